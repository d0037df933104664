"""Reads a mixture: records of text and pictures, and what happens to those that cannot be used.

A mixture is a JSON list, a JSONL file, a Parquet file, a folder of the ``datasets`` library, or a name on the Hugging
Face hub. ``fura_vlm.data.formats`` says what its records look like. What is not as it should be becomes a ``Problem``
and is left out; the rest is read.

Reading takes no torch, and memory for one record at a time (``iter_records``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fura_vlm.data.columns import iter_rows, names_columns
from fura_vlm.data.formats import InvalidRecord, parse
from fura_vlm.data.json_items import iter_items
from fura_vlm.data.messages import DataError, Problem, Record
from fura_vlm.files import write_text


def read_records(
    path: str | os.PathLike, image_folder: str | os.PathLike | None = None
) -> tuple[list[Record], list[Problem]]:
    """Reads a whole mixture into memory: ``iter_records`` as two lists.

    Returns:
        The records that keep to their format, in order, and what was wrong with the others.

    Raises:
        DataError: if there is no such file or image folder, or the file as a whole cannot be read.
    """
    records, problems = [], []
    for record, problem in iter_records(path, image_folder):
        if record is not None:
            records.append(record)
        if problem is not None:
            problems.append(problem)
    return records, problems


def iter_records(
    path: str | os.PathLike, image_folder: str | os.PathLike | None = None, progress: bool = False
) -> Iterator[tuple[Record | None, Problem | None]]:
    """Reads a mixture one record at a time. Images are not looked at: see ``fura_vlm.data.image_checks``.

    Args:
        path: a file as in ``iter_items``, or what ``fura_vlm.data.columns.iter_rows`` takes.
        image_folder: where image paths start; by default the folder of a file, a data set's folder itself, and the
            working directory for a name on the hub. Paths that lead out of it are problems; symbolic links within it
            may lead anywhere.
        progress: show a bar.

    Yields:
        A record, what is wrong with it, or both: a record that is used in part.

    Raises:
        DataError: if there is no such file or image folder, or the file as a whole cannot be read.
    """
    folder = Path(image_folder) if image_folder is not None else default_image_folder(path)
    if not folder.is_dir():
        raise DataError(f"The image folder {folder} does not exist: give the folder where image paths start")
    empty = True
    for place, item in iter_elements(path, progress):
        empty = False
        if isinstance(item, json.JSONDecodeError):
            yield None, Problem(str(path), place, "", f"the line is not valid JSON ({item})")
            continue
        identity = str(item["id"]) if isinstance(item, dict) and item.get("id") is not None else place
        identity = identity.encode(errors="backslashreplace").decode()  # half a surrogate pair, escaped again
        try:
            parsed = parse(item, folder)
        except InvalidRecord as reason:
            yield None, Problem(str(path), place, identity, str(reason))
        else:
            record = Record(identity, parsed.messages, str(path), place, parsed.extra)
            yield record, record.problem(parsed.note, skipped=False) if parsed.note else None
    if empty:
        raise DataError(f"{path} holds no records: it should be a list of them, each with conversations or messages")


def iter_elements(path: str | os.PathLike, progress: bool = False) -> Iterator[tuple[str, Any]]:
    """The place and the content of each element of a mixture, whatever holds it.

    Raises:
        DataError: if it cannot be read.
    """
    return iter_rows(path, progress) if names_columns(path) else iter_items(path, progress)


def default_image_folder(path: str | os.PathLike) -> Path:
    """Where the image paths of a mixture start if nobody says."""
    path = Path(path)
    if path.is_dir():
        return path
    return path.parent if path.exists() or not names_columns(path) else Path()


def report_problems(problems: list[Problem], kept: int, path: str | os.PathLike, strict: bool = False) -> str:
    """Writes all problems to ``path``, a JSON object a line, and says in one line how many there are.

    Args:
        problems: those of ``read_records``, of ``check_images`` and of the dataset.
        kept: how many records can be used.
        path: the file to write; it is written even if it stays empty.
        strict: records that are left out are an error.

    Returns:
        One line for the screen, or ``""`` if there is nothing to say.

    Raises:
        DataError: if no record can be used, or if ``strict`` and one is left out.
    """
    write_text(path, "".join(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems))

    skipped = [problem for problem in problems if problem.skipped]
    partly = len(problems) - len(skipped)
    total = kept + len(skipped)
    first = "; ".join(f"{p.place} of {p.file} (id {p.record}): {p.reason}" for p in skipped[:3])
    if not kept:
        raise DataError(f"None of the {total:,} records can be used, see {path}. The first: {first}")
    if strict and skipped:
        raise DataError(
            f"{len(skipped):,} of {total:,} records cannot be used, see {path}: correct them, or "
            f"train without --strict to leave them out. The first: {first}"
        )
    said = [f"{len(skipped):,} of {total:,} records left out"] if skipped else []
    said += [f"{partly:,} used in part"] if partly else []
    return f"{', '.join(said)}: see {path}" if said else ""
