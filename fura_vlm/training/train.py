"""A training run, from a configuration to a run folder.

<output_dir>/adapter/            the PEFT adapter; model/, a whole LLaVA, where every weight was trained
<output_dir>/mm_projector.safetensors  by LLaVA's names, for ``fura-vlm assemble``, where the projector was pretrained
<output_dir>/processor/          the processor it was trained with
<output_dir>/config.yaml         every setting, defaults included
<output_dir>/versions.json       the libraries
<output_dir>/metrics.jsonl       a row each time something was logged
<output_dir>/skipped.jsonl       records that could not be used, with the reason
<output_dir>/answers-*.jsonl     the held-out questions with the answers before and after
<output_dir>/report.md, *.png    for people
<output_dir>/checkpoint-*/       DeepSpeed checkpoints; tensorboard/ the event files; lock, held while a run goes on
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import shutil
import signal
import sys
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import yaml
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from peft import PeftModel
from rich.console import Console
from rich.markdown import Markdown
from safetensors.torch import load_file, save_file
from torch.utils import cpp_extension
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from fura_vlm.data.collator import Collator
from fura_vlm.data.dataset import ConversationDataset
from fura_vlm.data.index import open_index
from fura_vlm.data.records import Record, report_problems, write_text
from fura_vlm.errors import FuraVLMError
from fura_vlm.evaluation.heldout import (
    Answer,
    answer_questions,
    blind_guess,
    exact_match,
    load_questions,
    read_answers,
    write_answers,
)
from fura_vlm.modelling.assemble import PROJECTOR_KEYS
from fura_vlm.modelling.load import load_base, load_processor, use_all_parts
from fura_vlm.training import report
from fura_vlm.training.checkpoint import WrittenBy, make_universal
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.methods import PROJECTOR, compile_layers, learning_rate, prepare, quantization
from fura_vlm.training.trainer import FuraTrainer

FINISHED = "report.md"  # written last
ANSWERS_BEFORE = "answers-before.jsonl"
BATCH = ("train_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")  # how a step is made up
# What an interrupted run may go on with otherwise than it began: its result stays the same. Of BATCH, ``_accumulation``
# sees to that.
MAY_CHANGE = (
    *BATCH,
    "gradient_checkpointing",
    "compile_layers",
    "activation_memory_budget",
    "dataloader_num_workers",
    "eval_batch_size",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
)
# Less than this libraries refuse late, or not at all.
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "learning_rate": 0,
    "mm_projector_lr": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "seed": 0,
    "dataloader_num_workers": 0,
    "model_max_length": 1,
    "logging_steps": 1,
    "eval_batch_size": 1,
    "eval_max_new_tokens": 1,
}
LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "safetensors", "pillow", "fura-vlm")

# PyTorch writes this path as it is into the shell command that links what DeepSpeed compiles: a space would cut it.
cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)


class TrainingError(FuraVLMError):
    """A run that cannot start or go on; the message says why and what to do."""


def train(config: TrainConfig) -> Path:
    """Runs the training that ``config`` describes, on every process that DeepSpeed started.

    Returns:
        The run folder.

    Raises:
        TrainingError, ModelError, DataError: with one sentence each, before anything is trained.
        SystemExit: 143 after SIGTERM or Ctrl-C, with a checkpoint written.
    """
    state = _join()
    _agree(lambda: _check(config))
    set_seed(config.seed)
    run = _agree(lambda: _choose_run(config))
    with _alone_in(run):
        _agree(lambda: _begin(config, run))
        _train(config, run, state)
    return run


def _train(config: TrainConfig, run: Path, state: PartialState) -> None:
    checkpoint = _agree(lambda: get_last_checkpoint(str(run)))
    accumulation = _agree(lambda: _accumulation(config, checkpoint))
    universal = checkpoint is not None and WrittenBy.of(checkpoint).processes != state.num_processes
    # Before the model: ZeRO-3 partitions it while loading.
    arguments = _alike(lambda: _training_arguments(config, run, accumulation, universal))
    console = Console(quiet=not state.is_main_process)

    processor = _alike(lambda: load_processor(config.model_name_or_path))
    dataset, questions, said = _agree(lambda: _load_data(config, processor, run))
    if said:
        console.print(said, style="yellow", soft_wrap=True)
    quantized = quantization(config.method, _dtype(arguments))
    attention = config.attn_implementation
    model = _alike(lambda: load_base(config.model_name_or_path, _dtype(arguments), attention, quantized))
    model = _alike(lambda: prepare(model, config), f"{config.method} cannot be set up with these settings")
    # ZeRO-3 also takes the last gradients again of what a batch leaves out.
    if state.num_processes > 1 or is_deepspeed_zero3_enabled():
        use_all_parts(model)
    if config.compile_layers:
        compile_layers(model, config.activation_memory_budget)

    if state.is_main_process:
        _describe(config, run, processor, model, dataset, checkpoint, console)
    signals = SaveOnSignal()
    held_out = HeldOut(config, run, processor, questions, signals)
    trainer = _alike(
        lambda: FuraTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=Collator(processor.tokenizer, pad_to_multiple_of=8),  # as tensor cores like it
            callbacks=[MetricsFile(run / "metrics.jsonl", resume_from=checkpoint), signals, held_out],
            mm_projector_lr=config.mm_projector_lr,
            group_by_modality_length=config.group_by_modality_length,
            universal=universal,
        )
    )
    if universal:
        _agree(lambda: make_universal(checkpoint))
    with advice_on_memory(config, run):
        trainer.train(resume_from_checkpoint=checkpoint)
    if signals.stopped:
        console.print(
            f"Stopped and saved at step {trainer.state.global_step}; the same command goes on from there.",
            soft_wrap=True,
        )
        state.wait_for_everyone()
        raise SystemExit(128 + signal.SIGTERM)

    if config.method == "full":
        _save(trainer, run / "model")
    else:
        _save(trainer, run / "adapter", report.adapter_card(config, run.name))
    if state.is_main_process:
        if config.method == "projector":
            _write_projector(run)
        _finish(config, run, held_out, console)
    state.wait_for_everyone()


# --------------------------------------------------------------------------------------------------- preparation


def _join() -> PartialState:
    """Meets the other processes. They wait an hour for one another: the main one may have many images to check."""
    cuda = torch.cuda.is_available()
    # Batches of ever new lengths would leave holes in the GPU's memory that nothing fits into.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        if "RANK" in os.environ:  # by way of DeepSpeed, which else believes itself alone under ZeRO-3
            deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=timedelta(hours=1), auto_mpi_discovery=False)
            if not cuda:
                unlink_shared_memory()
        state = PartialState(cpu=not cuda)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        raise TrainingError(f"Port {port} is in use: set MASTER_PORT to a free one, or leave it unset") from error
    if not state.is_main_process:  # one bar for each thing that is loaded, not one a process
        logging.disable_progress_bar()
    return state


def unlink_shared_memory() -> None:
    """Takes the name off the 66 MiB that a process shares on a CPU, once all have opened it. DeepSpeed never does: the
    memory would stay taken after the run, until the machine starts anew. Without a name it goes with the processes."""
    dist.barrier()
    address, port, rank = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


def _agree(decide):
    """The main process decides, all others follow; its error ends them too."""
    state = PartialState()
    outcome = [None]
    if state.is_main_process:
        try:
            outcome = [decide()]
        except Exception as error:
            outcome = [error]
    if state.num_processes > 1:
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        if state.is_main_process:
            raise outcome[0]
        raise SystemExit(1)  # once on the screen is enough
    return outcome[0]


def _alike(do, refusal: str = "These settings are refused"):
    """Every process does the same. Where that is refused, it is refused on all of them: the main one says so, and all
    end."""
    try:
        return do()
    except (FuraVLMError, ValueError) as error:  # a ValueError is a library's
        refused = error if isinstance(error, FuraVLMError) else TrainingError(f"{refusal}: {error}")
        return _agree(lambda: _raise(refused))


def _raise(error: Exception) -> None:
    raise error


def _choose_run(config: TrainConfig) -> Path:
    """The folder to run in: a new one, or that of the same run interrupted. Numbered after a finished run."""
    first = Path(config.output_dir.replace("{method}", config.method))
    number = 1
    run = first
    while (run / FINISHED).exists():
        number += 1
        run = first.with_name(f"{first.name}-{number}")
    return run


@contextmanager
def _alone_in(run: Path):
    """Makes the folder and keeps other runs out of it: two at once would write over each other's files."""
    lock = FileLock(run / "lock")

    def take() -> None:
        run.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=10)  # the data workers of a run that was killed hold on to it for some seconds
        except Timeout:
            raise TrainingError(
                f"Another run is under way in {run}: wait for its end, stop it, or choose another --output_dir"
            ) from None

    _agree(take)
    try:
        yield
    finally:
        lock.release()


def _begin(config: TrainConfig, run: Path) -> None:
    """Writes ``config.yaml``, unless the folder holds a run that cannot go on so."""
    settings = dataclasses.asdict(config)
    saved = run / "config.yaml"
    if saved.is_file():
        previous = yaml.safe_load(saved.read_text())
        changed = sorted(key for key in settings if previous.get(key) != settings[key] and key not in MAY_CHANGE)
        if changed and get_last_checkpoint(str(run)):
            key = changed[0]
            raise TrainingError(
                f"{run} holds an interrupted run with another {key} ({previous.get(key)!r} there, {settings[key]!r} "
                "here): go on with its settings, or choose another --output_dir"
            )
        if changed:  # it begins anew, and perhaps with another base or other questions
            (run / ANSWERS_BEFORE).unlink(missing_ok=True)
    write_text(saved, yaml.safe_dump(settings, sort_keys=False))


def _load_data(config: TrainConfig, processor, run: Path) -> tuple[ConversationDataset, list[Record], str]:
    """The mixture, the held-out questions, and a line about records that cannot be used (``skipped.jsonl``)."""
    questions = []
    if config.eval_data_path:
        questions = load_questions(config.eval_data_path, config.eval_image_folder)
    index = open_index(
        config.data_path,
        config.image_folder,
        processor,
        config.model_max_length,
        fallback=run / "index",
        conversation=config.conversation,
    )
    dataset, advice = index.dataset(processor, config.verify_images)
    said = report_problems(dataset.problems, len(dataset), run / "skipped.jsonl", config.strict)
    return dataset, questions, "\n".join(line for line in (said, advice) if line)


def _check(config: TrainConfig) -> None:
    """Looks at the settings: numbers that are none, and what they say together."""
    for name, least in AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise TrainingError(f"{name} is {value} and has to be at least {least}")
    if not Path(config.deepspeed).is_file():
        raise TrainingError(f"There is no DeepSpeed configuration at {config.deepspeed}; scripts/ has zero1 to zero3")
    try:
        stage = _zero(config).get("stage")
    except (ValueError, AttributeError) as error:  # no JSON, or no object
        raise TrainingError(f"{config.deepspeed} is no DeepSpeed configuration in JSON: {error}") from error
    if stage == 3 and config.compile_layers:
        raise TrainingError(
            "compile_layers and ZeRO-3 do not go together, because DeepSpeed gathers weights in the midst of a layer: "
            "take --compile_layers false, or --deepspeed scripts/zero2.json where memory allows"
        )
    if stage == 3 and config.method in ("qfura", "qlora"):
        raise TrainingError(
            f"{config.method} keeps its base in 4 bits, which ZeRO-3 cannot partition: take --deepspeed "
            "scripts/zero2.json, or the method without q"
        )
    _accumulation(config, None)


def _accumulation(config: TrainConfig, checkpoint: str | None) -> int:
    """The gradient accumulation steps. Those of a resumed run make its steps as large as they were, so that they take
    the same records in the same order on any number of processes."""
    records = config.train_batch_size
    if checkpoint is not None:
        records = WrittenBy.of(checkpoint).train_batch_size
        if config.train_batch_size not in (None, records):
            raise TrainingError(
                f"{checkpoint} was written by a run of {records} records a step, and train_batch_size is "
                f"{config.train_batch_size}: leave it as it was, or choose another --output_dir"
            )
    if records is None:
        return config.gradient_accumulation_steps
    processes = PartialState().num_processes
    at_once = config.per_device_train_batch_size * processes
    if records % at_once:
        raise TrainingError(
            f"train_batch_size {records} is no multiple of the {at_once} records that {processes} processes take at "
            f"once: change per_device_train_batch_size ({config.per_device_train_batch_size}) or the number of "
            "processes"
        )
    return records // at_once


def _training_arguments(config: TrainConfig, run: Path, accumulation: int, universal: bool) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    bf16 = config.bf16 if config.bf16 is not None else cuda and torch.cuda.is_bf16_supported()
    deepspeed_config = json.loads(Path(config.deepspeed).read_text())
    deepspeed_config["checkpoint"] = deepspeed_config.get("checkpoint", {}) | {"load_universal": universal}
    same_name = {field.name for field in dataclasses.fields(TrainingArguments)}
    shared = {k: v for k, v in dataclasses.asdict(config).items() if k in same_name}
    shared |= {
        "gradient_accumulation_steps": accumulation,
        "learning_rate": learning_rate(config),
        "output_dir": str(run),
        "deepspeed": deepspeed_config,
        "bf16": bf16,
        "tf32": config.tf32 if cuda else None,
    }
    if not config.gradient_checkpointing:
        del shared["gradient_checkpointing"]  # newer versions of transformers warn of its coming new name
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / "tensorboard")
    arguments = TrainingArguments(
        **shared,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        use_cpu=not cuda,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        remove_unused_columns=False,
        label_names=["labels"],
        eval_strategy="no",
        logging_first_step=True,
        dataloader_persistent_workers=config.dataloader_num_workers > 0,
        accelerator_config={"non_blocking": True} if cuda else None,  # batches are copied from pinned memory
    )
    clashes = [
        clash.removeprefix("- ds ").replace(" vs hf ", " there, ") + " here"
        for clash in arguments.hf_deepspeed_config.mismatches
    ]
    if clashes:
        raise TrainingError(
            f"{config.deepspeed} says otherwise than the recipe on {PartialState().num_processes} processes "
            f'({"; ".join(clashes)}): put "auto" in its place, or change the recipe'
        )
    return arguments


def _dtype(arguments: TrainingArguments) -> torch.dtype:
    return torch.bfloat16 if arguments.bf16 else torch.float32


class SaveOnSignal(TrainerCallback):
    """On SIGTERM or Ctrl-C: finish the step, save, stop. All processes agree on the step."""

    def __init__(self):
        self.stopped = False
        self._received = False
        # By way of the CPU: asking a GPU would make every step wait for it.
        self._group = dist.new_group(backend="gloo") if PartialState().num_processes > 1 else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self._received = True

    def on_step_end(self, args, state, control, **kwargs):
        received = torch.tensor(int(self._received))
        if self._group is not None:
            dist.all_reduce(received, op=dist.ReduceOp.MAX, group=self._group)
        if received.item():
            self.stopped = control.should_save = control.should_training_stop = True


class MetricsFile(TrainerCallback):
    """Appends what is logged to ``metrics.jsonl``; a resumed run drops the rows after its checkpoint."""

    def __init__(self, path: Path, resume_from: str | None):
        self.path = path
        if PartialState().is_main_process:
            step = int(Path(resume_from).name.rpartition("-")[2]) if resume_from else -1
            kept = [row for row in report.read_metrics(path) if row["step"] <= step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_train_begin(self, args, state, control, **kwargs):
        # A checkpoint brings those of its own run along.
        state.compute_steps(args, state.max_steps)

    def write(self, row: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            self.write({"step": state.global_step, **logs})


class HeldOut(TrainerCallback):
    """Answers the held-out questions with the adapter off when training begins, and with it on when it ends.

    As a callback it runs where DeepSpeed is set up: under ZeRO-3 a process holds only parts of the weights.
    """

    def __init__(self, config: TrainConfig, run: Path, processor, questions: list[Record], signals: SaveOnSignal):
        self.config, self.run, self.processor, self.questions, self.signals = (
            config,
            run,
            processor,
            questions,
            signals,
        )
        self.before: list[Answer] = []
        self.after: list[Answer] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self.questions:
            return
        saved = self.run / ANSWERS_BEFORE
        if saved.is_file():  # an interrupted run has answered them already
            self.before = read_answers(saved)
            return
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            self.before = self._answer(args, model)
        if state.is_world_process_zero:
            write_answers(saved, self.before)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.questions and not self.signals.stopped:
            self.after = self._answer(args, model)
            if state.is_world_process_zero:
                write_answers(self.run / "answers-after.jsonl", self.after)

    def _answer(self, args, model) -> list[Answer]:
        # Every process answers its share. The shares are made equally long, because under ZeRO-3 all processes
        # must call the model equally often; what was added is taken off again.
        rank, world = args.process_index, args.world_size
        share = -(-len(self.questions) // world)
        mine = [self.questions[min(i * world + rank, len(self.questions) - 1)] for i in range(share)]
        # Layers compiled for generating would be compiled for each length, and leave no room for training's.
        with torch.compiler.set_stance("force_eager"):
            answers = answer_questions(
                model,
                self.processor,
                mine,
                self.config.eval_batch_size,
                self.config.eval_max_new_tokens,
                progress=rank == 0,
                synced_gpus=is_deepspeed_zero3_enabled(),
            )
        if world > 1:
            gathered = gather_object(answers)
            answers = [gathered[r * share + i] for i in range(share) for r in range(world)]
        return answers[: len(self.questions)]


# ------------------------------------------------------------------------------------------------------ the end


def _zero(config: TrainConfig) -> dict:
    return json.loads(Path(config.deepspeed).read_text()).get("zero_optimization", {})


@contextmanager
def advice_on_memory(config: TrainConfig, run: Path):
    """Where memory runs out within: a TrainingError that says what to change and is accepted for this run."""
    try:
        yield
    except RuntimeError as error:
        words = ("out of memory", "can't allocate memory", "not enough memory")
        if not any(word in str(error) for word in words):
            raise
        batch, four_bits = config.per_device_train_batch_size, config.method in ("qfura", "qlora")
        advice = []
        if batch > 1:  # a divisor, so that train_batch_size stays a multiple
            less = next(n for n in range(batch // 2, 0, -1) if batch % n == 0)
            kept = "with train_batch_size a step has as many records as before"
            advice.append(f"--per_device_train_batch_size {less} ({kept})")
        if not config.gradient_checkpointing:
            advice.append("--gradient_checkpointing true")
        others = []  # of another run, by what a checkpoint holds
        if _zero(config).get("stage") != 3:
            if not four_bits:
                eager = " --compile_layers false" * config.compile_layers
                others.append(f"--deepspeed scripts/zero3.json{eager} on several GPUs")
            if config.method in ("fura", "lora"):
                others.append(f"--method q{config.method}")
        elif "offload_param" not in _zero(config):
            others.append("--deepspeed scripts/zero3_offload.json")
        if get_last_checkpoint(str(run)):
            others = [f"{other} in another --output_dir" for other in others]
        if advice or others:
            tried = f"try {', or '.join(advice + others)}"
        else:
            tried = (
                "no setting is left that takes less, so take a larger GPU or a smaller model (fura-vlm plan says what "
                "fits), or cut the records with --model_max_length in another --output_dir"
            )
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
            where = f"a GPU of {total:.0f} GiB"
        else:
            where = "this machine"
        raise TrainingError(
            f"The memory of {where} does not suffice for {config.per_device_train_batch_size} records of up to "
            f"{config.model_max_length} tokens with {config.method}: {tried}"
        ) from error


def _describe(config, run, processor, model, dataset, checkpoint, console) -> None:
    """Writes what the run is before it starts, and says it."""
    processor.save_pretrained(run / "processor")
    versions = {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}
    write_text(run / "versions.json", json.dumps(versions, indent=1))
    if isinstance(model, PeftModel):
        trained, total = model.get_nb_trainable_parameters()
    else:
        trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
    console.print(
        f"{config.method} trains {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %) of "
        f"{config.model_name_or_path} on {len(dataset):,} records; the run folder is {run}",
        soft_wrap=True,
    )
    if checkpoint:
        console.print(f"Going on where the interrupted run stopped: {checkpoint}", soft_wrap=True)


def _save(trainer: FuraTrainer, folder: Path, card: str | None = None) -> None:
    """The adapter as PEFT saves it or the whole model, gathered from all processes under ZeRO-3; written beside and
    renamed. PEFT's own card is a form that nobody has filled in."""
    building = folder.with_name(folder.name + ".tmp")
    trainer.save_model(str(building))
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        if card is not None:
            write_text(building / "README.md", card)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(building, folder)


def _write_projector(run: Path) -> None:
    """The pretrained projector out of its adapter, as LLaVA calls its parts."""
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    weights = {}
    for theirs, ours in PROJECTOR_KEYS.items():
        [weights[theirs]] = (weight for name, weight in trained.items() if name.endswith(f"{PROJECTOR}.{ours}"))
    building = run / "mm_projector.tmp"
    save_file(weights, building)
    os.replace(building, run / "mm_projector.safetensors")


def _finish(config: TrainConfig, run: Path, held_out: HeldOut, console: Console) -> None:
    """Pictures, the report and the closing words."""
    rows = report.read_metrics(run / "metrics.jsonl")
    report.plot_curve(rows, run / "loss.png")
    lines = [f"# {run.name}", "", "![loss](loss.png)", ""]
    if held_out.questions:
        before, after = exact_match(held_out.before), exact_match(held_out.after)
        blind = blind_guess(held_out.after)
        report.plot_scores(before, after, blind, run / "scores.png")
        report.plot_samples(held_out.before, held_out.after, run / "samples.png")
        table = report.score_table(before, after, blind)
        lines += ["Held-out questions, exact match in percent:", "", table, "", "![scores](scores.png)", ""]
        lines += ["![samples](samples.png)", ""]
        console.print(Markdown("Held-out questions, exact match in percent\n\n" + table))
    write_text(run / FINISHED, "\n".join(lines))
    full = config.method == "full"
    console.print(f"{'model  ' if full else 'adapter'}     {run / ('model' if full else 'adapter')}")
    console.print(f"loss curve  {run / 'loss.png'}")
    if held_out.questions:
        samples = run / "samples.png"
        console.print(f"report      {run / FINISHED}, with sample answers in {samples}", soft_wrap=True)
    console.print("What next:")
    image = next((answer.image for answer in held_out.after if answer.image), "IMAGE")
    program = os.path.relpath(Path(sys.executable).with_name("fura-vlm"))
    commands = [["bash", "scripts/eval.sh", run], [program, "chat", image, "--model", run]]
    if not full:
        commands.append([program, "merge", run, run / "merged"])
    for command in commands:
        console.print("  " + shlex.join(map(str, command)), soft_wrap=True)
