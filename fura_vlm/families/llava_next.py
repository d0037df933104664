"""LLaVA-NeXT (LLaVA 1.6): the picture as a whole and in tiles, each row of tiles closed by a learnt vector."""

from __future__ import annotations

from fura_vlm.families.base import Family, Patches


class LlavaNext(Family):
    """LLaVA-NeXT, with the conversation of its language model."""

    model_types = ("llava_next",)
    projector_names = ("multi_modal_projector",)
    bare_head = True

    def patches(self) -> Patches:
        """As LLaVA's: the vectors at the ends of rows are about as many as the class tokens."""
        vision = self.config.vision_config
        return Patches(1.0, (vision.image_size // vision.patch_size) ** 2 + 1)
