"""Every image of a mixture, decoded: what is missing, broken, or there and not used, by source.

    <report_dir>/images.jsonl   an object for each image that is missing, broken or extra, with the reason
    <report_dir>/good.txt       size, time of change (ns) and name of each image that has been decoded

A second run decodes what has changed since, what was not good, and what an interruption has left; without
``good.txt`` it decodes all. The source of an image is the first folder of its path: coco, gqa, ocr_vqa, ...
"""

from __future__ import annotations

import json
import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from fura_vlm.data.columns import address
from fura_vlm.data.config import VerifyConfig
from fura_vlm.data.formats import InvalidRecord, image_path, named_pictures
from fura_vlm.data.images import ImageError, check_image, find_image
from fura_vlm.data.locate import image_hint, source_of
from fura_vlm.data.messages import DataError
from fura_vlm.data.records import default_image_folder, iter_elements
from fura_vlm.families.messages import Picture
from fura_vlm.files import write_text

_AT_ONCE = 64  # images that a process gets


@dataclass
class Counts:
    """Of a source: different images that the mixture names, how many of them are what, and files it does not name."""

    images: int = 0
    good: int = 0
    missing: int = 0
    broken: int = 0
    extra: int = 0


class _Seen(NamedTuple):
    """What a process saw of an image; ``path`` is ``None`` if it is missing, ``reason`` if it is good."""

    name: str
    path: str | None
    state: tuple[int, int]
    reason: str | None


def verify(config: VerifyConfig) -> None:
    """Verifies a mixture's images and prints a table.

    Raises:
        DataError: if an image is missing or broken, or if the mixture cannot be read.
        SystemExit: 130 after Ctrl-C or SIGTERM; the same command goes on.
    """
    data_path = Path(config.data_path)
    folder = default_image_folder(data_path) if config.image_folder is None else Path(config.image_folder)
    beside = data_path if data_path.exists() else Path(data_path.name)  # of a name on the hub: here
    report = Path(config.report_dir) if config.report_dir else beside.with_name(beside.name + ".images")
    workers = len(os.sched_getaffinity(0)) if config.workers is None else config.workers
    if workers < 1:
        raise DataError(f"workers is {workers}: give at least 1")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that no process is left behind
    try:
        found = verify_images(data_path, folder, report, workers)
    except KeyboardInterrupt:
        print(f"Stopped; the same command goes on from {report / 'good.txt'}")
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)

    total = Counts(*(sum(column) for column in zip(*map(astuple, found.values()), strict=True)))
    table = Table("source", *(field for field in Counts.__dataclass_fields__))
    for name, counts in [*sorted(found.items()), ("all", total)]:
        table.add_row(name, *(f"{number:,}" for number in astuple(counts)), end_section=name == max(found))
    for column in table.columns[1:]:
        column.justify = "right"
    console = Console()
    console.print(table)
    for line in _hints(report, found, folder):
        console.print(line, style="yellow", soft_wrap=True, highlight=False)
    if total.missing or total.broken:
        raise DataError(
            f"{total.missing:,} images are missing and {total.broken:,} are broken of the {total.images:,} that "
            f"{data_path} names in {folder}: see {report / 'images.jsonl'}"
        )
    console.print(f"All {total.images:,} images can be used. Train with --image_folder {folder}", soft_wrap=True)


def _hints(report: Path, found: dict[str, Counts], folder: Path) -> Iterator[str]:
    with (report / "images.jsonl").open(encoding="utf-8") as lines:
        missing = defaultdict(list)
        for row in map(json.loads, lines):
            if row["state"] == "missing":
                missing[row["source"]].append(row["image"])
    for source, names in missing.items():
        if len(names) == found[source].images:
            yield f"None of {len(names):,} images in {source}: {image_hint(folder, names)}"


def verify_images(
    data_path: str | os.PathLike,
    image_folder: str | os.PathLike,
    report_dir: str | os.PathLike,
    workers: int,
    progress: bool = True,
) -> dict[str, Counts]:
    """Decodes the images of a mixture in parallel processes and writes the report.

    Args:
        data_path: the mixture, as in ``iter_records``.
        image_folder: where its image paths start.
        report_dir: the folder for ``images.jsonl`` and ``good.txt``.
        workers: processes.
        progress: show a bar.

    Returns:
        The counts by source.

    Raises:
        DataError: if the mixture or the folder cannot be read, or if a process dies.
    """
    folder, report = Path(image_folder), Path(report_dir)
    if not folder.is_dir():
        raise DataError(f"The image folder {folder} does not exist: give the folder where image paths start")
    names = _images_of(data_path, folder, progress)
    report.mkdir(parents=True, exist_ok=True)
    known = _read_good(report / "good.txt")
    counts: dict[str, Counts] = defaultdict(Counts)
    bad, present = [], set()
    with (report / "good.txt").open("a", encoding="utf-8") as good:
        for seen in _look_at(folder, names, known, workers, progress):
            of = counts[source_of(seen.name)]
            of.images += 1
            if seen.path is None:
                of.missing += 1
                bad.append((seen.name, "missing", "there is no such file"))
                continue
            present.add(os.path.normpath(seen.path))
            if seen.reason:
                of.broken += 1
                bad.append((seen.name, "broken", seen.reason))
                continue
            of.good += 1
            if known.get(seen.name) != seen.state:
                good.write(f"{seen.state[0]} {seen.state[1]} {seen.name}\n")
    sources = {source_of(seen) for seen in names if not address(seen)} - {os.pardir}
    for name in _extra(folder, sources, present):
        counts[source_of(name)].extra += 1
        bad.append((name, "extra", "the mixture does not name it"))
    rows = (
        {"source": source_of(name), "image": name, "state": state, "reason": reason}
        for name, state, reason in sorted(bad, key=lambda row: (source_of(row[0]), row[1], row[0]))
    )
    write_text(report / "images.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return dict(counts)


def _images_of(data_path: str | os.PathLike, folder: Path, progress: bool) -> list[str]:
    """The different images that a mixture names, also in records that are wrong otherwise, as paths from ``folder``."""
    images = (image for _, item in iter_elements(data_path, progress) for image in named_pictures(item))
    names = list(dict.fromkeys(i.source if isinstance(i, Picture) else _name(i, folder) for i in images))
    if not names:
        raise DataError(f"{data_path} names no images: there is nothing to verify")
    return names


def _name(image: str, folder: Path) -> str:
    """The path from ``folder``; what is no path of this machine stays as it is, for the report."""
    path = os.path.normpath(image)
    if not any(odd in image for odd in ":\\") and not path.startswith((os.sep, os.pardir)):
        return path  # nearly all, and this is quick
    try:
        path = image_path(image, folder)
    except InvalidRecord:
        if ":" in image:
            return image
    return os.path.relpath(folder / path, folder)


def _read_good(path: Path) -> dict[str, tuple[int, int]]:
    known = {}
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                fields = line.rstrip("\n").split(" ", 2)
                if len(fields) == 3 and line.endswith("\n"):  # the last line may have been cut
                    known[fields[2]] = (int(fields[0]), int(fields[1]))
    return known


def _look_at(folder: Path, names: list[str], known: dict, workers: int, progress: bool) -> Iterator[_Seen]:
    def tasks():
        for start in range(0, len(names), _AT_ONCE):
            part = names[start : start + _AT_ONCE]
            yield str(folder), part, [known.get(name) for name in part]

    pool = ProcessPoolExecutor(workers, initializer=_leave_signals)
    try:
        with tqdm(total=len(names), desc="images", unit="images", disable=not progress) as bar:
            for seen in pool.map(_look, *zip(*tasks(), strict=True)):
                yield from seen
                bar.update(len(seen))
    except BrokenProcessPool as error:
        raise DataError(
            "A decoding process was killed, perhaps because memory ran out: start the same command again with "
            f"--workers below {workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_signals() -> None:
    """Ctrl-C is the business of the process that gives out the work; what is not begun is dropped there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _look(folder: str, names: list[str], known: list[tuple[int, int] | None]) -> list[_Seen]:
    """In a process of its own."""
    seen = []
    for name, before in zip(names, known, strict=True):
        try:
            path = find_image(name if address(name) else image_path(name, folder))
        except InvalidRecord as reason:
            seen.append(_Seen(name, "", (0, 0), str(reason)))
            continue
        if path is None:
            seen.append(_Seen(name, None, (0, 0), None))
            continue
        stored = address(path)
        status = os.stat(stored.file if stored else path)
        state, reason = (status.st_size, status.st_mtime_ns), None
        if state != before:
            try:
                check_image(path, decode=True)
            except ImageError as error:
                reason = str(error)
        seen.append(_Seen(name, path, state, reason))
    return seen


def _extra(folder: Path, sources: set[str], present: set[str]) -> Iterator[str]:
    """Image files in the folders of the sources that are none of ``present``."""
    suffixes, been = set(Image.registered_extensions()), set()
    for source in sources:
        for where, folders, files in os.walk(folder / source, followlinks=True):
            real = os.path.realpath(where)
            if real in been or source == ".":  # links may lead in circles; beside the mixture there is all sorts
                folders.clear()
            if real in been:
                continue
            been.add(real)
            for file in files:
                path = os.path.join(where, file)
                if os.path.splitext(file)[1].lower() in suffixes and os.path.normpath(path) not in present:
                    yield os.path.relpath(path, folder)
