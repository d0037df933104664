"""The spectral basis of a weight and the block-diagonal map FuRA makes of it: functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch.nn.functional import linear

from fura_vlm.fura import kernels
from fura_vlm.fura.errors import FuraError

# Memory for the float64 copies that one step of the decomposition may make, unless a single block needs more.
CHUNK_BYTES = 256 * 2**20

# Up to this size a matrix is decomposed faster by one CPU core than by all of them, or by a GPU.
SMALL_MATRIX = 256

# A block this many times larger than that of a square cut (b = sqrt(n)) is refused unless asked for by name:
# it costs that many times more trainable parameters than the method is known for, n ** 1.5.
MAX_BLOCK_RATIO = 8

# Of a block's mean singular value: what smaller ones count as where dR is scaled by a power of them.
LEAST_SCALED = 1e-2

# Below this fraction of the largest, a singular value is lost in the rounding of the float64 Gram matrix.
GRAM_RESOLUTION = 1e-7


def factor_pair(n: int) -> tuple[int, int]:
    """The factor pair ``(N, b)`` of ``n`` closest to a square, ``N <= b``: ``11008 = 86 * 128``."""
    blocks = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    return blocks, n // blocks


def block_shape(n: int, num_blocks: int | None, block_size: int | None, module: str) -> tuple[int, int]:
    """Number and size of the blocks, ``(N, b)``, into which an axis of length ``n`` is cut.

    Raises:
        FuraError: ``n`` cannot be cut as asked; or, nothing being asked, ``n`` is prime or so lopsided that
            its closest factor pair has a block more than ``MAX_BLOCK_RATIO`` times ``sqrt(n)``. A small
            prime, which makes a single small block, passes.
    """
    for what, wanted in (("block_size", block_size), ("num_blocks", num_blocks)):
        if wanted is not None and n % wanted:
            raise FuraError(f"{module}: {what}={wanted} does not divide its dimension {n}; choose a divisor.")
    if block_size is not None:
        return n // block_size, block_size
    if num_blocks is not None:
        return num_blocks, n // num_blocks
    blocks, size = factor_pair(n)
    if size > MAX_BLOCK_RATIO * math.sqrt(n):
        raise FuraError(
            f"{module}: its dimension {n} can only be cut into {blocks} blocks of {size}, which trains "
            f"{n * size:,} parameters; accept that with block_size_pattern={{{module!r}: {size}}}, or leave "
            "the module out with exclude_modules."
        )
    return blocks, size


@torch.no_grad()
def decompose(weight: torch.Tensor, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular vectors and values of the column blocks of a weight, without an SVD of any block.

    Each block ``W_j (out, b)`` contributes the eigenvectors of its Gram matrix ``W_j^T W_j (b, b)``, in
    float64 and batched; at most about ``CHUNK_BYTES`` of float64 copies are alive at a time (or one block's).
    The Gram squares the condition number: in float64, singular values below about 1e-8 of their block's
    largest are noise, and those above are good to about ``1e-16 * (s_max / s) ** 2`` relative. Neither moves
    the starting point, which is the base model exactly whatever the basis, nor the space of reachable
    weights, since V stays orthonormal.

    The sign of each vector is chosen so that its largest component is positive. Nothing the method computes
    depends on that choice, nor on the rotation inside a space of equal singular values; it only makes two
    machines agree more often on the stored numbers.

    Args:
        weight: ``(out, n)``, any floating dtype, on any device that has float64; its columns are cut.
        num_blocks: ``N``, a divisor of ``n``.

    Returns: V ``(N, b, r)``, orthonormal columns, and s ``(N, r)``, descending, ``r = min(out, b)``; both in
        float64 on the weight's device.
    """
    out, n = weight.shape
    size = n // num_blocks
    rank = min(out, size)
    V = weight.new_empty(num_blocks, size, rank, dtype=torch.float64)
    s = weight.new_empty(num_blocks, rank, dtype=torch.float64)
    step = max(1, CHUNK_BYTES // (8 * size * (out + 4 * size)))
    for start in range(0, num_blocks, step):
        stop = min(start + step, num_blocks)
        columns = weight[:, start * size : stop * size].to(torch.float64)
        blocks = columns.reshape(out, stop - start, size).transpose(0, 1)
        values, vectors = _eigh(blocks.mT @ blocks)
        V[start:stop] = vectors[..., -rank:].flip(-1)
        s[start:stop] = values[..., -rank:].flip(-1).clamp(min=0).sqrt()
    largest = V.gather(1, V.abs().argmax(dim=1, keepdim=True))
    V *= torch.where(largest < 0, -1.0, 1.0)
    return V, s


@torch.no_grad()
def columns_by_norm(weight: torch.Tensor, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """In the place of ``decompose``, the basis without singular vectors: the block's columns, longest first.

    Args:
        weight: ``(out, n)``; its columns are cut.
        num_blocks: ``N``, a divisor of ``n``.

    Returns: V ``(N, b, r)``, columns of the unit matrix, and s ``(N, r)``, the norms of the block's columns in
        descending order, ``r = min(out, b)``; both in float64 on the weight's device.
    """
    norms = weight.to(torch.float64).norm(dim=0).unflatten(0, (num_blocks, -1))
    s, order = norms.sort(descending=True, stable=True)
    rank = min(len(weight), s.shape[-1])
    V = torch.nn.functional.one_hot(order[:, :rank], s.shape[-1]).mT.to(torch.float64)
    return V.contiguous(), s[:, :rank].contiguous()


def _eigh(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch.linalg.eigh`` of a batch ``(N, b, b)``. Small matrices are spread over the CPU's cores, one each.

    The libraries take one matrix after the other and have several threads, or a GPU, wait on a matrix too small for
    them: one thread alone is faster, and threads with a matrix each are as many times faster again. Each matrix is
    solved by one thread, so that the result does not depend on their number.
    """
    if matrices.shape[-1] > SMALL_MATRIX:
        return torch.linalg.eigh(matrices)
    threads = torch.get_num_threads()

    def solve(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch.set_num_threads(1)
        return torch.linalg.eigh(part)

    try:
        with ThreadPoolExecutor(threads) as pool:
            solved = list(pool.map(solve, matrices.cpu().split(8)))
    finally:
        torch.set_num_threads(threads)
    values, vectors = (torch.cat(part).to(matrices.device) for part in zip(*solved, strict=True))
    return values, vectors


def relative_floor(wanted: float | None, dtype: torch.dtype) -> float:
    """The fraction of a block's largest singular value below which the method does not divide by one.

    ``wanted``, or else the resolution of the weight's dtype, below which a direction is rounding error of the
    stored weight; in any case no less than what the Gram matrix resolves in a wide dtype.
    """
    return wanted if wanted is not None else max(torch.finfo(dtype).eps, GRAM_RESOLUTION)


def raise_to_floor(s: torch.Tensor, floor: float) -> tuple[torch.Tensor, int]:
    """Singular values ``(N, r)`` fit to divide by, and how many had to be raised.

    None is left below ``floor`` times its block's largest. Along a raised direction training moves the weight
    less than its singular value suggests, by the factor raised; a block of zeros, whose every change is zero,
    gets 1.
    """
    lowest = floor * s[:, :1]
    raised = int(((s < lowest) | (s == 0)).sum())
    return torch.where(s[:, :1] > 0, torch.maximum(s, lowest), 1.0), raised


def divisor_floor(resolution: torch.dtype | None) -> tuple[float, float]:
    """What ``block_delta`` divides by at least, where weights or inputs have this dtype: a fraction of the block's
    largest singular value, and a number. (0, 0) for float32 and wider, where the adapter's own floor is enough.

    A direction below it is rounding error in a weight of this dtype. Multiplied by ``ds / s`` it, and the rounding of
    ``x + D x``, would be louder than the whole rest of the row; divided by the floor they are, in relation to the rest,
    ``eps * ds / (eps * s_max)``: no more than the change that is meant.
    """
    if resolution is None or resolution.itemsize >= 4:
        return 0.0, 0.0
    info = torch.finfo(resolution)
    return info.eps, info.smallest_normal


def needs_floor(s0: torch.Tensor, resolution: torch.dtype) -> bool:
    """Whether ``divisor_floor`` raises any of the singular values ``s0 (N, r)``, each block's in descending order."""
    return not torch.equal(effective_values(s0, resolution), s0)


def effective_values(s0: torch.Tensor, resolution: torch.dtype | None) -> torch.Tensor:
    """The singular values that ``block_delta`` divides by: ``s0 (N, r)``, none below ``divisor_floor``."""
    fraction, least = divisor_floor(resolution)
    return s0 if not least else torch.maximum(s0, s0[:, :1] * fraction).clamp(min=least)


def row_scales(s0: torch.Tensor, power: float) -> torch.Tensor:
    """What multiplies the rows of dR in the form with a spectral power: ``(m / s0) ** power``, like ``s0 (N, r)``.

    ``m`` is the root mean square of a block's values. Values below ``LEAST_SCALED * m`` count as that large: along them
    the weight does next to nothing, however large dR is made.
    """
    mean = s0.square().mean(-1, keepdim=True).sqrt()
    return (mean / torch.maximum(s0, LEAST_SCALED * mean)) ** power


def block_delta(
    dR: torch.Tensor,
    ds: torch.Tensor | None,
    V: torch.Tensor,
    s0: torch.Tensor,
    resolution: torch.dtype | None = None,
) -> torch.Tensor:
    """The block matrices ``D`` of an adapter: the adapted block is ``W_j (I + D_j)``.

    **The formula stands in three places.** On a GPU ``_delta_kernel`` of ``kernels.py`` computes it, and
    ``_delta_backward_kernel`` there its gradients: change all three, or set ``FURA_KERNELS=0``, which has this one
    used everywhere. A test holds the kernels to this function and its gradients by autograd.

    With ``R = V^T + dR`` and ``s = s0 + ds``, ``W_j = U_j diag(s0) V^T`` becomes ``U_j diag(s) R``; and since
    ``U_j = W_j V diag(1 / s0)``, ``D_j = V [ e * (V^T + dR) + dR ]`` with ``e = ds / s0`` scaling rows.
    Exactly zero for ``dR = ds = 0``; the gradients are those of R and s.

    Args:
        dR: ``(N, r, b)``.
        ds: ``(N, r)``, or None for frozen singular values.
        V: ``(N, b, r)``.
        s0: ``(N, r)``, each block's in descending order.
        resolution: the coarser one of the dtypes that W and x have; in a 16-bit one no value below ``divisor_floor`` is
            divided by. None: float32 or wider.

    Returns:
        ``(N, b, b)`` in the widest of the arguments' dtypes, float32 at least; also under autocast.
    """
    dtype = torch.promote_types(torch.promote_types(V.dtype, dR.dtype), torch.float32)
    if dtype == torch.float32 and kernels.usable(dR, dR.shape[-1]):
        return kernels.Delta.apply(dR, ds, V, s0, *divisor_floor(resolution))
    V, rows = V.to(dtype), dR.to(dtype)
    if ds is not None:
        e = ds.to(dtype) / effective_values(s0.to(dtype), resolution)
        rows = e.unsqueeze(-1) * (V.mT + rows) + rows
    with without_autocast(V):
        return V @ rows


def computing_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a product of x with a weight is computed: x's, or autocast's."""
    on = not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype


def narrowed(D: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """D for products in ``dtype``: what is beyond float16's range becomes its largest number, and not Inf."""
    if dtype == torch.float16 and D.dtype != dtype:
        largest = torch.finfo(dtype).max
        D = D.clamp(-largest, largest)
    return D


def without_autocast(x: torch.Tensor):
    """Inside, products on x's device have the dtype of what they are made of."""
    on = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()


def apply_blocks(x: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
    """``blockdiag(D_1, ..., D_N) x`` of ``x (..., N * b)``, in x's dtype; ``D (N, b, b)``."""
    blocks = x.unflatten(-1, D.shape[:2])
    return torch.einsum("...nb,ncb->...nc", blocks, D.to(x.dtype)).flatten(-2)


def mix(x: torch.Tensor, Ds: list[torch.Tensor], up: torch.Tensor | None = None) -> torch.Tensor:
    """``x + sum_i D_i x``, like x; each ``D_i`` block-diagonal with blocks of its own size, ``(N, b, b)``.

    With ``up``, like x, it is ``silu(x) * up`` that is mixed; the kernels do not keep it for the backward pass.
    """
    if up is not None and len(Ds) == 1 and torch.is_grad_enabled() and kernels.usable(x, Ds[0].shape[-1]):
        return kernels.Mix.apply(x, up, Ds[0])
    mixed = x = kernels.gated(x, up)
    for D in Ds:
        if mixed is not x or not kernels.usable(x, D.shape[-1]):
            mixed = mixed + apply_blocks(x, D)
        elif torch.is_grad_enabled():
            mixed = kernels.Mix.apply(x, None, D)
        else:
            mixed = kernels.mix(x, D)
    return mixed


def fold_pays(
    x: torch.Tensor, weights: Sequence[torch.Tensor], D: torch.Tensor, up: torch.Tensor | None = None
) -> bool:
    """Whether ``(W + W D) x`` reads and writes less than ``W (x + D x)``, for all weights ``(out, in)`` together.

    Folding reads and writes each weight once. Mixing reads x ``(..., in)`` once and writes it once for each of them;
    but of ``silu(x) * up``, in training, the mixed one is written in the place of itself.
    """
    if up is not None and torch.is_grad_enabled() and kernels.gate_fits(x, D.shape[-1]):
        return False
    rows = x.numel() // x.shape[-1]
    return fits(x, weights, D.shape[-1]) and rows * (1 + len(weights)) > 2 * sum(len(weight) for weight in weights)


def fits(x: torch.Tensor, weights: Sequence[torch.Tensor], block_size: int) -> bool:
    """Whether the kernels take x, and x, weights and their product have one dtype."""
    return (
        kernels.usable(x, block_size)
        and all(weight.dtype == x.dtype for weight in weights)
        and computing_dtype(x) == x.dtype
    )


def folded_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, D: torch.Tensor, up: torch.Tensor | None = None
) -> torch.Tensor:
    """``(W + W D) x + bias``, which is ``W (x + D x) + bias``; no gradients for weight and bias.

    ``W + W D`` is rounded to the weight's dtype as ``x + D x`` would be to x's: neither is the more exact (see
    docs/speed.md).

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``, of x's dtype.
        bias: ``(out,)`` or None.
        D: ``(N, b, b)``.
        up: as for ``mix``.

    Returns: ``(..., out)``.
    """
    if torch.is_grad_enabled():
        return kernels.FoldedLinear.apply(x, up, weight, bias, D)
    return linear(kernels.gated(x, up), kernels.mix(weight, D.mT), bias)


def joint_takes(x: torch.Tensor, weights: Sequence[torch.Tensor], block_size: int) -> bool:
    """Whether the kernels take these Linears of the same x together, with blocks of this size."""
    return len(weights) in (2, 3) and kernels.joinable(x, block_size) and fits(x, weights, block_size)


def joint_linear(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], Ds: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """``[W (x + D x) + bias]`` for Linears that `joint_takes`, with one pass over x for all their gradients; no
    gradients for weights and biases.

    Args:
        x: ``(..., in)``.
        weights: each ``(out, in)``.
        biases: each ``(out,)`` or None.
        Ds: each ``(N, b, b)``.

    Returns: each ``(..., out)``.
    """
    folds = bool(fold_pays(x, weights, Ds[0]))
    return kernels.JointLinear.apply(x, folds, *weights, *biases, *Ds)


def multiply_columns(weight: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
    """``weight @ blockdiag(D_1, ..., D_N)``: ``weight (out, N * b)``, ``D (N, b, b)``, its dtype."""
    blocks = weight.unflatten(-1, D.shape[:2])
    with without_autocast(weight):
        return torch.einsum("onb,nbc->onc", blocks, D.to(weight.dtype)).flatten(-2)
