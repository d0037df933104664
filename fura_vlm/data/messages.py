"""What a record is: messages made of text and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from fura_vlm.errors import FuraVLMError

IMAGE = "<image>"
"""Where a picture goes, in formats whose messages are plain text."""


class DataError(FuraVLMError):
    """A mixture that cannot be used. The message is one sentence: the file, the reason and the way out."""


class Text(NamedTuple):
    """Words of a message, as they stand in the record: spaces and line breaks beside a picture are still there."""

    text: str


class Picture(NamedTuple):
    """A picture of a message.

    Args:
        source: the path of its file; or, of a picture that is stored in a column of a data set,
            ``"<Arrow file>::<row>::<column>::<number>"`` (``fura_vlm.data.columns``). ``load_image`` takes both.
    """

    source: str


Part = Text | Picture
"""Tell them apart by ``isinstance``: as tuples, ``Text("a")`` and ``Picture("a")`` are equal."""

Role = Literal["system", "user", "assistant"]


class Message(NamedTuple):
    """A turn of a conversation: at least one part, none of them empty.

    Texts stand side by side where the record has them so; of an Alpaca record the second one is its ``input``, after a
    line break.
    """

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """Its texts, joined; without the pictures."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def pictures(self) -> list[str]:
        """The sources of its pictures, in order."""
        return [part.source for part in self.parts if isinstance(part, Picture)]


class Turn(NamedTuple):
    """A message as LLaVA writes it: ``role`` is ``"human"`` or ``"gpt"``, a picture is ``<image>``."""

    role: str
    value: str


@dataclass(frozen=True, slots=True)
class Record:
    """A record that keeps to its format.

    Args:
        id: the record's ``id``, or where it stands in its file if it has none. Need not be unique.
        messages: perhaps one of the system, then user and assistant in turn, at least one of each. Only those of
            system and user have pictures.
        file: the file, folder or hub name it was read from.
        place: where in ``file``, ``"record 3"``, ``"line 3"`` or ``"row 3"``, counted from 1.
        extra: the keys that the format does not know.
    """

    id: str
    messages: tuple[Message, ...]
    file: str = ""
    place: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def pictures(self) -> list[str]:
        """The sources of all pictures, in order."""
        return [source for message in self.messages for source in message.pictures]

    def problem(self, reason: str, skipped: bool = True) -> Problem:
        return Problem(self.file, self.place, self.id, reason, skipped)

    def __str__(self) -> str:
        return f"{self.file}, {self.place} (id {self.id})"

    # What follows is LLaVA-1.5's view of a record: one picture, no system turn.

    @property
    def image_path(self) -> str | None:
        """The only picture, or ``None``."""
        pictures = self.pictures
        return pictures[0] if pictures else None

    @property
    def conversations(self) -> tuple[Turn, ...]:
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        return tuple(
            Turn(names[m.role], "".join(p.text if isinstance(p, Text) else IMAGE for p in m.parts))
            for m in self.messages
        )


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a record. ``skipped``: it is left out; otherwise it is used in part."""

    file: str
    place: str
    record: str
    reason: str
    skipped: bool = True
