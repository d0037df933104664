"""Sets of mathematical questions, each with its answer, as they are published.

MATH and competition_math have ``problem`` and a worked ``solution`` that ends in a boxed answer; MATH-500 and AIME
``problem`` (or ``question``) and ``answer``; GSM8K ``question`` and an ``answer`` that ends in ``#### 18``; the word
problems of LLM-Adapters ``instruction`` and ``answer``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import NamedTuple

from fura_vlm.data.messages import Problem
from fura_vlm.data.records import iter_elements
from fura_vlm.evaluation.math_answers import last_boxed, read_expected

ASKED = ("problem", "question", "instruction")
"""Where a question stands, the first of these that a record has."""

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
"""What asks for an answer that can be found."""


class MathQuestion(NamedTuple):
    """A question.

    Args:
        text: as the set has it.
        answer: the right one, as the set has it.
        expected: the same as math-verify reads it.
        file, place: where it comes from.
    """

    text: str
    answer: str
    expected: list
    file: str
    place: str


def iter_questions(path: str | os.PathLike) -> Iterator[tuple[MathQuestion | None, Problem | None]]:
    """A question, or what is wrong with a record, for each record of a set.

    Args:
        path: a JSON list, a JSONL or Parquet file, a folder of the ``datasets`` library, or a name on the hub.

    Raises:
        DataError: the set cannot be read as a whole.
    """
    for place, item in iter_elements(path):
        identity = str(item.get("id", item.get("unique_id", place))) if isinstance(item, dict) else place
        try:
            text, answer = _parts(item)
        except ValueError as reason:
            yield None, Problem(str(path), place, identity, str(reason))
            continue
        if expected := read_expected(answer):
            yield MathQuestion(text, answer, expected, str(path), place), None
        else:
            yield None, Problem(str(path), place, identity, f"math-verify cannot read its answer {answer!r}")


def _parts(item) -> tuple[str, str]:
    """Question and answer of a record. Raises ValueError with the reason if it has another schema."""
    if isinstance(item, json.JSONDecodeError):
        raise ValueError(f"the line is not valid JSON ({item})")
    if not isinstance(item, dict):
        raise ValueError("it is no object")
    text = next((item[key] for key in ASKED if isinstance(item.get(key), str) and item[key].strip()), None)
    if text is None:
        raise ValueError(f"it has no text in problem, question or instruction (its keys are {', '.join(item)})")
    if item.get("input"):
        raise ValueError("its input is not empty, and a question is one text: put it into the instruction")
    answer = item.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if isinstance(answer, str) and answer.strip():
        return text.strip(), answer.rpartition("####")[2].strip()
    if isinstance(item.get("solution"), str) and (boxed := last_boxed(item["solution"])):
        return text.strip(), boxed
    raise ValueError("it has no answer: there is none in answer, and none in a \\boxed{} at the end of solution")
