"""LLaVA-1.5-7B with random weights, for the benchmarks: its speed is that of the published one."""

from __future__ import annotations

import torch
from fura_vlm.training.plan import named_model
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from fura_vlm.families.llava import make_processor
from fura_vlm.modelling.load import load_processor


def random_llava(image_token_id: int) -> LlavaForConditionalGeneration:
    """In bfloat16, made on the GPU."""
    config = named_model("7b")
    config.image_token_id = image_token_id
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def processor_of_336(path: str) -> LlavaProcessor:
    """The tokenizer at ``path`` and pictures of LLaVA-1.5's size: 576 tokens each."""
    vision = named_model("7b").vision_config
    return make_processor(load_processor(path).tokenizer, vision.image_size, vision.patch_size)
