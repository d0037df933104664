"""The records of the text study, and plain English.

The records are LLM-Adapters' (arXiv 2304.01933), ``NAME-train.json`` and ``NAME-test.json``. Plain English are 300 news
articles of the Lee corpus (M. D. Lee and others, 2005), which gensim's wheel has among the files of its tests.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np
import torch

from evidence.configuration import EvidenceError, Study
from evidence.data import Choices, Data, Rows, encode, encode_choices
from fura_vlm.evaluation.commonsense import ANSWER, Item, read_set
from fura_vlm.families.base import Family

PLAIN = "gensim/test/test_data/lee_background.cor"
FETCH = "pip download --no-deps --dest data/plain gensim==4.4.0"


@dataclass
class TextData:
    """Settings of the text study's data.

    Args:
        folder: of LLM-Adapters' records.
        plain: a text file, or a wheel of gensim.
        train: sets whose train parts are trained on.
        held_out: sets that are only asked.
        validation: share of each train part that learning rates are chosen by; it is not trained on.
        max_length: the most tokens of a record.
        plain_tokens: as much of the text is used.
        limit: the most records of each part, for a try.
    """

    folder: str
    plain: str
    train: list[str]
    held_out: list[str]
    validation: float = 0.15
    max_length: int = 512
    plain_tokens: int = 65_536
    limit: int | None = None


def prepare(study: Study, family: Family, settings: TextData) -> Data:
    """Reads and encodes all of a text study's data.

    Raises:
        EvidenceError, DataError: a file is missing or has another form.
    """
    rows, validation = Rows(), {}
    for number, name in enumerate(settings.train):
        items = read_set(settings.folder, name, "train")[: settings.limit]
        order = np.random.default_rng((0, number)).permutation(len(items))
        first = max(1, round(settings.validation * len(items)))
        held = {int(place) for place in order[:first]}
        validation[name] = choices(family, [item for place, item in enumerate(items) if place in held])
        talks = [(item.text, ANSWER.format(item.answer), -1) for place, item in enumerate(items) if place not in held]
        found = encode(family, talks, settings.max_length)
        rows.ids += found.ids
        rows.labels += found.labels
        rows.pictures += found.pictures
    tests = sets(family, settings.folder, [*settings.train, *settings.held_out], settings.limit)
    return Data(rows, validation, tests, plain(family, settings.plain, limited(settings)))


def limited(settings) -> int:
    """The tokens of plain English: fewer for a try."""
    return min(settings.plain_tokens, 64 * settings.limit) if settings.limit else settings.plain_tokens


def sets(family: Family, folder: str, names: list[str], limit: int | None) -> dict[str, Choices]:
    """The test parts of some sets."""
    return {name: choices(family, read_set(folder, name)[:limit]) for name in names}


def choices(family: Family, items: list[Item]) -> Choices:
    """Questions with the answers "the correct answer is CHOICE"."""
    asked = [
        (item.text, [ANSWER.format(choice) for choice in item.choices], item.choices.index(item.answer), -1)
        for item in items
    ]
    return encode_choices(family, asked)


def plain(family: Family, file: str, tokens: int) -> torch.Tensor:
    """The first tokens of a text: (tokens,) int64, or fewer.

    Raises:
        EvidenceError: there is no such file, or no text in it.
    """
    found = [Path(each) for each in sorted(glob(file))] if "*" in file else [Path(file)]
    if not found or not found[0].is_file():
        raise EvidenceError(f"There is no plain English at {file}: fetch it with {FETCH}, or name a text with --plain")
    if found[0].suffix == ".whl":
        try:
            text = zipfile.ZipFile(found[0]).read(PLAIN).decode("utf-8")
        except (KeyError, zipfile.BadZipFile) as error:
            raise EvidenceError(f"{found[0]} holds no {PLAIN}: fetch it with {FETCH}") from error
    else:
        text = found[0].read_text("utf-8")
    ids = family.tokenizer(text, add_special_tokens=False).input_ids[:tokens]
    if len(ids) < 2:
        raise EvidenceError(f"{found[0]} holds no text: name another one with --plain")
    return torch.tensor(ids)
