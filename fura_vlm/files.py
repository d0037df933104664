"""Small helpers for files."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

PATIENCE = 10.0  # seconds; the workers of a process that was killed hold on to its lock for some


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file in UTF-8 under a temporary name and renames it, so that nobody ever reads half of it.

    Its folder is made. The temporary name is another one each time: processes may write the same file at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, "utf-8", errors="backslashreplace")  # half a surrogate pair, escaped again
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path, by_one: Callable[[Callable[[], None]], object], refusal: Exception) -> Iterator[None]:
    """Makes a folder and keeps others out of it: two at once would write over each other's files.

    Args:
        by_one: has one of several processes do what it is given, and all of them end if that fails.
        refusal: raised if somebody is at work there.
    """
    lock = FileLock(folder / "lock")

    def take() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise refusal from None

    by_one(take)
    try:
        yield
    finally:
        lock.release()
