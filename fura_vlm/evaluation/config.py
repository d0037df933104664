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
        tasks: names of lmms-eval's tasks or of those in eval/, as a list, with commas (pope,gqa) or spaces; by default
            the four of the protocol.
        protocol: the four tasks as lmms-eval defines them, or as the LLaVA-1.5 paper scores them (eval/paper).
        data: where the benchmarks come from: embedded (made here), hub (or its cache), or a folder with the folders
            GQA, ScienceQA, textvqa and POPE as they are on the hub; auto is embedded for models of the embedded size
            and hub for all others.
        base: evaluate the base model too, where there is an adapter, and set it beside the tuned one.
        output_dir: where results, report and answers go; by default eval or eval-embedded in the run folder, or
            runs/eval-NAME. An interrupted evaluation goes on from the answers in it.
        batch_size: questions answered at once; auto takes as many as fit. Either shrinks when memory runs out.
        limit: only so many documents of each task, the first; for a try.
        max_new_tokens: length limit of an answer; by default that of the task, and 16 on the embedded benchmarks, where
            an answer is a word or two and a longer one is wrong however it ends.
        offline: use nothing but local files and the hub's cache.
        dtype: bfloat16, float16 or float32; auto is bfloat16 on a GPU and float32 elsewhere.
        num_workers: processes that prepare pictures ahead of the model; by default up to 8 beside a GPU.
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
    """Compare two evaluated models document by document, with a paired test for each task.

    Args:
        first: a folder with results, or a run folder that holds one.
        second: another one, on the same benchmarks.
        output_path: where to write the table as Markdown; by default it is only printed.
    """

    first: str
    second: str
    output_path: str | None = None
