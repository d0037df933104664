"""How much memory and time a recipe takes, computed from shapes: ``fura-vlm plan``. GiB and hours are printed."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentError
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jsonargparse import ArgumentParser
from transformers import PreTrainedConfig

from fura_vlm.errors import FuraVLMError, ModelError, first_line
from fura_vlm.families.base import model_class
from fura_vlm.families.llava import published
from fura_vlm.files import write_text
from fura_vlm.modelling.load import read_config
from fura_vlm.plan.choose import Data, in_order, possible
from fura_vlm.plan.costs import BUDGET, CONTEXT, GIB, MOST, USABLE, Setting, best, gpu_of, host_memory, memory
from fura_vlm.plan.shapes import Counts
from fura_vlm.shipped import find
from fura_vlm.tables import Table, markdown, show
from fura_vlm.training.config import PlanConfig, TrainConfig, is_auto, least_settings, zero
from fura_vlm.training.errors import TrainingError


class PlanError(FuraVLMError):
    """A recipe that cannot be planned."""


def plan(config: PlanConfig) -> str:
    """Prints, and returns as Markdown, the recipe's memory by part and a table of what fits where.

    Raises:
        PlanError: the recipe or the model's config.json cannot be read, or a number is out of its range.
        ShippedError, TrainingError: there is no such recipe or DeepSpeed configuration, or it cannot be read.
    """
    _check_numbers(config)
    train = _recipe(config.recipe)
    model, said = _model(config.model, train)
    methods = config.methods if train.method in config.methods else [train.method, *config.methods]
    try:
        counted = {
            method: Counts(model, dataclasses.replace(train, method=method), config.picture_tokens)
            for method in methods
        }
    except (TrainingError, ValueError) as error:  # this project or PEFT refuses the settings
        raise PlanError(f"{config.recipe} cannot be set up for this model: {first_line(error)}") from error
    own, where = _own(config, train, counted[train.method])
    parts = memory(train, counted[train.method], own, config.labelled)
    sizes = [*parts.values(), sum(parts.values())]
    page = [
        said,
        f"The recipe {where}, {_named(own)}, on each of {own.gpus} GPUs, GiB:",
        Table([*parts, "together"], [[f"{size / GIB:.1f}" for size in sizes]], left=0),
    ]
    at_once = own.batch * own.gpus
    if train.train_batch_size and train.train_batch_size % at_once:
        page.append(f"Training refuses it so: a step's {train.train_batch_size} records are no multiple of {at_once}.")
    if own.offload:
        needed = host_memory(counted[train.method], own) / GIB
        page.append(f"In the memory of the host, for all GPUs together: {needed:.0f} GiB.")
    length = f"{config.records:,} records"
    if train.max_steps > 0:
        length = f"{train.max_steps:,} steps with records"
    elif train.num_train_epochs != 1:
        length = f"{train.num_train_epochs:g} times {length}"
    records = f"{train.train_batch_size} records"
    if not train.train_batch_size:
        records = f"{train.gradient_accumulation_steps} times what all GPUs have at once"
    page.append(
        f"What fits, the fastest way: ZeRO stage, records at once on a GPU (of {train.model_max_length} tokens), GiB "
        f"on it, hours for {length} of {config.tokens} tokens in steps of {records}. *c*: with "
        "gradient checkpointing, *o*: with offload, and the GiB of the host's memory that all GPUs together need."
    )
    if is_auto(train):
        page.append(
            "A run of this recipe looks at the longest of its own records and at the free memory of its GPUs, tries "
            f"its choice, and goes on to the next if it does not fit. *b*: with the compiler's memory budget {BUDGET}."
        )
    head = ["method", *(f"{n} GPU{'s' if n > 1 else ''}" for n in config.gpus)]
    for gigabytes in config.memory:
        rows = [
            [method, *_what_fits(config, dataclasses.replace(train, method=method), counts, gigabytes)]
            for method, counts in counted.items()
        ]
        page += [f"GPUs of {gigabytes} GB; hours for {gpu_of(gigabytes).name}:", Table(head, rows, left=len(head))]
    show(page)
    text = markdown(page)
    if config.output_path:
        write_text(config.output_path, text)
    return text


def _own(config: PlanConfig, train: TrainConfig, counts: Counts) -> tuple[Setting, str]:
    """How the recipe is run, and where: what is ``auto`` is found for the largest of the GPUs."""
    gpus, stage = max(config.gpus), zero_of(train)
    compiled, where = train.compile_layers and stage[0] < 3, "as it is"
    if is_auto(train):
        gigabytes = max(config.memory)
        lengths = np.array([train.model_max_length] * MOST)
        data = Data(lengths, lengths * config.labelled)
        if found := possible(train, counts, stage, gpus, gpu_of(gigabytes), data):
            train = in_order(found, USABLE * gigabytes * GIB - CONTEXT)[0].put_into(train)
            where = f"on GPUs of {gigabytes} GB"
        else:  # the records of a step cannot be divided by the GPUs
            train = least_settings(train)
    batch, budget = train.per_device_train_batch_size, train.activation_memory_budget
    return Setting(train.method, gpus, *stage, train.gradient_checkpointing, batch, compiled, budget), where


def _what_fits(config: PlanConfig, train: TrainConfig, counts: Counts, gigabytes: int) -> Iterator[str]:
    """The cells of a method, one for each number of GPUs."""
    for n in config.gpus:
        found = best(config, train, counts, n, gigabytes)
        if found is not None:
            yield _cell(counts, *found)
        elif train.train_batch_size and train.train_batch_size % n:
            yield f"{train.train_batch_size} cannot be divided by {n}"
        else:
            yield "no"


def _check_numbers(config: PlanConfig) -> None:
    for name in ("gpus", "memory", "records", "tokens"):
        given = getattr(config, name)
        numbers = given if isinstance(given, list) else [given]
        if not numbers or min(numbers) < 1:
            raise PlanError(f"{name} is {given}: give numbers of at least 1")
    if config.picture_tokens is not None and not 0 <= config.picture_tokens <= config.tokens:
        raise PlanError(
            f"picture_tokens is {config.picture_tokens}: it cannot be more than tokens, which is {config.tokens}"
        )
    if not 0 < config.labelled <= 1:
        raise PlanError(f"labelled is {config.labelled}: give a share above 0 and at most 1")


def _recipe(path: str) -> TrainConfig:
    """Read as ``fura-vlm train`` reads it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    try:
        train = TrainConfig(**parser.parse_string(find("recipe", path).read_text("utf-8")).as_dict())
    except (ArgumentError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not a recipe: {' '.join(str(error).split())}") from error
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "model_max_length"):
        if getattr(train, name) != "auto" and getattr(train, name) < 1:
            raise PlanError(f"{name} is {getattr(train, name)} in {path}: it must be at least 1")
    return train


def _model(name: str | None, train: TrainConfig) -> tuple[PreTrainedConfig, str]:
    wanted = name or train.model_name_or_path
    if not (Path(wanted) / "config.json").is_file() and (found := published(wanted)):
        size, config = found
        return config, f"The shapes of LLaVA-1.5-{size.upper()}."
    try:
        config = read_config(wanted)
        model_class(config)
    except ModelError as error:
        raise PlanError(f"{error}; or name another one with --model (7b and 13b are LLaVA-1.5's shapes)") from error
    return config, f"The shapes of {wanted}."


def zero_of(train: TrainConfig) -> tuple[int, bool]:
    """Stage and offload of the recipe's DeepSpeed configuration."""
    try:
        settings = zero(train)
        return settings["stage"], "offload_optimizer" in settings
    except (KeyError, TypeError) as error:
        raise PlanError(f"The DeepSpeed configuration {train.deepspeed} names no ZeRO stage") from error


def _named(setting: Setting) -> str:
    words = [setting.method, f"ZeRO-{setting.stage}", f"{setting.batch} records at once"]
    words += ["gradient checkpointing"] * setting.checkpointing + ["offload"] * setting.offload
    words += ["compiled layers"] * setting.compiled
    return ", ".join(words + [f"the compiler's memory budget {setting.budget:g}"] * (setting.budget < 1))


def _cell(counts: Counts, setting: Setting, parts: dict, hours: float) -> str:
    host = f" *o* ({host_memory(counts, setting) / GIB:.0f} GiB)"
    marks = [" *c*"] * setting.checkpointing + [" *b*"] * (setting.budget < 1) + [host] * setting.offload
    marks = "".join(marks)
    size = sum(parts.values()) / GIB
    return f"Z{setting.stage}{marks}, {setting.batch}, {size:.0f} GiB, {hours:.3g} h"
