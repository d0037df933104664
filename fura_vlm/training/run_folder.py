"""The folder of a run: which folder it is, the lock that keeps other runs out, and what is written into it.

<output_dir>/adapter/            the PEFT adapter; model/, a whole model, where every weight was trained
<output_dir>/mm_projector.safetensors  by LLaVA's names, for ``fura-vlm assemble``, where the projector was pretrained
<output_dir>/processor/          the processor it was trained with
<output_dir>/config.yaml         every setting, defaults included
<output_dir>/chosen.json         what those that are ``auto`` have become
<output_dir>/versions.json       the libraries
<output_dir>/metrics.jsonl       a row each time something was logged
<output_dir>/skipped.jsonl       records that could not be used, with the reason
<output_dir>/answers-*.jsonl     the held-out questions with the answers before and after
<output_dir>/report.md, *.png    for people
<output_dir>/checkpoint-*/       DeepSpeed checkpoints; tensorboard/ the event files; lock, held while a run goes on
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path

import yaml
from accelerate import PartialState
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import get_last_checkpoint

from fura_vlm.files import alone_in, finish, unfinished, whole_file, write_text
from fura_vlm.modelling.assemble import PROJECTOR_KEYS
from fura_vlm.processes import agree
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.errors import TrainingError
from fura_vlm.training.trainer import FuraTrainer

FINISHED = "report.md"  # written last
ANSWERS_BEFORE = "answers-before.jsonl"
BATCH = ("train_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")  # how a step is made up
# What may change when an interrupted run is resumed, because the result stays the same. For BATCH
# ``accumulation_steps`` makes sure of that.
MAY_CHANGE = (
    *BATCH,
    "gradient_checkpointing",
    "rollout_batch_size",
    "compile_layers",
    "activation_memory_budget",
    "gpu_memory",
    "dataloader_num_workers",
    "eval_batch_size",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
)
LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "safetensors", "pillow", "fura-vlm")


def choose_run(config: TrainConfig) -> Path:
    """The folder to run in: a new one, or that of the same run interrupted. Numbered after a finished run."""
    first = Path(config.output_dir.replace("{method}", config.method))
    number = 1
    run = first
    while (run / FINISHED).exists():
        number += 1
        run = first.with_name(f"{first.name}-{number}")
    return run


def alone(run: Path) -> AbstractContextManager[None]:
    """Makes the folder and locks it against other runs."""
    busy = f"Another run is under way in {run}: wait for its end, stop it, or choose another --output_dir"
    return alone_in(run, agree, TrainingError(busy))


def begin(config: TrainConfig, run: Path) -> None:
    """Writes ``config.yaml``. Raises TrainingError if the folder holds a run that cannot continue with these
    settings."""
    settings = dataclasses.asdict(config)
    saved = run / "config.yaml"
    if saved.is_file():
        previous = yaml.safe_load(saved.read_text())
        # A setting that the run did not know yet had the value that is its default now.
        before = dataclasses.asdict(type(config)()) | previous
        changed = sorted(key for key in settings if before[key] != settings[key] and key not in MAY_CHANGE)
        if changed and get_last_checkpoint(str(run)):
            key = changed[0]
            raise TrainingError(
                f"{run} holds an interrupted run with another {key} ({before[key]!r} then, {settings[key]!r} "
                "now): use the settings it began with, or choose another --output_dir"
            )
        if changed:  # it begins anew, and perhaps with another base or other questions
            (run / ANSWERS_BEFORE).unlink(missing_ok=True)
    write_text(saved, yaml.safe_dump(settings, sort_keys=False))


def describe(config, run, family, model, dataset, checkpoint, console, libraries: Sequence[str] = ()) -> None:
    """Writes and prints what the run is before it starts.

    Args:
        libraries: those whose versions are noted beside the usual ones.
    """
    family.processor.save_pretrained(run / "processor")
    versions = {name: version(name) for name in (*LIBRARIES, *libraries)} | {"python": platform.python_version()}
    write_text(run / "versions.json", json.dumps(versions, indent=1))
    if isinstance(model, PeftModel):
        trained, total = model.get_nb_trainable_parameters()
    else:
        # Under ZeRO-3 a process holds no part of a weight before it is used, and only ``ds_numel`` says its size.
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
        trained, total = sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
    console.print(
        f"{config.method} trains {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %) of "
        f"{config.model_name_or_path} on {len(dataset):,} records; the run folder is {run}",
        soft_wrap=True,
    )
    if checkpoint:
        console.print(f"Continuing where the interrupted run stopped: {checkpoint}", soft_wrap=True)


def save(trainer: FuraTrainer, folder: Path, card: str | None = None) -> None:
    """The adapter as PEFT saves it or the whole model, gathered from all processes under ZeRO-3; written beside and
    renamed. PEFT's own card is a form that nobody has filled in."""
    building = unfinished(folder)
    trainer.save_model(str(building))
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        if card is not None:
            write_text(building / "README.md", card)
        finish(building, folder)


def write_projector(run: Path) -> None:
    """Writes the pretrained projector with LLaVA-1.5's names, for ``fura-vlm assemble``. Other families have no such
    names; their projector is in the adapter."""
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    weights = {
        theirs: weight
        for theirs, ours in PROJECTOR_KEYS.items()
        for name, weight in trained.items()
        if name.endswith(f".{ours}")
    }
    if len(trained) != len(PROJECTOR_KEYS) or weights.keys() != PROJECTOR_KEYS.keys():
        return
    with whole_file(run / "mm_projector.safetensors") as building:
        save_file(weights, building)
