"""The LLaVA data format, and what happens to records that break it.

A mixture is a JSON list or a JSONL file of records::

    {"id": "1", "image": "coco/train2017/1.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                       {"from": "gpt", "value": "A cat."}, ...]}

``image`` is optional and lies within the image folder. What is not as it should be becomes a ``Problem`` and
is left out; the rest is read. A record is used if

- its turns alternate between human and gpt and end with gpt. A gpt turn before the first question is left
  out, as LLaVA v1.5 does, and noted;
- every question and every answer is text that is not blank;
- it has an image and exactly one ``<image>``, in a question, or neither. (LLaVA's scripts take several as
  one.)

Reading takes no torch.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from fura_vlm.data.images import MAX_PIXELS, ImageError, check_image
from fura_vlm.errors import FuraVLMError

IMAGE = "<image>"
"""Where the image goes in a conversation."""

DECODE_UP_TO = 10_000
"""With ``verify="auto"``, mixtures of at most this many different images have them all decoded beforehand."""

Verify = Literal["auto", "decode", "header", "none"]


class DataError(FuraVLMError):
    """A mixture that cannot be used. The message is one sentence: the file, the reason and the way out."""


class Turn(NamedTuple):
    """One turn of a conversation: ``role`` is ``"human"`` or ``"gpt"``."""

    role: str
    value: str


@dataclass(frozen=True, slots=True)
class Record:
    """A record that keeps to the format.

    Args:
        id: the record's ``id``, or where it stands in its file if it has none. Need not be unique.
        image: the path as the record gives it, or ``None`` for text only.
        image_path: ``image`` joined to the image folder, or ``None``.
        conversations: human and gpt in turn, at least one of each.
        file: the file it was read from.
        place: where in ``file``, ``"record 3"`` or ``"line 3"``, counted from 1.
        extra: the keys that the format does not know.
    """

    id: str
    image: str | None
    image_path: str | None
    conversations: tuple[Turn, ...]
    file: str = ""
    place: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def problem(self, reason: str, skipped: bool = True) -> Problem:
        return Problem(self.file, self.place, self.id, reason, skipped)

    def __str__(self) -> str:
        return f"{self.file}, {self.place} (id {self.id})"


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a record. ``skipped``: it is left out; otherwise it is used in part."""

    file: str
    place: str
    record: str
    reason: str
    skipped: bool = True


# --------------------------------------------------------------------------------------------------- reading


def read_records(
    path: str | os.PathLike, image_folder: str | os.PathLike | None = None
) -> tuple[list[Record], list[Problem]]:
    """Reads a mixture. The content tells JSON from JSONL. Images are not looked at: see ``check_images``.

    Args:
        path: the file, in UTF-8.
        image_folder: where image paths start; by default the folder of ``path``. Paths that lead out of it
            are problems; symbolic links within it may lead anywhere.

    Returns:
        The records that keep to the format, in order, and what was wrong with the others.

    Raises:
        DataError: if there is no such file or image folder, or the file as a whole cannot be read.
    """
    path = Path(path)
    folder = Path(image_folder) if image_folder is not None else path.parent
    if not folder.is_dir():
        raise DataError(f"The image folder {folder} does not exist: give the folder where image paths start")
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path} is empty: it should hold records in the LLaVA format")
    records, problems = [], []
    for place, item in _items(path, text):
        if isinstance(item, json.JSONDecodeError):
            problems.append(Problem(str(path), place, "", f"the line is no valid JSON ({item})"))
            continue
        identity = str(item["id"]) if isinstance(item, dict) and item.get("id") is not None else place
        try:
            record, note = _parse(item, identity, place, path, folder)
        except _Invalid as reason:
            problems.append(Problem(str(path), place, identity, str(reason)))
        else:
            records.append(record)
            if note:
                problems.append(record.problem(note, skipped=False))
    if not records and not problems:
        raise DataError(f"{path} holds no records: it should be a list of records in the LLaVA format")
    return records, problems


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 at byte {error.start}: convert it, for example with "
            "iconv -f LATIN1 -t UTF-8, if it is Latin-1"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check data_path") from error


def _items(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Place and parsed record; for a bad line of a JSONL file the error in the record's place."""
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except json.JSONDecodeError as error:
            if text.rstrip().endswith("]") and error.pos < len(text.rstrip()):
                where = f"line {error.lineno}, column {error.colno}"
                reason = f"{path} is no valid JSON at {where} ({error.msg}): correct it there"
            else:
                last = text.rstrip().count("\n") + 1
                reason = f"{path} is cut off at line {last}, inside the list: fetch or write it again"
            raise DataError(reason) from error
        except RecursionError as error:
            raise DataError(f"{path} is nested too deeply for a list of records: check data_path") from error
        yield from ((f"record {number}", item) for number, item in enumerate(items, 1))
        return
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    parsed = [(place, _parse_line(line)) for place, line in lines]
    if all(isinstance(item, json.JSONDecodeError) for _, item in parsed):
        raise DataError(f"{path} is neither a JSON list nor JSONL, one record a line: check data_path")
    yield from parsed


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return error


# ------------------------------------------------------------------------------------------------ validation


class _Invalid(Exception):
    """Why a record cannot be used."""


def _parse(item: Any, identity: str, place: str, path: Path, folder: Path) -> tuple[Record, str | None]:
    """The record, and a note if it is used in part only."""
    if not isinstance(item, dict):
        raise _Invalid(f"a record is an object with conversations, this is {_kind(item)}")
    image, image_path = _image(item.get("image"), folder)
    turns, note = _turns(item.get("conversations"))
    count = sum(turn.value.count(IMAGE) for turn in turns)
    if any(IMAGE in turn.value for turn in turns if turn.role == "gpt"):
        raise _Invalid(f"{IMAGE} in an answer: it belongs in a question")
    if image is None and count:
        raise _Invalid(f"{IMAGE} in the conversation but no image: name the image, or take {IMAGE} out")
    if image is not None and not count:
        raise _Invalid(f"an image but no {IMAGE} in the conversation: put {IMAGE} into the first question")
    if count > 1:
        raise _Invalid(f"{count} times {IMAGE} for one image: keep the first")
    extra = {key: value for key, value in item.items() if key not in ("id", "image", "conversations")}
    return Record(identity, image, image_path, turns, str(path), place, extra), note


def _image(image: Any, folder: Path) -> tuple[str | None, str | None]:
    if image is None:
        return None, None
    if not isinstance(image, str) or not image:
        raise _Invalid(f"image should be a path, it is {_kind(image) if image != '' else 'empty'}")
    joined = os.path.normpath(os.path.join(folder, image))
    # By name only: links within the image folder may lead elsewhere, as COCO often does.
    if not Path(os.path.abspath(joined)).is_relative_to(os.path.abspath(folder)):
        raise _Invalid(f"the image path {image!r} leads out of the image folder {folder}")
    return image, joined


def _turns(conversations: Any) -> tuple[tuple[Turn, ...], str | None]:
    if conversations is None:
        raise _Invalid("no conversations")
    if not isinstance(conversations, list):
        raise _Invalid(f"conversations should be a list of turns, it is {_kind(conversations)}")
    turns = tuple(_turn(number, turn) for number, turn in enumerate(conversations, 1))
    note, first = None, 1
    if turns and turns[0].role == "gpt":
        turns, note, first = turns[1:], "the gpt turn before the first question is left out", 2
    if not turns:
        raise _Invalid("conversations without a question")
    for number, turn, expected in zip(itertools.count(first), turns, itertools.cycle(("human", "gpt"))):
        if turn.role != expected:
            raise _Invalid(f"turns {number - 1} and {number} are both from {turn.role}")
        if not turn.value.strip():
            raise _Invalid(f"turn {number} is an empty {'question' if turn.role == 'human' else 'answer'}")
    if turns[-1].role == "human":
        raise _Invalid("the last question has no answer")
    return turns, note


def _turn(number: int, turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise _Invalid(f"turn {number} should be an object with from and value, it is {_kind(turn)}")
    role, value = turn.get("from"), turn.get("value")
    if role not in ("human", "gpt"):
        raise _Invalid(f"turn {number} is from {role!r}: roles are human and gpt")
    if not isinstance(value, str):
        raise _Invalid(f"the value of turn {number} should be text, it is {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write these, nobody can tokenize them
        raise _Invalid(f"turn {number} has half of a surrogate pair, which is no character") from None
    return Turn(role, value)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "missing"}
    return kinds.get(type(value), "a number")


# ---------------------------------------------------------------------------------------------------- images


def check_images(
    records: Iterable[Record], verify: Verify = "auto", max_pixels: int = MAX_PIXELS, progress: bool = True
) -> tuple[list[Record], list[Problem]]:
    """Checks the image of each record, every file once, in threads.

    Args:
        records: what ``read_records`` gave.
        verify: ``"decode"`` decodes every image and so finds truncated ones too; ``"header"`` checks that it
            exists, is an image and not too large; ``"none"`` checks nothing; ``"auto"`` decodes up to
            ``DECODE_UP_TO`` different images and reads headers beyond. What is not found here is an error of
            the data loader later.
        max_pixels: images of this many pixels or more are refused.
        progress: show a bar if there are many.

    Returns:
        The records that can be used and the problems of the others.
    """
    records = list(records)
    paths = list(dict.fromkeys(record.image_path for record in records if record.image_path))
    if verify == "none":
        return records, []
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
    good = [record for record in records if record.image_path not in broken]
    bad = [record for record in records if record.image_path in broken]
    return good, [record.problem(broken[record.image_path]) for record in bad]


# ------------------------------------------------------------------------------------------------ the report


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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    lines = "".join(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems)
    temporary.write_text(lines, "utf-8", errors="backslashreplace")  # half a surrogate pair, escaped again
    os.replace(temporary, path)

    skipped = [problem for problem in problems if problem.skipped]
    partly = len(problems) - len(skipped)
    total = kept + len(skipped)
    first = "; ".join(f"{p.place} of {p.file} (id {p.record}): {p.reason}" for p in skipped[:3])
    if not kept:
        raise DataError(f"None of the {total:,} records can be used, see {path}. The first: {first}")
    if strict and skipped:
        raise DataError(
            f"{len(skipped):,} of {total:,} records cannot be used, see {path}: correct them, or leave "
            f"them out by training without strict. The first: {first}"
        )
    said = [f"{len(skipped):,} of {total:,} records left out"] if skipped else []
    said += [f"{partly:,} used in part"] if partly else []
    return f"{', '.join(said)}: see {path}" if said else ""
