"""A conversation as every family takes it: messages made of text and pictures. Light: it takes no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple


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


def pictures(messages: Iterable[Message]) -> list[str]:
    """The sources of all pictures of a conversation, in order."""
    return [source for message in messages for source in message.pictures]
