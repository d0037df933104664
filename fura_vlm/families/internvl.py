"""InternVL (arXiv 2504.10479), in transformers' form: a picture is cut into tiles of 256 tokens each."""

from __future__ import annotations

from fura_vlm.families.base import Family, Patches


class InternVL(Family):
    """InternVL 2.5 and 3."""

    model_types = ("internvl",)
    projector_names = ("multi_modal_projector",)
    bare_head = True

    def expansion(self, width: int, height: int) -> str:
        processor = self.processor
        tiles = processor.image_processor.get_number_of_image_patches(height, width)
        return (
            processor.start_image_token
            + self.run_token * (processor.image_seq_length * tiles)
            + processor.end_image_token
        )

    def patches(self) -> Patches:
        (height, width), (down, across) = self.config.vision_config.image_size, self.config.vision_config.patch_size
        together = (height // down) * (width // across) + 1  # with the class token
        return Patches(self.config.downsample_ratio**-2, together)
