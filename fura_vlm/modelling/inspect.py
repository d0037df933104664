"""The spectra behind an adapter: ``fura-vlm inspect``."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from fura_vlm.errors import ModelError
from fura_vlm.files import whole_file
from fura_vlm.fura.inspect import SPECTRUM_HEAD, plot_spectrum, spectrum_report, spectrum_rows, worst_first
from fura_vlm.fura.update import UPDATE_HEAD, update_report, update_rows
from fura_vlm.modelling.config import InspectConfig
from fura_vlm.modelling.load import load_any
from fura_vlm.tables import Table, show


def inspect(config: InspectConfig) -> None:
    """Prints the spectra behind a FuRA adapter as a table, the worst layers first, and draws them.

    Raises:
        ModelError: if ``model`` has no FuRA adapter, ``output_path`` is of another format than png, svg or pdf, or a
            rank is no number above 0.
    """
    if any(rank < 1 for rank in config.lora_ranks):
        raise ModelError(f"lora_ranks is {config.lora_ranks}: give numbers above 0, such as [16,128]")
    picture = Path(config.output_path or Path(config.model) / "spectrum.png")
    if picture.suffix not in (".png", ".svg", ".pdf"):
        raise ModelError(f"{picture} has another format: --output_path must end in .png, .svg or .pdf")
    model, _ = load_any(config.model)
    if not isinstance(model, PeftModel) or model.peft_config["default"].peft_type != "FURA":
        raise ModelError(f"{config.model} has no FuRA adapter: there is nothing to inspect")
    spectra = spectrum_report(model)
    first = (
        "Layers by the condition number of their worst block, the largest first. Guarded: directions below the floor."
    )
    with whole_file(picture) as building:
        plot_spectrum(spectra, building, picture.suffix.removeprefix("."))
    show([first, Table(SPECTRUM_HEAD, spectrum_rows(worst_first(spectra))), f"Drawn in {picture}"])
    if config.lora_ranks:
        words = (
            "The adapter as a LoRA: the error of the nearest update of each rank, relative to the update, in the "
            "Frobenius norm."
        )
        show([words, Table(UPDATE_HEAD, update_rows(update_report(model), config.lora_ranks))])
