"""The suite lm-eval: any tasks of the EleutherAI harness, with its own HFLM over the models of this project.

Answers are not kept for a second start: the harness would keep them as pickles, which run code when they are read.
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import version
from pathlib import Path

from fura_vlm.errors import first_line
from fura_vlm.evaluation.base import Suite, SuiteError
from fura_vlm.evaluation.config import EvalConfig
from fura_vlm.evaluation.scores import Sample, TaskScore, score_of_means
from fura_vlm.evaluation.source import Source
from fura_vlm.extras import require

METRICS = ("acc_norm", "acc", "exact_match", "em", "f1")
"""What stands in the table, the first of these that a task has, or else its first mean over documents."""


CPU_BATCH = 8
"""In place of auto on a CPU: HFLM finds its batches by filling the memory with the longest input there is."""


class Harness(Suite):
    folder = "eval-lm-eval"
    packages = ("lm_eval",)
    protocol = "the tasks' own (lm-eval)"

    def __init__(self, config: EvalConfig, source: Source):
        super().__init__(config, source)
        require("lm-eval")
        if not config.tasks:
            raise SuiteError("lm-eval has thousands of tasks: name those you want with --tasks")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise SuiteError("The suite lm-eval runs in one process: start it with NUM_PROCESSES=1")
        if config.data == "embedded":
            raise SuiteError("There are no embedded tasks for lm-eval: leave --data out, or name a folder with tasks")
        self.include = None if config.data in ("auto", "hub") else config.data
        if self.include and not Path(self.include).is_dir():
            raise SuiteError(f"There is no folder {self.include}: --data names a folder with YAML files of tasks")
        self.data = "as the tasks say" if self.include is None else f"as the tasks say, with those in {self.include}"

    def load(self) -> None:
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.manager = TaskManager(include_path=self.include)
        unknown = [name for name in self.config.tasks if name not in self.manager.all_tasks]
        if unknown:
            raise SuiteError(f"lm-eval {version('lm_eval')} has no task {unknown[0]!r}: python -m lm_eval ls tasks "
                             "lists them, and --data FOLDER adds your own")  # fmt: skip

    def run(self, source: Source, folder: Path) -> tuple[dict[str, TaskScore], list[Sample]] | None:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model, family, _ = source.place(self.config.dtype)
        if family.sees:
            raise SuiteError(f"{source.base} takes pictures, and lm-eval's tasks are for language models: use --suite "
                             "visual")  # fmt: skip
        size = self.config.batch_size
        if size == "auto" and model.device.type == "cpu":
            size = CPU_BATCH
        held = HFLM(pretrained=model, tokenizer=family.tokenizer, batch_size=size)
        try:
            outcome = simple_evaluate(
                model=held,
                tasks=self.config.tasks,
                task_manager=self.manager,
                limit=self.config.limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        except Exception as error:  # whatever libraries and the tasks' own code raise
            raise SuiteError(
                f"lm-eval fails in {', '.join(self.config.tasks)} ({first_line(error)}): check the network if their "
                "data come from the hub, and the task's file if it is your own"
            ) from error
        reached, samples = {}, []
        for name, rows in outcome["samples"].items():
            reached[name], own = _task(name, rows, outcome)
            samples += own
        return reached, samples


def _task(name: str, rows: list[dict], outcome: dict) -> tuple[TaskScore, list[Sample]]:
    """Score and samples of a task. Of its filters, which read an answer in several ways, the first one counts."""
    first = rows[0]["filter"]
    rows = sorted((row for row in rows if row["filter"] == first), key=lambda row: row["doc_id"])
    ours = f",{first}"
    metrics = {
        key.removesuffix(ours): value
        for key, value in outcome["results"][name].items()
        if key.endswith(ours) and "stderr" not in key and isinstance(value, (int, float))
    }
    means = {
        metric
        for metric, value in metrics.items()
        if all(isinstance(row.get(metric), (bool, int, float)) for row in rows)
        and abs(sum(row[metric] for row in rows) / len(rows) - value) < 1e-9
    }
    chosen = next((metric for metric in (*METRICS, *metrics) if metric in means), None)
    if chosen is None:
        raise SuiteError(
            f"{name} has no score that is a mean over its documents, which the tables and intervals here need: run it "
            "with python -m lm_eval --model hf, on a merged model"
        )
    values = [float(row[chosen]) for row in rows]
    samples = [
        Sample(name, row["doc_id"], _words(row["arguments"]), str(row["target"]), _said(row), value)
        for row, value in zip(rows, values, strict=True)
    ]
    return score_of_means(values, chosen, metrics, len(values)), samples


def _words(arguments) -> str:
    """The prompt of a document's first request."""
    first = next(iter(arguments.values())) if isinstance(arguments, dict) else arguments[0]
    return str(next(iter(first.values())) if isinstance(first, dict) else first[0])


def _said(row: dict) -> str:
    """The written answer, or the number of the likeliest choice."""
    answers = row["filtered_resps"]
    if answers and isinstance(answers[0], (list, tuple)):
        values = [float(answer[0]) for answer in answers]
        return f"choice {values.index(max(values))}"
    return str(answers[0])
