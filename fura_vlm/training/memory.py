"""What to do when memory runs out."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.trainer_utils import get_last_checkpoint

from fura_vlm.training.config import TrainConfig, zero
from fura_vlm.training.errors import TrainingError
from fura_vlm.training.methods import method_of


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory has run out, on a GPU or without one."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def whose_memory(gpu_memory: float | None = None) -> str:
    """The GPU and its size, or the machine, for a sentence; with ``gpu_memory``, a GPU of so many GB."""
    if gpu_memory is not None:
        return f"a GPU of {gpu_memory:g} GB (gpu_memory)"
    if not torch.cuda.is_available():
        return "this machine"
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
    return f"a GPU of {total:.0f} GiB"


@contextmanager
def advice_on_memory(config: TrainConfig, run: Path):
    """If memory runs out inside, raises the TrainingError of ``too_small``."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise too_small(config, run) from error


def too_small(config: TrainConfig, run: Path) -> TrainingError:
    """Says what to change; each change is possible for this run. No setting of ``config`` is ``auto``."""
    batch, method = config.per_device_train_batch_size, method_of(config)
    advice = []
    if batch > 1:  # a divisor, so that train_batch_size stays a multiple
        less = next(n for n in range(batch // 2, 0, -1) if batch % n == 0)
        kept = "with train_batch_size, a step still has as many records as before"
        advice.append(f"--per_device_train_batch_size {less} ({kept})")
    if not config.gradient_checkpointing:
        advice.append("--gradient_checkpointing true")
    others = []  # of another run, by what a checkpoint holds
    if zero(config).get("stage") != 3:
        if not method.four_bits:
            eager = " --compile_layers false" * config.compile_layers
            others.append(f"--deepspeed zero3{eager} on several GPUs")
        if method.with_four_bits:
            others.append(f"--method {method.with_four_bits}")
    elif "offload_param" not in zero(config):
        others.append("--deepspeed zero3_offload")
    if get_last_checkpoint(str(run)):
        others = [f"{other} in another --output_dir" for other in others]
    if advice or others:
        tried = f"try {', or '.join(advice + others)}"
    else:
        tried = (
            "no other setting saves memory, so take a larger GPU or a smaller model (fura-vlm plan says what "
            "fits), or shorten the records with --model_max_length in another --output_dir"
        )
    return TrainingError(
        f"The memory of {whose_memory(config.gpu_memory)} is too small for {config.per_device_train_batch_size} "
        f"records of up to {config.model_max_length} tokens with {config.method}: {tried}"
    )
