"""The configurations of merging and inspecting. Light: the command line reads them before torch is imported."""

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


@dataclass
class InspectConfig:
    """Show the spectra that a FuRA adapter starts from: condition numbers, guarded directions.

    Args:
        model: a run folder or an adapter.
        output_path: where to draw them (png, svg or pdf); by default ``spectrum.png`` beside the adapter.
    """

    model: str
    output_path: str | None = None
