"""The families of models: a small file for each, and ``base`` for what they have in common."""

from __future__ import annotations

from fura_vlm.families.base import Encoded, EncodingError, Family, FamilyError, Parts, Patches, Rendered
from fura_vlm.families.gemma3 import Gemma3
from fura_vlm.families.internvl import InternVL
from fura_vlm.families.llava import Llava
from fura_vlm.families.llava_next import LlavaNext
from fura_vlm.families.messages import Message, Part, Picture, Text
from fura_vlm.families.qwen_vl import QwenVL
from fura_vlm.families.smolvlm import SmolVLM
from fura_vlm.families.text import Language

FAMILIES: tuple[type[Family], ...] = (Llava, LlavaNext, QwenVL, SmolVLM, Gemma3, InternVL)

__all__ = [
    "FAMILIES",
    "Encoded",
    "EncodingError",
    "Family",
    "FamilyError",
    "Gemma3",
    "InternVL",
    "Language",
    "Llava",
    "LlavaNext",
    "Message",
    "Part",
    "Parts",
    "Patches",
    "Picture",
    "QwenVL",
    "Rendered",
    "SmolVLM",
    "Text",
    "family_class",
]


def family_class(config) -> type[Family]:
    """The family of a model's configuration; the general one for a kind that has no file of its own."""
    return next((family for family in FAMILIES if config.model_type in family.model_types), Family)
