"""One run: the project's loss, samplers and collator in a loop that does nothing else.

`FuraTrainer` gives the same losses (tests/benchmarks/test_evidence.py). It also writes checkpoints and logs, and reads
every batch from files, which takes longer than a run of this study.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from torch import nn
from transformers import get_scheduler

from evidence.configuration import Study, Variant
from evidence.data import Data
from evidence.methods import groups
from fura_vlm.data.collator import Collator
from fura_vlm.data.sampler import ModalityLengthSampler
from fura_vlm.families.base import Family
from fura_vlm.training.loss import positions, train_on_labels_only

LOOK_EVERY = 20  # steps between two looks at the clock


class Stopped(Exception):
    """The time is over; the run is given up."""


@dataclass
class Outcome:
    """What a training leaves besides the model.

    Args:
        steps: that were taken.
        losses: of each step.
        trained: the number of weights that were trained.
    """

    steps: int
    losses: list[float]
    trained: int


def autocast(study: Study, device: str) -> Callable:
    """Makes the context in which a study computes on a device."""
    narrow = study.training.precision == "bfloat16" or study.training.precision == "auto" and device == "cuda"
    return partial(torch.autocast, device, torch.bfloat16) if narrow else nullcontext


def planned_steps(study: Study, rows: int) -> int:
    """The steps of every run: whole passes, of which the last batch may be smaller, or fewer if the study says so."""
    wanted = study.training.epochs * math.ceil(rows / study.training.batch)
    return min(wanted, study.training.steps or wanted)


def batches(data: Data, family: Family, study: Study, seed: int) -> Iterator[dict]:
    """The batches of a run on the CPU, the same ones for every method with this seed: pictures by their numbers."""
    rows, collate = data.train, Collator(family, pad_to_multiple_of=8)
    has_image = [picture >= 0 for picture in rows.pictures]
    sampler = ModalityLengthSampler(rows.lengths, has_image, study.training.batch, seed=seed)
    left = planned_steps(study, len(rows))
    for epoch in range(study.training.epochs):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), study.training.batch):
            if not left:
                return
            left -= 1
            chosen = order[start : start + study.training.batch]
            batch = collate([
                {"input_ids": rows.ids[row], "labels": rows.labels[row], "pictures": {}} for row in chosen
            ])  # fmt: skip
            numbers = [rows.pictures[row] for row in chosen if rows.pictures[row] >= 0]
            if numbers:
                batch["pictured"] = (batch["input_ids"] == family.run_id).nonzero().T
                batch["numbers"] = numbers
            yield batch | {"supervised": positions(batch, family.run_id)["supervised"]}


def train(
    model: nn.Module,
    data: Data,
    family: Family,
    study: Study,
    variant: Variant,
    rate: float,
    seed: int,
    is_over: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Trains a model that ``methods.build`` made.

    Args:
        is_over: asked now and then; if it says so, the run is given up.

    Raises:
        Stopped: ``is_over`` said so.
    """
    device = next(model.parameters()).device
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    train_on_labels_only(plain, family)
    context = autocast(study, device.type)
    settings, steps = study.training, planned_steps(study, len(data.train))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trained] if variant.decay else []
    optimizer = torch.optim.AdamW(
        groups(model, variant, family, rate), lr=rate, betas=settings.betas, weight_decay=0.0,
        fused=device.type == "cuda",
    )  # fmt: skip
    rates = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    warmup = math.ceil(steps * (settings.warmup if variant.warmup is None else variant.warmup))
    scheduler = get_scheduler(settings.schedule, optimizer, warmup, steps)
    model.train()
    losses = []
    for step, batch in enumerate(batches(data, family, study, seed)):
        if step % LOOK_EVERY == 0 and is_over():
            raise Stopped
        numbers = batch.pop("numbers", None)
        batch = {name: _moved(value, device) for name, value in batch.items()}
        if numbers is not None:
            batch["pixel_values"] = data.pixels(numbers, device)
        with context():
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        if variant.decay:  # before Adam's step, as AdamW does it
            with torch.no_grad():
                for parameter, first in zip(trained, start, strict=True):
                    parameter.lerp_(first, min(1.0, rates[id(parameter)]["lr"] * variant.decay))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    model.eval()
    return Outcome(len(losses), torch.stack(losses).float().tolist(), sum(p.numel() for p in trained))


def _moved(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device. From memory that is not pinned a copy would wait for all work before it."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)
