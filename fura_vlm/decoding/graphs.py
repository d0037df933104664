"""Steps as CUDA graphs: all kernels of a step are launched at once, where launching one after the other takes longer
than the GPU takes to run them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from fura_vlm.decoding.attention import attending
from fura_vlm.decoding.slots import Slots
from fura_vlm.errors import first_line

logger = logging.getLogger(__name__)


class Graphs:
    """Graphs of a decoder's step over one cache, one for each of 1, 2, 4, 8, ... rows. Others are rounded up.

    A graph repeats what was recorded: the same kernels, over the same memory. So nothing of the model may change while
    it is used, its adapter included, and other buffers of the cache need other graphs.

    Attributes:
        failed: the model cannot be recorded.

    Args:
        decoder: that of ``fura_vlm.decoding.rows``.
        cache: whose first rows take part in a step.
    """

    def __init__(self, decoder, cache: Slots) -> None:
        self._decoder, self._cache, self.failed = decoder, cache, False
        self.clear()

    def clear(self) -> None:
        """Forgets all graphs: the cache has other buffers."""
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._tokens: torch.Tensor | None = None
        self._pool = torch.cuda.graph_pool_handle()  # one is replayed after the other

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
            expected = plain()
            try:
                self._graphs[size] = self._record(size, expected)
            except Exception as error:
                logger.warning("Answers are written without CUDA graphs, more slowly: %s.", first_line(error))
                self.failed = True
                self.clear()
            return expected
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:count]

    def _record(self, size: int, expected: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Records the step, and compares what it gives for the first rows.

        Raises:
            RuntimeError: the model does something that cannot be recorded, or the results differ by more than rounding.
        """
        cache = self._cache
        with attending(cache.places[:size]):
            cache.width = cache.columns
            try:
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self._run(size)  # what is made only once, such as block matrices, is made before it is recorded
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    logits = self._run(size)
            finally:
                cache.width = None
        graph.replay()
        found, expected = logits[: len(expected)].float(), expected.float()
        if not (found - expected).norm() <= (2e-2 if logits.dtype.itemsize == 2 else 1e-3) * expected.norm():
            raise RuntimeError("a recorded step gives other results")
        return graph, logits

    def _run(self, size: int) -> torch.Tensor:
        places = self._cache.places[:size]
        return self._decoder(self._tokens[:size], places + self._offsets[:size], self._cache)
