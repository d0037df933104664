"""Where the time of a run goes."""

from __future__ import annotations

import time

import torch

PARTS = ("preparing", "questions", "forward", "backward", "optimizer", "data", "saving", "other")
SHOWN = 0.005  # of the whole: parts that would be 0 % are among the others
MANY = 256  # events of a GPU that have not been asked yet


class Clock:
    """Gives every moment to one of ``PARTS``, by marks where each of them ends.

    A GPU is not waited for: an event is put into its queue at each mark, and asked for its time when it is long past.
    So what counts on a GPU is where the GPU itself was, at work or waiting for something to do.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device | str):
        self.cuda = torch.device(device).type == "cuda"
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last = self._now()
        self._waiting: list[tuple[str, torch.cuda.Event]] = []

    def mark(self, part: str) -> None:
        """The time since the last mark was ``part``'s."""
        now = self._now()
        if not self.cuda:
            self.seconds[part] += now - self._last
            self._last = now
            return
        self._waiting.append((part, now))
        if len(self._waiting) > MANY:
            self._read()

    def line(self) -> str:
        """The whole time and its parts; on a GPU this waits for all that was marked."""
        if self.cuda:
            torch.cuda.synchronize()
            self._read()
        whole = sum(self.seconds.values())
        shown = {part: spent for part, spent in self.seconds.items() if part != "other" and spent >= SHOWN * whole}
        shown["other"] = whole - sum(shown.values())
        shares = [f"{100 * spent / whole:.0f} % {part}" for part, spent in shown.items() if spent >= SHOWN * whole]
        return f"{_length(whole)}: {', '.join(shares)}"

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self) -> None:
        """Takes the times of the events that the GPU has passed."""
        while self._waiting and self._waiting[0][1].query():
            part, event = self._waiting.pop(0)
            self.seconds[part] += self._last.elapsed_time(event) / 1000
            self._last = event


def _length(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
