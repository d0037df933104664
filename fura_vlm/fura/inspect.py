"""The spectrum that an adapter starts from: condition numbers, guarded directions, a table and a picture."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from fura_vlm.fura.basis import decompose, relative_floor
from fura_vlm.fura.errors import FuraError
from fura_vlm.fura.layer import FuraLayer
from fura_vlm.fura.weights import gathered


@dataclass
class Spectrum:
    """Singular values of one adapted weight, block by block, before any of them is raised to the floor.

    Attributes:
        module: name of the module.
        side: ``"input"`` or ``"output"``, the axis that was cut.
        block_size: ``b``.
        values: ``(N, r)``, float64, descending along the last axis.
        floor: fraction of a block's largest value below which a value is guarded.
    """

    module: str
    side: str
    block_size: int
    values: torch.Tensor
    floor: float

    @property
    def condition(self) -> torch.Tensor:
        """Largest over smallest singular value of each block: ``(N,)``; inf if rank-deficient."""
        return torch.where(self.values[:, -1] > 0, self.values[:, 0] / self.values[:, -1], torch.inf)

    @property
    def guarded(self) -> int:
        """How many directions are guarded: below the floor, or zero."""
        return int(((self.values < self.floor * self.values[:, :1]) | (self.values == 0)).sum())


@torch.no_grad()
def spectrum_report(model: nn.Module, adapter_name: str = "default") -> list[Spectrum]:
    """Singular values of the base weight behind each layer of an adapter, computed anew from the weights.

    Args:
        model: a model with FuRA adapters, not merged.
        adapter_name: which adapter; its blocks and floor are taken.

    Raises:
        FuraError: the model has no such adapter, or it is merged.
    """
    layers = [m for m in model.modules() if isinstance(m, FuraLayer) and adapter_name in m.fura_adapters]
    if not layers:
        raise FuraError(f"spectrum_report: the model has no FuRA adapter {adapter_name!r}.")
    if any(layer.merged for layer in layers):
        raise FuraError("spectrum_report: an adapter is merged into the base; call unmerge_adapter() first.")
    config = model.peft_config[adapter_name]
    report = []
    for layer in layers:
        adapter = layer.fura_adapters[adapter_name]
        side, (N, b) = adapter.side, adapter.blocks
        with gathered(layer.get_base_layer()):
            weight = layer.get_base_weight()
            _, values = decompose(weight if side == "input" else weight.T, N)
        floor = relative_floor(config.singular_floor, weight.dtype)
        report.append(Spectrum(layer.module_name, side, b, values.cpu(), floor))
    return report


SPECTRUM_HEAD = ["layer", "blocks", "largest s", "smallest s", "condition, median", "worst", "guarded"]


def worst_first(report: list[Spectrum]) -> list[Spectrum]:
    """The report with the layers first whose worst block has the largest condition number; of equals, those with the
    larger share of guarded directions."""
    return sorted(report, key=lambda entry: (-float(entry.condition.max()), -entry.guarded / entry.values.numel()))


def spectrum_rows(report: list[Spectrum]) -> list[list[str]]:
    """The cells below ``SPECTRUM_HEAD``: a row for each layer, in the report's order, and one for all of them."""
    rows = [
        [
            entry.module,
            f"{len(entry.values)} x {entry.block_size}",
            *_cells(entry.values, entry.condition, entry.guarded),
        ]
        for entry in report
    ]
    values = torch.cat([entry.values.flatten() for entry in report])
    conditions = torch.cat([entry.condition for entry in report])
    guarded = sum(entry.guarded for entry in report)
    return [*rows, [f"all {len(report)}", f"{len(conditions)}", *_cells(values, conditions, guarded)]]


def _cells(values: torch.Tensor, condition: torch.Tensor, guarded: int) -> list[str]:
    numbers = (values.max(), values.min(), condition.median(), condition.max())
    return [*(f"{number:.3g}" for number in numbers), f"{guarded} of {values.numel()}"]


def spectrum_table(report: list[Spectrum]) -> str:
    """The report as a Markdown table, one line for each layer and one for all of them."""
    lines = [SPECTRUM_HEAD, ["---"] * len(SPECTRUM_HEAD), *spectrum_rows(report)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot_spectrum(report: list[Spectrum], path: str | os.PathLike, picture_format: str | None = None) -> None:
    """Draw the report: condition numbers along the layers, and the shape of the spectra, one colour per kind
    of layer. Guarded directions are counted in the legend and the title.

    Args:
        path: the picture to write.
        picture_format: ``"png"``, ``"svg"`` or ``"pdf"``; None: what the path's suffix names.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, MaxNLocator

    kinds: dict[str, list[Spectrum]] = {}
    for entry in report:
        kinds.setdefault(entry.module.rpartition(".")[2], []).append(entry)
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    by_layer, by_index = figure.subplots(1, 2)
    smallest = 1.0
    for i, (kind, entries) in enumerate(kinds.items()):
        color = f"C{i % 10}"
        entries = sorted(entries, key=_layer_number)
        where = [_layer_number(entry) for entry in entries]
        guarded = sum(entry.guarded for entry in entries)
        by_layer.plot(
            where, [entry.condition.median() for entry in entries], color=color, marker="o", markersize=3,
            label=f"{kind}, {guarded:,} guarded" if guarded else kind,
        )  # fmt: skip
        worst = [entry.condition.max() for entry in entries]
        by_layer.plot(where, worst, color=color, linestyle=":", marker="x", markersize=4)
        for entry in entries:
            scaled = (entry.values / entry.values[:, :1].clamp(min=torch.finfo(torch.float64).tiny)).mean(0)
            smallest = min([smallest, *scaled[scaled > 0].tolist()])
            by_index.plot(torch.linspace(0, 1, len(scaled)), scaled, color=color, alpha=0.5, linewidth=1)
    floor = max(entry.floor for entry in report)
    note = f"floor {floor:.1e}"
    if floor > smallest / 30:  # else it would squeeze the curves
        by_index.axhline(floor, color="black", linestyle="--", linewidth=1)
        note += ", dashed"
    total, guarded = sum(entry.values.numel() for entry in report), sum(entry.guarded for entry in report)
    by_layer.set(
        yscale="log",
        xlabel="layer (-1: outside the stack)" if any(_layer_number(entry) < 0 for entry in report) else "layer",
        ylabel="condition number of a block",
        title="conditioning: median block (o), worst block (x)",
    )
    by_layer.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_index.set(
        yscale="log",
        xlabel="place in the spectrum, from largest to smallest",
        ylabel="s / largest s, mean over a layer's blocks",
        title=f"singular values: {guarded:,} of {total:,} guarded ({note})",
    )
    for axes in (by_layer, by_index):
        for which in ("major", "minor"):
            getattr(axes.yaxis, f"set_{which}_formatter")(LogFormatter(minor_thresholds=(2, 0.5)))
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120, format=picture_format)


def _layer_number(entry: Spectrum) -> int:
    """The number in a module's name, such as 3 in ``model.layers.3.self_attn.q_proj``; -1 if it has none."""
    return next((int(part) for part in entry.module.split(".") if part.isdigit()), -1)
