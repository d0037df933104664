"""The Vicuna v1 conversation as LLaVA v1.5 writes it (``preprocess_multimodal``, ``preprocess_v1``)::

    <s>A chat between ... questions. USER: <image>\\nWhat is this? ASSISTANT: A cat.</s>USER: Why? ...
                                                                             supervised

The pictures of a question stand at its front, each on a line of its own. Labels are on each answer and its ``</s>``.
The space before an answer is part of it, because a Llama token carries the space before its word: the prompt ends with
``ASSISTANT:`` and the first token that the model has to say is ``▁A``. The ``<s>`` is left to the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fura_vlm.families.base import EncodingError, Rendered
from fura_vlm.families.messages import Message

IMAGE = "<image>"

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

CHAT_TEMPLATE = Path(__file__).with_name("vicuna_v1.jinja").read_text(encoding="utf-8")
"""The same as a chat template of transformers, with the answers marked by ``{% generation %}``."""


def render(messages: Sequence[Message], eos: str = "</s>") -> Rendered:
    """The whole conversation.

    Raises:
        EncodingError: a system turn that is not the first, or a picture that is in no question.
    """
    if any(message.pictures for message in messages if message.role != "user"):
        raise EncodingError("a picture in an answer or a system turn: it belongs in a question")
    messages = list(messages)
    system = messages.pop(0).text if messages and messages[0].role == "system" else SYSTEM_PROMPT
    text, spans = system + " ", []
    for message in messages:
        if message.role == "user":
            text += f"USER: {_question(message)} "
        elif message.role == "assistant":
            text += "ASSISTANT:"
            answer = f" {message.text}{eos}"
            spans.append((len(text), len(text) + len(answer)))
            text += answer
        else:
            raise EncodingError("a system turn within the conversation: it belongs at the beginning")
    return Rendered(text, spans)


def prompt(messages: Sequence[Message], eos: str = "</s>") -> str:
    """What the model is given to answer the last question, up to ``ASSISTANT:``."""
    return render(messages, eos).text + "ASSISTANT:"


def render_plain(messages: Sequence[Message], eos: str = "</s>") -> Rendered:
    """The bare picture and its caption, as LLaVA v1.5 pretrains the projector (``preprocess_plain``)::

        <s><image>A cat on a sofa.\\n
                  supervised: the caption and its line break

    What was asked is dropped, and no ``</s>`` ends the caption. LLaVA tokenizes the caption by itself, so that its
    first word has the space that begins a text; here that space is written.

    Raises:
        EncodingError: if it is not one question about one picture, and its answer.
    """
    if [message.role for message in messages] != ["user", "assistant"]:
        raise EncodingError(f"it has {len(messages)} turns, and a plain conversation is a picture and its caption")
    pictures = len(messages[0].pictures)
    if not pictures and IMAGE not in messages[0].text:  # one that was typed is a picture to LLaVA; tokens stay text
        raise EncodingError("it has no image, and a plain conversation is a picture and its caption")
    if pictures > 1:
        raise EncodingError(f"it has {pictures} images, and a plain conversation is a picture and its caption")
    text = f"{IMAGE} {messages[1].text}\n"
    return Rendered(text, [(len(IMAGE), len(text))])


def _question(message: Message) -> str:
    if not message.pictures:
        return message.text
    return (f"{IMAGE}\n" * len(message.pictures) + message.text.strip()).strip()
