"""The commonsense suite: the eight sets of LLM-Adapters (arXiv 2304.01933), from local files as it publishes them.

Each file is a JSON list of ``instruction``, ``input``, ``output`` and ``answer``; the instruction ends with the
choices, "Answer format: answer1/answer2". The answer is the first choice of the set's that the model writes, as
LLM-Adapters' script reads it, or the likeliest of the question's own.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from fura_vlm.data.json_items import iter_items
from fura_vlm.errors import FuraVLMError
from fura_vlm.evaluation.answers import answer_all, request_key
from fura_vlm.evaluation.base import Suite, SuiteError, is_main
from fura_vlm.evaluation.config import EvalConfig
from fura_vlm.evaluation.generation import Answerer, Question
from fura_vlm.evaluation.likelihood import likelihoods
from fura_vlm.evaluation.scores import Sample, TaskScore, score_of_means
from fura_vlm.evaluation.source import Source
from fura_vlm.modelling.load import load_family

_NUMBERED = tuple(f"answer{number}" for number in range(1, 6))

CHOICES = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": _NUMBERED,
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": _NUMBERED,
    "ARC-Challenge": _NUMBERED,
    "openbookqa": _NUMBERED,
}
"""The sets, and the words that are looked for in an answer."""

WHOLE = {
    "boolq": 3270,
    "piqa": 1838,
    "social_i_qa": 1954,
    "hellaswag": 10042,
    "winogrande": 1267,
    "ARC-Easy": 2376,
    "ARC-Challenge": 1172,
    "openbookqa": 500,
}
"""The questions of each set."""

PUBLISHED = {"boolq": 76.5}
AVERAGE = 87.3
"""FuRA's, with Llama-3-8B, in percent; of the other sets the paper's figures are not at hand."""

MAX_NEW_TOKENS = 32
ANSWER = "the correct answer is {}"
"""What the records of LLM-Adapters have a model say."""


class DataError(FuraVLMError):
    """A set that is missing or has another form."""


class Item(NamedTuple):
    """A question.

    Args:
        text: what is asked.
        choices: those that it names.
        answer: the right one.
    """

    text: str
    choices: tuple[str, ...]
    answer: str


class Commonsense(Suite):
    folder = "eval-commonsense"
    settings = frozenset({"score", "num_beams", "conversation", "max_new_tokens"})

    def __init__(self, config: EvalConfig, source: Source):
        super().__init__(config, replace(source, conversation=_form(config, source)))
        if config.data in ("auto", "hub", "embedded"):
            raise SuiteError("The commonsense suite reads local files: give --data FOLDER, which holds boolq/test.json "
                             "and the others as LLM-Adapters publishes them")  # fmt: skip
        self.data = config.data
        if config.score == "likelihood":
            self.protocol = "LLM-Adapters' sets, the likeliest choice"
        else:
            beams = "greedy" if config.num_beams == 1 else f"{config.num_beams} beams"
            self.protocol = f"LLM-Adapters' sets, the first choice in the answer, {beams}"
            self.max_new_tokens = config.max_new_tokens or MAX_NEW_TOKENS
            self.folder += f"-{config.num_beams}-beams" * (config.num_beams > 1)
        self.folder += "-likelihood" * (config.score == "likelihood")

    def load(self) -> None:
        self.sets = {}
        for name in self.config.tasks or list(CHOICES):
            self.sets[name] = read_set(self.data, name)[: self.config.limit]

    def run(self, source: Source, folder: Path) -> tuple[dict[str, TaskScore], list[Sample]] | None:
        model, family, dtype = source.place(self.config.dtype)
        answerer = Answerer(model, family, dtype, self.config.batch_size, num_workers=0)
        asked = [(name, number, item) for name, items in self.sets.items() for number, item in enumerate(items)]
        identity = [source.fingerprint(), str(dtype), family.conversation, version("transformers")]
        keys = [self._key(identity, item) for _, _, item in asked]
        kept = answer_all(folder, keys, lambda places: self._answers(answerer, [asked[place] for place in places]))
        if kept is None:
            return None
        samples = [
            self._sample(name, number, item, said) for (name, number, item), said in zip(asked, kept, strict=True)
        ]
        return {name: self._score(name, [each for each in samples if each.task == name]) for name in self.sets}, samples

    def _answers(self, answerer: Answerer, asked: list[tuple[str, int, Item]]):
        """Batches of what is kept of the answers: their text, or the choices' likelihoods as JSON."""
        if self.config.score == "answers":
            arguments = self._arguments()
            questions = [
                Question(f"{name}, document {number}", item.text, tuple, arguments) for name, number, item in asked
            ]
            yield from answerer.answers(questions, progress=is_main())
            return
        questions = [
            (f"{name}, document {number}", item.text, [ANSWER.format(choice) for choice in item.choices])
            for name, number, item in asked
        ]
        for batch in likelihoods(answerer, questions, progress=is_main()):
            yield {number: json.dumps(values) for number, values in batch.items()}

    def _arguments(self) -> dict:
        return {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "num_beams": self.config.num_beams,
            "max_new_tokens": self.max_new_tokens,
            "until": [],
        }

    def _key(self, identity: list, item: Item) -> str:
        if self.config.score == "answers":
            return request_key(model=identity, question=item.text, arguments=self._arguments())
        return request_key(model=identity, question=item.text, choices=item.choices)

    def _sample(self, name: str, number: int, item: Item, kept: str) -> Sample:
        if self.config.score == "likelihood":
            values = json.loads(kept)
            kept = item.choices[values.index(max(values))]
        chosen = first_choice(kept, CHOICES[name])
        return Sample(name, number, item.text, item.answer, kept, float(chosen == item.answer))

    def _score(self, name: str, samples: list[Sample]) -> TaskScore:
        values = [each.score for each in samples]
        metrics = {"accuracy": sum(values) / len(values)}
        if self.config.score == "answers":
            read = [first_choice(each.predicted, CHOICES[name]) for each in samples]
            metrics["unread"] = read.count(None) / len(read)
        return score_of_means(values, "accuracy", metrics, len(values))

    def published(self, scores: dict[str, TaskScore]) -> dict[str, dict]:
        whole = {name for name, score in scores.items() if score.n == WHOLE[name]}
        found = {name: figure for name, figure in PUBLISHED.items() if name in whole}
        average = AVERAGE if whole == WHOLE.keys() else None
        if not found and average is None:
            return {}
        return {"FuRA, Llama-3-8B": {"scores": found, "average": average, "source": "FuRA, arXiv 2605.22869"}}

    def notes(self, scores: dict[str, dict[str, TaskScore]], published: bool) -> list[str]:
        lines = []
        for model, each in scores.items():
            unread = {name: round(score.metrics.get("unread", 0) * score.n) for name, score in each.items()}
            listed = ", ".join(f"{name} {count} of {each[name].n}" for name, count in unread.items() if count)
            if listed:
                lines.append(f"{model}: answers that name no choice count as wrong: {listed}.")
        if self.config.score == "likelihood":
            lines.append("A choice's likelihood is the mean over the tokens of 'the correct answer is CHOICE'.")
        if published:
            lines.append(
                "Published: 4 beams, after training on commonsense_170k.json. It stands beside whole sets only."
            )
        return lines


def _form(config: EvalConfig, source: Source) -> str | None:
    """The form of a question: the given one, or what a run says, and Alpaca's where nothing does."""
    if config.conversation or source.processor != source.base:
        return config.conversation
    family = load_family(source.processor, source.base)
    said = "conversation" in family.tokenizer.init_kwargs
    return None if said or "alpaca" not in family.conversations else "alpaca"


def first_choice(text: str, choices: tuple[str, ...]) -> str | None:
    """The first of ``choices`` in a text, as LLM-Adapters finds it: anywhere, in this case of letters."""
    found = re.search("|".join(choices), text)
    return found and found.group()


def read_set(folder: str, name: str, part: str = "test") -> list[Item]:
    """The questions of a set.

    Args:
        folder: holds ``NAME/test.json`` (as in LLM-Adapters' repository) or ``NAME-test.json``.
        name: a key of ``CHOICES``.
        part: ``train`` for the other part of a set.

    Raises:
        DataError: there is no such set or file, or a record of it has another form.
    """
    if name not in CHOICES:
        raise DataError(f"There is no commonsense set {name!r}: the sets are {', '.join(CHOICES)}")
    places = [Path(folder).expanduser() / name / f"{part}.json", Path(folder).expanduser() / f"{name}-{part}.json"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise DataError(
            f"There is neither {places[0]} nor {places[1]}: fetch dataset/{name}/{part}.json of LLM-Adapters, or name "
            "the sets that are there with --tasks"
        )
    items = [_item(file, place, record, name) for place, record in iter_items(file)]
    if not items:
        raise DataError(f"{file} holds no records: fetch it again")
    return items


def _item(file: Path, place: str, record, name: str) -> Item:
    def wrong(reason: str) -> DataError:
        return DataError(f"{file}, {place}: {reason}; records of this suite are LLM-Adapters', with instruction, "
                         "input, output and answer")  # fmt: skip

    if not isinstance(record, dict):
        raise wrong("it is no object")
    for key in ("instruction", "answer"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise wrong(f"it has no text {key!r}")
    if (record.get("input") or "") != "":
        raise wrong("its input is not empty")
    format_ = re.search(r"Answer format: (\S+)\s*$", record["instruction"])
    if format_ is None:
        raise wrong("its instruction does not end with 'Answer format:' and the choices")
    choices = tuple(format_[1].split("/"))
    if not set(choices) <= set(CHOICES[name]):
        raise wrong(f"its choices are {'/'.join(choices)}, and those of {name} are {'/'.join(CHOICES[name])}")
    if record["answer"] not in choices:
        raise wrong(f"its answer {record['answer']!r} is none of its choices {'/'.join(choices)}")
    return Item(record["instruction"], choices, record["answer"])
