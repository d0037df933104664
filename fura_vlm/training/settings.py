"""The settings of a run: whether they are possible, and what transformers' Trainer gets of them."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from fura_vlm.fura import fp8
from fura_vlm.training.checkpoint import WrittenBy
from fura_vlm.training.config import TrainConfig, deepspeed_settings, zero
from fura_vlm.training.errors import TrainingError
from fura_vlm.training.methods import learning_rate, method_of, takes_fp8

logger = logging.getLogger(__name__)

# Libraries refuse smaller values late, or not at all.
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "gpu_memory": 1,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "learning_rate": 0,
    "mm_projector_lr": 0,
    "vision_tower_lr": 0,
    "singular_values_lr": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "seed": 0,
    "dataloader_num_workers": 0,
    "model_max_length": 1,
    "logging_steps": 1,
    "eval_batch_size": 1,
    "eval_max_new_tokens": 1,
}


def check(config: TrainConfig) -> None:
    """Checks ranges, and settings that exclude each other."""
    for name, least in AT_LEAST.items():
        value = getattr(config, name)
        if value not in (None, "auto") and value < least:
            raise TrainingError(f"{name} is {value} and has to be at least {least}")
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(config, name) >= 1:
            raise TrainingError(f"{name} is {getattr(config, name)} and has to be below 1")
    stage = zero(config).get("stage")
    if stage == 3 and config.compile_layers:
        raise TrainingError(
            "compile_layers and ZeRO-3 do not go together, because DeepSpeed gathers weights in the midst of a layer: "
            "take --compile_layers false, or --deepspeed zero2 where memory allows"
        )
    if stage == 3 and method_of(config).four_bits:
        raise TrainingError(
            f"{config.method} keeps its base in 4 bits, which ZeRO-3 cannot partition: take --deepspeed "
            "zero2, or the method without q"
        )
    if config.fp8_backward:
        _check_fp8(config, stage)
    if config.per_device_train_batch_size != "auto":
        accumulation_steps(config, None)
        return
    processes = PartialState().num_processes
    if config.train_batch_size is None:
        raise TrainingError(
            "per_device_train_batch_size is auto, and nothing says how many records a step has: set train_batch_size, "
            "or give per_device_train_batch_size a number"
        )
    if config.train_batch_size % processes:
        raise TrainingError(
            f"train_batch_size {config.train_batch_size} cannot be divided among {processes} processes: change one of "
            "them"
        )


def _check_fp8(config: TrainConfig, stage: int | None) -> None:
    if not takes_fp8(config):
        raise TrainingError(
            f"fp8_backward is for FuRA over a base that is not quantised, and method is {config.method}: take --method "
            "fura, or leave it out"
        )
    if stage == 3:
        raise TrainingError(
            "fp8_backward and ZeRO-3 do not go together, because no process has a whole weight to copy: take "
            "--deepspeed zero1 where memory allows, or leave fp8_backward out"
        )
    if fp8.missing():
        raise TrainingError(f"fp8_backward cannot be used here, because {fp8.missing()}: leave it out")
    if not torch.cuda.is_available():
        logger.warning("fp8_backward makes nothing faster on a CPU: it is there for a try.")


def accumulation_steps(config: TrainConfig, checkpoint: str | None) -> int:
    """The gradient accumulation steps. A resumed run keeps the size of its steps, so that they take the same records in
    the same order on any number of processes."""
    records = config.train_batch_size
    if checkpoint is not None:
        records = WrittenBy.of(checkpoint).train_batch_size
        if config.train_batch_size not in (None, records):
            raise TrainingError(
                f"{checkpoint} was written with {records} records a step, and train_batch_size is now "
                f"{config.train_batch_size}: leave it as it was, or choose another --output_dir"
            )
    if records is None:
        return config.gradient_accumulation_steps
    processes = PartialState().num_processes
    at_once = config.per_device_train_batch_size * processes
    if records % at_once:
        raise TrainingError(
            f"train_batch_size {records} is not a multiple of the {at_once} records that {processes} processes take "
            f"at once: change per_device_train_batch_size ({config.per_device_train_batch_size}) or the number of "
            "processes"
        )
    return records // at_once


def training_arguments(
    config: TrainConfig,
    run: Path,
    accumulation: int,
    universal: bool,
    kind: type[TrainingArguments] = TrainingArguments,
    **more,
) -> TrainingArguments:
    """What the Trainer gets: the settings of ``config`` that ``kind`` knows by the same names, and ``more``.
    No setting of ``config`` is ``auto``.

    Raises:
        TrainingError: the DeepSpeed configuration contradicts the recipe.
        ValueError: the Trainer refuses the settings.
    """
    cuda = torch.cuda.is_available()
    bf16 = config.bf16 if config.bf16 is not None else cuda and torch.cuda.is_bf16_supported()
    deepspeed_config = deepspeed_settings(config)
    deepspeed_config["checkpoint"] = deepspeed_config.get("checkpoint", {}) | {"load_universal": universal}
    same_name = {field.name for field in dataclasses.fields(kind)}
    shared = {k: v for k, v in dataclasses.asdict(config).items() if k in same_name}
    shared |= {
        "gradient_accumulation_steps": accumulation,
        "learning_rate": learning_rate(config),
        "output_dir": str(run),
        "deepspeed": deepspeed_config,
        "bf16": bf16,
        "tf32": config.tf32 if cuda else None,
    }
    if not config.gradient_checkpointing and kind is TrainingArguments:  # others may have another default
        del shared["gradient_checkpointing"]  # newer versions of transformers warn of its coming new name
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / "tensorboard")
    arguments = kind(
        **shared | more,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        use_cpu=not cuda,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        remove_unused_columns=False,
        label_names=["labels"],
        eval_strategy="no",
        logging_first_step=True,
        dataloader_persistent_workers=config.dataloader_num_workers > 0,
        accelerator_config={"non_blocking": True} if cuda else None,  # batches are copied from pinned memory
    )
    clashes = [
        clash.removeprefix("- ds ").replace(" vs hf ", " there, ") + " here"
        for clash in arguments.hf_deepspeed_config.mismatches
    ]
    if clashes:
        raise TrainingError(
            f"{config.deepspeed} contradicts the recipe on {PartialState().num_processes} processes "
            f'({"; ".join(clashes)}): write "auto" there, or change the recipe'
        )
    return arguments


def training_dtype(arguments: TrainingArguments) -> torch.dtype:
    return torch.bfloat16 if arguments.bf16 else torch.float32
