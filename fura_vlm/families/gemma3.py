"""Gemma 3 (arXiv 2503.19786): 256 tokens a picture, which see one another in both directions."""

from __future__ import annotations

from fura_vlm.families.base import Family, Patches


class Gemma3(Family):
    """Gemma 3 with pictures. The placeholder is ``<start_of_image>``; the run between the two ends is of another."""

    model_types = ("gemma3",)
    projector_names = ("multi_modal_projector",)
    bare_head = True
    token_types = "token_type_ids"

    @property
    def run_token(self) -> str:
        return self.tokenizer.image_token

    @property
    def needs_sizes(self) -> bool:
        """Only crops of long pictures ("pan and scan") make a difference."""
        return bool(getattr(self.processor.image_processor, "do_pan_and_scan", False))

    def patches(self) -> Patches:
        vision = self.config.vision_config
        number = (vision.image_size // vision.patch_size) ** 2
        return Patches(number / self.config.mm_tokens_per_image, number)
