"""The suite of mathematics: MATH-500, AIME, and sets of word problems, answered in words and judged by math-verify.

Where a set is small or its questions hard, one answer says little: MATH-500 and AIME are asked eight times with
temperature 0.6 and top-p 0.95, as in the paper's release, and a question's score is the share of right answers. The
word problems are answered once, greedily.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from fura_vlm.data.messages import DataError
from fura_vlm.evaluation.answers import answer_all, request_key
from fura_vlm.evaluation.base import Suite, SuiteError, is_main
from fura_vlm.evaluation.config import EvalConfig
from fura_vlm.evaluation.generation import Answerer, Question
from fura_vlm.evaluation.math_answers import is_right, read_answer
from fura_vlm.evaluation.problems import BOXED, MathQuestion, iter_questions
from fura_vlm.evaluation.scores import Sample, TaskScore, score_of_means
from fura_vlm.evaluation.source import Source


class Set(NamedTuple):
    """How a set is asked by default.

    Args:
        hub: its name on the hub, or ``None`` where it is on none that we know.
        samples, temperature, top_p: of the answers; temperature 0 is greedy.
        max_new_tokens: of an answer.
    """

    hub: str | None
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int


_WORDS = Set(None, 1, 0.0, 1.0, 256)

SETS = {
    "MATH-500": Set("HuggingFaceH4/MATH-500@test", 8, 0.6, 0.95, 1024),
    "AIME24": Set("HuggingFaceH4/aime_2024", 8, 0.6, 0.95, 1024),
    "AIME25": Set("math-ai/aime25@test", 8, 0.6, 0.95, 1024),
    "MultiArith": _WORDS,
    "AddSub": _WORDS,
    "SingleEq": _WORDS,
    "SVAMP": _WORDS,
    "gsm8k": _WORDS,
}
"""The sets by name."""

ENDINGS = ("json", "jsonl", "parquet")
SEED = 42  # of answers that are drawn


class Mathematics(Suite):
    folder = "eval-math"
    settings = frozenset({"samples", "temperature", "top_p", "instruction", "conversation", "max_new_tokens"})
    packages = ("math-verify",)

    def __init__(self, config: EvalConfig, source: Source):
        super().__init__(config, Source(source.base, source.adapter, source.processor, config.conversation))
        if config.data in ("auto", "embedded"):
            raise SuiteError(
                "The suite math reads local files, MultiArith-test.json and so on: give --data FOLDER; or --data hub "
                "for MATH-500, AIME24 and AIME25"
            )
        for name, least, most in (("samples", 1, None), ("temperature", 0, None), ("top_p", 0, 1)):
            value = getattr(config, name)
            if value is not None and (value < least or most is not None and value > most):
                raise SuiteError(f"{name} is {value}: give {least} or more" + (f", and at most {most}" if most else ""))
        if config.samples and config.samples > 1 and config.temperature == 0:
            raise SuiteError(f"{config.samples} samples at temperature 0 are all the same: leave one of the two out")
        self.data = config.data
        self.instruction = _instruction(config)
        self.max_new_tokens = config.max_new_tokens
        own = {"samples": config.samples, "temperature": config.temperature, "top-p": config.top_p}
        said = ", ".join(f"{name} {value:g}" for name, value in own.items() if value is not None)
        self.protocol = "math-verify, " + (said or "each set's own sampling")
        self.folder += "".join(f"-{name}-{value:g}" for name, value in own.items() if value is not None)

    def load(self) -> None:
        names = self.config.tasks
        if not names:
            names = [name for name, one in SETS.items() if (one.hub if self.data == "hub" else find(self.data, name))]
            if not names:
                raise DataError(f"{self.data} holds none of the sets {', '.join(SETS)}, such as AddSub-test.json")
        self.sets = {name: read_set(self.data, name)[: self.config.limit] for name in names}

    def run(self, source: Source, folder: Path) -> tuple[dict[str, TaskScore], list[Sample]] | None:
        model, family, dtype = source.place(self.config.dtype)
        answerer = Answerer(model, family, dtype, self.config.batch_size, num_workers=0)
        torch.manual_seed(SEED + int(os.environ.get("RANK", 0)))
        identity = [source.fingerprint(), str(dtype), family.conversation, version("transformers")]
        asked, keys = [], []
        for name, questions in self.sets.items():
            for number, question in enumerate(questions):
                text, arguments = question.text + self.instruction, self.arguments(name)
                for sample in range(self.samples(name)):
                    asked.append(Question(f"{name}, document {number}", text, tuple, arguments))
                    keys.append(request_key(model=identity, question=text, arguments=arguments, sample=sample))

        def answers(places: list[int]):
            return answerer.answers([asked[place] for place in places], progress=is_main())

        kept = answer_all(folder, keys, answers)
        if kept is None:
            return None
        samples, scores, said = [], {}, iter(kept)
        for name, questions in self.sets.items():
            own, unread = [], 0
            for number, question in enumerate(questions):
                texts = [next(said) for _ in range(self.samples(name))]
                read = [read_answer(text) for text in texts]
                unread += read.count([])
                own.append(self._sample(name, number, question, texts, read))
            values = [each.score for each in own]
            metrics = {"accuracy": sum(values) / len(values), "unread": unread / len(values) / self.samples(name)}
            scores[name] = score_of_means(values, "accuracy", metrics, len(values))
            samples += own
        return scores, samples

    def _sample(self, name: str, number: int, question: MathQuestion, texts: list[str], read: list[list]) -> Sample:
        right = [is_right(question.expected, each) for each in read]
        score = sum(right) / len(right)
        shown = texts[0] if len(texts) == 1 else f"{sum(right)} of {len(right)} are right. The first: {texts[0]}"
        return Sample(name, number, question.text, question.answer, shown, score)

    def samples(self, name: str) -> int:
        """How often a question of a set is asked."""
        if self.config.samples is not None:
            return self.config.samples
        return 1 if self.config.temperature == 0 else SETS[name].samples

    def arguments(self, name: str) -> dict:
        """For ``generate``."""
        given, own = self.config, SETS[name]
        temperature = own.temperature if given.temperature is None else given.temperature
        top_p = own.top_p if given.top_p is None else given.top_p
        if self.samples(name) > 1 and not temperature:  # a set that is asked greedily by default
            temperature = SETS["MATH-500"].temperature
        drawn = temperature > 0
        return {
            "do_sample": drawn,
            "temperature": temperature if drawn else None,
            "top_p": top_p if drawn else None,
            "top_k": 0 if drawn else None,  # a model's generation_config.json may name another
            "num_beams": 1,
            "max_new_tokens": given.max_new_tokens or own.max_new_tokens,
            "until": [],
        }

    def notes(self, scores: dict[str, dict[str, TaskScore]], published: bool) -> list[str]:
        lines = []
        for name in self.sets:
            own = self.arguments(name)
            how = f"temperature {own['temperature']:g}, top-p {own['top_p']:g}" if own["do_sample"] else "greedy"
            times = f"the mean of {self.samples(name)} answers" if self.samples(name) > 1 else "one answer"
            lines.append(f"{name}: {times}, {how}, up to {own['max_new_tokens']} tokens.")
        for model, each in scores.items():
            unread = {name: round(s.metrics["unread"] * s.n * self.samples(name)) for name, s in each.items()}
            listed = ", ".join(
                f"{name} {count} of {each[name].n * self.samples(name)}" for name, count in unread.items() if count
            )
            if listed:
                lines.append(f"{model}: answers in which math-verify finds nothing count as wrong: {listed}.")
        return lines


def _instruction(config: EvalConfig) -> str:
    """What follows each question: the given words, those that a run was trained with, or the request for a box."""
    if config.instruction is not None:
        return config.instruction
    saved = Path(config.model).expanduser() / "config.yaml"
    settings = yaml.safe_load(saved.read_text()) if saved.is_file() else {}
    if settings.get("reward") == "math" and settings.get("instruction") is not None:
        return settings["instruction"]
    return BOXED


def find(folder: str, name: str) -> Path | None:
    """The file of a set: ``NAME/test.json``, ``NAME-test.json`` or ``NAME.json``, or with another ending."""
    places = (f"{name}/test", f"{name}-test", name)
    files = (Path(folder).expanduser() / f"{place}.{ending}" for place in places for ending in ENDINGS)
    return next((file for file in files if file.is_file()), None)


def read_set(data: str, name: str) -> list[MathQuestion]:
    """The questions of a set. Unlike training, an evaluation leaves nothing out.

    Args:
        data: a folder, or ``"hub"``.

    Raises:
        DataError: there is no such set or file, or a record of it has another schema.
    """
    if name not in SETS:
        raise DataError(f"There is no set {name!r} in the suite math: the sets are {', '.join(SETS)}")
    path = SETS[name].hub if data == "hub" else find(data, name)
    if path is None:
        raise DataError(
            f"{name} is on no hub that this program knows: give --data FOLDER with {name}-test.json"
            if data == "hub"
            else f"There is no {name}-test.json in {data} (nor {name}.jsonl, {name}.parquet, {name}/test.json): put "
            "the set there, or name those that are there with --tasks"
        )
    questions = []
    for question, problem in iter_questions(path):
        if problem is not None:
            raise DataError(f"{problem.file}, {problem.place}: {problem.reason}: correct it, or fetch the set again")
        questions.append(question)
    if not questions:
        raise DataError(f"{path} holds no questions: fetch it again")
    return questions
