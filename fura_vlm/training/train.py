"""A training run, from a configuration to a run folder (``run_folder.py``)."""

from __future__ import annotations

import signal
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from transformers import TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint

from fura_vlm.data.answer_tokens import warning
from fura_vlm.data.collator import Collator
from fura_vlm.data.dataset import ConversationDataset
from fura_vlm.data.index import open_index
from fura_vlm.data.messages import Record
from fura_vlm.data.records import report_problems
from fura_vlm.evaluation.heldout import load_questions
from fura_vlm.families.base import Family
from fura_vlm.modelling.load import load_base, load_family
from fura_vlm.processes import agree
from fura_vlm.training.auto import choices, count, keep_to, settle
from fura_vlm.training.callbacks import HeldOut, MetricsFile, SaveOnSignal
from fura_vlm.training.checkpoint import WrittenBy, make_universal
from fura_vlm.training.clock import Clock
from fura_vlm.training.config import TrainConfig, is_auto, least_settings
from fura_vlm.training.loss import train_on_labels_only, use_all_parts
from fura_vlm.training.memory import advice_on_memory
from fura_vlm.training.methods import compile_layers, method_of, prepare, quantization
from fura_vlm.training.processes import refusing, together
from fura_vlm.training.report import adapter_card, write_report
from fura_vlm.training.run_folder import alone, begin, choose_run, describe, save, write_projector
from fura_vlm.training.settings import accumulation_steps, check, training_arguments, training_dtype
from fura_vlm.training.trainer import FuraTrainer

REFUSED = "These settings are refused"


def train(config: TrainConfig) -> Path:
    """Runs the training that ``config`` describes, on every process that DeepSpeed started.

    Returns:
        The run folder.

    Raises:
        TrainingError, ModelError, DataError: each with a one-sentence message, before anything is trained.
        SystemExit: 143 after SIGTERM or Ctrl-C, with a checkpoint written.
    """
    with together() as state:
        check(config)
        set_seed(config.seed)
        run = agree(lambda: choose_run(config))
        with alone(run):
            agree(lambda: begin(config, run))
            _train(config, run, state)
    return run


def _train(config: TrainConfig, run: Path, state: PartialState) -> None:
    clock = Clock("cuda" if torch.cuda.is_available() else "cpu")
    keep_to(config.gpu_memory)
    questions = agree(lambda: _questions(config))  # first, so that faults in their files show at once
    checkpoint = agree(lambda: get_last_checkpoint(str(run)))
    universal = checkpoint is not None and WrittenBy.of(checkpoint).processes != state.num_processes
    searched = is_auto(config)
    counts = agree(lambda: count(config)) if searched else None

    def given(settings: TrainConfig) -> TrainingArguments:
        accumulation = agree(lambda: accumulation_steps(settings, checkpoint))
        with refusing(REFUSED):
            return training_arguments(settings, run, accumulation, universal)

    # Before the model: ZeRO-3 partitions it while loading. With the least for what is auto, so that what is refused of
    # the others is refused at once.
    arguments = given(least_settings(config))
    console = Console(quiet=not state.is_main_process)

    family = load_family(config.model_name_or_path, conversation=config.conversation)
    dataset, said = agree(lambda: _load_data(config, family, run))
    if said:
        console.print(said, style="yellow", soft_wrap=True)
    order = []
    if searched:
        order = choices(config, family, counts, dataset, run, resumes=checkpoint is not None)
    dtype = training_dtype(arguments)
    quantized = quantization(config, family, dtype)
    model = load_base(config.model_name_or_path, dtype, config.attn_implementation, quantized)
    with refusing(f"{config.method} cannot be set up with these settings"):
        model = prepare(model, config, family)
    # ZeRO-3 also takes the last gradients again of what a batch leaves out.
    if state.num_processes > 1 or is_deepspeed_zero3_enabled():
        use_all_parts(model, family)
    if config.compile_layers:
        compile_layers(model, family, order[0].budget if searched else config.activation_memory_budget)

    if state.is_main_process:
        describe(config, run, family, model, dataset, checkpoint, console)
    if searched:
        train_on_labels_only(model.get_base_model() if isinstance(model, PeftModel) else model, family)
        config = settle(config, order, model, family, dataset, dtype, run, console)
        arguments = given(config)
    signals = SaveOnSignal()
    held_out = HeldOut(config, run, family, questions, signals, clock)
    with refusing(REFUSED):
        trainer = FuraTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=Collator(family, pad_to_multiple_of=8),  # as tensor cores like it
            callbacks=[MetricsFile(run / "metrics.jsonl", resume_from=checkpoint), signals, held_out],
            family=family,
            mm_projector_lr=config.mm_projector_lr,
            vision_tower_lr=config.vision_tower_lr,
            singular_values_lr=config.singular_values_lr,
            group_by_modality_length=config.group_by_modality_length,
            universal=universal,
            clock=clock,
        )
    if universal:
        agree(lambda: make_universal(checkpoint))
    with advice_on_memory(config, run):
        trainer.train(resume_from_checkpoint=checkpoint)
    clock.mark("other")
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
    clock.mark("saving")
    if state.is_main_process:
        if not method_of(config).language:
            write_projector(run)
        write_report(config, run, held_out.before, held_out.after, clock.line(), console)
    state.wait_for_everyone()


def _questions(config: TrainConfig) -> list[Record]:
    return load_questions(config.eval_data_path, config.eval_image_folder) if config.eval_data_path else []


def _load_data(config: TrainConfig, family: Family, run: Path) -> tuple[ConversationDataset, str]:
    """The mixture, and warnings about it: records that cannot be used (``skipped.jsonl``), missing images, and answers
    whose words the tokenizer does not know."""
    index = open_index(
        config.data_path,
        config.image_folder,
        family,
        config.model_max_length,
        fallback=run / "index",
    )
    dataset, advice = index.dataset(family, config.verify_images)
    said = report_problems(dataset.problems, len(dataset), run / "skipped.jsonl", config.strict)
    spelt = warning(dataset.answers(), family.tokenizer)
    return dataset, "\n".join(line for line in (said, advice, spelt) if line)
