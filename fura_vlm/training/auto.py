"""Settings that are ``auto``: the fastest that fits the GPU at hand, found by the plan and tried before training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console
from torch import nn
from transformers import PreTrainedConfig

from fura_vlm.data.collator import Collator
from fura_vlm.data.dataset import ConversationDataset
from fura_vlm.errors import first_line
from fura_vlm.families.base import Family, model_class
from fura_vlm.files import write_text
from fura_vlm.modelling.load import load_family
from fura_vlm.plan.choose import Choice, Data, in_order, possible, without_gpu
from fura_vlm.plan.costs import CONTEXT, GIB, SLACK, USABLE, Gpu, gpu_of
from fura_vlm.plan.shapes import Counts
from fura_vlm.processes import agree, least
from fura_vlm.training.config import AUTO, TrainConfig, is_auto, zero
from fura_vlm.training.errors import TrainingError
from fura_vlm.training.memory import too_small
from fura_vlm.training.methods import memory_budget
from fura_vlm.training.processes import refusing
from fura_vlm.training.rehearsal import rehearse
from fura_vlm.training.throughput import peak_flops

CHOSEN = "chosen.json"  # in the run folder: what these have become
LIBRARIES = 0.5 * GIB  # that NCCL and others take later, beside what PyTorch holds


def as_chosen(config: TrainConfig, run: Path) -> TrainConfig:
    """The settings of a run that has begun, with what it found for those that are ``auto``.

    Raises:
        TrainingError: the run has not written it, or the file cannot be read.
    """
    if not is_auto(config):
        return config
    try:
        chosen = json.loads((run / CHOSEN).read_text("utf-8"))
        return dataclasses.replace(config, **{k: chosen[k] for k in AUTO if getattr(config, k) == "auto"})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{run / CHOSEN}, which says what auto was, cannot be read ({first_line(error)}): remove it, and it is "
            "found anew"
        ) from error


def keep_to(gigabytes: float | None) -> None:
    """Has this process hold no more memory of its GPU than one of so many GB, as its name says, would give it."""
    if gigabytes is None:
        return
    if not torch.cuda.is_available():
        raise TrainingError(f"gpu_memory is {gigabytes:g}, and there is no GPU here: leave it out")
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    share = max(USABLE * gigabytes * GIB - CONTEXT, 0) / whole
    torch.cuda.set_per_process_memory_fraction(min(share, torch.cuda.get_per_process_memory_fraction()))


def room() -> float:
    """Bytes that PyTorch may hold on this process's GPU: what it holds and what is free, or its share of the whole
    (``torch.cuda.set_per_process_memory_fraction``), if that is less."""
    free, whole = torch.cuda.mem_get_info()
    share = torch.cuda.get_per_process_memory_fraction() * whole
    return min(share, free + torch.cuda.memory_reserved() - LIBRARIES)


def gpu_at_hand() -> Gpu:
    """Its name and peak; the rest from the GPU of the plan that is nearest in size."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    near = gpu_of(round(device.total_memory / GIB))
    return dataclasses.replace(near, name=device.name, peak=peak_flops(device.name) or near.peak)


def count(config: TrainConfig) -> Counts | None:
    """What a plan has to know of the model; ``None`` if nothing is planned. To be called before DeepSpeed's settings
    are, which have ZeRO-3 make every model in parts. Raises as ``counts_of`` does."""
    if not torch.cuda.is_available():
        return None
    return counts_of(config, load_family(config.model_name_or_path, conversation=config.conversation).config)


def counts_of(config: TrainConfig, model: PreTrainedConfig) -> Counts:
    """Of the model of a configuration.

    Raises:
        TrainingError: the method cannot be set up, or the model is of a kind that the plan does not know.
    """
    try:
        with refusing(f"{config.method} cannot be set up with these settings"):
            return Counts(model, config)
    except (AttributeError, StopIteration, TypeError) as error:
        names = ", ".join(name for name in AUTO if getattr(config, name) == "auto")
        raise TrainingError(
            f"A model of the type {model.model_type} cannot be planned ({first_line(error)}), so nothing can be auto: "
            f"give numbers for {names}"
        ) from error


def choices(
    config: TrainConfig, family: Family, counts: Counts | None, dataset: ConversationDataset, run: Path, resumes: bool
) -> list[Choice]:
    """What is tried, one after the other. All processes call this, and get what the main process decides.

    A resumed run begins with what it had, unless that no longer divides the records of a step.
    """
    processes = PartialState().num_processes
    where = least(room()) if counts else 0.0
    return agree(lambda: _choices(config, family, counts, dataset, run if resumes else None, processes, where))


def _choices(config, family, counts, dataset, run, processes, where) -> list[Choice]:
    data = Data(dataset.lengths, dataset.supervised())
    can = model_class(family.config)._model_mapping[type(family.config)].supports_gradient_checkpointing
    if counts is None:
        found = without_gpu(config, processes, data, can)
    else:
        divided = zero(config)
        stage = divided.get("stage", 0), "offload_optimizer" in divided
        found = possible(config, counts, stage, processes, gpu_at_hand(), data, can)
    kept = None
    if run is not None and (run / CHOSEN).is_file():
        before = as_chosen(config, run)
        same = [choice for choice in found if choice.put_into(config) == before]
        kept = same[0] if same else None
    if counts is not None:
        return in_order(found, where, kept)
    return found[found.index(kept) if kept else 0 :]


def settle(
    config: TrainConfig,
    order: list[Choice],
    model: nn.Module,
    family: Family,
    dataset: ConversationDataset,
    dtype: torch.dtype,
    run: Path,
    console: Console,
) -> TrainConfig:
    """Tries them with the batch of the data that takes the most memory, writes the first that fits into the run folder,
    and returns the settings with it. Weights, random numbers and the order of the records stay as they were.

    Args:
        order: as ``choices`` gives them.
        model: as it will be trained, with ``train_on_labels_only``.

    Raises:
        TrainingError: none of them fits.
    """
    for number, choice in enumerate(order):
        settings = choice.put_into(config)
        if config.compile_layers and number and choice.budget != order[number - 1].budget:
            memory_budget(choice.budget)
        batch = Collator(family, pad_to_multiple_of=8)([dataset[row] for row in choice.rows])
        peak = rehearse(model, family, batch, choice.held, dtype, choice.checkpointing)
        if least(peak is not None):
            if PartialState().is_main_process:
                found = {name: getattr(settings, name) for name in AUTO}
                if choice.rate is not None:
                    found |= {"planned_gib": choice.needed / SLACK / GIB, "planned_tokens_per_second": choice.rate}
                write_text(run / CHOSEN, json.dumps(found))
            console.print(_said(choice, peak), soft_wrap=True)
            return settings
        if choice is not order[-1]:
            console.print(
                f"auto: the memory is too small for {choice}, with the longest batch of the data; next is "
                f"{order[number + 1]}",
                style="yellow",
                soft_wrap=True,
            )
    raise too_small(settings, run)


def _said(choice: Choice, peak: int) -> str:
    if choice.rate is None:
        return f"auto: {choice}, as always without a GPU; the longest batch of the data fits"
    planned = f"planned are {choice.needed / GIB:.1f} GiB on each GPU and {choice.rate:,.0f} tokens/s"
    return f"auto: {choice}; {planned}, and the longest batch of the data took {peak / GIB:.1f} GiB"
