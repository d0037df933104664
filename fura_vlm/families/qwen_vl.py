"""Qwen2-VL, Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL: pictures of their own size, 3-D positions (M-RoPE).

A picture of h x w patches takes h w / 4 tokens, but only max(h, w) / 2 positions: while an answer is written, the next
position lies before the token's place in the sequence.
"""

from __future__ import annotations

from fura_vlm.families.base import Family, Parts, Patches
from fura_vlm.families.windows import use_windows


class QwenVL(Family):
    """Qwen2-VL, 2.5 and 3, also with experts."""

    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    bare_head = True
    compiles_tower = False
    """Its attention splits the patches by picture and window, so each number of them would need another graph."""

    def expansion(self, width: int, height: int) -> str:
        images = self.processor.image_processor
        return self.run_token * (images.get_number_of_image_patches(height, width) // images.merge_size**2)

    def parts(self, model) -> Parts:
        """The projector is the last part of the tower, and of Qwen3-VL's one in front of each deep layer, too."""
        found = super().parts(model)
        deep = list(getattr(found.tower, "deepstack_merger_list", ()))
        return found._replace(projectors=[found.tower.merger, *deep])

    def prepare_tower(self, tower) -> None:
        use_windows(tower)

    def patches(self) -> Patches:
        """Qwen2.5-VL's attention is within windows in most layers; a whole picture is taken for one of 32 x 32."""
        vision = self.config.vision_config
        window = getattr(vision, "window_size", None)
        whole = len(vision.fullatt_block_indexes) / vision.depth if window else 1.0
        within = (window // vision.patch_size) ** 2 if window else 0
        return Patches(vision.spatial_merge_size**2, round(whole * 32**2 + (1 - whole) * within))
