"""Users' pictures, read by a process of its own that may take little memory and little time.

What a file costs to decode is told neither by its size nor by its header: a JPEG of a few hundred kilobytes may have
ten thousand scans, a TIFF of 16 x 16 pixels tiles of a gigabyte, a GIF megabytes of comments. A thread that decodes
cannot be ended, a process can. It starts with the first picture, reads one at a time and ends with its parent.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fura_vlm.data.images import ImageError, load_image, upright_size

MAX_PIXELS = 25_000_000
"""Pixels of a picture: what a good camera takes. Decoded they are 75 MB."""
FORMATS = "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"
"""What browsers and cameras send. Pillow knows forty more; each is a parser that a stranger's file would reach."""
SECONDS = 8
"""Of a processor's time for one picture. One of 25 megapixels takes one to three."""
WALL_SECONDS = 60
"""In which a picture must have been read, however busy the machine is."""
MEMORY = 1_500_000_000
"""Bytes for one picture. 25 megapixels of 16 bits take half of it."""
KEPT = 64_000_000
"""Bytes of pictures that are kept: each question reads those of its conversation again."""
KEPT_HEADERS = 10_000


class Header(NamedTuple):
    """What is known of a picture besides its pixels.

    Attributes:
        size: width and height, upright.
        animation: whether it has more than one frame. They are not counted: there may be millions.
    """

    size: tuple[int, int]
    animation: bool


class Pictures:
    """Reads pictures, one at a time. Thread-safe.

    Args:
        seconds: of a processor's time for one picture.
    """

    def __init__(self, seconds: float = SECONDS):
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._headers: OrderedDict[tuple, Header] = OrderedDict()
        self._kept: OrderedDict[tuple, Image.Image] = OrderedDict()

    def read(self, path: str, enough: tuple[int, int] | None = None) -> Image.Image:
        """A picture as 8-bit RGB, upright; of twice ``enough`` or more at a half, a third, ... of its size.

        Raises:
            ImageError: if it cannot be used. The message begins with the file's name, and not with where it lies.
        """
        with self._lock:
            key = (*_version(path), enough)
            image = self._kept.pop(key, None) or self._ask(path, enough)
            self._kept[key] = image
            while sum(kept.width * kept.height * 3 for kept in self._kept.values()) > KEPT:
                self._kept.popitem(last=False)
            return image.copy()

    def header(self, path: str) -> Header:
        """What the header says of a picture that can be read; nothing is decoded.

        Raises:
            ImageError: as ``read``.
        """
        with self._lock:
            if _version(path) not in self._headers:
                self._ask(path, None, decode=False)
            return self._headers[_version(path)]

    def close(self) -> None:
        """Ends the process. The next picture starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, path: str, enough: tuple[int, int] | None, decode: bool = True) -> Image.Image | None:
        if self._process is None:
            self._process = self._start()
        request = {"path": os.fspath(path), "enough": enough, "decode": decode, "seconds": self._seconds}
        guard = threading.Timer(WALL_SECONDS, self._process.kill)
        guard.start()
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            answer = json.loads(line) if line.endswith(b"\n") else None
            pixels = self._process.stdout.read(answer.get("bytes", 0)) if answer else b""
        except BrokenPipeError:
            answer, pixels = None, b""
        finally:
            guard.cancel()
        if answer is None or len(pixels) < answer.get("bytes", 0):
            self.close()
            raise ImageError(
                f"{Path(path).name} takes too much time or memory to decode: save it anew as JPEG, or make it smaller"
            )
        if "error" in answer:
            raise ImageError(answer["error"].replace(os.fspath(path), Path(path).name))
        self._headers[_version(path)] = Header(tuple(answer["size"]), answer["animation"])
        while len(self._headers) > KEPT_HEADERS:
            self._headers.popitem(last=False)
        return Image.frombytes("RGB", answer["decoded"], pixels) if decode else None

    @staticmethod
    def _start() -> subprocess.Popen:
        # One thread and one arena of memory: what others would reserve counts as taken.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "fura_vlm.chat.pictures"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what a decoder says of a stranger's file must not fill the log
            start_new_session=True,  # Ctrl-C is for the parent
        )
        if process.stdout.readline() != b"ready\n":
            process.kill()
            raise RuntimeError("The process that reads pictures does not start")
        return process


def _version(path: str) -> tuple:
    """A file as it is now; a missing one is looked for by whoever reads it."""
    try:
        status = os.stat(path)
    except OSError:
        return path, None, None
    return path, status.st_mtime_ns, status.st_size


def _look(path: str, enough: list[int] | None, decode: bool) -> tuple[dict, bytes]:
    """The answer to one request and the pixels that follow it, in the process that reads."""
    image = load_image(path, MAX_PIXELS, formats=FORMATS, draft=enough and tuple(enough)) if decode else None
    with Image.open(path, formats=FORMATS) as opened:
        # A phone's JPEG with a preview ("MPO") is no animation.
        animation = bool(getattr(opened, "is_animated", False) and opened.format != "MPO")
        answer = {"size": upright_size(opened), "animation": animation}
    pixels = image.tobytes() if decode else b""
    return answer | {"bytes": len(pixels), "decoded": image and image.size}, pixels


def _serve() -> None:
    """Answers requests from the standard input, a line each, until it ends. Past its limits it is killed or ends."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    answers = sys.stdout.buffer
    answers.write(b"ready\n")
    answers.flush()
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # nothing handles its signal, which ends the process
        try:
            answer, pixels = _look(request["path"], request["enough"], request["decode"])
        except ImageError as error:
            if isinstance(error.__cause__, MemoryError) or "decoder error -9" in str(error.__cause__):  # Pillow's code
                return
            answer, pixels = {"error": str(error)}, b""
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.write(pixels)
        answers.flush()


if __name__ == "__main__":
    _serve()
