"""The configuration of a chat. Light: the command line reads it before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ChatConfig:
    """Talk about an image in the terminal.

    Args:
        model: a run folder, an adapter, or a LLaVA (a folder or a name on the hub).
        image: the picture to talk about.
        question: ask this one question and end; by default questions are read from the terminal.
        max_new_tokens: length limit of an answer.
    """

    model: str
    image: str
    question: str | None = None
    max_new_tokens: int = 256
