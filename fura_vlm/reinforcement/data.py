"""Questions that a model is trained on by reward, and the rows that TRL gets of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from fura_vlm.data.image_checks import check_paths
from fura_vlm.data.images import image_size, load_image
from fura_vlm.data.messages import Problem, Record
from fura_vlm.data.records import iter_records
from fura_vlm.evaluation.problems import BOXED, iter_questions
from fura_vlm.families.base import EncodingError, Family
from fura_vlm.families.messages import Message, Picture, Text, pictures
from fura_vlm.reinforcement.config import GrpoConfig
from fura_vlm.training.errors import TrainingError


@dataclass(frozen=True)
class Asked:
    """A question as the model gets it.

    Args:
        messages: up to the answer.
        answer: the right one, as the set has it.
        expected: the same as math-verify reads it; empty for the reward exact.
        file, place, id: where it comes from.
    """

    messages: tuple[Message, ...]
    answer: str
    expected: tuple = ()
    file: str = ""
    place: str = ""
    id: str = ""

    def problem(self, reason: str) -> Problem:
        return Problem(self.file, self.place, self.id or self.place, reason)


def load_questions(config: GrpoConfig, family: Family) -> tuple[list[Asked], list[Problem]]:
    """The questions that can be used, and what is wrong with the others.

    Raises:
        DataError: the set cannot be read as a whole.
        TrainingError: there are fewer questions than a step takes.
    """
    found, problems = (_of_math if config.reward == "math" else _of_records)(config)
    if config.only is not None and not found:
        raise TrainingError(f"{config.data_path} has no question in which {config.only!r} is found: change --only")
    kept = []
    for one in found:
        try:
            family.refuse_typed(one.messages)
            tokens = family.prompt_length(one.messages, [image_size(path) for path in pictures(one.messages)])
        except EncodingError as reason:
            problems.append(one.problem(str(reason)))
            continue
        if tokens > config.max_prompt_length:
            reason = f"the question has {tokens} tokens, and max_prompt_length is {config.max_prompt_length}"
            problems.append(one.problem(reason))
        else:
            kept.append(one)
    if kept and len(kept) < config.prompts_per_step:
        raise TrainingError(
            f"{config.data_path} has {len(kept)} questions that can be used, and a step takes "
            f"{config.prompts_per_step}: take fewer with --prompts_per_step, or more questions"
        )
    return kept, problems


def _of_math(config: GrpoConfig) -> tuple[list[Asked], list[Problem]]:
    found, problems = [], []
    after = BOXED if config.instruction is None else config.instruction
    for question, problem in itertools.islice(iter_questions(config.data_path), config.limit):
        if problem is not None:
            problems.append(problem)
        elif config.only is None or re.search(config.only, question.text):
            messages = (Message("user", (Text(question.text + after),)),)
            found.append(Asked(messages, question.answer, tuple(question.expected), question.file, question.place))
    return found, problems


def _of_records(config: GrpoConfig) -> tuple[list[Asked], list[Problem]]:
    pairs = itertools.islice(iter_records(config.data_path, config.image_folder), config.limit)
    records, problems = [], []
    for record, problem in pairs:
        records += [record] if record is not None else []
        problems += [problem] if problem is not None else []
    found = [one for record in records if (one := _question(record, config)) is not None]
    if any(pictures(one.messages) for one in found):  # TRL's batches need a picture in each row
        problems += [one.problem("it has no picture, and others have") for one in found if not pictures(one.messages)]
        found = [one for one in found if pictures(one.messages)]
    broken = check_paths(list(dict.fromkeys(path for one in found for path in pictures(one.messages))))
    problems += [
        one.problem(next(broken[path] for path in pictures(one.messages) if path in broken))
        for one in found
        if broken.keys() & pictures(one.messages)
    ]
    return [one for one in found if not broken.keys() & pictures(one.messages)], problems


def _question(record: Record, config: GrpoConfig) -> Asked | None:
    """The first question of a record that fits, by itself, with all pictures up to it before its words."""
    for number, message in enumerate(record.messages[:-1]):
        words = message.text.strip()
        if message.role == "user" and re.search(config.only or "", words):
            before = [Picture(path) for path in pictures(record.messages[: number + 1])]
            asked = Message("user", (*before, Text(words + (config.instruction or ""))))
            system = [one for one in record.messages[:1] if one.role == "system"]
            answer = record.messages[number + 1].text.strip()
            return Asked((*system, asked), answer, (), record.file, record.place, record.id)
    return None


def rows(questions: Sequence[Asked]) -> Dataset:
    """A row for each question: ``number``, ``prompt`` as TRL takes a conversation, and of questions with pictures
    ``images``, which are read when a row is asked for."""
    with_pictures = any(pictures(one.messages) for one in questions)

    def made(batch: dict[str, list]) -> dict[str, list]:
        asked = [questions[number] for number in batch["number"]]
        columns = {"number": batch["number"], "prompt": [[_as_dict(m) for m in one.messages] for one in asked]}
        if with_pictures:
            columns["images"] = [[load_image(path) for path in pictures(one.messages)] for one in asked]
        return columns

    return Dataset.from_dict({"number": list(range(len(questions)))}).with_transform(made)


def _as_dict(message: Message) -> dict:
    """TRL puts the pictures themselves where they stand."""
    if not any(isinstance(part, Picture) for part in message.parts):
        return {"role": message.role, "content": message.text}
    parts = [
        {"type": "image"} if isinstance(part, Picture) else {"type": "text", "text": part.text}
        for part in message.parts
    ]
    return {"role": message.role, "content": parts}
