"""What every run of a study reads: tokens, choices and pictures, in one file that is made once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from evidence.configuration import EvidenceError
from fura_vlm.families.base import IGNORE, EncodingError, Family
from fura_vlm.families.messages import Message, Picture, Text

SHARED = -1  # the owner of tokens that all answers see


class Laid(NamedTuple):
    """A question with all of its answers as one row.

    Args:
        ids: (n,) int64.
        places: (n,) int64, the position of each token in the question with its own answer alone.
        owners: (n,) int64, the answer that each token belongs to, or ``SHARED``.
        asked: (m, 3) int64: a place in the row, the token that should follow it, and the answer that this is for.
    """

    ids: torch.Tensor
    places: torch.Tensor
    owners: torch.Tensor
    asked: torch.Tensor


def laid_out(prompt: torch.Tensor, answers: Sequence[torch.Tensor]) -> Laid:
    """What answers begin with in common stands once, and then what each has of its own, one behind the other."""
    common = 0
    while all(len(answer) > common + 1 and answer[common] == answers[0][common] for answer in answers):
        common += 1
    trunk = torch.cat([prompt, answers[0][:common]])
    ids, places, owners = [trunk], [torch.arange(len(trunk))], [torch.full_like(trunk, SHARED)]
    asked = [(len(prompt) - 1 + number, int(token), SHARED) for number, token in enumerate(answers[0][:common])]
    length = len(trunk)
    for number, answer in enumerate(answers):
        own = answer[common:]
        asked.append((len(trunk) - 1, int(own[0]), number))
        asked += [(length + place, int(token), number) for place, token in enumerate(own[1:])]
        ids.append(own[:-1])
        places.append(torch.arange(len(trunk), len(trunk) + len(own) - 1))
        owners.append(torch.full_like(own[:-1], number))
        length += len(own) - 1
    return Laid(torch.cat(ids), torch.cat(places), torch.cat(owners), torch.tensor(asked))


@dataclass
class Rows:
    """Conversations as tokens.

    Args:
        ids: of each (n,) int64.
        labels: of each (n,) int64, ``IGNORE`` where nothing is to be said.
        pictures: of each the number of its picture, or -1.
    """

    ids: list[torch.Tensor] = field(default_factory=list)
    labels: list[torch.Tensor] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]


@dataclass
class Choices:
    """Questions with several answers, one of them right, as tokens.

    Args:
        prompts: of each question (n,) int64, up to where the answer begins.
        answers: of each question its answers, (m,) int64 each, with their end token.
        right: of each question the number of the right answer.
        pictures: of each the number of its picture, or -1.
    """

    prompts: list[torch.Tensor] = field(default_factory=list)
    answers: list[list[torch.Tensor]] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def laid(self) -> list[Laid]:
        """Each question in the form that all of its answers are judged in at once."""
        return [laid_out(prompt, answers) for prompt, answers in zip(self.prompts, self.answers, strict=True)]


@dataclass
class Data:
    """The data of a study.

    Args:
        train: what is trained on.
        validation: by name, what learning rates are chosen by; cut from the training parts.
        tests: by name, what results are given of. Rows are answered word for word, choices by their likelihood.
        plain: plain English, (n,) int64: forgetting is measured by its perplexity.
        pictures: (number, 3, height, width) uint8, or None.
        mean, std: of the three colours, as the model's image processor has them.
        fingerprint: of all that.
    """

    train: Rows
    validation: dict[str, Rows | Choices]
    tests: dict[str, Rows | Choices]
    plain: torch.Tensor
    pictures: torch.Tensor | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    fingerprint: str = ""

    def pixels(self, numbers: Sequence[int], device: torch.device | str) -> torch.Tensor:
        """Pictures as the model takes them, (len(numbers), 3, height, width) float32."""
        chosen = self.pictures[torch.as_tensor(numbers)].to(device, non_blocking=True).float() / 255
        mean, std = (torch.tensor(each, device=device).view(1, 3, 1, 1) for each in (self.mean, self.std))
        return (chosen - mean) / std


def save(data: Data, file: Path) -> str:
    """Writes the data, whole or not at all; returns their fingerprint."""
    packed = {
        "train": _packed(data.train),
        "validation": {name: _packed(each) for name, each in data.validation.items()},
        "tests": {name: _packed(each) for name, each in data.tests.items()},
        "plain": data.plain,
        "pictures": data.pictures,
        "mean": data.mean,
        "std": data.std,
    }
    packed["fingerprint"] = _fingerprint(packed)
    file.parent.mkdir(parents=True, exist_ok=True)
    building = file.with_name(f"{file.name}.tmp")
    torch.save(packed, building)
    building.replace(file)
    return packed["fingerprint"]


def load(file: Path) -> Data:
    """The data that ``save`` wrote.

    Raises:
        EvidenceError: they are not there, or the file is damaged.
    """
    if not file.is_file():
        raise EvidenceError(f"There is no {file}: make it with --prepare first")
    try:
        packed = torch.load(file, weights_only=True, mmap=True)
        parts = {name: {key: _unpacked(each) for key, each in packed[name].items()} for name in ("validation", "tests")}
        return Data(
            train=_unpacked(packed["train"]), plain=packed["plain"], pictures=packed["pictures"], mean=packed["mean"],
            std=packed["std"], fingerprint=packed["fingerprint"], **parts,
        )  # fmt: skip
    except (RuntimeError, KeyError, ValueError, OSError) as error:
        raise EvidenceError(f"{file} is damaged or of another version: make it again with --prepare") from error


def encode(family: Family, talks: Sequence[tuple[str, str, int]], max_length: int) -> Rows:
    """Rows of questions and answers.

    Args:
        talks: of each the question, the answer, and the number of its picture or -1.
        max_length: the most tokens of a row.

    Raises:
        EvidenceError: a conversation cannot be encoded, or is longer.
    """
    rows = Rows()
    conversations = [(_messages(question, answer, picture), [(1, 1)] * (picture >= 0))
                     for question, answer, picture in talks]  # fmt: skip
    for (question, _, picture), encoded in zip(talks, family.encode(conversations), strict=True):
        if isinstance(encoded, EncodingError):
            raise EvidenceError(f"The record {question[:60]!r} cannot be used: {encoded}")
        ids, labels = family.spread(encoded)
        if len(ids) > max_length:
            raise EvidenceError(f"The record {question[:60]!r} has {len(ids)} tokens: raise max_length to that")
        rows.ids.append(torch.from_numpy(ids))
        rows.labels.append(torch.from_numpy(labels))
        rows.pictures.append(picture)
    return rows


def encode_choices(family: Family, questions: Sequence[tuple[str, Sequence[str], int, int]]) -> Choices:
    """Choices of questions, answers, the number of the right one, and that of the question's picture or -1.

    Raises:
        EvidenceError: a question cannot be encoded.
    """
    talks = [(question, answer, picture) for question, answers, _, picture in questions for answer in answers]
    rows = encode(family, talks, max_length=10**9)
    choices, place = Choices(), 0
    for _, answers, right, picture in questions:
        prompt, found = None, []
        for ids, labels in zip(rows.ids[place : place + len(answers)], rows.labels[place:], strict=False):
            said = (labels != IGNORE).nonzero()[:, 0]
            prompt = ids[: said[0]]
            found.append(ids[said[0] : said[-1] + 1])
        choices.prompts.append(prompt)
        choices.answers.append(found)
        choices.right.append(right)
        choices.pictures.append(picture)
        place += len(answers)
    return choices


def _messages(question: str, answer: str, picture: int) -> tuple[Message, Message]:
    asked = (Picture(""), Text(question)) if picture >= 0 else (Text(question),)
    return Message("user", asked), Message("assistant", (Text(answer),))


def _packed(part: Rows | Choices) -> dict:
    if isinstance(part, Rows):
        lists = {"ids": part.ids, "labels": part.labels}
        return {"kind": "rows", "pictures": torch.tensor(part.pictures)} | _flat(lists)
    flat = {"prompts": part.prompts, "answers": [answer for answers in part.answers for answer in answers]}
    numbers = torch.tensor([len(answers) for answers in part.answers])
    more = {"right": torch.tensor(part.right), "pictures": torch.tensor(part.pictures), "numbers": numbers}
    return {"kind": "choices"} | more | _flat(flat)


def _flat(lists: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensors in lists.items():
        found[name] = torch.cat([*tensors, torch.zeros(0, dtype=torch.long)]).to(torch.int32)
        found[f"{name} lengths"] = torch.tensor([len(tensor) for tensor in tensors], dtype=torch.long)
    return found


def _lists(packed: dict, name: str) -> list[torch.Tensor]:
    return list(packed[name].long().split(packed[f"{name} lengths"].tolist()))


def _unpacked(packed: dict) -> Rows | Choices:
    if packed["kind"] == "rows":
        return Rows(_lists(packed, "ids"), _lists(packed, "labels"), packed["pictures"].tolist())
    answers, place, grouped = _lists(packed, "answers"), 0, []
    for number in packed["numbers"].tolist():
        grouped.append(answers[place : place + number])
        place += number
    return Choices(_lists(packed, "prompts"), grouped, packed["right"].tolist(), packed["pictures"].tolist())


def _fingerprint(packed) -> str:
    digest = hashlib.sha256()

    def add(value) -> None:
        if isinstance(value, dict):
            for key in sorted(value):
                digest.update(key.encode())
                add(value[key])
        elif isinstance(value, torch.Tensor):
            digest.update(value.numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    add(packed)
    return digest.hexdigest()[:16]
