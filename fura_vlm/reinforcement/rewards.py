"""What an answer is worth, and how many answers could not be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fura_vlm.evaluation.heldout import normalise
from fura_vlm.evaluation.math_answers import is_right, read_answer
from fura_vlm.reinforcement.data import Asked


@dataclass(frozen=True)
class Rewarded:
    """An answer, what it is worth, and whether there was anything in it to be compared."""

    question: Asked
    text: str
    reward: float
    is_read: bool


def by_math(question: Asked, text: str) -> tuple[float, bool]:
    """1 for an answer that is equal to the right one, and whether math-verify has found an answer at all."""
    said = read_answer(text)
    return float(is_right(list(question.expected), said)), bool(said)


def exactly(question: Asked, text: str) -> tuple[float, bool]:
    """1 for the right answer, but for case and a closing full stop, and whether there is one at all."""
    return float(normalise(text) == normalise(question.answer)), bool(text.strip())


JUDGES: dict[str, Callable[[Asked, str], tuple[float, bool]]] = {"math": by_math, "exact": exactly}


class Reward:
    """A reward function as TRL calls it, which keeps what it has seen.

    Args:
        questions: by the ``number`` of a row.
        judge: a value of ``JUDGES``.

    Attributes:
        recent: the answers to the first question of each call since it was last emptied.
    """

    def __init__(self, questions: Sequence[Asked], judge: Callable[[Asked, str], tuple[float, bool]]):
        self.questions, self.judge = questions, judge
        self.recent: list[Rewarded] = []
        self.__name__ = "accuracy"  # TRL's metrics have it

    def __call__(self, completions: Sequence[list[dict]], number: Sequence[int], log_metric, **_) -> list[float]:
        """The reward of each answer; the share of those without anything to compare is logged as ``unread``."""
        judged = []
        for [message], one in zip(completions, number, strict=True):
            question, text = self.questions[one], message["content"]
            judged.append(Rewarded(question, text, *self.judge(question, text)))
        self.recent += [each for each in judged if each.question is judged[0].question]
        log_metric("unread", sum(not each.is_read for each in judged) / len(judged))
        return [each.reward for each in judged]
