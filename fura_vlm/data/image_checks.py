"""Checks the pictures of records before training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from tqdm import tqdm

from fura_vlm.data.images import MAX_PIXELS, ImageError, check_image
from fura_vlm.data.messages import Problem, Record

DECODE_UP_TO = 10_000
"""With ``verify="auto"``, all images are decoded beforehand if a mixture has at most this many different ones."""

Verify = Literal["auto", "decode", "header", "none"]


def check_images(
    records: Iterable[Record], verify: Verify = "auto", max_pixels: int = MAX_PIXELS, progress: bool = True
) -> tuple[list[Record], list[Problem]]:
    """Checks the pictures of each record, every file once.

    Args:
        records: what ``read_records`` gave.
        verify, max_pixels, progress: as in ``check_paths``.

    Returns:
        The records that can be used and the problems of the others.
    """
    records = list(records)
    paths = list(dict.fromkeys(path for record in records for path in record.pictures))
    broken = check_paths(paths, verify, max_pixels, progress)
    good, problems = [], []
    for record in records:
        if reason := next((broken[path] for path in record.pictures if path in broken), None):
            problems.append(record.problem(reason))
        else:
            good.append(record)
    return good, problems


def check_paths(
    paths: Sequence[str], verify: Verify = "auto", max_pixels: int = MAX_PIXELS, progress: bool = True
) -> dict[str, str]:
    """Checks image files in threads.

    Args:
        paths: the files, each once.
        verify: ``"decode"`` decodes every image and so finds truncated ones too; ``"header"`` checks that it
            exists, is an image and not too large; ``"none"`` checks nothing; ``"auto"`` decodes up to
            ``DECODE_UP_TO`` different images and reads headers beyond. What is not found here is an error of
            the data loader later.
        max_pixels: images of this many pixels or more are refused.
        progress: show a bar if there are many.

    Returns:
        By path, what is wrong with those that cannot be used.
    """
    if verify == "none":
        return {}
    decode = verify == "decode" or verify == "auto" and len(paths) <= DECODE_UP_TO

    def reason(path: str) -> str | None:
        try:
            return check_image(path, decode, max_pixels)
        except ImageError as error:
            return str(error)

    broken = {}
    # Few threads, as each may hold a whole decoded image; slices, so that the queue stays short.
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(paths), desc="images", disable=not progress or len(paths) < 5000) as bar,
    ):
        for start in range(0, len(paths), 10_000):
            part = paths[start : start + 10_000]
            for path, found in zip(part, pool.map(reason, part), strict=True):
                bar.update()
                if found:
                    broken[path] = found
    return broken
