"""Files and folders that have their name only when they are whole, and folders that one at a time works in."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

PATIENCE = 10.0  # seconds; the workers of a process that was killed hold on to its lock for some


def unfinished(path: Path) -> Path:
    """The name beside its own, ``NAME.tmp``, of a file or folder that is not whole yet."""
    return path.with_name(path.name + ".tmp")


def finish(building: Path, path: Path) -> None:
    """Gives what is whole its name. What has that name already, a file or a folder with all in it, goes."""
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(building, path)


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Inside, the name to write a file under, which becomes ``path`` when the block ends well and vanishes otherwise:
    nobody ever reads half of it.

    Its folder is made. The name is another one each time: processes may write the same file at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield building
        finish(building, path)
    finally:
        building.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Inside, an empty folder to write in, which becomes ``path`` when the block ends well and vanishes otherwise."""
    building = unfinished(path)
    shutil.rmtree(building, ignore_errors=True)  # of one that was killed
    building.mkdir(parents=True)
    try:
        yield building
        finish(building, path)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file in UTF-8, as a `whole_file`."""
    with whole_file(path) as building:
        building.write_text(text, "utf-8", errors="backslashreplace")  # half a surrogate pair, escaped again


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
