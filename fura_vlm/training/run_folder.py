"""The folder of a run: which one it is, who may write there, and whether an interrupted run in it can go on.

<output_dir>/adapter/            the PEFT adapter; model/, a whole model, where every weight was trained
<output_dir>/mm_projector.safetensors  by LLaVA's names, for ``fura-vlm assemble``, where the projector was pretrained
<output_dir>/processor/          the processor it was trained with
<output_dir>/config.yaml         every setting, defaults included
<output_dir>/versions.json       the libraries
<output_dir>/metrics.jsonl       a row each time something was logged
<output_dir>/skipped.jsonl       records that could not be used, with the reason
<output_dir>/answers-*.jsonl     the held-out questions with the answers before and after
<output_dir>/report.md, *.png    for people
<output_dir>/checkpoint-*/       DeepSpeed checkpoints; tensorboard/ the event files; lock, held while a run goes on
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from pathlib import Path

import yaml
from filelock import FileLock, Timeout
from transformers.trainer_utils import get_last_checkpoint

from fura_vlm.files import write_text
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.processes import TrainingError, agree

FINISHED = "report.md"  # written last
ANSWERS_BEFORE = "answers-before.jsonl"
ANSWERS_AFTER = "answers-after.jsonl"
BATCH = ("train_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")  # how a step is made up
# What may change while an interrupted run goes on: its result stays the same. For BATCH, ``batches.accumulation`` sees
# to that.
MAY_CHANGE = (
    *BATCH,
    "gradient_checkpointing",
    "compile_layers",
    "activation_memory_budget",
    "dataloader_num_workers",
    "eval_batch_size",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
)


def choose_run(config: TrainConfig) -> Path:
    """The folder to run in: a new one, or that of the same run interrupted. Numbered after a finished run."""
    first = Path(config.output_dir.replace("{method}", config.method))
    number = 1
    run = first
    while (run / FINISHED).exists():
        number += 1
        run = first.with_name(f"{first.name}-{number}")
    return run


@contextmanager
def alone_in(run: Path):
    """Makes the folder and keeps other runs out of it: two at once would write over each other's files."""
    lock = FileLock(run / "lock")

    def take() -> None:
        run.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=10)  # the data workers of a run that was killed hold on to it for some seconds
        except Timeout:
            raise TrainingError(
                f"Another run is under way in {run}: wait for its end, stop it, or choose another --output_dir"
            ) from None

    agree(take)
    try:
        yield
    finally:
        lock.release()


def begin(config: TrainConfig, run: Path) -> None:
    """Writes ``config.yaml``, unless the folder holds a run that cannot go on so."""
    settings = dataclasses.asdict(config)
    saved = run / "config.yaml"
    if saved.is_file():
        previous = yaml.safe_load(saved.read_text())
        # A setting that the run did not know yet had the value that is its default now.
        before = dataclasses.asdict(TrainConfig()) | previous
        changed = sorted(key for key in settings if before[key] != settings[key] and key not in MAY_CHANGE)
        if changed and get_last_checkpoint(str(run)):
            key = changed[0]
            raise TrainingError(
                f"{run} holds an interrupted run with another {key} ({before[key]!r} there, {settings[key]!r} "
                "here): go on with its settings, or choose another --output_dir"
            )
        if changed:  # it begins anew, and perhaps with another base or other questions
            (run / ANSWERS_BEFORE).unlink(missing_ok=True)
    write_text(saved, yaml.safe_dump(settings, sort_keys=False))
