"""The records of the study with pictures: scenes of the embedded world, and easy-VQA.

Some kinds of questions about scenes are trained, others are only asked. easy-VQA (PyPI, ``easy-vqa``) has 48 thousand
questions on 5,000 small pictures that are not of this project. Answers to what is trained are compared word for word;
of kinds that are not trained the likeliest of a few answers counts, because nobody has told the model their form.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evidence.configuration import EvidenceError, Study
from evidence.data import Choices, Data, Rows, encode, encode_choices
from evidence.texts import limited, plain, sets
from fura_vlm.embedded.embedded import held_out_questions
from fura_vlm.embedded.questions import SHORT, Question, ask
from fura_vlm.embedded.scenes import WORDS, draw, make_scene
from fura_vlm.families.base import Family

VALIDATION_SCENES = 10_000_000  # numbers from here on are not trained on
WORDS_OFFERED = 8  # of a sign


@dataclass
class PictureData:
    """Settings of the data.

    Args:
        folder: of LLM-Adapters' records, for what is left of the language.
        plain: a text file, or a wheel of gensim.
        trained: kinds of questions about scenes that are trained.
        asked: kinds that are only asked.
        language: LLM-Adapters' sets that are asked, without pictures.
        scenes: records about scenes, one question each, two of a scene.
        easy_vqa: records of easy-VQA.
        validation: questions of each kind, and of easy-VQA, that learning rates are chosen by.
        tests: questions of each kind.
        easy_vqa_tests: questions of easy-VQA's test part.
        max_length: the most tokens of a record.
        plain_tokens: as much of the plain English is used.
        limit: the most records of each part, for a try.
    """

    folder: str
    plain: str
    trained: list[str]
    asked: list[str]
    language: list[str]
    scenes: int = 10_000
    easy_vqa: int = 10_000
    validation: int = 400
    tests: int = 500
    easy_vqa_tests: int = 3000
    max_length: int = 512
    plain_tokens: int = 65_536
    limit: int | None = None


class Album:
    """Pictures as they are collected: each once, by a name."""

    def __init__(self, family: Family):
        self.family, self.numbers, self.pixels = family, {}, []
        settings = family.processor.image_processor
        self.mean, self.std = tuple(settings.image_mean), tuple(settings.image_std)

    def add(self, name: str, picture: Image.Image) -> int:
        """The number of a picture, which the model's own processor has made the size that the model sees."""
        if name not in self.numbers:
            made = self.family.pixels([picture])["pixel_values"][0]
            mean, std = (torch.tensor(each)[:, None, None] for each in (self.mean, self.std))
            values = (made * std + mean) * 255
            self.pixels.append(values.round().to(torch.uint8))
            self.numbers[name] = len(self.pixels) - 1
        return self.numbers[name]


def prepare(study: Study, family: Family, settings: PictureData) -> Data:
    """Makes and encodes all of the data.

    Raises:
        EvidenceError, DataError: easy-VQA is not installed, or a file is missing or has another form.
    """
    limits = {
        name: min(getattr(settings, name), settings.limit or 10**9)
        for name in ("scenes", "easy_vqa", "validation", "tests", "easy_vqa_tests")
    }
    album = Album(family)
    talks = scene_talks(album, settings.trained, limits["scenes"], first=0)
    easy_train, easy_held = easy_vqa_talks(album, "train", limits["easy_vqa"], limits["validation"])
    train = encode(family, talks + easy_train, settings.max_length)
    validation: dict[str, Rows | Choices] = {
        kind: encode(family, scene_talks(album, [kind], limits["validation"], VALIDATION_SCENES), settings.max_length)
        for kind in settings.trained
    }
    validation["easy-VQA"] = encode(family, easy_held, settings.max_length)
    tests: dict[str, Rows | Choices] = {}
    for kind in settings.trained:
        talks = [
            (question.text, question.answer, album.add(f"test of {kind} {number}", draw(scene)))
            for number, (scene, question) in enumerate(held_out_questions(0, kind, limits["tests"]))
        ]
        tests[kind] = encode(family, talks, settings.max_length)
    for kind in settings.asked:
        asked = []
        for number, (scene, question) in enumerate(held_out_questions(0, kind, limits["tests"])):
            offered = offers(question, random.Random(f"{kind}/{number}"))
            picture = album.add(f"test of {kind} {number}", draw(scene))
            asked.append((question.text, offered, offered.index(question.answer), picture))
        tests[kind] = encode_choices(family, asked)
    easy_tests, _ = easy_vqa_talks(album, "test", limits["easy_vqa_tests"], 0)
    tests["easy-VQA"] = encode(family, easy_tests, settings.max_length)
    tests |= sets(family, settings.folder, settings.language, settings.limit)
    return Data(
        train, validation, tests, plain(family, settings.plain, limited(settings)), torch.stack(album.pixels),
        album.mean, album.std,
    )  # fmt: skip


def scene_talks(album: Album, kinds: Sequence[str], number: int, first: int) -> list[tuple[str, str, int]]:
    """Questions about scenes of the training part, two of each scene, their kinds in turn.

    Args:
        first: the number of the first scene.
    """
    rng = random.Random(f"evidence/{first}/{','.join(kinds)}")
    talks, index = [], first
    while len(talks) < number:
        scene = make_scene(0, "train", index, with_sign=True if "textvqa" in kinds else None)
        picture = album.add(f"scene {index} {scene.signs}", draw(scene))
        found = [ask(kinds[(len(talks) + each) % len(kinds)], scene, rng) for each in range(2)]
        talks += [(question.text, question.answer, picture) for question in found if question]
        index += 1
    return talks[:number]


def offers(question: Question, rng: random.Random) -> list[str]:
    """The answers that a model chooses from: the letters of the choices, or the sign's word among others."""
    if "choices" in question.extra:
        return list("ABCDE"[: len(question.extra["choices"])])
    words = [question.answer, *rng.sample([word for word in WORDS if word != question.answer], WORDS_OFFERED - 1)]
    rng.shuffle(words)
    return words


def easy_vqa_talks(album: Album, part: str, number: int, held: int) -> tuple[list, list]:
    """Questions of easy-VQA: ``number`` of them, and ``held`` about other pictures.

    Raises:
        EvidenceError: the package is not installed.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise EvidenceError("easy-VQA is not installed: pip install --no-deps easy-vqa==1.0") from error
    questions, answers, pictures = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[part]()
    folder = Path(easy_vqa.__file__).parent / "data" / part / "images"
    order = np.random.default_rng(0).permutation(len(questions))
    # The pictures with the highest numbers are held back, more than enough of them.
    border = int(0.9 * max(pictures)) if held else max(pictures) + 1
    chosen: dict[bool, list] = {False: [], True: []}
    for place in order:
        is_held = pictures[place] >= border
        if len(chosen[is_held]) < (held if is_held else number):
            name = f"easy-VQA {part} {pictures[place]}"
            if name in album.numbers:
                picture = album.numbers[name]
            else:
                picture = album.add(name, Image.open(folder / f"{pictures[place]}.png").convert("RGB"))
            chosen[is_held].append((f"{questions[place]}\n{SHORT}", answers[place], picture))
    return chosen[False], chosen[True]
