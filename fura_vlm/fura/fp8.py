"""FP8 in the backward pass: the product that carries a gradient through a frozen weight, ``grad W``.

The forward pass stays as it is, bit for bit. What FP8 there would swallow is the adapter's own change, which goes
through the same product; a gradient is noisy anyway, and is averaged over many rows.

Of ``y = W (x + D x)`` the backward pass needs ``grad W (rows, in)``: it makes of it the gradient of x and that of D. So
the rounding reaches the gradients of a layer's own R and S as well as those of all layers before it. For an adapter of
the output side, ``y = W x + D (W x)``, the gradient of D does not go through W and is exact.

Both factors are in e4m3, three bits of mantissa. Sums run over ``out``, so each row of grad and each column of W has a
scale of its own, which brings its largest number to the largest of the format. The scale makes up for e4m3's short
range: below that number it has 14 powers of two in full precision and three more, and what is smaller has next to no
part in the sum. e5m2, which is the usual choice for gradients under one scale for all, would round twice as coarsely.

The weight is quantised once, which takes one byte more for each of its numbers: ``torch._scaled_mm`` wants its second
factor by columns, so that this copy is ``(in, out)`` in memory and cannot take the weight's place.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
MULTIPLE = 16  # of both sides of a weight, as cuBLAS wants them
CAPABILITY = (8, 9)  # of the first GPUs with products of FP8


def missing() -> str | None:
    """Why products of FP8 cannot be computed in this process, as a clause of a sentence; None if they can, as on a
    CPU, where they are slow."""
    if not torch.cuda.is_available():
        return None
    return unfit(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.version.hip is not None)


def unfit(name: str, capability: tuple[int, int], amd: bool) -> str | None:
    """Why a GPU of this name and compute capability cannot, likewise. AMD's have another format of the same name."""
    if not amd and capability >= CAPABILITY:
        return None
    has = "is AMD's" if amd else f"has {capability[0]}.{capability[1]}"
    return f"it takes an NVIDIA GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or more, and {name} {has}"


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x (m, n)`` as ``q * scale``: q ``(m, n)`` in e4m3, contiguous, and scale ``(m, 1)`` float32.

    A row of zeros has the smallest scale, and one with NaN or Inf becomes NaN.
    """
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True, dtype=torch.float32)
    scale = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    # The largest quotient may be 448 and a rounding more, which the cast takes for 448.
    return (x / scale).to(FORMAT).contiguous(), scale


@torch.inference_mode(False)
@torch.no_grad()
def quantised_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight (out, in)``, any floating dtype, as ``product`` takes it: ``(in, out)`` in e4m3 and ``(in, 1)``."""
    return quantised(weight.detach().T)


def product(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``grad W``, like grad, rounded to bfloat16.

    Args:
        grad: ``(..., out)``, any floating dtype.
        weight, scale: as ``quantised_weight`` makes them.

    Returns: ``(..., in)``.
    """
    rows, row_scale = quantised(grad.reshape(-1, grad.shape[-1]))
    # Hopper's fast form of the sum has fewer bits than float32, and more than the factors. torchao takes it for scales
    # by row, too: PyTorch's other kernel for them is slow.
    made = torch._scaled_mm(
        rows, weight.T, scale_a=row_scale, scale_b=scale.T, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return made.to(grad.dtype).unflatten(0, grad.shape[:-1])


class Linear(torch.autograd.Function):
    """``torch.nn.functional.linear`` over a frozen weight and bias, with ``product`` in its backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, copy, scale):
        ctx.save_for_backward(copy, scale)
        ctx.dtype = x.dtype
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return product(grad, *ctx.saved_tensors).to(ctx.dtype), None, None, None, None
