"""The configuration of an evaluation. Light: the command line reads it before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EvalConfig:
    """Answer held-out questions and count exact matches.

    Args:
        model: a run folder, an adapter, or a LLaVA (a folder or a name on the hub).
        data_path: the questions, a JSON or JSONL file in the LLaVA format, one turn each.
        image_folder: where the image paths start; by default the folder of ``data_path``.
        output_path: where to write the answers as JSONL; by default nowhere.
        batch_size: questions answered at once.
        max_new_tokens: length limit of an answer.
    """

    model: str
    data_path: str = "data/embedded/eval.json"
    image_folder: str | None = None
    output_path: str | None = None
    batch_size: int = 32
    max_new_tokens: int = 16
