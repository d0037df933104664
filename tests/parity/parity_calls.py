"""All that these tests call of the package. Where its functions move or change, this file follows; what they make does
not: ``frozen/`` stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
import yaml

from fura_vlm.chat.prompt import Exchange, build_prompt, encode
from fura_vlm.data.collator import Collator
from fura_vlm.data.index import open_index
from fura_vlm.embedded.benchmarks import write_benchmarks
from fura_vlm.embedded.embedded import EmbeddedConfig, write_embedded
from fura_vlm.evaluation.generation import Prepared, messages_of
from fura_vlm.evaluation.lmms_model import FuraVLM
from fura_vlm.evaluation.tasks import TASKS, load_tasks
from fura_vlm.modelling.load import load_family

ROOT = Path(__file__).parents[2]
FROZEN_PROCESSOR = Path(__file__).parent / "processor"
EMBEDDED_MODEL = ROOT / "data/tiny-llava"
MAX_LENGTH = 200
BATCH = 8
DOCUMENTS = 6
STEPS = 50


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def ids_digest(ids: torch.Tensor) -> str:
    """Of token ids or labels as little-endian int64, whatever they are held in."""
    return digest(ids.numpy().astype("<i8").tobytes())


# --------------------------------------------------------------------------------------------------- records


def training_rows(mixture: Path, conversation: str) -> list[str]:
    """What training makes of each record, one line a record: through the index, the dataset and the collator.

    A line has the length, the digests of input ids, labels and pixels (float32; ``-`` without a picture), and what was
    noted about the record; or why it is left out.
    """
    family = load_family(str(FROZEN_PROCESSOR), conversation=conversation)
    index = open_index(mixture, mixture.parent, family, MAX_LENGTH, mixture.parent / "unused")
    dataset, _ = index.dataset(family)
    notes: dict[int, list[str]] = {}
    left_out = set()
    for problem in dataset.problems:
        place = int(problem.place.removeprefix("record "))
        notes.setdefault(place, []).append(_without_folder(problem.reason, mixture.parent))
        if problem.skipped:
            left_out.add(place)
    rows = _rows(dataset, family)
    lines = []
    for place in range(1, len(json.loads(mixture.read_text())) + 1):
        said = "; ".join(notes.get(place, []))
        lines.append(f"left out: {said}" if place in left_out else " # ".join([next(rows), *([said] if said else [])]))
    assert next(rows, None) is None
    return lines


def _rows(dataset, family) -> Iterator[str]:
    """The rows of the dataset in its order, taken out of batches again."""
    collate = Collator(family, pad_to_multiple_of=8)
    for start in range(0, len(dataset), BATCH):
        numbers = range(start, min(start + BATCH, len(dataset)))
        batch = collate([dataset[number] for number in numbers])
        pictures = iter(batch.get("pixel_values", ()))
        assert batch["input_ids"].shape[1] == -(-int(batch["attention_mask"].sum(1).max()) // 8) * 8
        for row, number in enumerate(numbers):
            ids, labels, mask = (batch[name][row] for name in ("input_ids", "labels", "attention_mask"))
            length = int(mask.sum())
            assert mask[:length].all() and length == dataset.lengths[number]
            assert (ids[length:] == family.tokenizer.pad_token_id).all() and (labels[length:] == -100).all()
            pixels = "-"
            if dataset.has_image[number]:
                picture = next(pictures)
                assert picture.dtype == torch.float32
                pixels = digest(np.ascontiguousarray(picture.numpy(), "<f4").tobytes())
            yield f"{length} {ids_digest(ids[:length])} {ids_digest(labels[:length])} {pixels}"
        assert next(pictures, None) is None


def _without_folder(reason: str, folder: Path) -> str:
    """Neither the folder nor Pillow's own words are ours."""
    return re.sub(r"damaged \(.*\):", "damaged (...):", reason.replace(str(folder), "FOLDER"))


# --------------------------------------------------------------------------------------------------- prompts


def task_prompts(folder: Path) -> dict[str, list[dict]]:
    """The first documents of the benchmarks' tasks as the model gets them.

    Each has the prompt, the number of pictures, the arguments of ``generate``, and the digests of the ids by the frozen
    processor and by the embedded model's.
    """
    write_benchmarks(folder / "benchmarks", per_task=DOCUMENTS)
    names = list(dict.fromkeys(name for protocol in TASKS.values() for name in protocol))
    families = {"ids": load_family(str(FROZEN_PROCESSOR)), "embedded_ids": load_family(str(EMBEDDED_MODEL))}
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    try:
        tasks = load_tasks(names, str(folder / "benchmarks"), DOCUMENTS)
    finally:
        datasets.config.HF_DATASETS_CACHE = before
    return {name: list(_task_prompts(loaded.task, families)) for name, loaded in tasks.items()}


def _task_prompts(task, families: dict) -> Iterator[dict]:
    task.build_all_requests()
    documents = SimpleNamespace(task_dict={task.config.task: {task.config.test_split: task.eval_docs}})
    questions = [FuraVLM._question(documents, request) for request in task.instances]
    prepared = {key: Prepared(family, questions, torch.float32) for key, family in families.items()}
    for number, question in enumerate(questions):
        pictures = len(question.pictures())
        asked = {
            "prompt": families["ids"].prompt(messages_of(families["ids"], question.text, pictures)),
            "pictures": pictures,
            "arguments": question.arguments,
        }
        for key, each in prepared.items():
            inputs = each[number]
            assert len(inputs.get("pixel_values", ())) == pictures
            asked[key] = ids_digest(inputs["input_ids"][0])
        yield asked


def chat_prompt(exchanges: list[tuple[str, str | None, str | None]], max_tokens: int) -> dict:
    """The prompt of a chat: its text, the names of its pictures, the notice, and the digests of ids and pixels.

    Args:
        exchanges: question, path of the picture or ``None``, and answer, which the last one lacks.
        max_tokens: tokens the prompt may have.
    """
    family = load_family(str(FROZEN_PROCESSOR))
    prompt = build_prompt([Exchange(*exchange) for exchange in exchanges], family, max_tokens)
    inputs = encode(prompt, family)
    pixels = inputs["pixel_values"].numpy().astype("<f4").tobytes() if prompt.images else None
    return {
        "text": prompt.text,
        "pictures": [Path(path).name for path in prompt.images],
        "notice": prompt.notice,
        "ids": ids_digest(inputs["input_ids"][0]),
        "pixels": pixels and digest(pixels),
    }


# ---------------------------------------------------------------------------------------------------- losses


def training_losses(folder: Path) -> list[float]:
    """The loss of each step of a run of ``STEPS`` steps, as a user starts it: the embedded model, FuRA, float32,
    one thread."""
    mixture = EmbeddedConfig(
        output_dir=str(folder / "mixture"), train_records=2 * STEPS, eval_per_family=1, text_share=0.2, talk_share=0.5
    )
    write_embedded(mixture)
    recipe = {
        "model_name_or_path": str(EMBEDDED_MODEL),
        "data_path": str(folder / "mixture/train.json"),
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "mm_projector_lr": 1e-3,
        "model_max_length": 512,
        "bf16": False,
        "dataloader_num_workers": 0,
        "report_to": [],
        "max_steps": STEPS,
        "warmup_steps": 2,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    process = subprocess.run(
        ["bash", "scripts/finetune_fura.sh", str(folder / "recipe.yaml")],
        cwd=ROOT,
        env=os.environ | {"NUM_PROCESSES": "1", "OMP_NUM_THREADS": "1"},  # threads wait for each other where it is busy
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background, Ctrl-C is ignored
    )
    assert process.returncode == 0, process.stdout
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    return [losses[step] for step in range(1, STEPS + 1)]
