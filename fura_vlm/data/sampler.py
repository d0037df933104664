"""The order of training: batches of one modality and of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class ModalityLengthSampler(Sampler[int]):
    """Orders rows so that an optimizer step has one modality and similar lengths; the steps come at random.

    The idea is LLaVA v1.5's ``group_by_modality_length``. A global batch is what one optimizer step takes,
    ``world_size * gradient_accumulation_steps * batch_size`` rows. For each modality the rows are shuffled,
    and ``pool`` global batches at a time are sorted by length and cut into global batches again; then all
    global batches are shuffled. What does not fill a global batch comes last, first the rows with an image,
    then those without: at most there a batch is mixed. The global batch with the longest row comes first, so
    that a run which does not fit into memory fails at once.

    The order is that of the whole run, on every process the same. accelerate cuts it into batches of
    ``batch_size`` and deals these to the processes in turn (``BatchSamplerShard`` with
    ``split_batches=False``): at any time neighbours in this order are on the processes, so that none waits
    long for another and all have the same modality.

    LLaVA's own order has ``pool=1`` and gives each process long and short rows alike. Sorting more rows at a
    time saves more padding and makes steps less alike.

    Args:
        lengths: tokens of each row.
        has_image: whether each row has an image.
        batch_size: rows of a batch on one process.
        world_size: the number of processes.
        gradient_accumulation_steps: batches of a process in one optimizer step.
        seed: with the epoch, decides the order.
        pool: global batches that are sorted together; at most a quarter of those of a modality, so that
            epochs differ in small mixtures too.

    Raises:
        ValueError: if ``lengths`` and ``has_image`` differ in length, or a number is below 1.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        has_image: Sequence[bool] | np.ndarray,
        batch_size: int,
        world_size: int = 1,
        gradient_accumulation_steps: int = 1,
        seed: int = 0,
        pool: int = 16,
    ):
        self.lengths, self.has_image = np.asarray(lengths), np.asarray(has_image, dtype=bool)
        if self.lengths.shape != self.has_image.shape:
            raise ValueError(f"{len(self.lengths)} lengths for {len(self.has_image)} rows")
        if min(batch_size, world_size, gradient_accumulation_steps, pool) < 1:
            raise ValueError("the batch size and what multiplies it must be at least 1, and pool too")
        self.global_batch = batch_size * world_size * gradient_accumulation_steps
        self.seed, self.pool, self.epoch = seed, pool, 0

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, another order; the same epoch, the same order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        batches, rest = [], []
        for modality in (True, False):
            rows = rng.permutation(np.flatnonzero(self.has_image == modality))
            whole = len(rows) - len(rows) % self.global_batch
            rest.append(rows[whole:])
            size = max(1, min(self.pool, whole // self.global_batch // 4)) * self.global_batch
            for start in range(0, whole, size):
                pooled = slice(start, min(start + size, whole))
                rows[pooled] = self._by_length(rows[pooled])
            batches += list(rows[:whole].reshape(-1, self.global_batch))
        order = rng.permutation(len(batches))
        if len(order):
            longest = max(order, key=lambda i: self.lengths[batches[i]].max())
            order = [longest, *(i for i in order if i != longest)]
        for batch in [*(batches[i] for i in order), *(self._by_length(rows) for rows in rest)]:
            yield from batch.tolist()

    def _by_length(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(-self.lengths[rows], kind="stable")]
