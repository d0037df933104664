"""What a model answered to a question of mathematics, and whether it is right: by math-verify, in training as in an
evaluation."""

from __future__ import annotations

import logging
import re
import threading

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

SECONDS = 5
"""For reading an answer, and for comparing it: simplifying an expression may take for ever."""

_FORMS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")

for _name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # they print a whole answer for each that takes too long


def read_answer(text: str) -> list:
    """What math-verify reads in the words of a model: an expression and its text, or nothing.

    The last box counts, as in MATH; without one, the last that looks like an answer. What a model thinks between
    ``<think>`` and ``</think>`` is no answer.
    """
    thought, end, said = text.rpartition("</think>")
    if not end:
        said = text.partition("<think>")[0]
    boxed = last_boxed(said)
    # math-verify by itself would take several boxes within 70 letters for one answer of several parts.
    return parse(said if boxed is None else rf"\boxed{{{boxed}}}", _FORMS, parsing_timeout=_seconds())


def read_expected(answer: str) -> list:
    """The same of the answer that a set gives, without words around it."""
    return parse(rf"\boxed{{{_THOUSANDS.sub('', answer.strip())}}}", _FORMS, parsing_timeout=_seconds())


def is_right(expected: list, said: list) -> bool:
    """Whether what was read of an answer is what is expected: 1/2 is 0.5."""
    return bool(said) and verify(expected, said, timeout_seconds=_seconds())


def last_boxed(text: str) -> str | None:
    r"""What is in the last ``\boxed{...}`` of a worked solution, or ``None`` if there is none that closes."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].partition("boxed")[2] or text[start:].partition("fbox")[2]
    if not rest.startswith("{"):  # \boxed 5
        words = rest.replace("$", " ").split()
        return words[0] if rest.startswith(" ") and words else None
    depth = 0
    for place, letter in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if not depth:
            return rest[1:place]
    return None


def _seconds() -> int | None:
    """math-verify sets an alarm, which Python gives the main thread alone."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None
