"""How a run changed the weights: by how much, and along which singular directions of the base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

BINS = 20  # of a spectrum, from the largest singular value to the smallest
TOP = 0.1  # of the directions
ROUNDS = 12  # of power iteration


def weights(model: nn.Module, base: nn.Module, names: list[str]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Of the named linear layers their name, the base's weight and what a training added to it: (out, in) float32.

    Args:
        model: the trained model, as it is or within PEFT; nothing in 4 bits.
        base: the model before, with the same names.
    """
    trained = model.get_base_model() if isinstance(model, PeftModel) else model
    for name in names:
        before, layer = base.get_submodule(name).weight.detach().float(), trained.get_submodule(name)
        if isinstance(layer, BaseTunerLayer) and not (getattr(layer, "use_dora", None) or {}).get("default"):
            yield name, before, layer.get_delta_weight("default").detach().float()
        elif isinstance(layer, BaseTunerLayer):  # DoRA has no delta: what it makes of unit vectors is its weight
            yield name, before, _effective(layer, before) - before
        else:
            yield name, before, layer.weight.detach().float() - before


def _effective(layer: nn.Module, like: torch.Tensor) -> torch.Tensor:
    unit, precision = torch.eye(like.shape[1], device=like.device), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would round the weight by more than it changed
    try:
        return (layer(unit) - layer(torch.zeros_like(unit[:1]))).T.detach().float()
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def sizes(model: nn.Module, base: nn.Module, names: list[str]) -> dict[str, float]:
    """The size of a change beside the weights that it changed, over all layers: ``frobenius``, the root of the sum of
    squares of the one by that of the other, and ``spectral``, the mean of each layer's largest singular values, one by
    the other."""
    changed = total = 0.0
    ratios = []
    for _, before, delta in weights(model, base, names):
        changed, total = changed + delta.double().square().sum(), total + before.double().square().sum()
        ratios.append(largest(delta) / largest(before))
    return {"frobenius": float((changed / total).sqrt()), "spectral": float(torch.stack(ratios).mean())}


def largest(matrix: torch.Tensor) -> torch.Tensor:
    """About the largest singular value, by power iteration from a fixed start."""
    vector = torch.ones(matrix.shape[1], device=matrix.device) + torch.arange(matrix.shape[1], device=matrix.device) % 7
    for _ in range(ROUNDS):
        vector = matrix.T @ (matrix @ vector)
        vector = vector / vector.norm().clamp(min=torch.finfo(vector.dtype).tiny)
    return (matrix @ vector).norm()


class Directions(NamedTuple):
    """The singular directions of a weight ``(out, in)``, ``W = U diag(s) V^T``, in float64 on the CPU.

    Args:
        U: (out, r), columns of length one.
        s: (r,), descending.
        Vh: (r, in), rows of length one.
    """

    U: torch.Tensor
    s: torch.Tensor
    Vh: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Directions:
        return cls(*torch.linalg.svd(weight.cpu().double(), full_matrices=False))


@torch.no_grad()
def spectrum(base: Directions, delta: torch.Tensor) -> dict[str, float | list[float]]:
    """A change ``(out, in)`` seen from the singular directions of the weight that it is added to.

    Returns: shares of the change's energy, the sum of its squares, and its ranks.
        left: along each of U, from the largest s to the smallest, summed into BINS equal bins.
        right: along each of V, likewise.
        squares: the share of the squares of s, which is that of a change ``W D`` with a random ``D`` along U.
        values: of each bin the mean of s beside the largest; bins may be empty where there are fewer values.
        top: within the span of the first TOP of both sides.
        outside: in no direction of U, of a weight with more rows than columns.
        rank: the effective rank, the exponential of the entropy of the shares of the change's squared singular values.
        stable: the stable rank, all of these by the largest.
    """
    U, s, Vh = base
    delta = delta.cpu().double()
    energy = delta.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    inside = U.T @ delta
    first = max(1, round(TOP * len(s)))
    narrow = delta if len(delta) <= delta.shape[1] else delta.T
    shares = torch.linalg.eigvalsh(narrow @ narrow.T).clamp(min=0) / energy
    return {
        "left": binned(inside.square().sum(1) / energy),
        "right": binned((delta @ Vh.T).square().sum(0) / energy),
        "squares": binned(s.square() / s.square().sum()),
        "values": [round(float(part.sum() / max(1, len(part)) / s[0]), 5) for part in s.tensor_split(BINS)],
        "top": float((inside[:first] @ Vh[:first].T).square().sum() / energy),
        "outside": float(1 - inside.square().sum() / energy),
        "rank": float(torch.exp(-(shares * shares.clamp(min=1e-300).log()).sum())),
        "stable": float(1 / shares.max().clamp(min=1e-300)),
    }


def binned(values: torch.Tensor) -> list[float]:
    return [round(float(part.sum()), 6) for part in values.tensor_split(BINS)]


def spectra(
    model: nn.Module, base: nn.Module, names: list[str], known: dict[str, Directions]
) -> dict[str, dict[str, float | list[float]]]:
    """``spectrum`` of each named layer.

    Args:
        known: by name the directions of the base's weights; those that are missing are added.
    """
    found = {}
    for name, before, delta in weights(model, base, names):
        if name not in known:
            known[name] = Directions.of(before)
        found[name] = spectrum(known[name], delta)
    return found
