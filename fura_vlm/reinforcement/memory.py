"""What to do when memory runs out: while answers are written, and while they are trained on."""

from __future__ import annotations

from contextlib import contextmanager
from math import lcm

from accelerate import PartialState

from fura_vlm.reinforcement.config import GrpoConfig
from fura_vlm.training.errors import TrainingError
from fura_vlm.training.memory import is_out_of_memory, whose_memory
from fura_vlm.training.methods import method_of


@contextmanager
def fewer_rollouts(config: GrpoConfig):
    """If memory runs out inside, raises a TrainingError that says how many answers to write at once."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        now = config.rollout_batch_size or config.prompts_per_step * config.num_generations
        raise TrainingError(
            f"The memory of {whose_memory()} is too small to write {now} answers of up to "
            f"{config.max_completion_length} tokens at once: {_less(config, now)}"
        ) from error


def _less(config: GrpoConfig, now: int) -> str:
    step = config.prompts_per_step * config.num_generations
    processes = PartialState().num_processes
    for batch in range(config.per_device_train_batch_size, 0, -1):
        unit = lcm(config.num_generations, batch * processes)
        fewer = next((n for n in range(now // 2 // unit * unit, 0, -unit) if not step % n), None)
        if fewer and not step % (batch * processes):
            smaller = batch < config.per_device_train_batch_size
            return f"try --rollout_batch_size {fewer}" + f" --per_device_train_batch_size {batch}" * smaller
    return "take shorter ones with --max_completion_length, or fewer of each question with --num_generations"


@contextmanager
def smaller_batches(config: GrpoConfig):
    """If memory runs out inside, raises a TrainingError that says what to change for the training."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        batch, advice = config.per_device_train_batch_size, []
        if batch > 1:
            less = next(n for n in range(batch // 2, 0, -1) if batch % n == 0)
            advice.append(f"--per_device_train_batch_size {less} (a step stays the same)")
        if not config.gradient_checkpointing:
            advice.append("--gradient_checkpointing true")
        if other := method_of(config).with_four_bits:
            advice.append(f"--method {other} in another --output_dir")
        tried = ", or ".join(advice) or "--max_completion_length, in another --output_dir"
        tokens = config.max_prompt_length + config.max_completion_length
        raise TrainingError(
            f"The memory of {whose_memory()} is too small to train on {batch} answers of up to {tokens} tokens, "
            f"question included, with {config.method}: try {tried}"
        ) from error
