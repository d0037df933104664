"""The settings of training by reward: whether they are possible, and what TRL gets of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from accelerate import PartialState
from trl import GRPOConfig

from fura_vlm.reinforcement.config import GrpoConfig
from fura_vlm.training.config import zero
from fura_vlm.training.errors import TrainingError
from fura_vlm.training.methods import METHODS, method_of
from fura_vlm.training.settings import training_arguments

AT_LEAST = {
    "limit": 1,
    "prompts_per_step": 1,
    "num_generations": 2,
    "max_steps": 1,
    "max_completion_length": 1,
    "max_prompt_length": 1,
    "rollout_batch_size": 1,
    "per_device_train_batch_size": 1,
    "learning_rate": 0,
    "mm_projector_lr": 0,
    "vision_tower_lr": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "beta": 0,
    "seed": 0,
    "dataloader_num_workers": 0,
    "logging_steps": 1,
}

LEARNING_RATE = {"full": 1e-5}
OF_ADAPTERS = 9e-5
"""The paper's release: 9e-5 for FuRA and LoRA, 1e-5 for full fine-tuning."""


def check(config: GrpoConfig, processes: int) -> None:
    """Checks ranges, and settings that exclude each other.

    Raises:
        TrainingError: one of them; the message says what to change.
    """
    if config.method not in METHODS or not METHODS[config.method].language:
        raise TrainingError(f"{config.method} trains no language model: take another --method")
    for name, least in AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise TrainingError(f"{name} is {value} and has to be at least {least}")
    if config.temperature <= 0:
        raise TrainingError(
            f"temperature is {config.temperature}: answers to one question have to differ, so take a number above 0"
        )
    if not 0 < config.top_p <= 1:
        raise TrainingError(f"top_p is {config.top_p} and has to be above 0 and at most 1")
    try:
        re.compile(config.only or "")
    except re.error as error:
        raise TrainingError(f"only is {config.only!r}, which is no regular expression ({error})") from error
    if zero(config).get("stage") == 3 and method_of(config).four_bits:
        raise TrainingError(
            f"{config.method} keeps its base in 4 bits, which ZeRO-3 cannot partition: take --deepspeed zero2, or the "
            "method without q"
        )
    step, at_once = config.prompts_per_step * config.num_generations, config.per_device_train_batch_size * processes
    if step % at_once:
        raise TrainingError(
            f"A step has {step} answers ({config.prompts_per_step} questions, {config.num_generations} answers each), "
            f"no multiple of the {at_once} that {processes} processes train on at once: change "
            f"per_device_train_batch_size ({config.per_device_train_batch_size}) or the number of processes"
        )
    rollout = config.rollout_batch_size or step
    for number, what in (
        (config.num_generations, "the answers to one question (num_generations)"),
        (at_once, f"the answers that {processes} processes train on at once (per_device_train_batch_size)"),
    ):
        if rollout % number:
            raise TrainingError(
                f"{rollout} answers written at once are no multiple of {number}, {what}: change rollout_batch_size or "
                "that number"
            )
    if step % rollout:
        raise TrainingError(
            f"rollout_batch_size is {rollout}, and the {step} answers of a step are no multiple of it: take a divisor"
        )


def grpo_arguments(config: GrpoConfig, run: Path, universal: bool, vllm: bool) -> GRPOConfig:
    """What TRL gets.

    Raises:
        TrainingError: the DeepSpeed configuration contradicts the recipe.
        ValueError: TRL refuses the settings.
    """
    step = config.prompts_per_step * config.num_generations
    at_once = config.per_device_train_batch_size * PartialState().num_processes
    rate = LEARNING_RATE.get(config.method, OF_ADAPTERS) if config.learning_rate is None else config.learning_rate
    return training_arguments(
        dataclasses.replace(config, learning_rate=rate),
        run,
        step // at_once,
        universal,
        GRPOConfig,
        steps_per_generation=(config.rollout_batch_size or step) // at_once,
        # An update uses the answers of the model that it updates, once: then the ratio of probabilities is 1, and the
        # bounds that epsilon sets are never met.
        num_iterations=1,
        use_vllm=vllm,
        vllm_max_model_length=config.max_prompt_length + config.max_completion_length,
        # vLLM samples from merged weights, rounded to 16 bits. Each token is weighed by how much likelier the model
        # that is trained finds it, at most three times; TRL's default would drop whole answers.
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=3.0,
    )
