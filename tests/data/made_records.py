"""Records for tests, made without a file."""

from fura_vlm.data.messages import Record
from fura_vlm.families.messages import Message, Picture, Text


def llava_record(name: str, values, image: str | None = None) -> Record:
    """The record of questions and answers in turn; with an image, ``<image>`` says where it is."""
    messages = []
    for number, value in enumerate(values):
        parts = (Text(value),)
        if image and "<image>" in value:
            before, *after = value.split("<image>")
            parts = (Text(before), Picture(image), Text("".join(after)))
        messages.append(Message(("user", "assistant")[number % 2], tuple(part for part in parts if part[0])))
    return Record(name, tuple(messages), "m.json", f"record {name}")
