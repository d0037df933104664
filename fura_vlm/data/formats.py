"""The formats of records, and how each becomes messages.

LLaVA and ShareGPT::

    {"id": "1", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                         {"from": "gpt", "value": "A cat."}, ...]}

Messages, as TRL and most data sets of the hub have them; ``content`` is text or a list of parts::

    {"images": ["1.jpg"],
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}]}

``prompt`` and ``completion`` (TRL), ``texts`` with ``user`` and ``assistant`` (the Cauldron, FineVision), and Alpaca::

    {"instruction": "Add.", "input": "2 and 3", "output": "5"}

Each may have ``image`` or ``images``, paths within the image folder or pictures stored in a column, and ``system``.
A record is used if

- its turns alternate between user and assistant and end with the assistant; the system may speak first. A turn of the
  assistant before the first question is left out, as LLaVA v1.5 does, and noted;
- every turn has text that is not blank, or a picture;
- it has as many pictures as places for them: parts ``{"type": "image"}``, or ``<image>`` in the text of questions where
  there are no such parts. Where messages are plain text without any ``<image>``, the pictures stand before the first
  question, as in TRL;
- nothing in it says that there are pictures, videos or sound that are not read (``fura_vlm.data.media``).

LLaVA's format with one ``image`` has two rules of its own, those of LLaVA v1.5: several ``<image>`` in one question
count as one; and in a record without image, an ``<image>`` within other text is text (ShareGPT has such code), but at
the beginning or end of a question it says that an image was forgotten.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fura_vlm.data.media import is_inline, unused_mark, unused_media
from fura_vlm.data.messages import IMAGE
from fura_vlm.families.messages import Message, Part, Picture, Role, Text


class InvalidRecord(Exception):
    """Why a record cannot be used."""


class Parsed(NamedTuple):
    """What a record says.

    Args:
        messages: as in ``fura_vlm.data.messages.Record``.
        extra: the keys that the format does not know.
        note: what of it is not used, or ``None``.
    """

    messages: tuple[Message, ...]
    extra: dict[str, Any]
    note: str | None


class _Place(NamedTuple):
    """A part that is a place for a picture of the record: which, or the next one."""

    index: int | None = None


@dataclass(slots=True)
class _Turn:
    """A turn as it is read: ``said`` is its role in the format's own words, ``text`` all of its text."""

    number: int
    role: Role
    said: str
    parts: list[Part | _Place]
    text: str


def parse(item: Any, folder: str | os.PathLike) -> Parsed:
    """The messages of a record.

    Args:
        item: the record, as JSON or a row of columns gives it, in which ``Picture`` is a picture stored in a column.
        folder: where image paths start.

    Raises:
        InvalidRecord: if it cannot be used.
    """
    if not isinstance(item, dict):
        raise InvalidRecord(f"a record should be an object with conversations or messages, it is {_kind(item)}")
    format = next((format for format in FORMATS if all(item.get(key) is not None for key in format.keys)), None)
    if format is None:
        _refuse_unused({key: value for key, value in item.items() if key not in ("image", "images")}, "", [])
        raise InvalidRecord(
            "no conversations: a record needs conversations (LLaVA, ShareGPT), messages, prompt and completion, or "
            "instruction and output (Alpaca)"
        )
    pictures = _pictures(item, folder)
    known = {"id", "image", "images", *format.keys, *format.others}
    if isinstance(item.get("system"), str):
        known.add("system")
    extra = {key: value for key, value in item.items() if key not in known}
    turns = format.read(item, folder)
    _refuse_unused(extra, "", [*pictures, *_sources(turns)])
    turns, note = _alternating(_with_system(turns, item.get("system")))
    _refuse_unused_marks(turns)
    single = format.keys == ("conversations",) and not isinstance(item.get("image"), (list, type(None)))
    _place(turns, pictures, single, format.marked)
    messages = tuple([Message(turn.role, tuple([part for part in turn.parts if part[0]])) for turn in turns])
    return Parsed(messages, extra, note)


# ---------------------------------------------------------------------------------------------------- formats


@dataclass(frozen=True)
class _Format:
    """A format: the keys that it is known by, others that it reads, and whether pictures have their places in it."""

    keys: tuple[str, ...]
    read: Callable[[dict, str | os.PathLike], list[_Turn]]
    others: tuple[str, ...] = ()
    marked: bool = False


ROLES: dict[Any, Role] = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
"""The names of the roles in the formats."""


def _conversations(item: dict, folder) -> list[_Turn]:
    return _talk(item["conversations"], "conversations", folder)


def _messages(item: dict, folder) -> list[_Turn]:
    return _talk(item["messages"], "messages", folder)


def _prompt_and_completion(item: dict, folder) -> list[_Turn]:
    turns = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        said = item[key]
        turns += [{"role": role, "content": said}] if isinstance(said, str) else _list(said, key)
    return _talk(turns, "prompt and completion", folder)


def _texts(item: dict, folder) -> list[_Turn]:
    turns = []
    for number, pair in enumerate(_list(item["texts"], "texts"), 1):
        if not isinstance(pair, dict):
            raise InvalidRecord(f"element {number} of texts should be an object, it is {_kind(pair)}")
        turns += [{"role": role, "content": pair.get(role)} for role in ("user", "assistant")]
        _refuse_unused({k: v for k, v in pair.items() if k not in ("user", "assistant")}, f" of element {number}", [])
    return _talk(turns, "texts", folder)


def _alpaca(item: dict, folder) -> list[_Turn]:
    history = []
    for pair in _list(item.get("history") or [], "history"):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise InvalidRecord("history should be a list of pairs, a question and its answer")
        history += pair
    said = [*history, item["instruction"], item["output"]]
    turns = [{"role": ("user", "assistant")[number % 2], "content": each} for number, each in enumerate(said)]
    turns = _talk(turns, "instruction and output", folder)
    more = item.get("input")
    if not isinstance(more, (str, type(None))):
        raise InvalidRecord(f"input should be text, it is {_kind(more)}")
    if more and more.strip():
        # A part of its own: Alpaca's own form has a heading between the two.
        turns[-2].parts += _text_parts("\n" + more, "input")
        turns[-2].text += "\n" + more
    return turns


FORMATS = (
    _Format(("conversations",), _conversations, marked=True),
    _Format(("messages",), _messages),
    _Format(("prompt", "completion"), _prompt_and_completion),
    _Format(("texts",), _texts),
    _Format(("instruction", "output"), _alpaca, ("input", "history")),
)
"""A record has the first of these formats whose keys are all in the record."""


# ------------------------------------------------------------------------------------------------------ turns


def _talk(turns: Any, name: str, folder) -> list[_Turn]:
    return [_turn(number, turn, folder) for number, turn in enumerate(_list(turns, name, " of turns"), 1)]


def _turn(number: int, turn: Any, folder) -> _Turn:
    if not isinstance(turn, dict):
        raise InvalidRecord(f"turn {number} should be an object with from and value, it is {_kind(turn)}")
    keys = ("from", "value") if "from" in turn or "value" in turn or "role" not in turn else ("role", "content")
    said, content = turn.get(keys[0]), turn.get(keys[1])
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise InvalidRecord(
            f"turn {number} is from {_short(said)}: roles are human (or user), gpt (or assistant), and system"
        )
    where = f"turn {number}"
    if isinstance(content, str):
        text, parts = content, _text_parts(content, where)
    elif isinstance(content, (list, tuple)) and not isinstance(content, Picture):
        parts = [made for part in content for made in _part(part, where, folder)]
        text = "".join(part.text for part in parts if isinstance(part, Text))
    else:
        _refuse_unused({keys[1]: content} if isinstance(content, (dict, Picture)) else {}, f" of {where}", [])
        raise InvalidRecord(f"the {keys[1]} of {where} should be text, it is {_kind(content)}")
    if len(turn) > 2:
        rest = {key: value for key, value in turn.items() if key not in keys}
        _refuse_unused(rest, f" of {where}", [part.source for part in parts if isinstance(part, Picture)])
    return _Turn(number, role, said, parts, text)


def _part(part: Any, where: str, folder) -> list[Part | _Place]:
    if isinstance(part, str):
        return _text_parts(part, where)
    if not isinstance(part, dict):
        raise InvalidRecord(f"a part of {where} should be text or an object with a type, it is {_kind(part)}")
    filled = {key: value for key, value in part.items() if value is not None}  # columns have every key in every part
    kind = filled.pop("type", None)
    if kind is None:
        kind = next((key for key in ("text", "image", "image_url") if key in filled), None)
    if kind == "text" and isinstance(filled.get("text"), str):
        made = _text_parts(filled.pop("text"), where)
    elif kind in ("image", "image_url", "input_image"):
        index = filled.pop("index", None)
        found = next((filled.pop(key) for key in ("image", "image_url", "url", "path") if key in filled), None)
        if isinstance(found, dict) and isinstance(found.get("url"), str):
            found = found["url"]
        made = [_Place(index if isinstance(index, int) else None) if found is None else _picture(found, where, folder)]
        filled.pop("text", None)  # "" in columns
        filled.pop("detail", None)
    else:
        raise InvalidRecord(f"a part of {where} has the type {_short(kind)}: only text and image are read")
    _refuse_unused(filled, f" of {where}", [p.source for p in made if isinstance(p, Picture)])
    return made


def _text_parts(text: str, where: str) -> list[Part | _Place]:
    _refuse_surrogates(text, where)
    return [Text(text)] if text else []


def _with_system(turns: list[_Turn], system: Any) -> list[_Turn]:
    if not isinstance(system, str) or not system.strip() or turns and turns[0].role == "system":
        return turns
    return [_Turn(0, "system", "system", _text_parts(system, "system"), system), *turns]


def _alternating(turns: list[_Turn]) -> tuple[list[_Turn], str | None]:
    """The turns that are used, and a note on one that is not."""
    start = [turn for turn in turns[:1] if turn.role == "system"]
    rest, note = turns[len(start) :], None
    if rest and rest[0].role == "assistant":
        note, rest = f"the {rest[0].said} turn before the first question is left out", rest[1:]
    if not rest:
        raise InvalidRecord("conversations without a question")
    for turn, before, expected in zip(rest, [None, *rest], itertools.cycle(("user", "assistant")), strict=False):
        if turn.role == "system":
            raise InvalidRecord(f"turn {turn.number} is from {turn.said}: only the first may be")
        if turn.role != expected:
            number = turn.number - 1 if before is None else before.number
            raise InvalidRecord(f"turns {number} and {turn.number} are both from {turn.said}")
    for turn in [*start, *rest]:
        if not turn.text.strip() and all(isinstance(part, Text) for part in turn.parts):
            name = {"user": "an empty question", "assistant": "an empty answer", "system": "empty"}[turn.role]
            raise InvalidRecord(f"turn {turn.number} is {name}")
    if rest[-1].role == "user":
        raise InvalidRecord("the last question has no answer")
    return start + rest, note


# --------------------------------------------------------------------------------------------------- pictures


def _pictures(item: dict, folder) -> list[str]:
    """The sources of the record's own pictures."""
    found = {key: item[key] for key in ("image", "images") if item.get(key) is not None and item[key] != []}
    if len(found) > 1:
        raise InvalidRecord("both image and images: put all pictures into one of them")
    for key, value in found.items():
        several = isinstance(value, (list, tuple)) and not isinstance(value, Picture)
        return [_picture(each, key, folder).source for each in (value if several else [value])]
    return []


def _picture(value: Any, where: str, folder) -> Picture:
    if isinstance(value, Picture):
        return value
    if isinstance(value, dict) and value.get("bytes") is None:
        value = next((value[key] for key in ("path", "url") if value.get(key)), value)
    if isinstance(value, (dict, bytes)):
        raise InvalidRecord(
            f"{where} has a picture inside {_kind(value)}: give the path of its file, or store it in a column image or "
            "images"
        )
    if not isinstance(value, str) or not value:
        raise InvalidRecord(f"{where} should be a path, it is {_kind(value) if value != '' else 'empty'}")
    return Picture(image_path(value, folder))


def image_path(image: str, folder: str | os.PathLike) -> str:
    """The file that a record's ``image`` names. It may begin with ``file://``. ``\\`` is read as ``/`` where no file
    has it in its name.

    Raises:
        InvalidRecord: if it leads out of the image folder, is an address, or has half of a surrogate pair.
    """
    path = image.removeprefix("file://")
    if is_inline(path):
        raise InvalidRecord(
            f"the image {_short(image)} is written into the record: save it as a file, and give its path"
        )
    if "://" in path:
        raise InvalidRecord(f"the image {_short(image)} is an address: download it, and give the path of the file")
    if "\\" in path and not os.path.isfile(os.path.join(folder, path)):
        path = path.replace("\\", "/")  # as Windows writes it
    network = image.startswith("\\\\") and path.startswith("//")
    if network:
        raise InvalidRecord(
            f"the image path {image!r} starts with a Windows network folder: write it relative to the image folder"
        )
    if re.match("/?[A-Za-z]:/", path):
        raise InvalidRecord(
            f"the image path {image!r} starts with a Windows drive: write it relative to the image folder"
        )
    joined = os.path.normpath(os.path.join(folder, path))
    # By name only: links within the image folder may lead elsewhere, as COCO often does.
    root = os.path.abspath(folder).rstrip(os.sep) + os.sep
    if not f"{os.path.abspath(joined)}{os.sep}".startswith(root):
        raise InvalidRecord(f"the image path {image!r} leads out of the image folder {folder}")
    _refuse_surrogates(image, f"the image path {image!r}")
    return joined


def _place(turns: list[_Turn], pictures: list[str], single: bool, marked: bool) -> None:
    """Puts the record's pictures where they belong.

    Args:
        turns: the turns; their parts are changed.
        pictures: those that the record names beside them.
        single: LLaVA's format with one image.
        marked: whether every picture must have a mark.
    """
    questions = [turn for turn in turns if turn.role != "assistant"]
    for turn in turns:
        if turn.role == "assistant" and any(not isinstance(part, Text) for part in turn.parts):
            raise InvalidRecord(f"a picture in turn {turn.number}, an answer: it belongs in a question")
    places = [part for turn in questions for part in turn.parts if isinstance(part, _Place)]
    if places or _sources(turns):
        _fill(questions, places, pictures)
        return
    if not pictures:
        if any(_begins_or_ends_with_image(turn) for turn in turns):
            raise InvalidRecord(f"{IMAGE} in the conversation but no image: give the image, or remove {IMAGE}")
        return
    if any(IMAGE in turn.text for turn in turns if turn.role == "assistant"):
        raise InvalidRecord(f"{IMAGE} in an answer: it belongs in a question")
    if single:
        count = sum(IMAGE in turn.text for turn in questions)
        if count > 1:
            raise InvalidRecord(f"{IMAGE} stands {count} times for one image: keep the first")
    else:
        count = sum(turn.text.count(IMAGE) for turn in questions)
    if not count and not marked:
        first = next(turn for turn in questions if turn.role == "user")
        first.parts = [*map(Picture, pictures), *first.parts]
        return
    if not count:
        what = "an image" if len(pictures) == 1 else f"{len(pictures)} pictures"
        raise InvalidRecord(f"{what} but no {IMAGE} in the conversation: put {IMAGE} into the first question")
    if not single and count != len(pictures):
        raise InvalidRecord(_mismatch(len(pictures), count, IMAGE))
    left = iter(pictures)
    for turn in questions:
        if IMAGE in turn.text:
            turn.parts = [made for part in turn.parts for made in _split(part.text, left)]


def _split(text: str, pictures) -> list[Part]:
    """``text`` with a picture at each mark as long as there are any; further marks of LLaVA's one image vanish."""
    first, *rest = text.split(IMAGE)
    parts: list[Part] = [Text(first)]
    for piece in rest:
        if source := next(pictures, None):
            parts += [Picture(source), Text(piece)]
        else:
            parts[-1] = Text(parts[-1].text + piece)
    return parts


def _fill(questions: list[_Turn], places: list[_Place], pictures: list[str]) -> None:
    indices = [place.index for place in places]
    if None in indices or not set(indices) == set(range(len(pictures))):  # in order, or each with its number
        if len(places) != len(pictures):
            raise InvalidRecord(_mismatch(len(pictures), len(places), "parts of the type image without a path"))
        indices = list(range(len(places)))
    left = iter(indices)
    for turn in questions:
        turn.parts = [Picture(pictures[next(left)]) if isinstance(p, _Place) else p for p in turn.parts]


def _mismatch(pictures: int, count: int, what: str) -> str:
    return (
        f"{pictures} {'picture' if pictures == 1 else 'pictures'} but {count} {'place' if count == 1 else 'places'} "
        f"for them ({what}): give each picture one place"
    )


def _begins_or_ends_with_image(turn: _Turn) -> bool:
    value = turn.text.strip()
    return turn.role == "user" and (value.startswith(IMAGE) or value.endswith(IMAGE))


def _sources(turns: Sequence[_Turn]) -> list[str]:
    return [part.source for turn in turns for part in turn.parts if isinstance(part, Picture)]


# --------------------------------------------------------------------------------------------- what is not read


def _refuse_unused(rest: Any, where: str, pictures: Sequence[str]) -> None:
    """A picture under a key that is not read would make a record that looks like text alone."""
    if rest and (found := unused_media(rest, pictures)):
        raise InvalidRecord(
            f"{found}{where}, which is not read: give the path of a picture under image or images; videos and sound "
            "are not used, so remove them"
        )


def _refuse_unused_marks(turns: Sequence[_Turn]) -> None:
    talk = [turn for turn in turns if turn.role != "system"]
    for number, (question, answer) in enumerate(zip(talk[::2], talk[1::2], strict=True), 1):
        if mark := unused_mark(question.text, answer.text):
            raise InvalidRecord(
                f"{mark} in question {number} does not mark a picture here: write {IMAGE} for a picture under image or "
                "images, and leave out records with videos or sound"
            )


def named_pictures(item: Any) -> list[str | Picture]:
    """All pictures that a record names under keys that are read, even if the record has other faults."""
    if not isinstance(item, dict):
        return []
    named, stack = [], [item.get("image"), item.get("images")]
    for key in ("conversations", "messages", "prompt"):
        for turn in item[key] if isinstance(item.get(key), list) else []:
            content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
            for part in content if isinstance(content, list) else []:
                if isinstance(part, dict):
                    stack += [part.get(name) for name in ("image", "image_url", "url", "path")]
    for value in stack:
        several = isinstance(value, (list, tuple)) and not isinstance(value, Picture)
        for each in value if several else [value]:
            if isinstance(each, dict):
                each = each.get("path") or each.get("url")
            if each and isinstance(each, (str, Picture)):
                named.append(each)
    return named


def _refuse_surrogates(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold these, but no tokenizer and no file name can
        raise InvalidRecord(f"{what} has half of a surrogate pair, which is not a character") from None


def _list(value: Any, name: str, of: str = "") -> list:
    if not isinstance(value, (list, tuple)):
        raise InvalidRecord(f"{name} should be a list{of}, it is {_kind(value)}")
    return list(value)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "missing"}
    return {**kinds, bytes: "bytes", Picture: "a picture"}.get(type(value), "a number")
