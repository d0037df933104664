"""What a plan adds up: bytes on a GPU by part, and seconds of a step, for each way to run it; and the fastest way that
fits.

Activations are what autograd keeps of a layer (``activation_bytes``); time is floating-point operations at the rates
that were measured (``RATES``). Units are bytes, seconds and operations.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from fura_vlm.plan.shapes import Counts, Shapes
from fura_vlm.training.config import PlanConfig, TrainConfig

GIB, TERA = 2**30, 1e12

# Adam in mixed precision (ZeRO, section 3.1): weights and two moments in float32.
OPTIMIZER_BYTES = 12
# Of a supervised position: its logits in bfloat16 and their gradient; beside them the float32 copies of the rows that
# the loss takes at once.
LOGIT_BYTES, LOSS_ROWS, LOSS_BYTES = 4, 2048, 12
# DeepSpeed's buckets with scripts/zero*.json: reduce (hidden_size squared, two of them), gather (2e8 elements); the
# weights that ZeRO-3 may hold gathered (stage3_max_live_parameters, 1e9).
GATHER_ELEMENTS, LIVE_ELEMENTS = 200_000_000, 1_000_000_000
CONTEXT = 1.0 * GIB  # CUDA, its libraries' work spaces, NCCL
SLACK = 1.04  # what the allocator cannot use of what it holds
USABLE = 0.94  # of the memory in a GPU's name: an L40S of 48 GB has 45.0 GiB

# Operations a second of the passes through Llama-7B's layers, eager and with compiled layers, when ``BATCH_SECONDS``
# are taken off. Compiled FuRA and LoRA are what the trainer's model alone reached (benchmarks/results/pipeline.md):
# FuRA the mean of two H200s and two H100s, 565 to 583, LoRA one H200. The others are 4 (full: 6) * weights * tokens
# over the step times of benchmarks/results/method-llama-4.md: one H200, 4 layers, 16 x 1024 tokens. LoRA and DoRA have
# r = 128 and are in bfloat16.
RATES = {
    "frozen": (411 * TERA, 561 * TERA),
    "fura": (401 * TERA, 571 * TERA),
    "lora": (351 * TERA, 471 * TERA),
    "dora": (269 * TERA, 477 * TERA),
    "full": (471 * TERA, 592 * TERA),
}
# What a batch takes beside, whatever its length: folding, DoRA's norms, launches. By what 1 x 2048 tokens through 32
# layers of Llama-7B took more than 16 x 1024 through 4 on an H200 (method-llama-7b.md,
# method-llama-4-checkpointing.md), seconds for all 32. That of full fine-tuning was the optimizer's, which counts once
# a step (``ADAM_BYTES``).
BATCH_SECONDS = {"frozen": 0.010, "fura": 0.025, "lora": 0.017, "dora": 0.068, "full": 0.010}
THEIR_WEIGHTS, THEIR_BANDWIDTH = 6_476_005_376, 4.8e12
ADAM_BYTES = 28  # of a trained weight, read and written in a step
# Over a 4-bit base the host decides in short batches: its seconds for a pass through a layer, eager and compiled, of
# QFuRA and QLoRA in bfloat16 with 1 x 2048 tokens (method-llama-7b.md).
FOUR_BIT_HOST = (0.0042, 0.0025)
# What a step of the trainer takes more than its batches alone, of FuRA: 0.11 to 0.18 s in four runs (pipeline.md).
# LoRA's one run took 0.39 s, which nothing here explains.
STEP_SECONDS = 0.14
# The compiler's budget that makes norms and SiLU again in the backward: it took 2 % more time with FuRA, and 4 % more
# over the frozen base (docs/speed.md).
BUDGET, BUDGET_COSTS = 0.9, 1.03
MOST = 32  # records at once: more are hardly faster
MEASURED_PEAK = 989 * TERA  # dense bfloat16, H100 and H200


@dataclass(frozen=True)
class Gpu:
    """A GPU: operations a second in dense bfloat16 and bytes a second of its memory (its data sheet), and bytes a
    second that reach another one and the host, which are assumptions: nothing was measured."""

    name: str
    peak: float
    bandwidth: float
    link: float
    host: float = 20e9


HOST_RATE = 100e9  # bytes a second that Adam on the host reads and writes; an assumption, too
GPUS = {
    24: Gpu("RTX 4090", 165 * TERA, 1.01e12, 12e9),
    48: Gpu("L40S", 362 * TERA, 0.86e12, 20e9),
    80: Gpu("H100", 989 * TERA, 3.35e12, 300e9),
}


@dataclass(frozen=True)
class Setting:
    """How a step is run on one of ``gpus`` GPUs."""

    method: str
    gpus: int
    stage: int
    offload: bool
    checkpointing: bool
    batch: int
    compiled: bool
    budget: float = 1.0


def activation_bytes(shapes: Shapes, counts: Counts, compiled: bool, remade: bool, budget: float = 1.0) -> int:
    """What autograd keeps of one layer for one token, in bfloat16, with attention that keeps no scores.

    As Korthikanti et al. (arXiv 2205.05198, section 4.1) count it for GPT. A layer over frozen weights keeps queries,
    keys, values and the attention's output; the inputs of the norms (in eager mode in float32); gate and up projections
    (in eager mode the activation, too). A trained map also needs the inputs of the linear layers: of attention, of the
    MLP and of its output; that of attention's output is kept already. LoRA with dropout keeps a dropped copy (2 bytes)
    and its mask (1) for each of the seven instead. If they are ``remade``, as FuRA's kernels do, the activation and the
    input of the MLP's output are not kept. With a ``budget`` below 1 the compiler makes again what norms and SiLU make,
    so that these inputs of linear layers are not kept either: for FuRA with the product still kept, this says 38 of the
    kilobytes that a 7B's layer had, and 36 were measured (docs/speed.md).
    """
    h, q, k, i = shapes.hidden, shapes.queries, shapes.keys, shapes.intermediate
    attention, norms, mlp = 2 * (2 * q + 2 * k), (2 if compiled else 4) * shapes.normed, (4 if compiled else 6) * i
    kept = attention + norms + mlp
    again = compiled and budget < 1
    if remade:
        return kept + 4 * h * (not again) - (0 if compiled else 2 * i)
    if counts.drops:
        kept += 3 * (5 * h + q + i)
    elif counts.method.language:
        kept += (4 * h + 2 * i) * (not again)
    if counts.dora:  # the base's output once more, beside the adapter's, for each linear layer
        kept += 2 * (2 * h + q + 2 * k + 2 * i)
    return kept


def memory(train: TrainConfig, counts: Counts, setting: Setting, labelled: float) -> dict[str, float]:
    """Bytes on each GPU by part, for a batch of the longest records."""
    text, n = counts.text, setting.gpus
    tokens = setting.batch * train.model_max_length
    whole = setting.stage < 3
    share = 1 if whole else n
    live = 0 if whole else 2 * min(counts.base + counts.trained, LIVE_ELEMENTS)
    weights = counts.base_bytes / share if whole or not setting.offload else 0
    weights += counts.copies * whole
    optimizer = 0 if setting.offload else OPTIMIZER_BYTES * counts.trained / n
    gradients = counts.trained * (2 / (n if setting.stage >= 2 else 1) + 4 / n * (not setting.offload))
    remade = counts.in_kernels and whole  # ZeRO-3's hooks want to see what goes into a linear layer
    layer = activation_bytes(text, counts, setting.compiled, remade, setting.budget)
    logits = labelled * tokens * text.vocabulary * LOGIT_BYTES
    logits += min(labelled * tokens, LOSS_ROWS) * text.vocabulary * LOSS_BYTES
    activations = tokens * layer * text.layers
    if setting.checkpointing:  # the inputs of the layers; and of one all the rest, when the logits are gone
        activations = tokens * 2 * text.hidden * text.layers + max(tokens * layer - logits, 0)
    if counts.trains_projector:
        activations += setting.batch * counts.picture_tokens * 2 * counts.projected
    if counts.tower_passes > 1:
        tower = counts.tower_shapes
        layer = activation_bytes(tower, counts, setting.compiled, remade, setting.budget)
        kept = 2 * tower.hidden * tower.layers + layer if setting.checkpointing else layer * tower.layers
        activations += setting.batch * counts.patches * kept
    buffers = live + (2 * 2 * text.hidden**2 + 2 * GATHER_ELEMENTS * whole) * (n > 1)
    parts = {
        "weights": weights,
        "adapter": 2 * counts.trained / share + counts.buffers,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "logits": logits,
        "buffers": buffers,
    }
    parts["reserve"] = CONTEXT + (SLACK - 1) * sum(parts.values())
    return parts


def host_memory(counts: Counts, setting: Setting) -> float:
    """Bytes that a machine with all of the GPUs needs for what is offloaded."""
    if not setting.offload:
        return 0
    return (OPTIMIZER_BYTES + 4) * counts.trained + (counts.base_bytes if setting.stage == 3 else 0)


def step_seconds(counts: Counts, setting: Setting, tokens: int, gpu: Gpu) -> float:
    """Seconds of a forward and a backward pass over ``tokens`` tokens on each GPU, with what is sent meanwhile."""
    passes = 6 if counts.method.adapter is None else 4
    again = 2 if setting.checkpointing else 0
    name = counts.method.without_four_bits or setting.method
    name = name if name in RATES else "frozen"
    rate = RATES[name][setting.compiled] * gpu.peak / MEASURED_PEAK
    seconds = (passes + again) * counts.used * tokens / rate
    if setting.compiled and setting.budget < 1:
        seconds *= BUDGET_COSTS
    seconds += BATCH_SECONDS[name] * counts.linear / THEIR_WEIGHTS * THEIR_BANDWIDTH / gpu.bandwidth
    seeing = 2 * counts.tower_passes + (again if counts.tower_passes > 1 else 0)
    seconds += seeing * counts.tower * setting.batch * counts.patches / (RATES["frozen"][0] * gpu.peak / MEASURED_PEAK)
    times = 3 if setting.checkpointing else 2  # that the weights are used
    if counts.method.four_bits:  # to be dequantised: half a byte read, two written and read again
        seconds += times * 4.5 * counts.linear / gpu.bandwidth
        seconds = max(seconds, times * counts.text.layers * FOUR_BIT_HOST[setting.compiled])
    if setting.stage == 3:
        gathered = times * 2 * (counts.base + counts.trained)
        sent = gathered * (setting.gpus - 1) / setting.gpus / gpu.link
        loaded = gathered / setting.gpus / gpu.host if setting.offload else 0
        seconds = max(seconds, sent, loaded)
    return seconds


def update_seconds(counts: Counts, setting: Setting, gpu: Gpu) -> float:
    """Seconds of a step that are not its batches': reducing the gradients, the optimizer, the trainer."""
    n = setting.gpus
    seconds = STEP_SECONDS + 2 * 2 * counts.trained * (n - 1) / n / gpu.link
    if not setting.offload:
        seconds += ADAM_BYTES * counts.trained / n / gpu.bandwidth
    if setting.offload:  # gradients down, weights up, and Adam in the host's memory
        seconds += 4 * counts.trained / n / gpu.host + 28 * counts.trained / HOST_RATE
    return seconds


def run_hours(plan: PlanConfig, train: TrainConfig, counts: Counts, setting: Setting, gpu: Gpu) -> float:
    """Hours of the whole run."""
    records = train.train_batch_size or setting.batch * setting.gpus * train.gradient_accumulation_steps
    turns = records / (setting.batch * setting.gpus)
    one = step_seconds(counts, setting, setting.batch * plan.tokens, gpu)
    steps = train.max_steps if train.max_steps > 0 else -(-plan.records // records) * train.num_train_epochs
    return steps * (turns * one + update_seconds(counts, setting, gpu)) / 3600


def batches(train: TrainConfig, gpus: int) -> list[int]:
    """The numbers of records at once that are looked at, larger ones first: those that divide the records of a step."""
    records = train.train_batch_size
    return [n for n in range(MOST, 0, -1) if (records % (n * gpus) == 0 if records else n & (n - 1) == 0)]


def budgets(train: TrainConfig, compiled: bool) -> tuple[float, ...]:
    """The compiler's budgets that are looked at."""
    if train.activation_memory_budget != "auto":
        return (train.activation_memory_budget,)
    return (1.0, BUDGET) if compiled else (1.0,)


def settings(train: TrainConfig, counts: Counts, gpus: int) -> Iterator[Setting]:
    """The ways to run a step that may be the best, simpler ones first, and for each the larger batches first."""
    whole = 2 if counts.method.adapter is None else 1  # dividing an adapter's gradients costs more than it saves
    for stage, offload in ((whole, False), (3, False), (2, True), (3, True)):
        if stage == 3 and (counts.method.four_bits or gpus == 1 and not offload):
            continue
        compiled = train.compile_layers and stage < 3
        for checkpointing, budget in itertools.product((False, True), budgets(train, compiled)):
            for batch in batches(train, gpus):
                yield Setting(train.method, gpus, stage, offload, checkpointing, batch, compiled, budget)


def best(plan: PlanConfig, train: TrainConfig, counts: Counts, gpus: int, gigabytes: int) -> tuple | None:
    """The fastest setting that fits, with its bytes by part and the hours of the run; of nearly equal ones the
    simplest. ``None`` if none fits."""
    found, done = None, set()
    for setting in settings(train, counts, gpus):
        form = dataclasses.replace(setting, batch=0)
        if form in done:  # smaller batches are no faster
            continue
        parts = memory(train, counts, setting, plan.labelled)
        if sum(parts.values()) > USABLE * gigabytes * GIB:
            continue
        done.add(form)
        hours = run_hours(plan, train, counts, setting, gpu_of(gigabytes))
        if found is None or hours < 0.98 * found[2]:
            found = setting, parts, hours
    return found


def gpu_of(gigabytes: int) -> Gpu:
    """The GPU that stands for all of its size."""
    return GPUS[min(GPUS, key=lambda known: abs(known - gigabytes))]
