"""SmolVLM (arXiv 2504.05299) and Idefics3: a large picture is cut into tiles, each told by its row and column."""

from __future__ import annotations

from fura_vlm.families.base import Family, Patches


class SmolVLM(Family):
    """SmolVLM, SmolVLM2, Idefics3."""

    model_types = ("smolvlm", "idefics3")
    projector_names = ("connector",)
    bare_head = True

    def patches(self) -> Patches:
        vision = self.config.vision_config
        return Patches(self.config.scale_factor**2, (vision.image_size // vision.patch_size) ** 2)
