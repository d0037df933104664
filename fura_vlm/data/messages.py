"""What a record is: a conversation, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fura_vlm.errors import FuraVLMError
from fura_vlm.families.messages import Message, pictures

IMAGE = "<image>"
"""Where a picture goes, in formats whose messages are plain text."""


class DataError(FuraVLMError):
    """A mixture that cannot be used. The message is one sentence: the file, the reason and the way out."""


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
        return pictures(self.messages)

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
