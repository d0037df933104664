"""Held-out questions, the quick check at the end of a training run: the model answers greedily, and an answer counts if

it matches exactly. Real benchmarks go through lmms-eval.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from fura_vlm.data.image_checks import check_images
from fura_vlm.data.images import load_image
from fura_vlm.data.messages import DataError, Record
from fura_vlm.data.records import default_image_folder, read_records
from fura_vlm.evaluation.generation import written
from fura_vlm.families.base import Family
from fura_vlm.families.messages import Message, pictures
from fura_vlm.files import write_text


@dataclass(frozen=True)
class Answer:
    """One answered question. ``image`` is the path of the picture or ``None``."""

    id: str
    family: str
    question: str
    expected: str
    predicted: str
    image: str | None

    @property
    def correct(self) -> bool:
        return normalise(self.predicted) == normalise(self.expected)


def normalise(text: str) -> str:
    """Ignores case, surrounding space and a closing full stop, nothing else."""
    return text.strip().removesuffix(".").casefold()


def load_questions(path: str | Path, image_folder: str | Path | None = None) -> list[Record]:
    """The held-out questions of a file in the LLaVA format. Unlike training, an evaluation leaves nothing out.

    Raises:
        DataError: if a record or its image cannot be used; the message names it.
    """
    records, problems = read_records(path, image_folder)
    records, broken = check_images(records, "decode")
    for problem in problems + broken:
        if problem.skipped:
            where = Path(image_folder) if image_folder is not None else default_image_folder(path)
            hint = f"; --eval_image_folder says where the questions' image paths start (now {where})"
            reason = problem.reason + (hint if problem in broken else "")
            raise DataError(f"{problem.file}, {problem.place} (id {problem.record}): {reason}")
    return records


# Not inference_mode: under ZeRO-3 the weights gathered here would stay inference tensors, useless for training.
@torch.no_grad()
def answer_questions(
    model,
    family: Family,
    records: list[Record],
    batch_size: int = 32,
    max_new_tokens: int = 16,
    progress: bool = True,
    synced_gpus: bool = False,
) -> list[Answer]:
    """Answers the first question of each record with the model as it is, greedily.

    Args:
        model: as it is or within a PEFT model; it is left in the mode it was in.
        family: that of the model.
        records: the questions; ``record.extra["family"]`` groups them, where it is there.
        synced_gpus: as in ``generate``: needed where several processes share the weights (ZeRO-3).
    """
    training = model.training
    model.eval()
    answers = []
    steps = range(0, len(records), batch_size)
    for start in tqdm(steps, desc="held-out questions", disable=not progress, mininterval=2, leave=False):
        batch = records[start : start + batch_size]
        asked = [question_of(record) for record in batch]
        inputs = [family.inputs(messages, [load_image(source) for source in pictures(messages)]) for messages in asked]
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "synced_gpus": synced_gpus}
        texts = written(model, family, inputs, **settings)
        for record, messages, text in zip(batch, asked, texts, strict=True):
            question, expected = messages[-1].text.strip(), record.messages[len(messages)].text
            image = next(iter(pictures(messages)), None)
            kind = record.extra.get("family", "all")
            answers.append(Answer(record.id, kind, question, expected, text.strip(), image))
    model.train(training)
    return answers


def question_of(record: Record) -> tuple[Message, ...]:
    """All up to the first answer."""
    first = next(number for number, message in enumerate(record.messages) if message.role == "assistant")
    return record.messages[:first]


def exact_match(answers: list[Answer]) -> dict[str, float]:
    """Share of exact matches by family, and ``"mean"``, the mean of the families."""
    by_family = defaultdict(list)
    for answer in answers:
        by_family[answer.family].append(answer.correct)
    scores = {family: sum(hits) / len(hits) for family, hits in by_family.items()}
    scores["mean"] = sum(scores.values()) / len(scores)
    return scores


def blind_guess(answers: list[Answer]) -> dict[str, float]:
    """The score without looking: every question gets the most common expected answer of its family."""
    expected = defaultdict(Counter)
    for answer in answers:
        expected[answer.family][normalise(answer.expected)] += 1
    scores = {family: counts.most_common(1)[0][1] / counts.total() for family, counts in expected.items()}
    scores["mean"] = sum(scores.values()) / len(scores)
    return scores


def write_answers(path: str | Path, answers: list[Answer]) -> None:
    """Writes answers as JSONL, under a temporary name first."""
    write_text(path, "".join(json.dumps(asdict(answer)) + "\n" for answer in answers))


def read_answers(path: str | Path) -> list[Answer]:
    """What :func:`write_answers` wrote."""
    return [Answer(**json.loads(line)) for line in Path(path).read_text().splitlines()]
