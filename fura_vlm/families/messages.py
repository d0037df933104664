"""A conversation as every family takes it: messages made of parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

Role = Literal["system", "user", "assistant"]


class Text(NamedTuple):
    """Words."""

    text: str


class Picture(NamedTuple):
    """A picture, by the name that ``fura_vlm.data.images.load_image`` opens: the path of a file, say."""

    source: str


Part = Text | Picture


class Message(NamedTuple):
    """What one side says: text and pictures in any order."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The words of all parts, joined; pictures leave nothing behind."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def pictures(self) -> list[str]:
        """The sources of its pictures, in order."""
        return [part.source for part in self.parts if isinstance(part, Picture)]


def pictures(messages: Iterable[Message]) -> list[str]:
    """The sources of all pictures of a conversation, in order."""
    return [source for message in messages for source in message.pictures]
