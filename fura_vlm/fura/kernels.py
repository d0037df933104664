"""FuRA's own kernels for GPUs, in Triton: each reads and writes a large tensor once.

As plain operations ``x + D x`` reads or writes its tensor five times, and its backward seven. The matrix products
around it are so much faster than memory that these passes are what an adapter costs: see docs/speed.md for what was
measured.

The kernels take blocks of up to ``MAX_BLOCK`` (``NARROW_BLOCK`` in float32, where the plain products are faster beyond)
and any number of rows. Products are accumulated in float32, and what is written is rounded once. Triton comes with
PyTorch's builds for GPUs; without it, on a CPU and for larger blocks the plain operations of ``basis.py`` do the same.

The environment variable ``FURA_KERNELS=0`` has the plain operations used everywhere, also on a GPU. Set it to try a
change of the method: its formula stands in ``block_delta`` and ``apply_blocks`` of ``basis.py``, once more in
``_delta_kernel`` and the three ``_mix_kernel`` here, and its gradients, which autograd derives from the plain form, in
``_delta_backward_kernel`` and the three ``_mix_backward_kernel``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch
from torch.nn.functional import linear, silu

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of PyTorch for CPUs
    triton = None

logger = logging.getLogger(__name__)

NARROW_BLOCK = 128  # a tile of a larger block does not fit into the registers as a whole
MAX_BLOCK = 256
CHUNK, GATED_CHUNK = 64, 32  # columns of a larger block that a program has
JOINT_BLOCK = 64  # a program for up to three adapters has that many blocks, and their sums

ENABLED = os.environ.get("FURA_KERNELS") != "0"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own interpreter runs the kernels on the CPU


def _shared_memory() -> int:
    """Bytes that a program may use on the chip, of the machine's GPU that has the least. 0 where Triton cannot make
    kernels: it builds its launcher with the system's C compiler. AMD's GPUs lack a form of product that is used here.
    """
    if triton is None or torch.version.hip or not torch.cuda.is_available():
        return 0
    try:
        torch.cuda.init()  # Triton asks the driver itself, which answers nobody before
        properties = triton.runtime.driver.active.utils.get_device_properties
        return min(properties(device)["max_shared_mem"] for device in range(torch.cuda.device_count()))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("FuRA runs as plain operations, more slowly: Triton cannot build kernels here (%s).", reason)
        return 0


# once: the compiler takes them for constants
SHARED_MEMORY = _shared_memory()
MULTIPROCESSORS = [
    torch.cuda.get_device_properties(device).multi_processor_count
    for device in range(torch.cuda.device_count() if SHARED_MEMORY else 0)
]
# Hopper and the Blackwell of data centres multiply what is in shared memory. Others, and float32, multiply registers,
# spread so that a gate before the product would be computed five times over.
PRODUCTS_OF_SHARED_MEMORY = bool(MULTIPROCESSORS) and all(
    torch.cuda.get_device_capability(device)[0] in (9, 10) for device in range(len(MULTIPROCESSORS))
)


def usable(x: torch.Tensor, block_size: int) -> bool:
    """Whether the kernels take this tensor."""
    return (
        ENABLED
        and (INTERPRETED or SHARED_MEMORY >= 96 * 1024 and x.is_cuda)  # which a block of 128 takes
        and triton is not None
        and block_size <= (MAX_BLOCK if x.dtype.itemsize == 2 or INTERPRETED else NARROW_BLOCK)
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    )


if triton is not None:

    @triton.jit
    def _mix_kernel(
        x, up, D, out, rows, width, tiles, D_block, D_row, D_column,
        b: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """A program: one block of columns of ``tiles`` times TILE rows."""
        block, share = tl.program_id(0), tl.program_id(1)
        c = tl.arange(0, B)
        square = (c[:, None] < b) & (c[None, :] < b)
        transposed = tl.load(D + block * D_block + c[None, :] * D_row + c[:, None] * D_column, mask=square, other=0.0)
        transposed = transposed.to(x.dtype.element_ty)
        for tile in range(tiles):
            row = ((share * tiles + tile) * TILE + tl.arange(0, TILE)).to(tl.int64)
            inside = (row[:, None] < rows) & (c[None, :] < b)
            place = row[:, None] * width + block * b + c[None, :]
            values = tl.load(x + place, mask=inside, other=0.0)
            if GATED:
                gate, factor = values.to(tl.float32), tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
                sigmoid = tl.fdiv(1.0, 1.0 + tl.exp2(gate * -1.4426950408889634))  # the factor is log2(e)
                values = (gate * sigmoid * factor).to(x.dtype.element_ty)
            mixed = values.to(tl.float32) + tl.dot(values, transposed, input_precision=PRECISION)
            tl.store(out + place, mixed.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _mix_backward_kernel(
        x, up, D, grad, out, out_up, partial, rows, width, blocks, tiles, D_block, D_row, D_column,
        b: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """A program: one block of columns of ``tiles`` times TILE rows."""
        block, share = tl.program_id(0), tl.program_id(1)
        c = tl.arange(0, B)
        square = (c[:, None] < b) & (c[None, :] < b)
        mixing = tl.load(D + block * D_block + c[:, None] * D_row + c[None, :] * D_column, mask=square, other=0.0)
        mixing = mixing.to(x.dtype.element_ty)
        total = tl.zeros((B, B), dtype=tl.float32)
        for tile in range(tiles):
            row = ((share * tiles + tile) * TILE + tl.arange(0, TILE)).to(tl.int64)
            inside = (row[:, None] < rows) & (c[None, :] < b)
            place = row[:, None] * width + block * b + c[None, :]
            values = tl.load(x + place, mask=inside, other=0.0)
            g = tl.load(grad + place, mask=inside, other=0.0)
            back = g.to(tl.float32) + tl.dot(g, mixing, input_precision=PRECISION)
            if GATED:
                # Adding nothing of `back` keeps what follows in its layout: else it would be computed twice, once in
                # that of the loads, which takes a third longer.
                gate = tl.fma(back, 0.0, values.to(tl.float32))
                factor = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
                sigmoid = tl.fdiv(1.0, 1.0 + tl.exp2(gate * -1.4426950408889634))
                passed = gate * sigmoid
                back *= sigmoid
                tl.store(out_up + place, (back * gate).to(out.dtype.element_ty), mask=inside)
                back *= factor * (1 + gate - passed)
                values = (passed * factor).to(x.dtype.element_ty)
            tl.store(out + place, back.to(out.dtype.element_ty), mask=inside)
            total = tl.dot(tl.trans(g), values, total, input_precision=PRECISION)
        place = (share * blocks + block) * b * b + c[:, None] * b + c[None, :]
        tl.store(partial + place, total, mask=square)

    @triton.jit
    def _wide_mix_kernel(
        x, D, out, rows, width, tiles, chunks, D_block, D_row, D_column,
        b: tl.constexpr, B: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """``_mix_kernel`` for a block that is cut into ``chunks`` of C columns of the result, one for a program."""
        block, share, k = tl.program_id(0) // chunks, tl.program_id(1), tl.arange(0, B)
        c = tl.program_id(0) % chunks * C + tl.arange(0, C)
        tall = (k[:, None] < b) & (c[None, :] < b)
        transposed = tl.load(D + block * D_block + c[None, :] * D_row + k[:, None] * D_column, mask=tall, other=0.0)
        transposed = transposed.to(x.dtype.element_ty)
        for tile in range(tiles):
            row = ((share * tiles + tile) * TILE + tl.arange(0, TILE)).to(tl.int64)
            start, inside = row[:, None] * width + block * b, (row[:, None] < rows) & (c[None, :] < b)
            values = tl.load(x + start + k[None, :], mask=(row[:, None] < rows) & (k[None, :] < b), other=0.0)
            mixed = tl.load(x + start + c[None, :], mask=inside, other=0.0).to(tl.float32)
            mixed += tl.dot(values, transposed, input_precision=PRECISION)
            tl.store(out + start + c[None, :], mixed.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _wide_mix_backward_kernel(
        x, up, D, grad, out, out_up, partial, rows, width, blocks, tiles, chunks, D_block, D_row, D_column,
        b: tl.constexpr, B: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, GATED: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """``_mix_backward_kernel`` for a block that is cut into ``chunks`` of C columns, one for a program."""
        block, share, k = tl.program_id(0) // chunks, tl.program_id(1), tl.arange(0, B)
        c = tl.program_id(0) % chunks * C + tl.arange(0, C)
        tall = (k[:, None] < b) & (c[None, :] < b)
        mixing = tl.load(D + block * D_block + k[:, None] * D_row + c[None, :] * D_column, mask=tall, other=0.0)
        mixing = mixing.to(x.dtype.element_ty)
        total = tl.zeros((B, C), dtype=tl.float32)
        for tile in range(tiles):
            row = ((share * tiles + tile) * TILE + tl.arange(0, TILE)).to(tl.int64)
            start, inside = row[:, None] * width + block * b, (row[:, None] < rows) & (c[None, :] < b)
            g = tl.load(grad + start + k[None, :], mask=(row[:, None] < rows) & (k[None, :] < b), other=0.0)
            values = tl.load(x + start + c[None, :], mask=inside, other=0.0)
            back = tl.load(grad + start + c[None, :], mask=inside, other=0.0).to(tl.float32)
            back += tl.dot(g, mixing, input_precision=PRECISION)
            if GATED:
                gate = tl.fma(back, 0.0, values.to(tl.float32))  # as in the other kernel
                factor = tl.load(up + start + c[None, :], mask=inside, other=0.0).to(tl.float32)
                sigmoid = tl.fdiv(1.0, 1.0 + tl.exp2(gate * -1.4426950408889634))
                passed = gate * sigmoid
                back *= sigmoid
                tl.store(out_up + start + c[None, :], (back * gate).to(out.dtype.element_ty), mask=inside)
                back *= factor * (1 + gate - passed)
                values = (passed * factor).to(x.dtype.element_ty)
            tl.store(out + start + c[None, :], back.to(out.dtype.element_ty), mask=inside)
            total = tl.dot(tl.trans(g), values, total, input_precision=PRECISION)
        place = (share * blocks + block) * b * b + k[:, None] * b + c[None, :]
        tl.store(partial + place, total, mask=tall)

    @triton.jit
    def _joint_mix_kernel(
        x, D_0, D_1, D_2, out_0, out_1, out_2, rows, width, tiles,
        b: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr, NUMBER: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """``_mix_kernel`` for NUMBER adapters of the same x, 2 or 3, which is read once."""
        block, share = tl.program_id(0), tl.program_id(1)
        c = tl.arange(0, B)
        square = (c[:, None] < b) & (c[None, :] < b)
        inner = block * b * b + c[None, :] * b + c[:, None]
        transposed_0 = tl.load(D_0 + inner, mask=square, other=0.0).to(x.dtype.element_ty)
        transposed_1 = tl.load(D_1 + inner, mask=square, other=0.0).to(x.dtype.element_ty)
        if NUMBER == 3:
            transposed_2 = tl.load(D_2 + inner, mask=square, other=0.0).to(x.dtype.element_ty)
        for tile in range(tiles):
            row = ((share * tiles + tile) * TILE + tl.arange(0, TILE)).to(tl.int64)
            inside = (row[:, None] < rows) & (c[None, :] < b)
            place = row[:, None] * width + block * b + c[None, :]
            values = tl.load(x + place, mask=inside, other=0.0)
            mixed = values.to(tl.float32) + tl.dot(values, transposed_0, input_precision=PRECISION)
            tl.store(out_0 + place, mixed.to(out_0.dtype.element_ty), mask=inside)
            mixed = values.to(tl.float32) + tl.dot(values, transposed_1, input_precision=PRECISION)
            tl.store(out_1 + place, mixed.to(out_1.dtype.element_ty), mask=inside)
            if NUMBER == 3:
                mixed = values.to(tl.float32) + tl.dot(values, transposed_2, input_precision=PRECISION)
                tl.store(out_2 + place, mixed.to(out_2.dtype.element_ty), mask=inside)

    @triton.jit
    def _joint_mix_backward_kernel(
        x, D_0, D_1, D_2, grad_0, grad_1, grad_2, out, partial, rows, width, blocks, tiles,
        b: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr, NUMBER: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """``_mix_backward_kernel`` for NUMBER adapters of the same x, 2 or 3, which gets the sum of their gradients."""
        block, share = tl.program_id(0), tl.program_id(1)
        c = tl.arange(0, B)
        square = (c[:, None] < b) & (c[None, :] < b)
        inner = block * b * b + c[:, None] * b + c[None, :]
        mixing_0 = tl.load(D_0 + inner, mask=square, other=0.0).to(x.dtype.element_ty)
        mixing_1 = tl.load(D_1 + inner, mask=square, other=0.0).to(x.dtype.element_ty)
        total_0 = tl.zeros((B, B), dtype=tl.float32)
        total_1 = tl.zeros((B, B), dtype=tl.float32)
        if NUMBER == 3:
            mixing_2 = tl.load(D_2 + inner, mask=square, other=0.0).to(x.dtype.element_ty)
            total_2 = tl.zeros((B, B), dtype=tl.float32)
        for tile in range(tiles):
            row = ((share * tiles + tile) * TILE + tl.arange(0, TILE)).to(tl.int64)
            inside = (row[:, None] < rows) & (c[None, :] < b)
            place = row[:, None] * width + block * b + c[None, :]
            values = tl.load(x + place, mask=inside, other=0.0)
            g = tl.load(grad_0 + place, mask=inside, other=0.0)
            back = g.to(tl.float32) + tl.dot(g, mixing_0, input_precision=PRECISION)
            total_0 = tl.dot(tl.trans(g), values, total_0, input_precision=PRECISION)
            g = tl.load(grad_1 + place, mask=inside, other=0.0)
            back += g.to(tl.float32) + tl.dot(g, mixing_1, input_precision=PRECISION)
            total_1 = tl.dot(tl.trans(g), values, total_1, input_precision=PRECISION)
            if NUMBER == 3:
                g = tl.load(grad_2 + place, mask=inside, other=0.0)
                back += g.to(tl.float32) + tl.dot(g, mixing_2, input_precision=PRECISION)
                total_2 = tl.dot(tl.trans(g), values, total_2, input_precision=PRECISION)
            tl.store(out + place, back.to(out.dtype.element_ty), mask=inside)
        size = blocks * b * b
        partial += share * NUMBER * size + inner
        tl.store(partial, total_0, mask=square)
        tl.store(partial + size, total_1, mask=square)
        if NUMBER == 3:
            tl.store(partial + 2 * size, total_2, mask=square)

    @triton.jit
    def _sum_kernel(partial, out, size, shares, TILE: tl.constexpr):
        """A program: the sum over the shares of TILE numbers."""
        place = tl.program_id(0) * TILE + tl.arange(0, TILE)
        inside = place < size
        total = tl.zeros((TILE,), dtype=tl.float32)
        for share in range(shares):
            total += tl.load(partial + share * size + place, mask=inside, other=0.0)
        tl.store(out + place, total, mask=inside)

    @triton.jit
    def _values(s0, k, r: tl.constexpr, FRACTION: tl.constexpr, LEAST: tl.constexpr):
        """``effective_values`` of ``basis.py``: a block's singular values of these numbers, none too small."""
        s = tl.load(s0 + k, mask=k < r, other=1.0).to(tl.float32)
        if LEAST > 0:
            s = tl.maximum(tl.maximum(s, tl.load(s0).to(tl.float32) * FRACTION), LEAST)
        return s

    @triton.jit
    def _delta_kernel(
        dR, ds, V, s0, out,
        b: tl.constexpr, r: tl.constexpr, B: tl.constexpr, SCALED: tl.constexpr, K: tl.constexpr,
        FRACTION: tl.constexpr, LEAST: tl.constexpr,
    ):  # fmt: skip
        """A program: K columns of one block's D, as in ``block_delta`` of ``basis.py``."""
        block, c = tl.program_id(0), tl.arange(0, B)
        column = tl.program_id(1) * K + tl.arange(0, K)
        dR, V, ds, s0 = dR + block * r * b, V + block * b * r, ds + block * r, s0 + block * r
        total = tl.zeros((B, K), dtype=tl.float32)
        for start in range(0, r, K):
            k = start + tl.arange(0, K)
            tall, wide = (c[:, None] < b) & (k[None, :] < r), (k[:, None] < r) & (column[None, :] < b)
            left = tl.load(V + c[:, None] * r + k[None, :], mask=tall, other=0.0).to(tl.float32)
            change = tl.load(dR + k[:, None] * b + column[None, :], mask=wide, other=0.0).to(tl.float32)
            if SCALED:
                right = tl.load(V + column[None, :] * r + k[:, None], mask=wide, other=0.0).to(tl.float32)
                e = tl.load(ds + k, mask=k < r, other=0.0).to(tl.float32)
                e = e / _values(s0, k, r, FRACTION, LEAST)
                change = e[:, None] * (right + change) + change
            total = tl.dot(left, change, total, input_precision="tf32x3")
        square = (c[:, None] < b) & (column[None, :] < b)
        tl.store(out + block * b * b + c[:, None] * b + column[None, :], total, mask=square)

    @triton.jit
    def _delta_backward_kernel(
        dR, ds, V, s0, grad, grad_dR, grad_ds, g_block, g_row, g_column,
        b: tl.constexpr, r: tl.constexpr, B: tl.constexpr, SCALED: tl.constexpr, K: tl.constexpr,
        FRACTION: tl.constexpr, LEAST: tl.constexpr,
    ):  # fmt: skip
        """A program: the gradients of K rows of one block's dR, and of their ds; of ``_delta_kernel``'s formula."""
        block, column = tl.program_id(0), tl.arange(0, B)
        k = tl.program_id(1) * K + tl.arange(0, K)
        dR, V, ds, s0 = dR + block * r * b, V + block * b * r, ds + block * r, s0 + block * r
        total = tl.zeros((K, B), dtype=tl.float32)
        for start in range(0, b, K):
            c = start + tl.arange(0, K)
            small, wide = (k[:, None] < r) & (c[None, :] < b), (c[:, None] < b) & (column[None, :] < b)
            left = tl.load(V + c[None, :] * r + k[:, None], mask=small, other=0.0).to(tl.float32)
            place = block * g_block + c[:, None] * g_row + column[None, :] * g_column
            right = tl.load(grad + place, mask=wide, other=0.0).to(tl.float32)
            total = tl.dot(left, right, total, input_precision="tf32x3")
        inside = (k[:, None] < r) & (column[None, :] < b)
        place = k[:, None] * b + column[None, :]
        if SCALED:
            s = _values(s0, k, r, FRACTION, LEAST)
            e = tl.load(ds + k, mask=k < r, other=0.0).to(tl.float32) / s
            R = tl.load(V + column[None, :] * r + k[:, None], mask=inside, other=0.0).to(tl.float32)
            R += tl.load(dR + place, mask=inside, other=0.0).to(tl.float32)
            grad_s = tl.sum(total * R, axis=1) / s
            tl.store(grad_ds + block * r + k, grad_s.to(grad_ds.dtype.element_ty), mask=k < r)
            total += e[:, None] * total
        tl.store(grad_dR + block * r * b + place, total.to(grad_dR.dtype.element_ty), mask=inside)


def _launch(kernel, grid: tuple[int, ...], x: torch.Tensor, *arguments, **options) -> None:
    """Runs a kernel on x's device. By itself Triton takes the current one, which need not be the same; compiled code
    sees to that."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        kernel[grid](x, *arguments, **options)
    else:
        with torch.cuda.device_of(x):
            kernel[grid](x, *arguments, **options)


def mix(x: torch.Tensor, D: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """``x + blockdiag(D_1, ..., D_N) x``, in one pass.

    Args:
        x: ``(..., N * b)``.
        D: ``(N, b, b)``, any strides; the products take it in x's dtype.
        up: like x; if given, ``silu(x) * up`` is mixed, computed in float32 and rounded once. In the same pass, if
            `gate_fits`.

    Returns: like x.
    """
    N, b, _ = D.shape
    if up is not None and not gate_fits(x, b):
        x, up = gated(x, up), None
    x, is_gated = x.contiguous(), up is not None
    up = up.contiguous() if is_gated else x  # not looked at
    out = torch.empty_like(x)
    rows = x.numel() // (N * b)
    chunks = _chunks(b, CHUNK)
    tile, options = _form(x, rows, chunks > 1)
    if is_gated:  # with 8 warps the compiler has the sigmoid computed three times
        options |= {"num_warps": 4, "num_stages": min(2, options["num_stages"])}
    shares = _shares(x, N * chunks, rows, tile)
    tiles = triton.cdiv(triton.cdiv(rows, tile), shares)
    if chunks > 1:
        _launch(
            _wide_mix_kernel, (N * chunks, shares), x, D, out, rows, N * b, tiles, chunks, *D.stride(),
            b, _tile_width(b), CHUNK, tile, _precision(x), **options,
        )  # fmt: skip
    else:
        _launch(
            _mix_kernel, (N, shares), x, up, D, out, rows, N * b, tiles, *D.stride(),
            b, _tile_width(b), tile, is_gated, _precision(x), **options,
        )  # fmt: skip
    return out


def mix_backward(
    x: torch.Tensor, D: torch.Tensor, grad: torch.Tensor, up: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The gradients of ``mix`` with respect to what it took and D, in one pass over all of them.

    Sums over rows are made in a fixed order: the result is the same each time.

    Args:
        x: ``(..., N * b)``, that of the forward.
        D: ``(N, b, b)``.
        grad: the gradient of the result, like x.
        up: like x, if ``silu(x) * up`` was mixed: it is computed again, in float32 and rounded once.

    Returns: the gradients of x and ``up`` (or None), like x: ``grad + D^T grad``, or what the gate makes of that; and
        of D: ``sum_rows grad x^T`` by block, ``(N, b, b)`` float32.
    """
    x, grad, is_gated = x.contiguous(), grad.contiguous(), up is not None
    up = up.contiguous() if is_gated else x  # not looked at
    out = torch.empty_like(grad)
    out_up = torch.empty_like(grad) if is_gated else out
    N, b, _ = D.shape
    rows = x.numel() // (N * b)
    chunk = GATED_CHUNK if is_gated else CHUNK
    chunks = _chunks(b, chunk)
    tile, options = _form(x, rows, chunks > 1, is_gated)
    shares = _shares(x, N * chunks, rows, tile, sums=True, is_gated=is_gated)
    tiles = triton.cdiv(triton.cdiv(rows, tile), shares)
    partial = torch.empty(shares, N, b, b, dtype=torch.float32, device=x.device)
    if chunks > 1:
        _launch(
            _wide_mix_backward_kernel, (N * chunks, shares), x, up, D, grad, out, out_up, partial, rows, N * b, N,
            tiles, chunks, *D.stride(), b, _tile_width(b), chunk, tile, is_gated, _precision(x), **options,
        )  # fmt: skip
    else:
        _launch(
            _mix_backward_kernel, (N, shares), x, up, D, grad, out, out_up, partial, rows, N * b, N, tiles, *D.stride(),
            b, _tile_width(b), tile, is_gated, _precision(x), **options,
        )  # fmt: skip
    return out, out_up if is_gated else None, _summed(partial)


def joinable(x: torch.Tensor, block_size: int) -> bool:
    """Whether the kernels for 2 or 3 adapters of one x, which have as many sums at once, take these blocks."""
    return block_size <= JOINT_BLOCK and (INTERPRETED or x.dtype.itemsize == 2)


def joint_mix(x: torch.Tensor, Ds: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """``[x + D x for D in Ds]``, 2 or 3, in one pass.

    Args:
        x: ``(..., N * b)``.
        Ds: each ``(N, b, b)``, ``b`` at most ``JOINT_BLOCK``.

    Returns: each like x.
    """
    x, Ds = x.contiguous(), [D.contiguous() for D in Ds]
    outs = [torch.empty_like(x) for _ in Ds]  # of two, the kernel does not look at a third
    N, b, _ = Ds[0].shape
    rows = x.numel() // (N * b)
    tile, options = _form(x, rows, False)
    shares = _shares(x, N, rows, tile)
    _launch(
        _joint_mix_kernel, (N, shares), x, *(*Ds, x)[:3], *(*outs, x)[:3], rows, N * b,
        triton.cdiv(triton.cdiv(rows, tile), shares), b, _tile_width(b), tile, len(Ds), _precision(x), **options,
    )  # fmt: skip
    return outs


def joint_mix_backward(
    x: torch.Tensor, Ds: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The gradients of ``joint_mix``, in one pass; sums in a fixed order, as in ``mix_backward``.

    Args:
        x: ``(..., N * b)``, that of the forward.
        Ds: those of the forward.
        grads: the gradient of each result, like x.

    Returns: the gradient of x, ``sum_i grads[i] + D_i^T grads[i]``, rounded once; and of each D, ``(N, b, b)`` float32.
    """
    x, Ds, grads = x.contiguous(), [D.contiguous() for D in Ds], [grad.contiguous() for grad in grads]
    out = torch.empty_like(x)
    N, b, _ = Ds[0].shape
    rows = x.numel() // (N * b)
    tile, options = _form(x, rows, False)
    options |= {"num_warps": 4, "num_stages": 2}  # with these a multiprocessor of an H200 has room for two programs
    shares = _shares(x, N, rows, tile, sums=True)
    partial = torch.empty(shares, len(Ds), N, b, b, dtype=torch.float32, device=x.device)
    _launch(
        _joint_mix_backward_kernel, (N, shares), x, *(*Ds, x)[:3], *(*grads, x)[:3], out, partial, rows, N * b, N,
        triton.cdiv(triton.cdiv(rows, tile), shares), b, _tile_width(b), tile, len(Ds), _precision(x), **options,
    )  # fmt: skip
    return out, list(_summed(partial))


def _summed(partial: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension, in its order."""
    shares, total = len(partial), partial[0]
    if shares > 1:
        total = torch.empty_like(total)
        _launch(_sum_kernel, (triton.cdiv(total.numel(), 1024),), partial, total, total.numel(), shares, 1024)
    return total


def gated(x: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """``silu(x) * up``, or x."""
    return x if up is None else silu(x) * up


def gate_fits(x: torch.Tensor, b: int) -> bool:
    """Whether ``silu(x) * up`` is made in the pass that mixes it."""
    return b <= NARROW_BLOCK and (INTERPRETED or PRODUCTS_OF_SHARED_MEMORY and x.dtype.itemsize == 2)


def _tile_width(b: int) -> int:
    """The power of two that holds a block; 16 is the least that a product of tiles takes."""
    return max(16, triton.next_power_of_2(b))


def _chunks(b: int, chunk: int) -> int:
    """How many programs share a block's columns."""
    return 1 if b <= NARROW_BLOCK else triton.cdiv(b, chunk)


def _form(x: torch.Tensor, rows: int, is_wide: bool, is_gated: bool = False) -> tuple[int, dict[str, int]]:
    """Rows of a tile, for a few rows no more than needed, and the options of the launch. What was within 2 % of the
    fastest on an H200, forward and backward, for blocks of 64 and 128; it fits into 99 KiB of a chip, too."""
    if is_wide:  # the fastest of 24 on an H100, for 128 blocks of 148
        tile = 16 if rows <= 16 or x.dtype.itemsize == 4 or SHARED_MEMORY < 160 * 1024 else 64
        return tile, {"num_warps": 4 if is_gated else 8, "num_stages": 2}
    if x.dtype.itemsize == 4:  # 32 rows take 112 KiB
        return 16 if rows <= 16 or SHARED_MEMORY < 112 * 1024 else 32, {"num_warps": 8, "num_stages": 1}
    if is_gated:  # more arithmetic for each number: small programs, so that a multiprocessor runs two at once
        return 16, {"num_warps": 4, "num_stages": 4}
    return 16 if rows <= 16 else 64, {"num_warps": 8, "num_stages": 3}


def _shares(x: torch.Tensor, blocks: int, rows: int, tile: int, sums: bool = False, is_gated: bool = False) -> int:
    """Into how many the rows are divided: 2 programs for each of the multiprocessors of x's GPU, or as many more as
    leave few of them idle at the end. Where there are sums to add up afterwards and no gate, 1 program each does if
    that leaves at most a tenth idle, found with the 132 of an H200. In a short batch, which waits for launches and not
    for the GPU, two sums are not worth a kernel that adds them up. Other lengths make no difference: the compiler makes
    code for each that does.
    """
    available = MULTIPROCESSORS[x.device.index] if x.is_cuda else 132  # the interpreter's programs run in turn
    shares, is_short = available // blocks, rows <= 2048
    if not sums or is_gated or 10 * shares * blocks < 9 * available:
        shares = max(1, 2 * available // blocks)
        if not is_short:
            shares = _balanced(shares, blocks, 2 * available, tile)
    if rows <= 16 or sums and is_short and shares == 2:
        return 1
    return max(1, min(32, shares))


def _balanced(least: int, blocks: int, at_once: int, tile: int) -> int:
    """The number of shares, this or more, with which the programs of all blocks, ``at_once`` at a time, end first.

    One share of 148 blocks would leave 116 of 132 multiprocessors with one program while 16 have two. The rows are
    counted as 8192; what a program does once, reading D and writing a sum, takes about as long as 160 rows.
    """
    best, shortest = least, None
    for shares in range(least, 17):
        turns = -(-shares * blocks // at_once)
        rows_each = -(-8192 // (shares * tile)) * tile
        time = turns * (rows_each + 160)
        if shortest is None or time < shortest:
            best, shortest = shares, time
    return best


def _precision(x: torch.Tensor) -> str:
    """float32 is multiplied as float32 and not in the shorter form that tensor cores take."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


class Mix(torch.autograd.Function):
    """``x + D x`` with its gradients. Keeps x and D.

    With ``up`` it is ``silu(x) * up`` that is mixed. That product is not kept: the backward pass, which reads x and
    ``up`` for their gradients anyway, makes it again on the way.
    """

    @staticmethod
    def forward(ctx, x, up, D):
        ctx.save_for_backward(x, up, D)
        return mix(x, D, up)

    @staticmethod
    def backward(ctx, grad):
        x, up, D = ctx.saved_tensors
        dx, dup, dD = mix_backward(x, D, grad, up)
        return dx, dup, dD.to(D.dtype)


class FoldedLinear(torch.autograd.Function):
    """``W (x + D x) + bias`` as ``(W + W D) x + bias``: one pass over W takes the place of one over x, which is longer.

    ``W + W D`` is rounded to W's dtype as ``x + D x`` would be to x's, and lives only until the product is done. The
    gradients are those of the unfolded form. W and bias get none. ``up`` as for ``Mix``.
    """

    @staticmethod
    def forward(ctx, x, up, weight, bias, D):
        ctx.save_for_backward(x, up, weight, D)
        return linear(gated(x, up), mix(weight, D.mT), bias)

    @staticmethod
    def backward(ctx, grad):
        x, up, weight, D = ctx.saved_tensors
        dx, dup, dD = mix_backward(x, D, grad @ weight, up)
        return dx, dup, None, None, dD.to(D.dtype)


class JointLinear(torch.autograd.Function):
    """``W_i (x + D_i x) + bias_i`` for 2 or 3 Linears of the same x; ``folds``: as ``(W_i + W_i D_i) x + bias_i``.

    Takes x, ``folds``, and the lists of weights, biases (or None) and D one after the other. One pass over x makes the
    gradients of all D and the sum of the gradients of x, which is rounded once; weights and biases get none.
    """

    @staticmethod
    def forward(ctx, x, folds, *parts):
        number = len(parts) // 3
        weights, biases, Ds = parts[:number], parts[number : 2 * number], parts[2 * number :]
        ctx.save_for_backward(x, *weights, *Ds)
        if folds:
            weights = [mix(weight, D.mT) for weight, D in zip(weights, Ds, strict=True)]
        inputs = [x] * number if folds else joint_mix(x, Ds)
        return tuple(linear(*each) for each in zip(inputs, weights, biases, strict=True))

    @staticmethod
    def backward(ctx, *grads):
        x, *parts = ctx.saved_tensors
        weights, Ds = parts[: len(grads)], parts[len(grads) :]
        back = [grad @ weight for grad, weight in zip(grads, weights, strict=True)]
        dx, dDs = joint_mix_backward(x, Ds, back)
        nothing = [None] * (2 * len(grads))
        return dx, None, *nothing, *(dD.to(D.dtype) for dD, D in zip(dDs, Ds, strict=True))


class Delta(torch.autograd.Function):
    """``block_delta`` of ``basis.py``, in float32 whatever the dtypes; one kernel each way: ``_delta_kernel`` and
    ``_delta_backward_kernel``, which hold its formula and gradients again. ``fraction`` and ``least``: its
    ``divisor_floor``."""

    @staticmethod
    def forward(ctx, dR, ds, V, s0, fraction, least):
        dR, V, s0 = dR.contiguous(), V.contiguous(), s0.contiguous()
        ds = None if ds is None else ds.contiguous()
        ctx.save_for_backward(dR, ds, V, s0)
        ctx.floor = fraction, least
        N, r, b = dR.shape
        out = torch.empty(N, b, b, dtype=torch.float32, device=dR.device)
        grid = (N, triton.cdiv(b, 32))
        scale = s0 if ds is None else ds
        _launch(_delta_kernel, grid, dR, scale, V, s0, out, b, r, _tile_width(b), ds is not None, 32, fraction, least)
        return out

    @staticmethod
    def backward(ctx, grad):
        dR, ds, V, s0 = ctx.saved_tensors
        N, r, b = dR.shape
        grad_dR = torch.empty_like(dR)
        grad_ds = None if ds is None else torch.empty_like(ds)
        scale, grad_scale = (s0, grad_dR) if ds is None else (ds, grad_ds)  # without ds neither is looked at
        _launch(
            _delta_backward_kernel, (N, triton.cdiv(r, 32)), dR, scale, V, s0, grad, grad_dR, grad_scale,
            *grad.stride(), b, r, _tile_width(b), ds is not None, 32, *ctx.floor,
        )  # fmt: skip
        return grad_dR, grad_ds, None, None, None, None
