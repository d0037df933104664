"""Which questions a step takes, and in which order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class PromptSampler(Sampler[int]):
    """The order of TRL's ``RepeatSampler``, with two differences: each epoch has its own order, whatever was sampled
    before, so that a resumed run takes the questions of an uninterrupted one; and an epoch has whole steps alone,
    however many answers are written at once.

    Args:
        questions: how many there are.
        per_step: questions of a step.
        at_once: questions whose answers are written at once, a divisor of ``per_step``.
        answers: to each question.
        repeats: how often TRL wants to see them: once for each batch that the answers written at once are cut into.
    """

    def __init__(self, questions: int, per_step: int, at_once: int, answers: int, repeats: int, seed: int):
        self.steps, self.questions = questions // per_step, questions
        self.per_step, self.at_once, self.answers, self.repeats = per_step, at_once, answers, repeats
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.per_step * self.answers * self.repeats

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.questions, generator=generator).tolist()[: self.steps * self.per_step]
        for start in range(0, len(order), self.at_once):
            for _ in range(self.repeats):
                for number in order[start : start + self.at_once]:
                    yield from [number] * self.answers
