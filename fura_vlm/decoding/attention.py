"""Attention of one new token a row over rows of different lengths, as a CUDA graph needs it.

A graph's kernels have the same sizes at every step, so a mask over the buffers' whole width would have attention read
all of it. This kernel takes each row's length from the GPU's memory and reads no more than that. It stands in for
transformers' ``sdpa`` while :func:`attending` says so; all else, prompts above all, goes to ``sdpa`` itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fura_vlm.fura import kernels

if kernels.triton is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _attend_kernel(
        query, key, value, places, sums, tops, totals, scale, window, splits, heads,
        q_row, q_head, k_row, k_head, k_column, v_row, v_head, v_column,
        groups: tl.constexpr, G: tl.constexpr, d: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """A program: one of ``splits`` parts of one row's keys, for the queries of one head of keys."""
        row, head, part = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads, tl.program_id(1)
        g, c = tl.arange(0, G), tl.arange(0, D)
        inside = (g[:, None] < groups) & (c[None, :] < d)
        own = row * q_row + (head * groups + g[:, None]) * q_head + c[None, :]
        queries = tl.load(query + own, mask=inside, other=0.0)
        length = tl.load(places + row).to(tl.int32) + 1
        first = tl.maximum(length - window, 0)
        share = tl.cdiv(tl.cdiv(length - first, splits), TILE) * TILE
        start = first + part * share
        end = tl.minimum(start + share, length)
        top, total = tl.full((G,), float("-inf"), tl.float32), tl.zeros((G,), tl.float32)
        sum_ = tl.zeros((G, D), tl.float32)
        keys_of, values_of = key + row * k_row + head * k_head, value + row * v_row + head * v_head
        for column in range(start, end, TILE):
            n = column + tl.arange(0, TILE)
            there = (n[None, :] < end) & (c[:, None] < d)
            keys = tl.load(keys_of + n[None, :] * k_column + c[:, None], mask=there, other=0.0)
            scores = tl.dot(queries, keys, input_precision=PRECISION) * scale
            scores = tl.where(n[None, :] < end, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))
            weights, before = tl.exp(scores - higher[:, None]), tl.exp(top - higher)
            there = (n[:, None] < end) & (c[None, :] < d)
            values = tl.load(values_of + n[:, None] * v_column + c[None, :], mask=there, other=0.0)
            sum_ = sum_ * before[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
            total = total * before + tl.sum(weights, axis=1)
            top = higher
        place = ((row * heads + head) * groups + g) * splits + part
        tl.store(tops + place, top, mask=g < groups)
        tl.store(totals + place, total, mask=g < groups)
        tl.store(sums + place[:, None] * D + c[None, :], sum_, mask=g[:, None] < groups)

    @triton.jit
    def _join_kernel(sums, tops, totals, out, splits: tl.constexpr, S: tl.constexpr, d: tl.constexpr, D: tl.constexpr):
        """A program: the parts of one head of one row, joined."""
        head, s, c = tl.program_id(0), tl.arange(0, S), tl.arange(0, D)
        top = tl.load(tops + head * splits + s, mask=s < splits, other=float("-inf"))
        weights = tl.exp(top - tl.max(top, axis=0))
        total = tl.sum(weights * tl.load(totals + head * splits + s, mask=s < splits, other=0.0), axis=0)
        parts = tl.load(sums + (head * splits + s[:, None]) * D + c[None, :], mask=s[:, None] < splits, other=0.0)
        joined = tl.sum(weights[:, None] * parts, axis=0) / total
        tl.store(out + head * d + c, joined.to(out.dtype.element_ty), mask=c < d)


NAME = "fura_slots"

FULL, WINDOW = "full_attention", "sliding_attention"


def kinds_of(text_config) -> set[str]:
    """The kinds of attention of a decoder's layers."""
    kinds = getattr(text_config, "layer_types", None)
    return set(kinds) if kinds else {WINDOW if getattr(text_config, "sliding_window", None) else FULL}


class Seen(list):
    """What attention returned, a tensor a layer.

    Attributes:
        windows: what each layer said of its window.
    """

    def __init__(self) -> None:
        super().__init__()
        self.windows: list[int | None] = []


class _State(threading.local):
    """What is asked of ``slot_attention`` in this thread, if anything."""

    places: torch.Tensor | None = None
    seen: Seen | None = None
    noise: tuple[float, torch.Generator] | None = None


_state = _State()


@contextmanager
def attending(places: torch.Tensor) -> Iterator[None]:
    """Within it, in this thread, one query a row sees the keys up to the row's place, (rows) int64, and no others."""
    _state.places = places
    try:
        yield
    finally:
        _state.places = None


@contextmanager
def watching() -> Iterator[Seen]:
    """Gathers, in this thread, what each layer's attention returns, (rows, 1, heads, size)."""
    _state.seen = seen = Seen()
    try:
        yield seen
    finally:
        _state.seen = None


@contextmanager
def moved(by: float, device: torch.device) -> Iterator[None]:
    """Within it, in this thread, each number that attention returns is moved at random by up to this share of it, the
    same way each time: what follows shows what the model makes of differences of that size."""
    _state.noise = by, torch.Generator(device).manual_seed(0)
    try:
        yield
    finally:
        _state.noise = None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    places: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of one query a row over the keys up to its place.

    Args:
        query: (rows, heads, 1, size).
        key, value: (rows, heads of keys, columns, size); in columns beyond a row's place there may be anything.
        places: (rows) int64, the last column that a row sees.
        scale: of the products of queries and keys.
        window: how many columns a row sees at most; ``None``: all.

    Returns: (rows, 1, heads, size) in the query's dtype. Products are summed up in float32.
    """
    rows, heads, _, d = query.shape
    kv_heads, columns = key.shape[1], key.shape[2]
    groups, D = heads // kv_heads, max(16, triton.next_power_of_2(d))
    tile = 64 if D * key.dtype.itemsize <= 256 else 32  # of keys and of values there are some on the chip at once
    processors = kernels.MULTIPROCESSORS[query.device.index] if query.is_cuda else 132
    splits = max(1, min(16, 2 * processors // (rows * kv_heads), triton.cdiv(columns, 64)))
    sums = query.new_empty(rows, heads, splits, D, dtype=torch.float32)
    tops, totals = (query.new_empty(rows, heads, splits, dtype=torch.float32) for _ in range(2))
    out = query.new_empty(rows, 1, heads, d)
    if query.stride(3) != 1:
        query = query.contiguous()
    kernels._launch(
        _attend_kernel, (rows * kv_heads, splits), query, key, value, places, sums, tops, totals, scale,
        window or columns + 1, splits, kv_heads, query.stride(0), query.stride(1), *key.stride()[:3],
        *value.stride()[:3], groups, max(16, triton.next_power_of_2(groups)), d, D, tile,
        "ieee" if query.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    kernels._launch(
        _join_kernel, (rows * heads,), sums, tops, totals, out, splits, triton.next_power_of_2(splits), d, D,
    )  # fmt: skip
    return out


def slot_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """transformers' interface: ``sdpa``, or ``attend`` within ``attending``."""
    if _state.places is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    else:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = attend(query, key, value, _state.places, scale, sliding_window)
    if _state.noise is not None:
        by, generator = _state.noise
        draw = torch.rand(out.shape, generator=generator, device=out.device)
        out = (out + out * by * (2 * draw - 1)).to(out.dtype)
    if _state.seen is not None:
        _state.seen.append(out)
        _state.seen.windows.append(sliding_window)
    return out, None


AttentionInterface.register(NAME, slot_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def prepare(decoder) -> bool:
    """Has a model's decoder use this attention. Returns whether it can: on a GPU for which Triton makes kernels, or in
    Triton's interpreter, with a model whose attention is ``sdpa``, full or with windows, and chosen by transformers."""
    able = kernels.ENABLED and (kernels.SHARED_MEMORY or kernels.INTERPRETED)
    text_config = decoder.config
    known = kinds_of(text_config) <= {FULL, WINDOW} and getattr(text_config, "attention_chunk_size", None) is None
    chosen = known and type(decoder)._can_set_attn_implementation()
    if text_config._attn_implementation not in ("sdpa", NAME) or not able or not chosen:
        return False
    text_config._attn_implementation = NAME
    return True
