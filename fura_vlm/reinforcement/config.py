"""The configuration of training by reward. Light: the command line reads it before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fura_vlm.training.config import Method


@dataclass
class GrpoConfig:
    """Train a model by the reward of its own answers: GRPO. Settings that TRL's ``GRPOConfig`` has mean the same here.

    Args:
        model_name_or_path: the base, a folder or hub name of a model with its processor, or a run of the method full.
        data_path: questions with their answers: a JSON, JSONL or Parquet file, a folder of the datasets library, or a
            hub name. For the reward math, with problem, question or instruction, and answer, or a solution with a
            boxed answer; for the reward exact a mixture as for ``fura-vlm train``, of which one question of each record
            is asked, the first that fits ``only``, with the record's pictures before it.
        only: a regular expression; questions in which it is not found are left out.
        limit: look at this many records only, the first ones: what comes after may be a set's test part.
        image_folder: where image paths start; by default the folder of ``data_path``.
        output_dir: the run folder; ``{method}`` in it stands for the method's name. If it holds an interrupted run,
            that run is resumed; if it holds a finished one, the new folder's name gets a number.
        strict: refuse to train if any question cannot be used, instead of leaving it out and listing it.
        reward: math is 1 for an answer that math-verify finds equal to the right one, and exact is 1 for an answer that
            is the right one but for case and a full stop; all other answers have 0.
        instruction: what follows each question; by default the request for a boxed answer for the reward math, and
            nothing for the reward exact.
        conversation: the form of a conversation; by default the model's own.
        method: what is trained: fura; qfura, FuRA over a base in 4 bits; lora, dora and qlora, PEFT's; or full.
        mm_projector: how the projector is trained: adapter (like the language model), full, or frozen.
        vision_tower: how the vision tower is trained, likewise.
        lora_r: the rank of LoRA, QLoRA and DoRA.
        lora_alpha: the scale of LoRA, QLoRA and DoRA.
        lora_dropout: the dropout of LoRA, QLoRA and DoRA; answers are written without it, so that with it the model
            that is trained is not the one that wrote them.
        target_modules: which modules are adapted, as for ``fura-vlm train``.
        block_size, block_size_pattern: width of FuRA's blocks, as for ``fura-vlm train``.
        train_singular_values: train the singular values with the cores (the paper's main form).
        prompts_per_step: questions of a step, over all processes.
        num_generations: answers to each question, which are compared with each other.
        max_steps: steps.
        max_completion_length: the most tokens of an answer.
        max_prompt_length: the most tokens of a question; longer ones are left out and listed.
        temperature: of the answers.
        top_p: of the answers.
        rollout_batch_size: answers that are written at once, over all processes; by default all of a step. Fewer take
            less memory and more time.
        use_vllm: write answers with vLLM; by default where it is installed in a version that TRL takes and there is a
            GPU, for language models that are not in 4 bits.
        vllm_gpu_memory_utilization: the share of the GPU's memory that vLLM takes.
        loss_type: how the tokens of a step are weighed, as in TRL.
        scale_rewards: what divides the difference of a reward to the mean of its group, as in TRL.
        beta: the weight of the divergence from the base; 0 does without it.
        per_device_train_batch_size: answers that are trained on at once, on each process; it does not change a step.
        learning_rate: by default 9e-5, and 1e-5 with ``full``.
        mm_projector_lr: the learning rate of the projector; by default ``learning_rate``.
        vision_tower_lr: the learning rate of the vision tower; by default ``learning_rate``.
        warmup_steps: steps in which the learning rate rises; a number below 1 is the share of all steps.
        bf16: train in bfloat16; ``None`` means where a GPU supports it.
        deepspeed: the DeepSpeed configuration: a JSON file, or the name of one that the package has: zero1, zero2,
            zero3, zero2_offload or zero3_offload.
    """

    model_name_or_path: str = "data/tiny-llava"
    data_path: str = "data/embedded/train.json"
    only: str | None = None
    limit: int | None = None
    image_folder: str | None = None
    output_dir: str = "runs/grpo-{method}"
    strict: bool = False

    reward: Literal["math", "exact"] = "math"
    instruction: str | None = None
    conversation: str | None = None

    method: Method = "fura"
    mm_projector: Literal["adapter", "full", "frozen"] = "adapter"
    vision_tower: Literal["frozen", "adapter", "full"] = "frozen"
    target_modules: str | list[str] | None = None
    block_size: int | None = None
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    train_singular_values: bool = True
    lora_r: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.0

    prompts_per_step: int = 32
    num_generations: int = 8
    max_steps: int = 100
    max_completion_length: int = 1024
    max_prompt_length: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    rollout_batch_size: int | None = None
    use_vllm: bool | None = None
    vllm_gpu_memory_utilization: float = 0.3

    loss_type: Literal["dr_grpo", "dapo", "grpo", "bnpo"] = "dr_grpo"
    scale_rewards: Literal["none", "group", "batch"] = "none"
    beta: float = 0.0

    per_device_train_batch_size: int = 16
    learning_rate: float | None = None
    mm_projector_lr: float | None = None
    vision_tower_lr: float | None = None
    lr_scheduler_type: str = "constant"
    warmup_steps: float = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    seed: int = 42

    bf16: bool | None = None
    tf32: bool = True
    gradient_checkpointing: bool = False
    attn_implementation: str = "sdpa"
    deepspeed: str = "zero2"
    dataloader_num_workers: int = 0

    logging_steps: int = 1
    save_steps: int = 50
    save_total_limit: int = 2
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
