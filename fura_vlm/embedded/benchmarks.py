"""The embedded benchmarks: the four families of held-out questions in the schemas of the real data sets.

Each is a folder as it would be on the Hugging Face hub, a card and Parquet files, so that ``load_dataset`` and
lmms-eval's own tasks read it by its path alone::

    <output_dir>/GQA/         testdev_balanced_instructions and testdev_balanced_images, split testdev
    <output_dir>/ScienceQA/   ScienceQA-IMG, split test
    <output_dir>/textvqa/     split validation; ten answers and the reference OCR tokens
    <output_dir>/POPE/        split test, and Full with one split for each category
    <output_dir>/recipe.json  the settings it was made with

Columns, types and splits are those of ``lmms-lab-encoder/GQA``, ``ScienceQA``, ``textvqa`` and ``POPE``; what has no
meaning here (a subject's lecture, a picture's address) is there and empty.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import yaml
from datasets import Dataset, Features, Image, List, Value

from fura_vlm.embedded.embedded import EmbeddedError, held_out_questions, is_made
from fura_vlm.embedded.scenes import Scene, draw
from fura_vlm.files import whole_folder

VERSION = 1  # raised when the same settings give other files

_TEXT, _INT = Value("string"), Value("int64")
_PAIRS = List({"key": _TEXT, "value": _TEXT})
GQA = Features({
    "id": _TEXT, "imageId": _TEXT, "question": _TEXT, "answer": _TEXT, "fullAnswer": _TEXT, "isBalanced": Value("bool"),
    "groups": {"global": _TEXT, "local": _TEXT}, "entailed": _TEXT, "equivalent": _TEXT,
    "types": {"structural": _TEXT, "semantic": _TEXT, "detailed": _TEXT},
    "annotations": {"answer": _PAIRS, "question": _PAIRS, "fullAnswer": _PAIRS},
    "semantic": List({"operation": _TEXT, "argument": _TEXT, "dependencies": List(_INT)}), "semanticStr": _TEXT,
})  # fmt: skip
GQA_IMAGES = Features({"id": _TEXT, "image": Image()})
SCIENCEQA = Features({
    "image": Image(), "question": _TEXT, "choices": List(_TEXT), "answer": _INT, "hint": _TEXT, "task": _TEXT,
    "grade": _TEXT, "subject": _TEXT, "topic": _TEXT, "category": _TEXT, "skill": _TEXT, "lecture": _TEXT,
    "solution": _TEXT,
})  # fmt: skip
TEXTVQA = Features({
    "image_id": _TEXT, "question_id": Value("int32"), "question": _TEXT, "question_tokens": List(_TEXT),
    "image": Image(), "image_width": Value("int32"), "image_height": Value("int32"), "flickr_original_url": _TEXT,
    "flickr_300k_url": _TEXT, "answers": List(_TEXT), "image_classes": List(_TEXT), "set_name": _TEXT,
    "ocr_tokens": List(_TEXT),
})  # fmt: skip
POPE = Features({
    "id": _TEXT, "question_id": _TEXT, "question": _TEXT, "answer": _TEXT, "image_source": _TEXT, "image": Image(),
    "category": _TEXT,
})  # fmt: skip


def write_benchmarks(output_dir: str | Path, per_task: int = 200, seed: int = 0) -> bool:
    """Writes the four benchmarks unless they are there with the same settings. Returns whether it wrote.

    The scenes are those of the embedded mixture's held-out questions, so no picture of them occurs in training.
    Everything is written beside ``output_dir`` first and moved there when complete.

    Args:
        output_dir: the folder to write.
        per_task: questions of each benchmark.
        seed: gives other scenes and questions.

    Raises:
        EmbeddedError: if ``per_task`` is below 1, or if ``output_dir`` holds something else.
    """
    if per_task < 1:
        raise EmbeddedError("a benchmark needs at least 1 question")
    target = Path(output_dir)
    recipe = json.dumps({"version": VERSION, "per_task": per_task, "seed": seed}, indent=1)
    if is_made(target, recipe, "per_task"):
        return False
    with whole_folder(target) as building:
        _gqa(building / "GQA", list(held_out_questions(seed, "gqa", per_task)))
        _scienceqa(building / "ScienceQA", list(held_out_questions(seed, "scienceqa", per_task)))
        _textvqa(building / "textvqa", list(held_out_questions(seed, "textvqa", per_task)))
        _pope(building / "POPE", list(held_out_questions(seed, "pope", per_task)))
        (building / "recipe.json").write_text(recipe)
    return True


def _gqa(folder: Path, asked: list) -> None:
    rows, images = [], []
    for number, (scene, question) in enumerate(asked):
        rows.append({
            "id": str(number), "imageId": f"n{number}", "question": question.question, "answer": question.answer,
            "fullAnswer": question.answer, "isBalanced": True, "groups": {"global": None, "local": None},
            "entailed": None, "equivalent": None, "types": dict.fromkeys(("structural", "semantic", "detailed")),
            "annotations": {"answer": [], "question": [], "fullAnswer": []}, "semantic": [], "semanticStr": None,
        })  # fmt: skip
        images.append({"id": f"n{number}", "image": _png(scene)})
    _write(folder, {
        "testdev_balanced_instructions": {"testdev": (rows, GQA)},
        "testdev_balanced_images": {"testdev": (images, GQA_IMAGES)},
    })  # fmt: skip


def _scienceqa(folder: Path, asked: list) -> None:
    rows = [
        dict.fromkeys(SCIENCEQA, "") | {
            "image": _png(scene), "question": question.question, "choices": question.extra["choices"],
            "answer": "ABCDE".index(question.answer), "hint": question.extra["hint"], "task": "closed choice",
        }
        for scene, question in asked
    ]  # fmt: skip
    _write(folder, {"ScienceQA-IMG": {"test": (rows, SCIENCEQA)}})


def _textvqa(folder: Path, asked: list) -> None:
    rows = [
        {
            "image_id": f"sign-{number}", "question_id": number, "question": question.question,
            "question_tokens": question.question.rstrip("?").lower().split(), "image": _png(scene),
            "image_width": scene.canvas[0], "image_height": scene.canvas[1], "flickr_original_url": "",
            "flickr_300k_url": "", "answers": [question.answer] * 10, "image_classes": [], "set_name": "val",
            "ocr_tokens": [sign.word for sign in scene.signs],
        }
        for number, (scene, question) in enumerate(asked)
    ]  # fmt: skip
    _write(folder, {"default": {"validation": (rows, TEXTVQA)}})


def _pope(folder: Path, asked: list) -> None:
    rows = [
        {
            "id": str(number), "question_id": str(number), "question": question.question,
            "answer": question.answer.lower(), "image_source": f"scene-{number}", "image": _png(scene),
            "category": question.extra["category"],
        }
        for number, (scene, question) in enumerate(asked)
    ]  # fmt: skip
    categories = ("adversarial", "popular", "random")
    full = {name: ([row for row in rows if row["category"] == name], POPE) for name in categories}
    full = {name: split for name, split in full.items() if split[0]}  # of a few questions, all may be of one kind
    _write(folder, {"default": {"test": (rows, POPE)}, "Full": full})


def _png(scene: Scene) -> dict:
    buffer = io.BytesIO()
    draw(scene).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _write(folder: Path, configs: dict[str, dict[str, tuple[list[dict], Features]]]) -> None:
    """Parquet files and a card whose head names configurations and splits, as ``load_dataset`` reads it."""
    cards = []
    for config, splits in configs.items():
        files = []
        for split, (rows, features) in splits.items():
            path = Path(config) / f"{split}-00000-of-00001.parquet"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            columns = {name: [row[name] for row in rows] for name in features}
            Dataset.from_dict(columns, features=features).to_parquet(folder / path)
            files.append({"split": split, "path": str(path)})
        cards.append({"config_name": config, "data_files": files})
    head = yaml.safe_dump({"configs": cards}, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{head}---\n\nEmbedded benchmark of FuRA-VLM, made by a generator.\n")
