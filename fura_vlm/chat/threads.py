"""How many threads compute, chosen by measuring.

The default, a thread a core, is right on a machine that does nothing else. Where cores are shared (a small virtual
machine, a server's own threads, other programs), threads that wait for one another at the end of each operation make
the model several times slower. What is right depends on the machine, the model and the hour, so it is measured on the
steps that the model takes anyway: now and then a few steps with half or twice as many threads, in turn with as many
as before, and the faster number stays.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

PAIRS = 5  # steps of either number in a trial
SHORT = 0.05  # seconds of a step
REST, LONGEST_REST = 32, 1024  # steps between trials: after each that changed nothing twice as many


class ThreadTuner:
    """The number of threads for one kind of work of the thread that calls it.

    Args:
        most: threads to begin with; never more are tried.
        clock: seconds.
        apply: sets the number of threads.

    Attributes:
        threads: the number at present.
    """

    def __init__(
        self,
        most: int,
        clock: Callable[[], float] = time.perf_counter,
        apply: Callable[[int], None] = torch.set_num_threads,
    ):
        self.threads = most
        self._most, self._clock, self._apply = most, clock, apply
        self._pause, self._rest, self._failed = REST, 0, 0
        self._down = True
        self._times: dict[Hashable, tuple[list[float], list[float]]] = {}  # of the trial, with as many and with others

    @property
    def tunes(self) -> bool:
        """Whether there is anything to choose."""
        return self._most > 1

    def begin(self, step: Callable[[], None]) -> None:
        """Chooses the number to begin with by steps with one thread: one, if the second is done in ``SHORT`` seconds.

        On cores that others use, too, a second thread makes short steps slower; where it does not, the trials find out.
        """
        if not self.tunes:
            return
        self._apply(1)
        for limit in (20 * SHORT, SHORT):  # the first step makes what later ones find
            began = self._clock()
            step()
            if self._clock() - began > limit:
                return
        self.threads = 1

    @property
    def settled(self) -> bool:
        """Neither fewer nor more threads were faster when they were tried last."""
        return self._rest > 0

    @contextmanager
    def step(self, work: Hashable) -> Iterator[None]:
        """Around one step. Only steps of the same ``work`` (so many rows, ...) are compared with one another."""
        trial = self._trial()
        if trial is None:
            self._rest = max(self._rest - 1, 0)
            self._apply(self.threads)
            yield
            return
        times = self._times.setdefault(work, ([], []))
        turn = len(times[0]) > len(times[1])
        self._apply(trial if turn else self.threads)
        began = self._clock()
        yield
        times[turn].append(self._clock() - began)
        if len(times[1]) == PAIRS:
            self._decide(trial, *map(median, times))

    def _trial(self) -> int | None:
        """The number to compare with, or ``None`` while nothing is tried."""
        if self._rest or not self.tunes:
            return None
        if self.threads == (1 if self._down else self._most):  # there is nothing to try on this side
            self._down = not self._down
        return self.threads // 2 if self._down else min(self.threads * 2, self._most)

    def _decide(self, trial: int, before: float, after: float) -> None:
        if after < before * (1 if self._down else 0.9):  # more threads have to be worth it
            self.threads, self._failed, self._pause = trial, 0, REST
        else:
            self._failed += 1
            self._down = not self._down
        if self._failed == 2:  # at an end twice on the one side
            self._failed, self._rest, self._pause = 0, self._pause, min(self._pause * 2, LONGEST_REST)
        self._times.clear()


def thread_tuner(device: torch.device) -> ThreadTuner:
    """A tuner from torch's own number down; one that leaves everything as it is on a GPU, or where the user has set
    ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS``."""
    chosen = any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    if device.type != "cpu" or chosen:
        return ThreadTuner(1, apply=lambda threads: None)
    return ThreadTuner(torch.get_num_threads())
