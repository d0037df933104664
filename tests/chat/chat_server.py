"""The chat in a process of its own, and files to try on it."""

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from PIL import Image

from fura_vlm.chat.pictures import MAX_PIXELS

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "data" / "tiny-llava")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serving(*arguments: str, files: int | None = None):
    """The chat command in a process of its own, which may have so many files open. Yields its address and itself."""
    port = free_port()
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment["OMP_NUM_THREADS"] = "1"
    process = subprocess.Popen(
        [sys.executable, "-m", "fura_vlm.cli", "chat", "--web", "--port", str(port), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if files is not None:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (files, files))
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                    assert json.load(answer)["status"] == "ok"
                break
            except OSError:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.1)
        yield address, process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def bad_files(folder):
    """Files that are no pictures to work with, and what is said of them."""
    (folder / "text.png").write_text("not a picture")
    (folder / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>')
    Image.new("1", (5_000, MAX_PIXELS // 5_000)).save(folder / "huge.png")
    Image.new("RGB", (80, 80), "red").save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:90])
    (folder / "empty.png").touch()
    return {
        "text.png": "not an image",
        "drawing.svg": "not an image",
        "huge.png": "25,000,000 or more are refused",
        "cut.png": "truncated or damaged",
        "empty.png": "is empty",
        "gone.png": "does not exist",
    }
