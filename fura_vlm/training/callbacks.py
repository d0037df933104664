"""What happens besides the training itself: saving on a signal, the metrics file, the held-out questions."""

from __future__ import annotations

import json
import signal
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from fura_vlm.data.messages import Record
from fura_vlm.evaluation.heldout import Answer, answer_questions, read_answers, write_answers
from fura_vlm.families.base import Family
from fura_vlm.files import write_text
from fura_vlm.training import report
from fura_vlm.training.clock import Clock
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.run_folder import ANSWERS_BEFORE


class SaveOnSignal(TrainerCallback):
    """On SIGTERM or Ctrl-C: finish the step, save, stop. All processes agree on the step."""

    def __init__(self):
        self.stopped = False
        self._received = False
        # Over the CPU, because asking a GPU would make every step wait for it.
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
    """Answers the held-out questions with the adapter off when training begins, and with it on when training ends. It

    is a callback because DeepSpeed must be set up: under ZeRO-3 a process holds only parts of the weights.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        family: Family,
        questions: list[Record],
        signals: SaveOnSignal,
        clock: Clock,
    ):
        self.config, self.run, self.family = config, run, family
        self.questions, self.signals, self.clock = questions, signals, clock
        self.before: list[Answer] = []
        self.after: list[Answer] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self.questions:
            return
        saved = self.run / ANSWERS_BEFORE
        if saved.is_file():  # an interrupted run has answered them already
            self.before = read_answers(saved)
            return
        self.clock.mark("preparing")
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            self.before = self._answer(args, model)
        if state.is_world_process_zero:
            write_answers(saved, self.before)
        self.clock.mark("questions")

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.questions and not self.signals.stopped:
            self.clock.mark("other")
            self.after = self._answer(args, model)
            if state.is_world_process_zero:
                write_answers(self.run / "answers-after.jsonl", self.after)
            self.clock.mark("questions")

    def _answer(self, args, model) -> list[Answer]:
        # Every process answers its share. The shares are made equally long, because under ZeRO-3 all processes
        # must call the model equally often; the added answers are removed again.
        rank, world = args.process_index, args.world_size
        share = -(-len(self.questions) // world)
        mine = [self.questions[min(i * world + rank, len(self.questions) - 1)] for i in range(share)]
        # Layers would be compiled for each length of an answer, and the compiler's limit would leave none for training.
        with torch.compiler.set_stance("force_eager"):
            answers = answer_questions(
                model,
                self.family,
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
