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
- it has an image and one question with ``<image>``, or neither. Several in one question count as one, as they
  do for LLaVA v1.5. In a record without image, an ``<image>`` within other text is text (ShareGPT has such
  code), but at the beginning or end of a question it says that an image was forgotten.

Reading takes no torch, and memory for one record at a time (``iter_records``).
"""

from __future__ import annotations

import codecs
import itertools
import json
import os
import re
import secrets
import shlex
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from fura_vlm.data.encodings import guess_encoding, wide_encoding
from fura_vlm.data.images import MAX_PIXELS, ImageError, check_image
from fura_vlm.data.media import unused_mark, unused_media
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
    """Reads a whole mixture into memory: ``iter_records`` as two lists.

    Returns:
        The records that keep to the format, in order, and what was wrong with the others.

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
    """Reads a mixture one record at a time. Images are not looked at: see ``check_images``.

    Args:
        path: the file, as in ``iter_items``.
        image_folder: where image paths start; by default the folder of ``path``. Paths that lead out of it
            are problems; symbolic links within it may lead anywhere.
        progress: show a bar.

    Yields:
        A record, what is wrong with it, or both: a record that is used in part.

    Raises:
        DataError: if there is no such file or image folder, or the file as a whole cannot be read.
    """
    path = Path(path)
    folder = Path(image_folder) if image_folder is not None else path.parent
    if not folder.is_dir():
        raise DataError(f"The image folder {folder} does not exist: give the folder where image paths start")
    empty = True
    for place, item in iter_items(path, progress):
        empty = False
        if isinstance(item, json.JSONDecodeError):
            yield None, Problem(str(path), place, "", f"the line is no valid JSON ({item})")
            continue
        identity = str(item["id"]) if isinstance(item, dict) and item.get("id") is not None else place
        identity = identity.encode(errors="backslashreplace").decode()  # half a surrogate pair, escaped again
        try:
            record, note = _parse(item, identity, place, path, folder)
        except InvalidRecord as reason:
            yield None, Problem(str(path), place, identity, str(reason))
        else:
            yield record, record.problem(note, skipped=False) if note else None
    if empty:
        raise DataError(f"{path} holds no records: it should be a list of records in the LLaVA format")


def iter_items(path: str | os.PathLike, progress: bool = False) -> Iterator[tuple[str, Any]]:
    """Parses a JSON list or JSONL file piece by piece, in memory that does not grow with the file.

    Args:
        path: the file, in UTF-8, with or without a byte order mark. The content tells JSON from JSONL.
        progress: show a bar.

    Yields:
        Place (``"record 3"`` or ``"line 3"``) and parsed element; for a bad line of a JSONL file the
        ``json.JSONDecodeError`` in its place.

    Raises:
        DataError: if the file cannot be read, or is neither.
    """
    path = Path(path)
    chunks = _chunks(path, progress)
    start = next((chunk for chunk in chunks if chunk.strip()), "")
    if not start:
        raise DataError(f"{path} is empty: it should hold records in the LLaVA format")
    chunks = itertools.chain([start], chunks)
    # Blank chunks before ``start`` are gone; no file begins with a megabyte of empty lines.
    return _list_items(path, chunks) if start.lstrip().startswith("[") else _line_items(path, chunks)


_CHUNK = 1 << 20  # bytes


def _chunks(path: Path, progress: bool) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = held = 0
    last = b""
    try:
        with (
            path.open("rb") as file,
            tqdm.wrapattr(file, "read", total=path.stat().st_size, desc=path.name, disable=not progress) as counted,
        ):
            while data := counted.read(_CHUNK):
                if done == 0 and (encoding := wide_encoding(data)):
                    raise DataError(f"{path} is {encoding}, not UTF-8: convert it, {_iconv(path, encoding)}")
                last = data
                held = len(decoder.getstate()[0])  # the start of a character that the last chunk has cut
                text = decoder.decode(data)
                yield text.removeprefix("\ufeff") if done == 0 else text
                done += len(data)
            held = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at = done - held + error.start
        encoding, language = guess_encoding(last)
        raise DataError(
            f"{path} is not UTF-8 at byte {at}; it looks like {encoding} ({language}): convert it, "
            f"{_iconv(path, encoding)}"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check data_path") from error


def _iconv(path: Path, encoding: str) -> str:
    new = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return f"for example with iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(str(new))}"


def _list_items(path: Path, chunks: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """The elements of a list, each parsed by the standard library as soon as all of it has been read."""
    parse = json.JSONDecoder().raw_decode
    text, at = "", 0  # what has been read and not parsed, and how far in it we are
    line = column = 0  # where ``text`` begins in the file
    ended = False

    def read(number: int = 1) -> None:
        """Drops what is parsed and reads more."""
        nonlocal text, at, line, column, ended
        newline = text.rfind("\n", 0, at)
        line += text.count("\n", 0, at)
        column = at - newline - 1 if newline >= 0 else column + at
        more = "".join(itertools.islice(chunks, number))
        text, at, ended = text[at:] + more, 0, not more

    def next_character() -> str:
        """The next one that is not blank; "" at the end."""
        nonlocal at
        while True:
            while at < len(text) and text[at] in " \t\r\n":
                at += 1
            if at < len(text) or ended:
                return text[at : at + 1]
            read()

    def broken(error: json.JSONDecodeError) -> DataError:
        left = text.rstrip()
        if ended and not (left.endswith("]") and error.pos < len(left)):
            return DataError(
                f"{path} is cut off at line {line + left.count(chr(10)) + 1}, inside the list: fetch or write it again"
            )
        where = f"line {line + error.lineno}, column {error.colno + (column if error.lineno == 1 else 0)}"
        return DataError(f"{path} is no valid JSON at {where} ({error.msg}): correct it there")

    def expect(character: str) -> None:
        nonlocal at
        if next_character() != character:
            raise broken(json.JSONDecodeError(f"Expecting {character!r}", text, at))
        at += 1

    expect("[")
    for number in itertools.count(1):
        if next_character() == "]":
            break
        if number > 1:
            expect(",")
            next_character()
        pieces = 1
        while True:
            try:
                item, end = parse(text, at)
                if end < len(text) or ended:  # a number at the very end might go on
                    break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(text) - 16
                if ended or not cut:
                    raise broken(error) from error
            except RecursionError as error:
                raise DataError(f"{path} is nested too deeply for a list of records: check data_path") from error
            except ValueError as error:  # Python reads no number of thousands of digits
                raise DataError(f"{path} cannot be read at record {number} ({error}): correct it there") from error
            read(pieces)
            pieces *= 2  # an element of many chunks is not parsed over and over
        at = end
        yield f"record {number}", item
    at += 1
    if next_character():
        raise broken(json.JSONDecodeError("Extra data", text, at))


def _line_items(path: Path, chunks: Iterator[str]) -> Iterator[tuple[str, Any]]:
    number, good, begun = 0, False, []
    for chunk in itertools.chain(chunks, ["\n"]):
        *lines, rest = chunk.split("\n")
        for line in lines:
            line, begun, number = "".join([*begun, line]), [], number + 1
            if line.strip():
                item = _parse_line(line)
                good = good or not isinstance(item, json.JSONDecodeError)
                yield f"line {number}", item
        begun.append(rest)
    if not good:
        raise DataError(f"{path} is neither a JSON list nor JSONL, one record a line: check data_path")


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return error
    except RecursionError:
        return json.JSONDecodeError("nested too deeply", line[:40], 0)
    except ValueError as error:
        return json.JSONDecodeError(str(error), line[:40], 0)


# ------------------------------------------------------------------------------------------------ validation


class InvalidRecord(Exception):
    """Why a record cannot be used."""


def _parse(item: Any, identity: str, place: str, path: Path, folder: Path) -> tuple[Record, str | None]:
    """The record, and a note if it is used in part only."""
    if not isinstance(item, dict):
        raise InvalidRecord(f"a record is an object with conversations, this is {_kind(item)}")
    image, image_path = _image(item.get("image"), folder)
    _refuse_unused_media(item, image)
    turns, note = _turns(item.get("conversations"))
    _refuse_unused_marks(turns)
    if image is None:
        if any(_begins_or_ends_with_image(turn) for turn in turns):
            raise InvalidRecord(f"{IMAGE} in the conversation but no image: name the image, or take {IMAGE} out")
    else:
        if any(IMAGE in turn.value for turn in turns if turn.role == "gpt"):
            raise InvalidRecord(f"{IMAGE} in an answer: it belongs in a question")
        count = sum(IMAGE in turn.value for turn in turns)
        if not count:
            raise InvalidRecord(f"an image but no {IMAGE} in the conversation: put {IMAGE} into the first question")
        if count > 1:
            raise InvalidRecord(f"{count} times {IMAGE} for one image: keep the first")
    extra = {key: value for key, value in item.items() if key not in ("id", "image", "conversations")}
    return Record(identity, image, image_path, turns, str(path), place, extra), note


def _refuse_unused_media(item: dict[str, Any], image: str | None) -> None:
    """A picture under a key that is not read would make a record that looks like text alone."""
    turns = item.get("conversations")
    rest = {key: value for key, value in item.items() if key not in ("image", "conversations", "id")}
    places = [(rest, "")]
    for number, turn in enumerate(turns if isinstance(turns, list) else [], 1):
        if isinstance(turn, dict):
            value = turn.get("value")
            places.append(({k: v for k, v in turn.items() if k not in ("from", "value")}, f" of turn {number}"))
            places.append(({"value": value} if isinstance(value, (dict, list)) else {}, f" of turn {number}"))
    for place, where in places:
        if found := unused_media(place, [image] if image else []):
            raise InvalidRecord(
                f"{found}{where}, which is not read: a picture is the path of its file under image, videos and sound "
                "are not used; move it there, or take it out"
            )


def _refuse_unused_marks(turns: Sequence[Turn]) -> None:
    for number, (question, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        if mark := unused_mark(question.value, answer.value):
            raise InvalidRecord(
                f"{mark} in question {number + 1} is no place for a picture here: write {IMAGE} for a picture under "
                "image, and leave records with videos or sound out"
            )


def _begins_or_ends_with_image(turn: Turn) -> bool:
    value = turn.value.strip()
    return turn.role == "human" and (value.startswith(IMAGE) or value.endswith(IMAGE))


def _image(image: Any, folder: Path) -> tuple[str | None, str | None]:
    if image is None:
        return None, None
    if not isinstance(image, str) or not image:
        raise InvalidRecord(f"image should be a path, it is {_kind(image) if image != '' else 'empty'}")
    return image, image_path(image, folder)


def image_path(image: str, folder: str | os.PathLike) -> str:
    """The file that a record's ``image`` names. It may begin with ``file://``. ``\\`` is read as ``/`` where no file
    has it in its name.

    Raises:
        InvalidRecord: if it leads out of the image folder, is an address, or has half of a surrogate pair.
    """
    path = image.removeprefix("file://")
    if "://" in path or path.startswith("data:"):
        raise InvalidRecord(f"the image {_short(image)} is an address: fetch it, and name the file")
    if "\\" in path and not os.path.isfile(os.path.join(folder, path)):
        path = path.replace("\\", "/")  # as Windows writes it
    if re.match("[A-Za-z]:/", path):
        raise InvalidRecord(f"the image path {image!r} begins at a drive of Windows: write it from the image folder on")
    joined = os.path.normpath(os.path.join(folder, path))
    # By name only: links within the image folder may lead elsewhere, as COCO often does.
    if not Path(os.path.abspath(joined)).is_relative_to(os.path.abspath(folder)):
        raise InvalidRecord(f"the image path {image!r} leads out of the image folder {folder}")
    _refuse_surrogates(image, f"the image path {image!r}")
    return joined


def _short(text: str) -> str:
    return repr(text) if len(text) <= 100 else repr(text[:97] + "...")


def _refuse_surrogates(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write these, nobody can tokenize them, no file has them
        raise InvalidRecord(f"{what} has half of a surrogate pair, which is no character") from None


def _turns(conversations: Any) -> tuple[tuple[Turn, ...], str | None]:
    if conversations is None:
        raise InvalidRecord("no conversations")
    if not isinstance(conversations, list):
        raise InvalidRecord(f"conversations should be a list of turns, it is {_kind(conversations)}")
    turns = tuple(_turn(number, turn) for number, turn in enumerate(conversations, 1))
    note, first = None, 1
    if turns and turns[0].role == "gpt":
        turns, note, first = turns[1:], "the gpt turn before the first question is left out", 2
    if not turns:
        raise InvalidRecord("conversations without a question")
    for number, turn, expected in zip(itertools.count(first), turns, itertools.cycle(("human", "gpt"))):
        if turn.role != expected:
            raise InvalidRecord(f"turns {number - 1} and {number} are both from {turn.role}")
        if not turn.value.strip():
            raise InvalidRecord(f"turn {number} is an empty {'question' if turn.role == 'human' else 'answer'}")
    if turns[-1].role == "human":
        raise InvalidRecord("the last question has no answer")
    return turns, note


def _turn(number: int, turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise InvalidRecord(f"turn {number} should be an object with from and value, it is {_kind(turn)}")
    role, value = turn.get("from"), turn.get("value")
    if role not in ("human", "gpt"):
        raise InvalidRecord(f"turn {number} is from {role!r}: roles are human and gpt")
    if not isinstance(value, str):
        raise InvalidRecord(f"the value of turn {number} should be text, it is {_kind(value)}")
    _refuse_surrogates(value, f"turn {number}")
    return Turn(role, value)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "missing"}
    return kinds.get(type(value), "a number")


# ---------------------------------------------------------------------------------------------------- images


def check_images(
    records: Iterable[Record], verify: Verify = "auto", max_pixels: int = MAX_PIXELS, progress: bool = True
) -> tuple[list[Record], list[Problem]]:
    """Checks the image of each record, every file once.

    Args:
        records: what ``read_records`` gave.
        verify, max_pixels, progress: as in ``check_paths``.

    Returns:
        The records that can be used and the problems of the others.
    """
    records = list(records)
    paths = list(dict.fromkeys(record.image_path for record in records if record.image_path))
    broken = check_paths(paths, verify, max_pixels, progress)
    good = [record for record in records if record.image_path not in broken]
    bad = [record for record in records if record.image_path in broken]
    return good, [record.problem(broken[record.image_path]) for record in bad]


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
    write_text(path, "".join(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems))

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
