"""The threads that read questions: text becomes tokens, a picture becomes pixels."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fura_vlm.chat.partner import ChatError

T = TypeVar("T")
READ_SECONDS = 60
"""In which a question must have been read, its turn awaited."""
MAX_WAITING = 200
"""What is being read or waits for it. The queue of questions lets fewer in; looking at a picture has no queue."""


class Readers:
    """Reads a few questions at a time; more wait. Each thread computes alone, so as not to take the model's cores.

    Args:
        threads: questions read at the same time. They are read in a fraction of a second, and a picture of 25
            megapixels in a second or two.
        seconds: in which a question must have been read.
    """

    def __init__(self, threads: int = 2, seconds: float = READ_SECONDS):
        self.seconds = seconds
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "chat-reader", _compute_alone)
        self._began: dict[object, float] = {}  # what is being read, also after nobody waits for it any more
        self.waiting = 0  # questions that are being read or wait to be

    async def run(self, read: Callable[..., T], *arguments) -> T:
        """Calls ``read`` in a thread.

        Raises:
            ChatError: if too many wait already, or if it has not ended in time. A thread cannot be stopped: it ends
                when it ends.
        """
        if self.waiting >= MAX_WAITING:
            raise ChatError("Too many questions are being read: ask again later")

        def timed() -> T:
            key = object()
            self._began[key] = time.monotonic()
            try:
                return read(*arguments)
            finally:
                del self._began[key]

        self.waiting += 1
        try:
            return await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(self._pool, timed), self.seconds)
        except asyncio.TimeoutError:
            raise ChatError(f"The question was not read within {self.seconds:.0f} seconds: ask again later") from None
        finally:
            self.waiting -= 1

    @property
    def stuck(self) -> bool:
        """Every thread is at one question for longer than any should take: nobody is answered any more."""
        late = time.monotonic() - self.seconds
        return sum(began < late for began in list(self._began.values())) >= self._threads


def _compute_alone() -> None:
    """In a thread: where a model is in this process, torch takes one core for the thread."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
