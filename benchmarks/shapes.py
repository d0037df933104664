"""LLaVA-1.5-7B with random weights, for the benchmarks: its speed is that of the published one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import LlavaForConditionalGeneration

from fura_vlm.families.llava import Llava, make_processor, named_config
from fura_vlm.modelling.load import load_family

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes per second, from NVIDIA's data sheets of the SXM forms


def reads_per_second(parameters: Iterable[torch.Tensor]) -> float | None:
    """How often the GPU at hand could read them from its memory; None for one that is not known, and without one."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    bandwidth = next((rate for card, rate in BANDWIDTH.items() if card in name), None)
    return bandwidth and bandwidth / sum(p.numel() * p.element_size() for p in parameters)


def random_llava(image_token_id: int) -> LlavaForConditionalGeneration:
    """In bfloat16, made on the GPU."""
    config = named_config("7b")
    config.image_token_id = image_token_id
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def family_of_336(path: str) -> Llava:
    """The tokenizer at ``path`` and pictures of LLaVA-1.5's size: 576 tokens each."""
    config = named_config("7b")
    vision = config.vision_config
    processor = make_processor(load_family(path).tokenizer, vision.image_size, vision.patch_size)
    config.image_token_id = processor.image_token_id
    return Llava(processor, config)
