"""How much memory and time a recipe takes, computed from shapes: ``fura-vlm plan``.

What is trained, and how large it is, is counted on the model itself, built without memory by the code that trains it.
Activations are what autograd keeps of a Llama layer (``activation_bytes``); time is floating-point operations at the
rates that were measured (``RATES``). Units are bytes, seconds and operations; GiB and hours in what is printed.
"""

from __future__ import annotations

import dataclasses
import json
import re
from argparse import ArgumentError
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from peft import PeftModel
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fura_vlm.errors import FuraVLMError, first_line
from fura_vlm.files import write_text
from fura_vlm.fura.kernels import MAX_BLOCK
from fura_vlm.fura.layer import FuraLayer
from fura_vlm.training.config import PlanConfig, TrainConfig
from fura_vlm.training.methods import prepare

GIB, TERA = 2**30, 1e12
NAMED = {"7b": (4096, 11_008, 32), "13b": (5120, 13_824, 40)}  # width, of the MLP, layers

# NF4 with double quantisation: half a byte, a byte for 64 weights, four bytes for 256 of those (QLoRA, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
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


class PlanError(FuraVLMError):
    """A recipe that cannot be planned."""


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


class Counts:
    """What a method trains of a model, counted on the model without memory.

    Attributes:
        base: parameters that are frozen, or all if none are.
        linear: those of them in the language model's layers, which 4-bit methods quantise.
        trained: parameters with gradients.
        buffers: bytes of the adapter's buffers, which no ZeRO stage divides.
        embedding: parameters of the language model's input embedding, which multiplies nothing.
        in_kernels: whether FuRA's kernels take its blocks.
    """

    def __init__(self, model_config: LlavaConfig, train: TrainConfig):
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(model_config).requires_grad_(False)
        model.name_or_path = train.model_name_or_path
        self.total = model.num_parameters()
        self.embedding = model.get_input_embeddings().weight.numel()
        self.tower = sum(p.numel() for p in model.model.vision_tower.parameters())
        layers = model.model.language_model.layers
        self.linear = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
        quantised = train.method.startswith("q")
        own = set(dict(model.named_buffers()))
        model = prepare(model, dataclasses.replace(train, method=train.method.removeprefix("q")))
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        blocks = [b for m in model.modules() if isinstance(m, FuraLayer) for _, b in m.fura_blocks.values()]
        self.in_kernels = 0 < max(blocks, default=0) <= MAX_BLOCK
        adapter = isinstance(model, PeftModel)
        self.base = self.total if adapter else self.total - self.trained
        self.base_bytes = 2 * self.base
        if quantised:
            self.base_bytes += self.linear * (NF4_BYTES - 2)
        new = (b for name, b in model.named_buffers() if name.removeprefix("base_model.model.") not in own)
        self.buffers = sum(b.nbytes for b in new if b.is_floating_point()) if adapter else 0


def activation_bytes(text: LlamaConfig, method: str, compiled: bool, dropout: bool, remade: bool) -> int:
    """What autograd keeps of one Llama layer for one token, in bfloat16, with attention that keeps no scores.

    As Korthikanti et al. (arXiv 2205.05198, section 4.1) count it for GPT. With width h and MLP width i, a layer over
    frozen weights keeps: queries, keys, values and the attention's output, 8h; the two inputs of the norms, 4h (8h in
    eager mode, where they are float32); gate and up projections, 4i (6i in eager mode, with the activation). A trained
    map also needs the inputs of the Linears: of attention, of its output, of the MLP, of its output, 6h + 2i less the
    attention's output, which is kept already. LoRA with dropout keeps a dropped copy (2) and its mask (1) for each of
    the seven instead. If they are ``remade``, as FuRA's kernels do, the activation and the input of the MLP's output
    are not kept.
    """
    h, i = text.hidden_size, text.intermediate_size
    kept = 12 * h + 4 * i if compiled else 16 * h + 6 * i
    if remade:
        return kept + 4 * h - (0 if compiled else 2 * i)
    if method in ("lora", "qlora", "dora") and dropout:
        kept += 3 * (6 * h + i)
    elif method != "projector":
        kept += 4 * h + 2 * i
    if method == "dora":  # the base's output once more, beside the adapter's, for each Linear
        kept += 2 * (5 * h + 2 * i)
    return kept


def memory(model: LlavaConfig, train: TrainConfig, counts: Counts, setting: Setting, labelled: float) -> dict:
    """Bytes on each GPU by part, for a batch of the longest records."""
    text, n = model.text_config, setting.gpus
    tokens = setting.batch * train.model_max_length
    whole = setting.stage < 3
    share = 1 if whole else n
    live = 0 if whole else 2 * min(counts.base + counts.trained, LIVE_ELEMENTS)
    weights = counts.base_bytes / share if whole or not setting.offload else 0
    optimizer = 0 if setting.offload else OPTIMIZER_BYTES * counts.trained / n
    gradients = counts.trained * (2 / (n if setting.stage >= 2 else 1) + 4 / n * (not setting.offload))
    remade = counts.in_kernels and whole  # ZeRO-3's hooks want to see what goes into a Linear
    layer = activation_bytes(text, setting.method, setting.compiled, train.lora_dropout > 0, remade)
    logits = labelled * tokens * text.vocab_size * LOGIT_BYTES
    logits += min(labelled * tokens, LOSS_ROWS) * text.vocab_size * LOSS_BYTES
    activations = tokens * layer * text.num_hidden_layers
    if setting.checkpointing:  # the inputs of the layers; and of one all the rest, when the logits are gone
        activations = tokens * 2 * text.hidden_size * text.num_hidden_layers + max(tokens * layer - logits, 0)
    if train.mm_projector != "frozen":
        pixels = setting.batch * model.image_seq_length
        activations += pixels * (2 * model.vision_config.hidden_size + 6 * text.hidden_size)
    buffers = live + (2 * 2 * text.hidden_size**2 + 2 * GATHER_ELEMENTS * whole) * (n > 1)
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


def step_seconds(model: LlavaConfig, counts: Counts, setting: Setting, tokens: int, gpu: Gpu) -> float:
    """Seconds of a forward and a backward pass over ``tokens`` tokens on each GPU, with what is sent meanwhile."""
    method = setting.method.removeprefix("q")
    passes = 6 if method == "full" else 4
    again = 2 if setting.checkpointing else 0
    rate = RATES.get(method, RATES["frozen"])[setting.compiled] * gpu.peak / MEASURED_PEAK
    weights = counts.total - counts.embedding - counts.tower
    seconds = (passes + again) * weights * tokens / rate
    images = setting.batch * ((model.vision_config.image_size // model.vision_config.patch_size) ** 2 + 1)
    seconds += 2 * counts.tower * images / (RATES["frozen"][0] * gpu.peak / MEASURED_PEAK)
    times = 3 if setting.checkpointing else 2  # that the weights are used
    if setting.method.startswith("q"):  # to be dequantised: half a byte read, two written and read again
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


def run_hours(plan: PlanConfig, train: TrainConfig, model, counts: Counts, setting: Setting, gpu: Gpu) -> float:
    records = train.train_batch_size or setting.batch * setting.gpus * train.gradient_accumulation_steps
    turns = records / (setting.batch * setting.gpus)
    one = step_seconds(model, counts, setting, setting.batch * plan.tokens, gpu)
    steps = train.max_steps if train.max_steps > 0 else -(-plan.records // records) * train.num_train_epochs
    return steps * (turns * one + update_seconds(counts, setting, gpu)) / 3600


def best(plan: PlanConfig, train: TrainConfig, model, counts: Counts, gpus: int, gigabytes: int) -> tuple | None:
    """The fastest setting that fits, with its bytes by part and the hours of the run; of equals the simpler one."""
    gpu = _gpu(gigabytes)
    found = None
    whole = 2 if train.method == "full" else 1  # dividing an adapter's gradients costs more than it saves
    for stage, offload in ((whole, False), (3, False), (2, True), (3, True)):
        if stage == 3 and (train.method.startswith("q") or gpus == 1 and not offload):
            continue
        for checkpointing in (False, True):
            for batch in (16, 8, 4, 2, 1):
                compiled = train.compile_layers and stage < 3
                setting = Setting(train.method, gpus, stage, offload, checkpointing, batch, compiled)
                if train.train_batch_size and train.train_batch_size % (batch * gpus):
                    continue
                parts = memory(model, train, counts, setting, plan.labelled)
                if sum(parts.values()) > USABLE * gigabytes * GIB:
                    continue
                hours = run_hours(plan, train, model, counts, setting, gpu)
                if found is None or hours < 0.98 * found[2]:
                    found = setting, parts, hours
                break  # smaller batches are no faster
    return found


def plan(config: PlanConfig) -> str:
    """Prints, and returns as Markdown, the recipe's memory by part and a table of what fits where.

    Raises:
        PlanError: the recipe or the model's config.json cannot be read, or a number is out of its range.
    """
    _check_numbers(config)
    train = _recipe(config.recipe)
    model, said = _model(config.model, train)
    methods = config.methods if train.method in config.methods else [train.method, *config.methods]
    try:
        counted = {method: Counts(model, dataclasses.replace(train, method=method)) for method in methods}
    except ValueError as error:  # PEFT refuses the settings
        raise PlanError(f"{config.recipe} cannot be set up for this model: {first_line(error)}") from error
    own = Setting(
        train.method,
        max(config.gpus),
        *zero_of(train),
        train.gradient_checkpointing,
        train.per_device_train_batch_size,
        train.compile_layers,
    )
    parts = memory(model, train, counted[train.method], own, config.labelled)
    lines = [said, "", f"The recipe as it is, {_named(own)}, on each of {own.gpus} GPUs, GiB:", ""]
    lines += ["| " + " | ".join([*parts, "together"]) + " |", "|" + "---:|" * (len(parts) + 1)]
    lines += ["| " + " | ".join(f"{size / GIB:.1f}" for size in [*parts.values(), sum(parts.values())]) + " |", ""]
    at_once = own.batch * own.gpus
    if train.train_batch_size and train.train_batch_size % at_once:
        lines += [
            f"Training refuses it so: a step's {train.train_batch_size} records are no multiple of {at_once}.",
            "",
        ]
    if own.offload:
        needed = host_memory(counted[train.method], own) / GIB
        lines += [f"In the memory of the host, for all GPUs together: {needed:.0f} GiB.", ""]
    length = f"{config.records:,} records"
    if train.max_steps > 0:
        length = f"{train.max_steps:,} steps with records"
    elif train.num_train_epochs != 1:
        length = f"{train.num_train_epochs:g} times {length}"
    records = f"{train.train_batch_size} records"
    if not train.train_batch_size:
        records = f"{train.gradient_accumulation_steps} times what all GPUs have at once"
    lines += [
        f"What fits, the fastest way: ZeRO stage, records at once on a GPU (of {train.model_max_length} tokens), GiB "
        f"on it, hours for {length} of {config.tokens} tokens in steps of {records}. *c*: with "
        "gradient checkpointing, *o*: with offload, and the GiB of the host's memory that all GPUs together need.",
        "",
    ]
    for gigabytes in config.memory:
        gpu = _gpu(gigabytes)
        lines += [f"GPUs of {gigabytes} GB; hours for {gpu.name}:", ""]
        lines += ["| method | " + " | ".join(f"{n} GPU{'s' if n > 1 else ''}" for n in config.gpus) + " |"]
        lines += ["|---" * (len(config.gpus) + 1) + "|"]
        for method, counts in counted.items():
            mine = dataclasses.replace(train, method=method)
            cells = []
            for n in config.gpus:
                found = best(config, mine, model, counts, n, gigabytes)
                divided = not train.train_batch_size or train.train_batch_size % n == 0
                none = "no" if divided else f"{train.train_batch_size} cannot be divided by {n}"
                cells.append(none if found is None else _cell(counts, *found))
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    text = "\n".join(lines)
    print(text)
    if config.output_path:
        write_text(config.output_path, text)
    return text


def named_model(name: str) -> LlavaConfig:
    """LLaVA-1.5's configuration, ``"7b"`` or ``"13b"``."""
    hidden, intermediate, layers = NAMED[name]
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            vocab_size=32_064,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 128,
            num_key_value_heads=hidden // 128,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _check_numbers(config: PlanConfig) -> None:
    for name in ("gpus", "memory", "records", "tokens"):
        given = getattr(config, name)
        numbers = given if isinstance(given, list) else [given]
        if not numbers or min(numbers) < 1:
            raise PlanError(f"{name} is {given}: it takes numbers from 1 on")
    if not 0 < config.labelled <= 1:
        raise PlanError(f"labelled is {config.labelled}: it is a share, above 0 and at most 1")


def _recipe(path: str) -> TrainConfig:
    """Read as ``fura-vlm train`` reads it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    try:
        train = TrainConfig(**parser.parse_string(Path(path).read_text("utf-8")).as_dict())
    except OSError as error:
        raise PlanError(f"There is no recipe at {path}: scripts/configs has some") from error
    except (ArgumentError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not a recipe: {' '.join(str(error).split())}") from error
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "model_max_length"):
        if getattr(train, name) < 1:
            raise PlanError(f"{name} is {getattr(train, name)} in {path}: it has to be at least 1")
    return train


def _model(name: str | None, train: TrainConfig) -> tuple[LlavaConfig, str]:
    wanted = name or train.model_name_or_path
    named = re.match(r"(?:.*llava-v?1\.5-)?(7b|13b)\b", Path(wanted).name.lower())
    if named and not (Path(wanted) / "config.json").is_file():
        return named_model(named[1]), f"The shapes of LLaVA-1.5-{named[1].upper()}."
    try:
        config = AutoConfig.from_pretrained(wanted)
    except (OSError, ValueError) as error:
        raise PlanError(
            f"No config.json of a LLaVA at {wanted}: name one with --model, or --model 7b or 13b"
        ) from error
    if not isinstance(config, LlavaConfig):
        raise PlanError(
            f"{wanted} is a {config.model_type!r} and no LLaVA: name one with --model, or --model 7b or 13b"
        )
    return config, f"The shapes of {wanted}."


def zero_of(train: TrainConfig) -> tuple[int, bool]:
    """Stage and offload of the recipe's DeepSpeed configuration."""
    try:
        zero = json.loads(Path(train.deepspeed).read_text())["zero_optimization"]
        return zero["stage"], "offload_optimizer" in zero
    except (OSError, ValueError, KeyError) as error:
        raise PlanError(f"There is no DeepSpeed configuration with a ZeRO stage at {train.deepspeed}") from error


def _gpu(gigabytes: int) -> Gpu:
    """The GPU that stands for all of its size."""
    return GPUS[min(GPUS, key=lambda known: abs(known - gigabytes))]


def _named(setting: Setting) -> str:
    words = [setting.method, f"ZeRO-{setting.stage}", f"{setting.batch} records at once"]
    words += ["gradient checkpointing"] * setting.checkpointing + ["offload"] * setting.offload
    return ", ".join(words + ["compiled layers"] * setting.compiled)


def _cell(counts: Counts, setting: Setting, parts: dict, hours: float) -> str:
    host = f" *o* ({host_memory(counts, setting) / GIB:.0f} GiB)"
    marks = "".join([" *c*"] * setting.checkpointing + [host] * setting.offload)
    size = sum(parts.values()) / GIB
    return f"Z{setting.stage}{marks}, {setting.batch}, {size:.0f} GiB, {hours:.3g} h"
