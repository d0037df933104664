"""The configurations of an evaluation. Light: the command line reads them before torch is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class EvalConfig:
    """Evaluate a model: on GQA, ScienceQA, TextVQA and POPE, commonsense, mathematics, or tasks of lm-eval.

    Args:
        model: a run folder, an adapter, or a model, merged or not (a folder or a name on the hub); with --server the
            name of one of its models.
        adapter: an adapter to put over ``model``; not needed for a run folder or an adapter's own folder.
        suite: visual is the four benchmarks of pictures, or other tasks of lmms-eval; commonsense the eight sets of
            LLM-Adapters; math MATH-500, AIME and word problems; lm-eval any tasks of the EleutherAI harness for
            language models.
        tasks: names of tasks, as a list or with commas (pope,gqa) or spaces. Of visual, those of lmms-eval or of
            eval/, by default the four of the protocol; of commonsense, sets, by default all eight; of math, sets
            (MATH-500, AIME24, AIME25, MultiArith, AddSub, SingleEq, SVAMP, gsm8k), by default all that are in the
            folder; of lm-eval, its own.
        protocol: the four tasks as lmms-eval defines them, or as the LLaVA-1.5 paper scores them (eval/paper).
        data: where the benchmarks come from: embedded (made here), hub (or its cache), or a folder that holds GQA,
            ScienceQA, textvqa and POPE as they are on the hub; auto means embedded for models of the embedded size and
            hub for all others. Of commonsense, a folder with boolq/test.json or boolq-test.json, and so on, as
            LLM-Adapters publishes them; of math, a folder with MATH-500.jsonl, AddSub-test.json and so on, or hub for
            MATH-500 and AIME; of lm-eval, a folder with more tasks, and by default there are none.
        base: if there is an adapter, also evaluate the base model, and compare the two.
        output_dir: where results, report and answers go; by default eval or eval-embedded in the run folder, or
            runs/eval-NAME. An interrupted evaluation continues from the answers in it.
        batch_size: questions answered at once; auto takes as many as fit. It is made smaller when memory runs out.
        limit: use only this many documents of each task, the first ones; for a quick try.
        max_new_tokens: the most tokens of an answer; by default the task's limit, and 16 on the embedded benchmarks,
            whose answers are a word or two; 32 for commonsense; of math 1024, and 256 for word problems.
        offline: use only local files and the hub's cache.
        dtype: bfloat16, float16 or float32; auto means bfloat16 on a GPU and float32 on a CPU.
        score: of commonsense: answers reads what the model writes; likelihood takes the likeliest of the choices, by
            the mean over the answer's tokens, as small models need.
        num_beams: of commonsense: beams of the search for an answer; 1 is greedy, and the paper's release takes 4.
        conversation: of commonsense and math: the form of a question; by default the one of the run; where nothing says
            one, alpaca for commonsense and the model's own for math.
        samples: of math: how often each question is asked; its score is the share of right answers. By default 8 for
            MATH-500 and AIME, and 1 for word problems.
        temperature: of math: that of the answers; 0 is greedy. By default 0.6 for MATH-500 and AIME, and 0 for word
            problems.
        top_p: of math: that of the answers, by default 0.95 for MATH-500 and AIME.
        instruction: of math: what follows each question; by default the words of the run that was trained by reward, or
            else a request for a boxed answer.
        num_workers: processes that prepare pictures for the model in advance; by default up to 8 with a GPU.
        server: the address of a server that speaks OpenAI's interface, such as http://localhost:8000 (vLLM, SGLang,
            transformers serve): its model answers the suite visual, and none is loaded here.
        server_key: the name of the environment variable that holds the server's key; by default none is sent.
    """

    model: str
    adapter: str | None = None
    tasks: list[str] | str = field(default_factory=list)
    suite: Literal["visual", "commonsense", "math", "lm-eval"] = "visual"
    protocol: Literal["lmms-eval", "paper"] = "lmms-eval"
    data: str = "auto"
    base: bool = True
    output_dir: str | None = None
    batch_size: int | Literal["auto"] = "auto"
    limit: int | None = None
    max_new_tokens: int | None = None
    offline: bool = False
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    score: Literal["answers", "likelihood"] = "answers"
    num_beams: int = 1
    conversation: str | None = None
    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    instruction: str | None = None
    num_workers: int | None = None
    server: str | None = None
    server_key: str | None = None

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
