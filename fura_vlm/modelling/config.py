"""The configuration of a merge. Light: the command line reads it before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class MergeConfig:
    """Merge an adapter into its base: the result is a plain LLaVA that needs none of this project's code.

    Args:
        model: a run folder or an adapter.
        output_dir: the folder to write; it must not exist yet.
    """

    model: str
    output_dir: str
