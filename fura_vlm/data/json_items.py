"""The elements of a JSON list or JSONL file, piece by piece, in memory that does not grow with the file."""

from __future__ import annotations

import codecs
import itertools
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fura_vlm.data.encodings import guess_encoding, is_damaged_utf8, packed, wide_encoding
from fura_vlm.data.messages import DataError


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
        raise DataError(f"{path} is empty: it should hold records, as a JSON list or one on each line")
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
                if done == 0 and (found := packed(data)):
                    raise DataError(f"{path} is {found[0]}, not JSON: {found[1]}")
                last = data
                held = len(decoder.getstate()[0])  # the start of a character that the last chunk has cut
                text = decoder.decode(data)
                yield text.lstrip("\ufeff") if done == 0 else text
                done += len(data)
            held = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at = done - held + error.start
        if error.reason == "unexpected end of data":
            raise DataError(f"{path} is cut off within a character, at byte {at}: fetch or write it again") from error
        if is_damaged_utf8(last):
            raise DataError(f"{path} is damaged at byte {at}, which is not UTF-8: fetch or write it again") from error
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
        return DataError(f"{path} is not valid JSON at {where} ({error.msg}): correct it there")

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
        raise DataError(f"{path} is neither a JSON list nor JSONL (one record on each line): check data_path")


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line.lstrip("\ufeff"))  # where files with byte order marks were joined
    except json.JSONDecodeError as error:
        return error
    except RecursionError:
        return json.JSONDecodeError("nested too deeply", line[:40], 0)
    except ValueError as error:
        return json.JSONDecodeError(str(error), line[:40], 0)
