"""The configurations of an evaluation. Light: the command line reads them before torch is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class EvalConfig:
    """Evaluate a model on GQA, ScienceQA, TextVQA and POPE through lmms-eval.

    Args:
        model: a run folder, an adapter, or a LLaVA, merged or not (a folder or a name on the hub).
        adapter: an adapter to put over ``model``; not needed for a run folder or an adapter's own folder.
        tasks: names of tasks of lmms-eval or of eval/, as a list or with commas (pope,gqa) or spaces; by default the
            four tasks of the protocol.
        protocol: the four tasks as lmms-eval defines them, or as the LLaVA-1.5 paper scores them (eval/paper).
        data: where the benchmarks come from: embedded (made here), hub (or its cache), or a folder that holds GQA,
            ScienceQA, textvqa and POPE as they are on the hub; auto means embedded for models of the embedded size and
            hub for all others.
        base: if there is an adapter, also evaluate the base model, and compare the two.
        output_dir: where results, report and answers go; by default eval or eval-embedded in the run folder, or
            runs/eval-NAME. An interrupted evaluation continues from the answers in it.
        batch_size: questions answered at once; auto takes as many as fit. It is made smaller when memory runs out.
        limit: use only this many documents of each task, the first ones; for a quick try.
        max_new_tokens: the most tokens of an answer; by default the task's limit, and 16 on the embedded benchmarks,
            whose answers are a word or two.
        offline: use only local files and the hub's cache.
        dtype: bfloat16, float16 or float32; auto means bfloat16 on a GPU and float32 on a CPU.
        num_workers: processes that prepare pictures for the model in advance; by default up to 8 with a GPU.
    """

    model: str
    adapter: str | None = None
    tasks: list[str] | str = field(default_factory=list)
    protocol: Literal["lmms-eval", "paper"] = "lmms-eval"
    data: str = "auto"
    base: bool = True
    output_dir: str | None = None
    batch_size: int | Literal["auto"] = "auto"
    limit: int | None = None
    max_new_tokens: int | None = None
    offline: bool = False
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    num_workers: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str):
            # With commas, spaces, or as a list that the command line has not parsed, such as [pope, gqa].
            self.tasks = [name for name in re.split(r"[\s,\[\]'\"]+", self.tasks) if name]


@dataclass
class CompareConfig:
    """Compare two evaluated models document by document: intervals and tests of the differences, and where they differ.

    Args:
        first: a folder with results, or a run folder that holds one.
        second: another one, on the same benchmarks; without it the base and the tuned model of ``first`` are compared.
        listed: how many of the documents on which they differ are listed, of each task.
        output_path: where to write the same as Markdown; by default it is only printed.
    """

    first: str
    second: str | None = None
    listed: int = 10
    output_path: str | None = None
