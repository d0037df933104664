"""Chat about one image in the terminal."""

from __future__ import annotations

import torch
from transformers import TextStreamer

from fura_vlm.chat.config import ChatConfig
from fura_vlm.chat.engine import ChatError, explain
from fura_vlm.chat.models import default_model
from fura_vlm.chat.prompt import Exchange, build_prompt, encode
from fura_vlm.data.images import load_image
from fura_vlm.modelling.load import load_any


def chat(config: ChatConfig) -> None:
    """Answers ``config.question``, or question after question until an empty line; tokens appear as they come.

    Ctrl-C ends an answer. A question that cannot be answered is forgotten, and the reason is printed.

    Raises:
        ChatError: if there is no picture, or if ``config.question`` cannot be answered.
        ImageError: if the picture cannot be used.
    """
    if config.image is None:
        raise ChatError("Name a picture to talk about, or open the chat in the browser with --web")
    if config.max_new_tokens < 1:
        raise ChatError("max_new_tokens must be at least 1")
    load_image(config.image)  # a bad one is said before the model is loaded
    model, processor = load_any(config.model or default_model())
    exchanges: list[Exchange] = []
    while question := config.question or _ask():
        exchanges.append(Exchange(question, None if exchanges else config.image))
        try:
            exchanges[-1].answer = _answer(exchanges, model, processor, config.max_new_tokens)
        except KeyboardInterrupt:
            print()
            exchanges.pop()
        except ChatError as error:
            if config.question:
                raise
            print(error)
            exchanges.pop()
        if config.question:
            return


@torch.inference_mode()
def _answer(exchanges: list[Exchange], model, processor, max_new_tokens: int) -> str:
    """Prints the answer to the last question while it is written, and returns it."""
    prompt = build_prompt(exchanges, processor, model.config.get_text_config().max_position_embeddings - max_new_tokens)
    if prompt.notice:
        print(prompt.notice)
    inputs = {name: value.to(model.device) for name, value in encode(prompt, processor).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        ids = model.generate(**inputs, streamer=streamer, do_sample=False, max_new_tokens=max_new_tokens)
    except Exception as error:
        raise ChatError(explain(error)) from error
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
