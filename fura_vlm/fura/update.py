"""What an adapter adds to its base, as a LoRA of some rank would hold it.

FuRA's update ``W D`` (or ``D W``) has block matrices of full rank, so that it is no product of two thin matrices. The
nearest matrix of rank r, in the Frobenius norm, is what the r largest singular values make (Eckart and Young, 1936),
and PEFT's ``convert_to_lora`` takes just that: what is lost is known from the singular values alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fura_vlm.fura.errors import FuraError
from fura_vlm.fura.layer import FuraLayer
from fura_vlm.fura.weights import gathered


@dataclass
class Update:
    """The singular values of what an adapter adds to one weight.

    Attributes:
        module: name of the module.
        shape: of the weight, ``(out, in)``.
        values: ``(min(out, in),)``, float64, descending.
        trained: numbers that the adapter holds for it.
    """

    module: str
    shape: tuple[int, int]
    values: torch.Tensor
    trained: int

    def lost(self, rank: int) -> float:
        """The relative error of the nearest matrix of this rank, in the Frobenius norm; 0 of an update of zeros."""
        whole = float(self.values.square().sum())
        return (float(self.values[rank:].square().sum()) / whole) ** 0.5 if whole else 0.0


@torch.no_grad()
def update_report(model: nn.Module, adapter_name: str = "default") -> list[Update]:
    """The updates of all layers of a FuRA adapter. Each takes a decomposition of its whole weight: for a 4096 x 4096
    one, tens of seconds on a CPU.

    Raises:
        FuraError: the model has no such adapter, or it is merged.
    """
    layers = [m for m in model.modules() if isinstance(m, FuraLayer) and adapter_name in m.fura_adapters]
    if not layers:
        raise FuraError(f"update_report: the model has no FuRA adapter {adapter_name!r}.")
    report = []
    for layer in layers:
        with gathered(layer.get_base_layer()):
            update = layer.get_delta_weight(adapter_name)
        adapter = layer.fura_adapters[adapter_name]
        trained = sum(part.numel() for part in (adapter.dR, adapter.ds, adapter.D) if part is not None)
        values = torch.linalg.svdvals(update.double())
        report.append(Update(layer.module_name, tuple(update.shape), values.cpu(), trained))
    return report


UPDATE_HEAD = ["rank", "lost, all layers", "median layer", "worst layer", "LoRA's numbers", "of the adapter's"]


def update_rows(report: list[Update], ranks: Sequence[int]) -> list[list[str]]:
    """The cells below ``UPDATE_HEAD``, a row for each rank. What is lost of all layers is the error of all updates
    together; a LoRA of rank r holds ``r (in + out)`` numbers for each weight."""
    rows = []
    whole = sum(float(each.values.square().sum()) for each in report)
    trained = sum(each.trained for each in report)
    for rank in ranks:
        lost = torch.tensor([each.lost(rank) for each in report])
        left = sum(float(each.values[rank:].square().sum()) for each in report)
        worst = report[int(lost.argmax())]
        numbers = sum(min(rank, *each.shape) * sum(each.shape) for each in report)
        rows.append(
            [
                str(rank),
                f"{(left / whole) ** 0.5 if whole else 0.0:.1%}",
                f"{lost.median():.1%}",
                f"{lost.max():.1%} ({worst.module})",
                f"{numbers:,}",
                f"{numbers / trained:.2f}" if trained else "",
            ]
        )
    return rows
