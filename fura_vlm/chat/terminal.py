"""Chat about one image in the terminal."""

from __future__ import annotations

import torch
from transformers import TextStreamer

from fura_vlm.chat.config import ChatConfig
from fura_vlm.data.images import load_image
from fura_vlm.modelling.load import load_any


@torch.inference_mode()
def chat(config: ChatConfig) -> None:
    """Answers ``config.question``, or question after question until an empty line; tokens appear as they come."""
    image = load_image(config.image)
    model, processor = load_any(config.model)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    turns = []
    while True:
        question = config.question or _ask()
        if not question:
            return
        # The picture stands before the first question, as in training; typing <image> does not add another.
        text = {"type": "text", "text": question.replace(processor.image_token, "")}
        turns.append({"role": "user", "content": [text] if turns else [{"type": "image"}, text]})
        prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = processor(text=prompt, images=[image], return_tensors="pt").to(model.device, model.dtype)
        generated = model.generate(**inputs, streamer=streamer, do_sample=False, max_new_tokens=config.max_new_tokens)
        answer = processor.tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]})
        if config.question:
            return


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
