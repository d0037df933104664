"""LLaVA-NeXT (LLaVA 1.6): the picture as a whole and in tiles, each row of tiles closed by a learnt vector."""

from __future__ import annotations

from fura_vlm.families.base import Family


class LlavaNext(Family):
    """LLaVA-NeXT, with the conversation of its language model."""

    model_types = ("llava_next",)
    projector_names = ("multi_modal_projector",)
