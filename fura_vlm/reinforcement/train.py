"""A run of training by reward, from a configuration to a run folder (``fura_vlm/training/run_folder.py``).

Besides what every run folder has: ``solutions.jsonl``, sample answers of each step, and ``reward.png``.
"""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig

from fura_vlm.data.records import report_problems
from fura_vlm.families.base import Family
from fura_vlm.modelling.load import find_parts, load_base, load_family
from fura_vlm.processes import agree
from fura_vlm.reinforcement.callbacks import ConstantReward, SolutionsFile
from fura_vlm.reinforcement.config import GrpoConfig
from fura_vlm.reinforcement.data import Asked, load_questions, rows
from fura_vlm.reinforcement.memory import smaller_batches
from fura_vlm.reinforcement.report import write_report
from fura_vlm.reinforcement.rewards import JUDGES, Reward
from fura_vlm.reinforcement.settings import check, grpo_arguments
from fura_vlm.reinforcement.trainer import GrpoTrainer, check_tokens
from fura_vlm.reinforcement.vllm import choose_vllm
from fura_vlm.training.callbacks import MetricsFile, SaveOnSignal
from fura_vlm.training.checkpoint import WrittenBy, make_universal
from fura_vlm.training.errors import TrainingError
from fura_vlm.training.methods import adapter_config, method_of, prepare, quantization
from fura_vlm.training.processes import refusing, together
from fura_vlm.training.report import adapter_card
from fura_vlm.training.run_folder import alone, begin, choose_run, describe, save
from fura_vlm.training.settings import training_dtype

REFUSED = "These settings are refused"


def grpo(config: GrpoConfig) -> Path:
    """Runs the training that ``config`` describes, on every process that DeepSpeed started.

    Returns:
        The run folder.

    Raises:
        TrainingError, ModelError, DataError: each with a one-sentence message, before anything is trained or when
            memory runs out.
        SystemExit: 143 after SIGTERM or Ctrl-C, with a checkpoint written.
    """
    with together("grpo") as state:
        check(config, state.num_processes)
        set_seed(config.seed)
        run = agree(lambda: choose_run(config))
        with alone(run):
            agree(lambda: begin(config, run))
            _grpo(config, run, state)
    return run


def _grpo(config: GrpoConfig, run: Path, state: PartialState) -> None:
    base, processor = _base(config)
    family = load_family(processor, base, config.conversation)
    config = dataclasses.replace(config, model_name_or_path=base)  # which an adapter is for
    checkpoint = agree(lambda: get_last_checkpoint(str(run)))
    universal = checkpoint is not None and WrittenBy.of(checkpoint).processes != state.num_processes
    questions, said = agree(lambda: _load_data(config, family, run))
    if family.sees:
        check_tokens(family, questions[0])
    console = Console(quiet=not state.is_main_process)
    vllm, about_vllm = choose_vllm(config, family)
    for line in filter(None, (said, about_vllm)):
        console.print(line, style="yellow", soft_wrap=True)

    with refusing(REFUSED):
        arguments: GRPOConfig = grpo_arguments(config, run, universal, vllm)
    dtype = training_dtype(arguments)
    model = load_base(base, dtype, config.attn_implementation, quantization(config, family, dtype))
    # Every token that ends an answer here ends one there.
    model.generation_config.eos_token_id = family.tokenizer.convert_tokens_to_ids(list(family.ends))
    adapter = None
    with refusing(f"{config.method} cannot be set up with these settings"):
        if method_of(config).adapter is None:
            model = prepare(model, config, family)
        else:  # TRL's way: then the reference for beta is the base itself, with the adapter off
            adapter = adapter_config(config, family, model)

    reward = Reward(questions, JUDGES[config.reward])
    signals, constant = SaveOnSignal(), ConstantReward(console)
    solutions = SolutionsFile(run / "solutions.jsonl", checkpoint, reward)
    with refusing(REFUSED):
        trainer = GrpoTrainer(
            model=model,
            args=arguments,
            train_dataset=rows(questions),
            reward_funcs=reward,
            processing_class=family.processor,
            peft_config=adapter,
            callbacks=[MetricsFile(run / "metrics.jsonl", checkpoint), solutions, constant, signals],
            family=family,
            mm_projector_lr=config.mm_projector_lr,
            vision_tower_lr=config.vision_tower_lr,
            universal=universal,
            config=config,
        )
    if method_of(config).four_bits:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:  # TRL casts them to bfloat16, whatever is computed in
                parameter.data = parameter.data.to(dtype)
    if state.is_main_process:
        describe(config, run, family, trainer.model, questions, checkpoint, console, ("trl", "math-verify"))
    if universal:
        agree(lambda: make_universal(checkpoint))
    with smaller_batches(config):
        trainer.train(resume_from_checkpoint=checkpoint)
    if signals.stopped:
        console.print(
            f"Stopped and saved at step {trainer.state.global_step}; the same command continues from there.",
            soft_wrap=True,
        )
        state.wait_for_everyone()
        raise SystemExit(128 + signal.SIGTERM)

    if method_of(config).adapter is None:
        save(trainer, run / "model")
    else:
        save(trainer, run / "adapter", adapter_card(config, run.name, family))
    if state.is_main_process:
        write_report(config, run, constant.said, console)
    state.wait_for_everyone()


def _base(config: GrpoConfig) -> tuple[str, str]:
    """Base and processor. Raises TrainingError for a run with an adapter."""
    base, adapter, processor = find_parts(config.model_name_or_path)
    if adapter is not None:
        path = config.model_name_or_path
        raise TrainingError(
            f"{path} is an adapter over {base}, and another one needs a whole model below it: merge it first, "
            f"fura-vlm merge {path} {path}/merged, and take --model_name_or_path {path}/merged"
        )
    return base, processor


def _load_data(config: GrpoConfig, family: Family, run: Path) -> tuple[list[Asked], str]:
    questions, problems = load_questions(config, family)
    return questions, report_problems(problems, len(questions), run / "skipped.jsonl", config.strict)
