"""Which family a model belongs to."""

from __future__ import annotations

from transformers import AutoModelForCausalLM

from fura_vlm.families.base import Family, model_class
from fura_vlm.families.gemma3 import Gemma3
from fura_vlm.families.internvl import InternVL
from fura_vlm.families.llava import Llava
from fura_vlm.families.llava_next import LlavaNext
from fura_vlm.families.qwen_vl import QwenVL
from fura_vlm.families.smolvlm import SmolVLM
from fura_vlm.families.text import Language

FAMILIES: tuple[type[Family], ...] = (Llava, LlavaNext, QwenVL, SmolVLM, Gemma3, InternVL)


def family_class(config) -> type[Family]:
    """The family of a model's configuration; the general one for a kind that has no file of its own."""
    if model_class(config) is AutoModelForCausalLM:
        return Language
    return next((family for family in FAMILIES if config.model_type in family.model_types), Family)
