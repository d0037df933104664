"""Who answers in a chat: a model in this process, or one of a server's. Light: torch is imported by the first alone."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fura_vlm.chat.config import ChatConfig
from fura_vlm.errors import FuraVLMError

if TYPE_CHECKING:
    from PIL import Image

    from fura_vlm.chat.prompt import Exchange

BASE = "base"
"""What the model without any adapter is called."""
LOOK = (1344, 1344)
"""Width and height of a picture that is sent to be looked at."""


class ChatError(FuraVLMError):
    """A question that cannot be answered. The message is one sentence, fit for the user."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: greedily at temperature 0."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256


@dataclass(eq=False)
class Generation:
    """An answer that is being written. The writer appends to ``tokens``; whoever asked reads them when it likes.

    Attributes:
        inputs: the prompt, as ``Partner.read`` makes it.
        adapter: the writer's name of the model.
        prompt: ids of the prompt, (1, n) int64, of a model that is to repeat little.
        tokens: what is written so far: a model's ids, the end token included, or a server's pieces of text.
        done: no more will come: complete, cancelled or failed.
        error: why it failed, or ``None``.
        asked, began, ended: ``time.monotonic()`` of the question, the first token and the last.
    """

    inputs: Any
    adapter: str | None
    sampling: Sampling
    prompt: Any = None
    tokens: list = field(default_factory=list)
    done: bool = False
    error: str | None = None
    cancelled: bool = False
    asked: float = field(default_factory=time.monotonic)
    began: float | None = None
    ended: float | None = None

    def cancel(self) -> None:
        """What is written stays; the model is free for others after the token it is at."""
        self.cancelled = True

    @property
    def count(self) -> int:
        """Tokens that are written."""
        return len(self.tokens)

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token, which also pays for the prompt; ``None`` while there are fewer than two."""
        if self.count < 2 or self.began is None:
            return None
        return (self.count - 1) / max((self.ended or time.monotonic()) - self.began, 1e-9)


class Writer(ABC):
    """Writes many answers at once. Thread-safe."""

    @abstractmethod
    def submit(self, inputs: Any, adapter: str | None, sampling: Sampling) -> Generation:
        """Takes a question and returns at once.

        Args:
            inputs: the prompt, as ``Partner.read`` makes it.
            adapter: one of the values of ``Partner.adapters``.

        Raises:
            ChatError: the chat is closing.
        """

    @property
    @abstractmethod
    def load(self) -> tuple[int, int]:
        """How many answers are being written, and how many questions wait."""

    @abstractmethod
    def close(self, seconds: float | None = None) -> None:
        """Ends the writer, or stops waiting for its end after so long; what is being written ends as if cancelled."""


class Partner(ABC):
    """What a chat talks with.

    Attributes:
        path: where it is from; the last part of it is its name.
        adapters: what a user can choose, with the writer's name of each. The first is the default.
        sees: whether it takes pictures.
        longest: tokens of the longest answer that a user can ask for.
    """

    path: str
    adapters: dict[str, str | None]
    sees: bool
    longest: int

    @abstractmethod
    def writer(self, max_rows: int) -> Writer:
        """Starts what writes the answers, at most so many at the same time."""

    @abstractmethod
    def read(self, exchanges: Sequence[Exchange], sampling: Sampling) -> tuple[Any, str | None]:
        """The prompt for the last question of a conversation, and what was left out of it, in a sentence.

        Raises:
            ChatError: the question cannot be asked.
        """

    @abstractmethod
    def text(self, generation: Generation) -> str:
        """What is written of an answer so far."""

    @abstractmethod
    def check_picture(self, path: str) -> None:
        """Raises ``ChatError`` if a picture cannot be used."""

    @abstractmethod
    def as_seen(self, path: str) -> tuple[Image.Image, str]:
        """A picture as the model gets it, and a sentence about what becomes of it.

        Raises:
            FuraVLMError: the picture cannot be used, or the model does not take it.
        """

    @abstractmethod
    def describe(self) -> str:
        """What it is, as Markdown."""

    @abstractmethod
    def examples(self, folder: Path) -> list[tuple[str, str]]:
        """Pictures with a question each, (path, question), that suit it; they may be made in ``folder``."""


def find_partner(config: ChatConfig) -> Partner:
    """Loads the model that a chat is to talk with, or finds it on a server.

    Raises:
        FuraVLMError: with one sentence, for everything that the user can fix.
    """
    if config.server is not None:
        from fura_vlm.chat.served import find_served

        return find_served(config)
    if config.server_key is not None:
        raise ChatError("--server_key is the key of a server: give its address with --server")
    from fura_vlm.chat.models import load_models

    return load_models(config.model, config.adapters)


def short_name(path: str, taken: dict[str, str | None]) -> str:
    """A short name for what is at ``path`` that is none of ``taken``."""
    folder = Path(path)
    name = folder.parent.name if folder.name == "adapter" else folder.name
    return next(each for each in [name, path, *(f"{name} {n}" for n in range(2, 99))] if each not in {*taken, BASE})
