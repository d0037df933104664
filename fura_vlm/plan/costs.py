"""What a plan adds up: bytes on a GPU by part, and seconds of a step, for each way to run it; and the fastest way that
fits.

Activations are what autograd keeps of a layer (``activation_bytes``); time is floating-point operations at the rates
that were measured (``RATES``). Units are bytes, seconds and operations.
"""

from __future__ import annotations

import dataclasses
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

# Operations a second of the passes through Llama-7B's layers, eager and with compiled layers: 4 (full: 6) * weights *
# tokens over the step times of benchmarks/results/method-llama-4.md: one H200, 4 layers, 16 x 1024 tokens, LoRA and
# DoRA with r = 128 in bfloat16.
RATES = {
    "frozen": (407 * TERA, 554 * TERA),
    "fura": (391 * TERA, 528 * TERA),
    "lora": (346 * TERA, 475 * TERA),
    "dora": (258 * TERA, 443 * TERA),
    "full": (456 * TERA, 568 * TERA),
}
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


def activation_bytes(shapes: Shapes, counts: Counts, compiled: bool, remade: bool) -> int:
    """What autograd keeps of one layer for one token, in bfloat16, with attention that keeps no scores.

    As Korthikanti et al. (arXiv 2205.05198, section 4.1) count it for GPT. A layer over frozen weights keeps queries,
    keys, values and the attention's output; the inputs of the norms (in eager mode in float32); gate and up projections
    (in eager mode the activation, too). A trained map also needs the inputs of the linear layers: of attention, of the
    MLP and of its output; that of attention's output is kept already. LoRA with dropout keeps a dropped copy (2 bytes)
    and its mask (1) for each of the seven instead. If they are ``remade``, as FuRA's kernels do, the activation and the
    input of the MLP's output are not kept.
    """
    h, q, k, i = shapes.hidden, shapes.queries, shapes.keys, shapes.intermediate
    attention, norms, mlp = 2 * (2 * q + 2 * k), (2 if compiled else 4) * shapes.normed, (4 if compiled else 6) * i
    kept = attention + norms + mlp
    if remade:
        return kept + 4 * h - (0 if compiled else 2 * i)
    if counts.drops:
        kept += 3 * (5 * h + q + i)
    elif counts.method.language:
        kept += 4 * h + 2 * i
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
    optimizer = 0 if setting.offload else OPTIMIZER_BYTES * counts.trained / n
    gradients = counts.trained * (2 / (n if setting.stage >= 2 else 1) + 4 / n * (not setting.offload))
    remade = counts.in_kernels and whole  # ZeRO-3's hooks want to see what goes into a linear layer
    layer = activation_bytes(text, counts, setting.compiled, remade)
    logits = labelled * tokens * text.vocabulary * LOGIT_BYTES
    logits += min(labelled * tokens, LOSS_ROWS) * text.vocabulary * LOSS_BYTES
    activations = tokens * layer * text.layers
    if setting.checkpointing:  # the inputs of the layers; and of one all the rest, when the logits are gone
        activations = tokens * 2 * text.hidden * text.layers + max(tokens * layer - logits, 0)
    if counts.trains_projector:
        activations += setting.batch * counts.picture_tokens * 2 * counts.projected
    if counts.tower_passes > 1:
        tower = counts.tower_shapes
        layer = activation_bytes(tower, counts, setting.compiled, remade)
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
    rate = RATES.get(name, RATES["frozen"])[setting.compiled] * gpu.peak / MEASURED_PEAK
    seconds = (passes + again) * counts.used * tokens / rate
    seeing = 2 * counts.tower_passes + (again if counts.tower_passes > 1 else 0)
    seconds += seeing * counts.tower * setting.batch * counts.patches / (RATES["frozen"][0] * gpu.peak / MEASURED_PEAK)
    times = 3 if setting.checkpointing else 2  # that the weights are used
    if counts.method.four_bits:  # to be dequantised: half a byte read, two written and read again
        seconds += times * 4.5 * counts.linear / gpu.bandwidth
    if setting.stage == 3:
        gathered = times * 2 * (counts.base + counts.trained)
        sent = gathered * (setting.gpus - 1) / setting.gpus / gpu.link
        loaded = gathered / setting.gpus / gpu.host if setting.offload else 0
        seconds = max(seconds, sent, loaded)
    return seconds


def update_seconds(counts: Counts, setting: Setting, gpu: Gpu) -> float:
    """Seconds of reducing the gradients and of the optimizer's step."""
    n = setting.gpus
    seconds = 2 * 2 * counts.trained * (n - 1) / n / gpu.link
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


def settings(train: TrainConfig, counts: Counts, gpus: int) -> Iterator[Setting]:
    """The ways to run a step that may be the best, simpler ones first, and for each the larger batches first."""
    whole = 2 if counts.method.adapter is None else 1  # dividing an adapter's gradients costs more than it saves
    for stage, offload in ((whole, False), (3, False), (2, True), (3, True)):
        if stage == 3 and (counts.method.four_bits or gpus == 1 and not offload):
            continue
        for checkpointing in (False, True):
            for batch in (16, 8, 4, 2, 1):
                if not (train.train_batch_size and train.train_batch_size % (batch * gpus)):
                    compiled = train.compile_layers and stage < 3
                    yield Setting(train.method, gpus, stage, offload, checkpointing, batch, compiled)


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
