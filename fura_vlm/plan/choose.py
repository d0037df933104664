"""The settings of a recipe that are left to the plan (``auto``), for the GPU and the data at hand: the fastest that
fits, and what to take if it does not after all."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np

from fura_vlm.plan.costs import (
    LOGIT_BYTES,
    SLACK,
    Gpu,
    Setting,
    activation_bytes,
    batches,
    budgets,
    memory,
    step_seconds,
    update_seconds,
)
from fura_vlm.plan.shapes import Counts
from fura_vlm.training.config import TrainConfig

NEARLY = 0.98  # of the rate of the fastest: the simpler setting is taken
LESS = 0.97  # of the memory that was not enough: what is tried next has to take less
WITHOUT_GPU = 8  # records at once: the cores are busy, and the memory of any machine suffices


@dataclass(frozen=True)
class Data:
    """The records of a mixture.

    Args:
        lengths: (records,) int, tokens of each, image tokens included.
        labels: (records,) int, how many of them have a loss.
    """

    lengths: np.ndarray
    labels: np.ndarray

    def heaviest(self, number: int, token: float, label: float) -> list[int]:
        """So many records, all if there are not as many, that no batch takes more memory than: the longest, to which a
        batch is padded, and beside it those that take most.

        Args:
            token, label: bytes of one in memory.
        """
        longest = int(self.lengths.argmax())
        order = np.argsort(-(token * self.lengths + label * self.labels), kind="stable")[:number].tolist()
        return [longest, *(row for row in order if row != longest)][:number]


@dataclass(frozen=True)
class Choice:
    """A setting with what is expected of it.

    Args:
        batch, checkpointing, budget: for TrainConfig's ``per_device_train_batch_size``, ``gradient_checkpointing`` and
            ``activation_memory_budget``.
        rows: of the data, the batch that takes the most memory.
        needed: bytes that PyTorch holds on each GPU for it; ``None`` without a GPU.
        held: bytes of these that the optimizer, the gradients and DeepSpeed's buffers take.
        rate: tokens a second of all GPUs together; ``None`` without a GPU.
    """

    batch: int
    checkpointing: bool
    budget: float
    rows: list[int]
    needed: float | None = None
    held: float = 0
    rate: float | None = None

    def __str__(self) -> str:
        form = f"{self.batch} records at once, {'with' if self.checkpointing else 'no'} gradient checkpointing"
        if self.batch == 1:
            form = form.replace("1 records", "1 record", 1)
        return form + f", the compiler's memory budget {self.budget:g}" * (self.budget < 1)

    def put_into(self, train: TrainConfig) -> TrainConfig:
        return dataclasses.replace(
            train,
            per_device_train_batch_size=self.batch,
            gradient_checkpointing=self.checkpointing,
            activation_memory_budget=self.budget,
        )


def _forms(train: TrainConfig, compiled: bool, can_checkpoint: bool) -> list[tuple[bool, float]]:
    """Gradient checkpointing and the compiler's budget, simpler ones first."""
    wanted = train.gradient_checkpointing
    switch = [False, True][: 1 + can_checkpoint] if wanted == "auto" else [wanted]
    return list(itertools.product(switch, budgets(train, compiled)))


def _numbers(train: TrainConfig, gpus: int) -> list[int]:
    wanted = train.per_device_train_batch_size
    return batches(train, gpus) if wanted == "auto" else [wanted]


def possible(
    train: TrainConfig,
    counts: Counts,
    stage: tuple[int, bool],
    gpus: int,
    gpu: Gpu,
    data: Data,
    can_checkpoint: bool = True,
) -> list[Choice]:
    """Every setting that the recipe leaves open, simpler ones first, and for each the larger batches first.

    Args:
        stage: of ZeRO, and whether it offloads.
    """
    compiled, whole = train.compile_layers and stage[0] < 3, counts.in_kernels and stage[0] < 3
    token = counts.text.layers * activation_bytes(counts.text, counts, compiled, whole)
    mean = float(data.lengths.mean())
    found = []
    for (checkpointing, budget), batch in itertools.product(
        _forms(train, compiled, can_checkpoint), _numbers(train, gpus)
    ):
        setting = Setting(train.method, gpus, *stage, checkpointing, batch, compiled, budget)
        rows = data.heaviest(batch, token, counts.text.vocabulary * LOGIT_BYTES)
        longest = int(data.lengths[rows].max())
        labelled = float(data.labels[rows].sum()) / (len(rows) * longest)
        parts = memory(dataclasses.replace(train, model_max_length=longest), counts, setting, labelled)
        del parts["reserve"]
        step = train.train_batch_size or batch * gpus * train.gradient_accumulation_steps
        turns = step / (batch * gpus)
        seconds = turns * step_seconds(counts, setting, batch * mean, gpu) + update_seconds(counts, setting, gpu)
        held = parts["gradients"] + parts["optimizer"] + parts["buffers"]
        found.append(
            Choice(batch, checkpointing, budget, rows, SLACK * sum(parts.values()), held, step * mean / seconds)
        )
    return found


def in_order(choices: list[Choice], room: float, kept: Choice | None = None) -> list[Choice]:
    """The fastest that fits first; then, for when memory runs out all the same, the fastest of those that take less
    than the one before. If none fits, the smallest alone.

    Args:
        choices: as ``possible`` gives them.
        room: bytes that PyTorch may hold on a GPU.
        kept: what a run began with, and goes on with.
    """
    fitting = [choice for choice in choices if choice.needed <= room]
    order = [kept or _fastest(fitting or [min(choices, key=lambda choice: choice.needed)])]
    while smaller := [choice for choice in choices if choice.needed < LESS * order[-1].needed]:
        order.append(_fastest(smaller))
    return order


def _fastest(choices: list[Choice]) -> Choice:
    enough = NEARLY * max(choice.rate for choice in choices)
    return next(choice for choice in choices if choice.rate >= enough)


def without_gpu(train: TrainConfig, processes: int, data: Data, can_checkpoint: bool = True) -> list[Choice]:
    """Where nothing is planned: up to ``WITHOUT_GPU`` records at once, then fewer, then with gradient checkpointing."""
    numbers = [n for n in _numbers(train, processes) if n <= WITHOUT_GPU or train.per_device_train_batch_size == n]
    plain, *saving = _forms(train, False, can_checkpoint)
    order = [(number, *plain) for number in numbers] + [(numbers[-1], *form) for form in saving]
    return [Choice(batch, *form, data.heaviest(batch, 1, 0)) for batch, *form in order]
