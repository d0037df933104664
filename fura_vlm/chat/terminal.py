"""Chat about one image in the terminal."""

from __future__ import annotations

import torch
from transformers import TextStreamer

from fura_vlm.chat.config import ChatConfig
from fura_vlm.chat.engine import ChatError
from fura_vlm.chat.models import default_model
from fura_vlm.chat.prompt import Exchange, build_prompt, encode
from fura_vlm.data.images import load_image
from fura_vlm.modelling.load import load_any


@torch.inference_mode()
def chat(config: ChatConfig) -> None:
    """Answers ``config.question``, or question after question until an empty line; tokens appear as they come."""
    if config.image is None:
        raise ChatError("Name a picture to talk about, or open the chat in the browser with --web")
    load_image(config.image)  # a bad one is said before the model is loaded
    model, processor = load_any(config.model or default_model())
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    room = model.config.get_text_config().max_position_embeddings - config.max_new_tokens
    exchanges: list[Exchange] = []
    while question := config.question or _ask():
        exchanges.append(Exchange(question, None if exchanges else config.image))
        prompt = build_prompt(exchanges, processor, room)
        if prompt.notice:
            print(prompt.notice)
        inputs = {name: value.to(model.device) for name, value in encode(prompt, processor).items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        generated = model.generate(**inputs, streamer=streamer, do_sample=False, max_new_tokens=config.max_new_tokens)
        answer = processor.tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        exchanges[-1].answer = answer.strip()
        if config.question:
            return


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
