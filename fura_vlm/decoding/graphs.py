"""Steps as CUDA graphs: all kernels of a step are launched at once, where launching one after the other takes longer
than the GPU takes to run them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext

import torch

from fura_vlm.decoding.attention import WINDOW, Seen, attending, kinds_of, moved, watching
from fura_vlm.decoding.slots import Slots
from fura_vlm.errors import first_line

logger = logging.getLogger(__name__)

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-5}
"""What two kernels for the same attention may differ by, as a share: about a rounding of what they return."""

TF32 = 2**-10
"""The same where products of float32 take TF32: another number of rows may get another kernel for each product."""

MARGIN = 4
"""How many times what such a difference makes of the results of each layer is taken for rounding."""

Outputs = Seen  # what the attention of each layer returned, (rows, 1, heads, size), and the logits


class Graphs:
    """Graphs of a decoder's step over one cache, one for each of 1, 2, 4, 8, ... rows. Others are rounded up.

    A graph repeats what was recorded: the same kernels, over the same memory. So no tensor of the model may move while
    it is used, its adapter's included, and other buffers of the cache need other graphs.

    Attributes:
        failed: the model cannot be recorded.
        sizes: numbers of rows that have a graph.

    Args:
        decoder: that of ``fura_vlm.decoding.rows``.
        cache: whose first rows take part in a step.
    """

    def __init__(self, decoder, cache: Slots) -> None:
        self._decoder, self._cache, self.failed = decoder, cache, False
        self.clear()

    def clear(self) -> None:
        """Forgets all graphs."""
        self._graphs: dict[int, tuple[Callable[[], None], torch.Tensor]] = {}
        self._tokens: torch.Tensor | None = None
        self._pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None  # they take turns

    @property
    def sizes(self) -> list[int]:
        return sorted(self._graphs)

    def step(self, last: torch.Tensor, offsets: torch.Tensor, plain: Callable[[], torch.Tensor]) -> torch.Tensor:
        """One step, without a change of the cache's lengths.

        Args:
            last: each row's last token, (rows) int64.
            offsets: how far its position is from its place, (rows) int64.
            plain: the same step as the model itself makes it. The first step of a number of rows is compared with it;
                where the model cannot be recorded, and where the results differ, all steps are plain from then on.

        Returns: logits, (rows, vocabulary), good until the next step.
        """
        count = len(last)
        size = min(1 << (count - 1).bit_length(), self._cache.capacity)
        if self.failed:
            return plain()
        if self._tokens is None:
            self._tokens, self._offsets = (last.new_zeros(self._cache.capacity) for _ in range(2))
        self._tokens[:count], self._offsets[:count] = last, offsets
        if size not in self._graphs:
            with moved(rounding_of(last.device, self._decoder.dtype), last.device):
                near = _watched(plain)
            expected = _watched(plain)
            try:
                with torch.cuda.device(last.device) if last.is_cuda else nullcontext():
                    make = record if last.is_cuda else repeat
                    replay, found = make(lambda: self._run(size), self._pool)
                for states in found:
                    states.fill_(float("nan"))  # what the check looks at is of the replay
                replay()
                self._check_attention(found)
                check(found, expected, near)
                self._graphs[size] = replay, found[-1]
            except Exception as error:
                logger.warning("Answers are written without CUDA graphs, more slowly: %s.", first_line(error))
                self.failed = True
                self.clear()
            return expected[-1]
        replay, logits = self._graphs[size]
        replay()
        return logits[:count]

    def _check_attention(self, found: Outputs) -> None:
        """Raises RuntimeError if not all layers have called the attention that takes each row's length from the GPU, or
        if it was not told of a window."""
        if len(found) - 1 < len(self._cache.layers):
            raise RuntimeError("not all of its layers use the attention that a graph needs")
        if WINDOW in kinds_of(self._decoder.text_config) and not any(found.windows):
            raise RuntimeError("it has attention with a window, and does not say how wide the window is")

    def _run(self, size: int) -> Outputs:
        cache = self._cache
        places = cache.places[:size]
        cache.width = cache.columns
        try:
            with attending(places):
                return _watched(lambda: self._decoder(self._tokens[:size], places + self._offsets[:size], cache))
        finally:
            cache.width = None


def check(found: Outputs, expected: Outputs, near: Outputs) -> float:
    """Compares a recorded step with the model's own, row by row and layer by layer.

    How far rounding may carry a result depends on the model: it grows with depth, in bfloat16 to several per cent of
    the logits. So ``near`` is the model's own step with a rounding's difference in each layer's attention, and what it
    differs by is the measure: in each layer, the largest over all rows, for of a hundred some are moved far by chance.
    In the first layers that is little, so that a key too many or too few is seen there, which the logits may hide.

    Args:
        found: of the recorded step; it may have more rows.
        expected: of the model's own.
        near: the same with differences of ``ROUNDING``.

    Returns: the largest difference, as a share of what rounding explains.

    Raises:
        RuntimeError: the results differ by more than rounding.
    """
    rounding, layers = rounding_of(expected[-1].device, expected[-1].dtype), len(expected) - 1
    shares = []
    for one, own, other in zip(found, expected, near, strict=True):
        one, own, other = (states[: len(own)].flatten(1).double() for states in (one, own, other))
        norm = own.norm(dim=1).clamp_min(torch.finfo(own.dtype).tiny)
        shares.append(torch.stack([(one - own).norm(dim=1), (other - own).norm(dim=1)]) / norm)
    differs, explained = torch.stack(shares).cpu().unbind(1)  # (layers + 1, rows)
    explained = (MARGIN * explained.amax(1, keepdim=True) + rounding).expand_as(differs)
    wrong = ~(differs <= explained)  # NaN included
    if wrong.any():
        layer, row = wrong.nonzero()[0].tolist()
        what = "its logits differ" if layer == layers else f"attention in layer {layer + 1} of {layers} differs"
        raise RuntimeError(
            f"a recorded step gives other results: {what} by {100 * differs[layer, row]:.2g} % in row {row + 1} of "
            f"{differs.shape[1]}, where rounding explains {100 * explained[layer, row]:.2g} %"
        )
    return (differs / explained).max().item()


def rounding_of(device: torch.device, dtype: torch.dtype) -> float:
    """What two kernels for the same product may differ by there, as a share."""
    products = torch.backends.cuda.matmul
    tf32 = products.fp32_precision == "tf32" if hasattr(products, "fp32_precision") else products.allow_tf32
    return TF32 if tf32 and device.type == "cuda" and dtype == torch.float32 else ROUNDING[dtype]


def _watched(step: Callable[[], torch.Tensor]) -> Outputs:
    with watching() as seen:
        seen.append(step())
    return seen


def record(run: Callable[[], Outputs], pool) -> tuple[Callable[[], None], Outputs]:
    """Returns what runs it again, and where its results are after that."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what is made only once, such as block matrices, is made before it is recorded
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The outer one leaves the stream also where a recording fails.
    with (
        torch.cuda.stream(stream),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        outputs = run()
    return graph.replay, outputs


def repeat(run: Callable[[], Outputs], pool) -> tuple[Callable[[], None], Outputs]:
    """``record`` where there are no graphs, for Triton's interpreter: the same step over the same memory."""
    outputs = run()

    def replay() -> None:
        for kept, new in zip(outputs, run(), strict=True):
            kept.copy_(new)

    return replay, outputs
