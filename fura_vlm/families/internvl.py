"""InternVL (arXiv 2504.10479), in transformers' form: a picture is cut into tiles of 256 tokens each."""

from __future__ import annotations

from fura_vlm.families.base import Family


class InternVL(Family):
    """InternVL 2.5 and 3."""

    model_types = ("internvl",)
    projector_names = ("multi_modal_projector",)

    def expansion(self, width: int, height: int) -> str:
        processor = self.processor
        tiles = processor.image_processor.get_number_of_image_patches(height, width)
        return (
            processor.start_image_token
            + self.run_token * (processor.image_seq_length * tiles)
            + processor.end_image_token
        )
