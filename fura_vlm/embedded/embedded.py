"""Writes the embedded mixture: pictures as PNG files and two JSON files in the LLaVA format.

    <output_dir>/train.json      records with several turns; some are text only
    <output_dir>/eval.json       held-out questions, one turn each, with ``family`` and what its benchmark records
    <output_dir>/images/*.png
    <output_dir>/recipe.json     the settings it was made with

Besides the LLaVA keys (``id``, ``image``, ``conversations``) a held-out record has ``family`` and, by family,
``category``, ``hint`` and ``choices``; readers of the format ignore what they do not know.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from fura_vlm.embedded.conversations import conversation, small_talk
from fura_vlm.embedded.questions import FAMILIES, SHORT, ask
from fura_vlm.embedded.scenes import Scene, draw, make_scene
from fura_vlm.errors import FuraVLMError
from fura_vlm.files import whole_folder


class EmbeddedError(FuraVLMError, ValueError):
    """Settings or a folder that cannot be used."""


VERSION = 3  # raised when the same settings give other files


@dataclass
class EmbeddedConfig:
    """Settings of the embedded mixture.

    Args:
        output_dir: the folder to write.
        train_records: records for training.
        text_share: share of the training records without a picture.
        talk_share: share of the records that are conversations in plain words; the others ask in the words of the four
            benchmarks.
        turns: question-and-answer turns of a training record with a picture.
        eval_per_family: held-out questions of each of the four families.
        seed: gives other scenes and questions.
    """

    output_dir: str = "data/embedded"
    train_records: int = 2240
    text_share: float = 0.06
    talk_share: float = 0.41
    turns: int = 4
    eval_per_family: int = 100
    seed: int = 0


def write_embedded(config: EmbeddedConfig) -> bool:
    """Writes the mixture unless it is there already with the same settings. Returns whether it wrote.

    The files are written beside ``output_dir`` first and moved there when complete.

    Raises:
        EmbeddedError: if a number is out of range, or if ``output_dir`` holds something else.
    """
    if config.train_records < 1 or config.eval_per_family < 1 or config.turns < 1:
        raise EmbeddedError("train_records, turns and eval_per_family must be at least 1")
    if not 0 <= config.text_share < 1 or not 0 <= config.talk_share <= 1:
        raise EmbeddedError("text_share must be in [0, 1) and talk_share in [0, 1]")
    target = Path(config.output_dir)
    recipe = json.dumps({"version": VERSION, **asdict(config), "output_dir": None}, indent=1)
    if is_made(target, recipe, "train_records"):
        return False
    with whole_folder(target) as building:
        (building / "images").mkdir()
        _write_json(building / "train.json", _training_records(config, building))
        _write_json(building / "eval.json", _held_out_records(config, building))
        (building / "recipe.json").write_text(recipe)
    return True


def is_made(target: Path, recipe: str, setting: str) -> bool:
    """Whether ``target`` holds what ``recipe`` makes. If not, it may be replaced by that.

    Args:
        target: a folder, or nothing yet.
        recipe: what its ``recipe.json`` should say.
        setting: a key by which the ``recipe.json`` of other settings is known.

    Raises:
        EmbeddedError: if the folder holds something else.
    """
    if not target.exists() or not any(target.iterdir()):
        return False
    try:
        found = (target / "recipe.json").read_text("utf-8")
        known = setting in json.loads(found)
    except (OSError, ValueError, TypeError):
        known = False
    if not known:
        raise EmbeddedError(f"{target} holds something else than embedded data: name another folder")
    return found == recipe


def _training_records(config: EmbeddedConfig, folder: Path):
    rng = random.Random(f"{config.seed}/train/records")
    for number in tqdm(range(config.train_records), desc="training records", mininterval=1):
        if rng.random() < config.text_share:
            yield {
                "id": f"text-{number}",
                "conversations": _turns(
                    small_talk(rng, config.turns)
                    if rng.random() < config.talk_share
                    else (_text_only(rng) for _ in range(config.turns))
                ),
            }
            continue
        # Every second scene has a sign, so that there are as many words to read as other questions to ask.
        scene = make_scene(config.seed, "train", number, with_sign=number % 2 == 0)
        if rng.random() < config.talk_share:
            asked = conversation(scene, rng, config.turns + 1)  # its turns are shorter
        else:
            families = [f for f in FAMILIES if f != "textvqa" or scene.signs]
            asked = [(q.text, q.answer) for q in _questions(scene, families, config.turns, rng)]
        mark = "<image>\n{}" if rng.random() < 0.7 else "{}\n<image>"
        asked[0] = (mark.format(asked[0][0]), asked[0][1])
        yield {
            "id": f"train-{number}",
            "image": _save(scene, folder, f"train-{number}"),
            "conversations": _turns(asked),
        }


def held_out_questions(seed: int, family: str, number: int):
    """The held-out questions of a family with their scenes; those of a smaller ``number`` are the first of a larger.

    Yields:
        ``(scene, question)``; no scene serves two families, and POPE asks as often for what is there as for what is
        not.
    """
    rng = random.Random(f"{seed}/eval/{family}")
    index, found = FAMILIES.index(family), 0
    while found < number:
        scene = make_scene(seed, "eval", index, with_sign=True if family == "textvqa" else None)
        question = ask(family, scene, rng)
        index += len(FAMILIES)
        if question is None or (family == "pope" and question.answer != ("Yes", "No")[found % 2]):
            continue
        found += 1
        yield scene, question


def _held_out_records(config: EmbeddedConfig, folder: Path):
    for family in FAMILIES:
        questions = held_out_questions(config.seed, family, config.eval_per_family)
        for number, (scene, question) in enumerate(questions):
            name = f"eval-{family}-{number}"
            yield {
                "id": name,
                "image": _save(scene, folder, name),
                "conversations": _turns([("<image>\n" + question.text, question.answer)]),
                "family": family,
                **question.extra,
            }


def _questions(scene: Scene, families: list[str], number: int, rng: random.Random):
    """``number`` different questions; the families take turns, in random order."""
    asked: list[str] = []
    order = rng.sample(families, len(families))
    while len(asked) < number:
        question = ask(order[len(asked) % len(order)], scene, rng) or ask("gqa", scene, rng)
        if question and question.text not in asked:
            asked.append(question.text)
            yield question


def _text_only(rng: random.Random) -> tuple[str, str]:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    place, a, b = rng.randrange(25), rng.randint(0, 9), rng.randint(0, 9)
    opposites = ("left right", "right left", "above below", "below above", "small large", "large small")
    word, opposite = rng.choice(opposites).split()
    question, answer = rng.choice((
        (f"What letter is after {letters[place]}?", letters[place + 1]),
        (f"How many are {a} and {b}?", str(a + b)),
        (f"What is the opposite of {word}?", opposite),
    ))  # fmt: skip
    return f"{question}\n{SHORT}", answer


def _turns(asked) -> list[dict[str, str]]:
    return [
        {"from": role, "value": value}
        for question, answer in asked
        for role, value in (("human", question), ("gpt", answer))
    ]


def _save(scene: Scene, folder: Path, name: str) -> str:
    draw(scene).save(folder / "images" / f"{name}.png")
    return f"images/{name}.png"


def _write_json(path: Path, records) -> None:
    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
