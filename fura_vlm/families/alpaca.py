"""Alpaca's form of a question and its answer, for language models without a chat template.

The instruction stands under a heading of its own, the answer under another; the answer ends with the end token.
"""

from __future__ import annotations

from collections.abc import Sequence

from fura_vlm.families.base import EncodingError, Rendered
from fura_vlm.families.messages import Message

INTRODUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


def render(messages: Sequence[Message], eos: str) -> Rendered:
    """The whole conversation: one question and its answer, after a system turn in place of the introduction.

    Raises:
        EncodingError: the conversation has several turns, and this form has only one.
    """
    if [message.role for message in messages if message.role != "system"] != ["user", "assistant"]:
        raise EncodingError("Alpaca's form has one question and one answer, and this conversation has another number")
    text = prompt(messages[:-1], eos)
    answer = f"{messages[-1].text}{eos}"
    return Rendered(text + answer, [(len(text), len(text) + len(answer))])


def prompt(messages: Sequence[Message], eos: str) -> str:
    """The text that the model gets, up to the beginning of the answer.

    Raises:
        EncodingError: as ``render``.
    """
    if [message.role for message in messages if message.role != "system"] != ["user"]:
        raise EncodingError("Alpaca's form has one question and one answer, and this conversation has another number")
    introduction = next((message.text for message in messages if message.role == "system"), INTRODUCTION)
    question = next(message.text for message in messages if message.role == "user")
    return f"{introduction}\n\n### Instruction:\n{question}\n\n### Response:\n"
