"""The configurations of what is done to models. Light: the command line reads them before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class AssembleConfig:
    """Make a LLaVA in transformers' form from Vicuna, CLIP and LLaVA's projector.

    Args:
        output_dir: the folder to write; it must not exist yet.
        mm_projector: the file ``mm_projector.bin`` that LLaVA publishes.
        language_model: a folder or a name on the hub.
        vision_tower: a folder or a name on the hub; of a whole CLIP the vision tower is taken.
        dtype: in which the weights are written.
    """

    output_dir: str
    mm_projector: str
    language_model: str = "lmsys/vicuna-7b-v1.5"
    vision_tower: str = "openai/clip-vit-large-patch14-336"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


@dataclass
class MergeConfig:
    """Merge an adapter into its base: the result is a plain LLaVA that needs none of this project's code.

    Args:
        model: a run folder or an adapter.
        output_dir: the folder to write; it must not exist yet.
    """

    model: str
    output_dir: str


@dataclass
class InspectConfig:
    """Show the spectra that a FuRA adapter starts from: condition numbers, guarded directions.

    Args:
        model: a run folder or an adapter.
        output_path: where to draw them (png, svg or pdf); by default ``spectrum.png`` beside the adapter.
    """

    model: str
    output_path: str | None = None
