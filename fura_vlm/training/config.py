"""The configuration of a training run. Light on purpose: the command line reads it before torch is imported."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Literal

from fura_vlm.shipped import find
from fura_vlm.training.errors import TrainingError

Method = Literal["fura", "qfura", "lora", "qlora", "dora", "full", "projector"]


@dataclass
class TrainConfig:
    """Fine-tune a model. Settings that transformers' ``TrainingArguments`` also has mean the same here.

    Args:
        model_name_or_path: the base, a folder or hub name of a model with its processor.
        data_path: the mixture: a JSON, JSONL or Parquet file, a folder of the datasets library, or a hub name.
        image_folder: where the mixture's image paths start; by default the folder of ``data_path``.
        eval_data_path: held-out questions in the same format; the first question of each record is answered before and
            after training.
        eval_image_folder: where the questions' image paths start; by default the folder of ``eval_data_path``.
        output_dir: the run folder; ``{method}`` in it stands for the method's name. If it holds an interrupted run,
            that run is resumed; if it holds a finished one, the new folder's name gets a number.
        strict: refuse to train if any record cannot be used, instead of leaving it out and listing it.
        verify_images: how images are checked before training: decode each, header reads only their headers, none
            checks nothing, and auto decodes in small mixtures and reads headers in large ones.
        method: what is trained: fura; qfura, FuRA over a base in 4 bits; lora, dora and qlora, PEFT's; full, every
            weight of the language model; or projector, LLaVA's stage 1.
        conversation: the form of a conversation; by default the model's own. LLaVA-1.5 has v1 (Vicuna's) and plain
            (only the picture and its caption, for pretraining the projector); language models without a chat template
            can take vicuna or alpaca.
        mm_projector: how the projector is trained: adapter (like the language model), full, or frozen.
        vision_tower: how the vision tower is trained, likewise.
        lora_r: the rank of LoRA, QLoRA and DoRA; this and the next two defaults are those of LLaVA's LoRA script.
        lora_alpha: the scale of LoRA, QLoRA and DoRA.
        lora_dropout: the dropout of LoRA, QLoRA and DoRA.
        target_modules: which modules are adapted, as in PEFT (a regular expression over full names, or a list); by
            default every linear layer of the language model, and of projector and tower if they are adapted.
        block_size: width of FuRA's blocks; by default, the input width of each layer is split into the two factors that
            are closest to each other.
        block_size_pattern: width of the blocks by module, as PEFT's rank_pattern: ``{down_proj: 128}``. The kernels
            take blocks of up to 128 whole (docs/speed.md).
        train_singular_values: train the singular values with the cores (the paper's main form).
        per_device_train_batch_size: records at once on each GPU. auto: what is fastest and fits; it needs
            ``train_batch_size``, which stays as it is.
        train_batch_size: records in a step over all processes; ``gradient_accumulation_steps`` is then computed from
            it. By default it is not set, and ``gradient_accumulation_steps`` counts.
        learning_rate: the learning rate of the language model; by default 2e-4, with ``full`` 2e-5 and with
            ``projector`` 1e-3 (both LLaVA's).
        mm_projector_lr: the learning rate of the projector; by default ``learning_rate``.
        vision_tower_lr: the learning rate of the vision tower; by default ``learning_rate``.
        singular_values_lr: the learning rate of FuRA's singular values, wherever they are; by default that of the cores
            beside them, as in the paper.
        model_max_length: the most tokens of a record, image tokens included; longer records are cut.
        warmup_steps: steps in which the learning rate rises; a number below 1 is the share of all steps.
        group_by_modality_length: make batches of records of one kind (with or without pictures) and of similar length,
            as LLaVA does.
        gradient_checkpointing: compute the layers again in the backward pass instead of keeping what they need. auto:
            where that is faster, because more records fit at once, or nothing else fits.
        compile_layers: use ``torch.compile`` on each layer; not possible with ZeRO-3.
        activation_memory_budget: with ``compile_layers``, a number below 1 saves memory and costs a few percent of the
            time: the compiler computes cheap results again in the backward pass instead of keeping them. auto: 1, or
            0.9 where memory is short.
        fp8_backward: experimental, for method fura: in the backward pass, compute the products that carry gradients
            through frozen weights in FP8. Their copies take a byte for each weight. It needs an NVIDIA GPU of compute
            capability 8.9 or more (or a CPU, for a try); not possible with ZeRO-3.
        gpu_memory: take no more of a GPU's memory than one of so many GB has; by default all that is free.
        bf16: train in bfloat16; ``None`` means where a GPU supports it.
        deepspeed: the DeepSpeed configuration: a JSON file, or the name of one that the package has: zero1, zero2,
            zero3, zero2_offload or zero3_offload.
        eval_batch_size: held-out questions answered at once, on each process.
        eval_max_new_tokens: the most tokens of an answer to a held-out question.
    """

    model_name_or_path: str = "data/tiny-llava"
    data_path: str = "data/embedded/train.json"
    image_folder: str | None = None
    eval_data_path: str | None = None
    eval_image_folder: str | None = None
    output_dir: str = "runs/{method}"
    strict: bool = False
    verify_images: Literal["auto", "decode", "header", "none"] = "auto"

    method: Method = "fura"
    conversation: str | None = None
    mm_projector: Literal["adapter", "full", "frozen"] = "adapter"
    vision_tower: Literal["frozen", "adapter", "full"] = "frozen"
    target_modules: str | list[str] | None = None
    block_size: int | None = None
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    train_singular_values: bool = True
    lora_r: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05

    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int | Literal["auto"] = 16
    train_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    mm_projector_lr: float | None = None
    vision_tower_lr: float | None = None
    singular_values_lr: float | None = None
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    model_max_length: int = 2048
    group_by_modality_length: bool = True
    seed: int = 42

    bf16: bool | None = None
    tf32: bool = True
    gradient_checkpointing: bool | Literal["auto"] = False
    compile_layers: bool = False
    activation_memory_budget: float | Literal["auto"] = 1.0
    fp8_backward: bool = False
    gpu_memory: float | None = None
    attn_implementation: str = "sdpa"
    deepspeed: str = "zero2"
    dataloader_num_workers: int = 2

    logging_steps: int = 1
    save_steps: int = 500
    save_total_limit: int = 2
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])

    eval_batch_size: int = 32
    eval_max_new_tokens: int = 16


AUTO = ("per_device_train_batch_size", "gradient_checkpointing", "activation_memory_budget")  # that may be ``auto``


def is_auto(config: TrainConfig) -> bool:
    return any(getattr(config, name) == "auto" for name in AUTO)


def least_settings(config: TrainConfig) -> TrainConfig:
    """With the smallest value for each that is ``auto``."""
    smallest = dict(zip(AUTO, (1, False, 1.0), strict=True))
    return replace(config, **{k: v for k, v in smallest.items() if getattr(config, k) == "auto"})


def deepspeed_settings(config: TrainConfig) -> dict:
    """The recipe's DeepSpeed configuration.

    Raises:
        ShippedError: there is none at this path or of this name.
        TrainingError: it cannot be read, or is not an object in JSON.
    """
    path = find("DeepSpeed configuration", config.deepspeed)
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} is not a DeepSpeed configuration in JSON: {error}") from error
    if not isinstance(settings, dict):
        raise TrainingError(f"{path} is not a DeepSpeed configuration: it is no object in JSON")
    return settings


def zero(config: TrainConfig) -> dict:
    """What the recipe's DeepSpeed configuration says of ZeRO. Raises as :func:`deepspeed_settings` does."""
    return deepspeed_settings(config).get("zero_optimization", {})


@dataclass
class PlanConfig:
    """Say how much memory and time a recipe takes, and on which GPUs it fits, from shapes alone.

    Args:
        recipe: a YAML file of training settings, or the name of a recipe that the package has, such as llava-1.5-7b.
        model: 7b or 13b (LLaVA-1.5's shapes), or a folder or hub name of any model, of which config.json is read; by
            default the recipe's model.
        methods: what to compare, beside the recipe's own.
        gpus: the numbers of GPUs to plan for.
        memory: the memory of a GPU to plan for, in GB as its name says.
        records: the records of one epoch; by default those of LLaVA-1.5's mixture.
        tokens: the tokens of an average record, image tokens included. Memory is planned for ``model_max_length``.
        picture_tokens: how many of ``tokens`` stand for pictures; by default those of one picture, and LLaVA-1.5's 576
            for models that take pictures of any size.
        labelled: the share of the tokens that have a loss.
        output_path: a Markdown file to write the plan to as well.
    """

    recipe: str
    model: str | None = None
    methods: list[Method] = field(default_factory=lambda: ["fura", "lora", "dora", "qfura", "qlora", "full"])
    gpus: list[int] = field(default_factory=lambda: [1, 4, 8])
    memory: list[int] = field(default_factory=lambda: [24, 48, 80])
    records: int = 665_298
    tokens: int = 832
    picture_tokens: int | None = None
    labelled: float = 0.25
    output_path: str | None = None
