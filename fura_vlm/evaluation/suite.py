"""The evaluation suite: a model, and its base beside it, on the four benchmarks, to one table, a JSON and a page."""

from __future__ import annotations

import gc
import json
import os
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from fura_vlm.errors import FuraVLMError
from fura_vlm.evaluation.config import EvalConfig
from fura_vlm.files import write_text

EMBEDDED = Path("data/benchmarks")


class SuiteError(FuraVLMError):
    """Settings that do not go together, or a folder that holds something else."""


@dataclass
class Sample:
    """One scored answer: ``score`` is between 0 and 1, ``document`` its number in the task."""

    task: str
    document: int
    question: str
    expected: str
    predicted: str
    score: float


@dataclass
class TaskScore:
    """What one model reached in one task; ``score``, ``low`` and ``high`` (95 %) are between 0 and 1.

    ``n`` documents are scored of ``total``; the others, ``unreadable``, have a picture that does not decode.
    """

    metric: str
    n: int
    total: int
    score: float
    low: float
    high: float
    metrics: dict[str, float]
    unreadable: list[dict]


def evaluate(config: EvalConfig) -> Path | None:
    """Runs the suite and returns the folder with the results; ``None`` on all processes but the main one.

    Raises:
        FuraVLMError: with one sentence for whatever the user can mend.
    """
    if config.offline:  # read by the libraries when they are imported
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from fura_vlm.embedded.benchmarks import write_benchmarks
    from fura_vlm.evaluation import report
    from fura_vlm.evaluation.source import find_model
    from fura_vlm.evaluation.tasks import TASKS, load_tasks

    _quiet()
    for name, least in (("limit", 1), ("max_new_tokens", 1), ("num_workers", 0)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise SuiteError(f"{name} is {value}: give {least} or more, or leave it out")
    source = find_model(config.model, config.adapter)
    main = int(os.environ.get("RANK", 0)) == 0
    data = _data(config.data, source)
    folder = Path(config.output_dir) if config.output_dir else _default_folder(config, embedded=data == str(EMBEDDED))
    identity = {
        "model": config.model,
        "adapter": source.adapter,
        "base": source.base,
        "fingerprint": source.fingerprint(),
    }
    _check_folder(folder, identity)
    if data == str(EMBEDDED) and main and write_benchmarks(data):
        print(f"The embedded benchmarks are in {data}")
    _wait_for_main()

    max_new_tokens = config.max_new_tokens or (16 if data == str(EMBEDDED) else None)
    tasks = load_tasks(config.tasks or list(TASKS[config.protocol]), data, config.limit, max_new_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    sources = {"tuned" if source.adapter else "model": source}
    if source.adapter and config.base:
        sources["base"] = source.without_adapter
    scores, samples = {}, {}
    for name, each in sources.items():
        outcome = _run(each, tasks, config, folder)
        if main:
            scores[name], samples[name] = outcome
    if not main:
        return None

    results = identity | {
        "protocol": "own choice" if config.tasks else config.protocol,
        "data": data or "hub",
        "limit": config.limit,
        "max_new_tokens": max_new_tokens,
        "versions": {name: version(name) for name in ("fura-vlm", "lmms-eval", "transformers", "peft", "torch")},
        "scores": {name: {task: asdict(score) for task, score in each.items()} for name, each in scores.items()},
        "average": {name: sum(s.score for s in each.values()) / len(each) for name, each in scores.items()},
        "published": report.PUBLISHED,
    }
    for name, rows in samples.items():
        report.write_samples(folder / f"samples-{name}.jsonl", rows)
    write_text(folder / "results.md", report.markdown(results))
    write_text(folder / "index.html", report.page(results, samples, tasks))
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")  # last: it says all is there
    console = Console()
    report.show(results, console)
    console.print(f"results  {folder / 'results.json'}, {folder / 'results.md'}", soft_wrap=True)
    console.print(f"page     {folder / 'index.html'}", soft_wrap=True)
    return folder


def _run(source, tasks: dict, config: EvalConfig, folder: Path):
    """Scores and samples of one model by task; lmms-eval does the work."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from fura_vlm.evaluation.lmms_model import FuraLlava

    gc.collect()  # the model before is in reference cycles: two at once may not fit
    model = FuraLlava(
        pretrained=source.base,
        adapter=source.adapter,
        processor=source.processor,
        batch_size=config.batch_size,
        dtype=config.dtype,
        num_workers=config.num_workers,
        cache=str(folder / "answers"),
    )
    print(f"{'Base model' if source.adapter is None else 'With adapter'}: {source.adapter or source.base}", flush=True)
    outcome = simple_evaluate(
        model=model,
        tasks=[loaded.task for loaded in tasks.values()],
        task_manager=TaskManager(include_defaults=False),
        limit=config.limit,
        bootstrap_iters=0,
        log_samples=True,
        # Scoring needs no pictures, and lmms-eval then decodes none; TextVQA writes a file for its server.
        cli_args=Namespace(output_path=str(folder), process_with_media=False),
    )
    if outcome is None:
        return None
    scores, samples = {}, []
    for name, loaded in tasks.items():
        rows = sorted(outcome["samples"][name], key=lambda row: row["doc_id"])
        items = [row[loaded.metric] for row in rows]
        metrics = {
            key.removesuffix(",none"): value
            for key, value in outcome["results"][name].items()
            if key.endswith(",none") and "stderr" not in key and isinstance(value, (int, float))
        }
        scores[name] = _score(loaded, items, metrics)
        samples += [_sample(name, row, item) for row, item in zip(rows, items, strict=True)]
    return scores, samples


def _score(loaded, items: list, metrics: dict[str, float]) -> TaskScore:
    from fura_vlm.evaluation.statistics import confidence_interval

    low, high = confidence_interval(items, loaded.task.aggregation()[loaded.metric])
    score = float(metrics[loaded.metric])
    return TaskScore(loaded.metric, len(items), loaded.total, score, low, high, metrics, loaded.unreadable)


def _sample(task: str, row: dict, item) -> Sample:
    """``item`` is a number, or a row of POPE's with the number in ``score``."""
    answers = row["doc"].get("answers") or [row["target"]]
    return Sample(
        task=task,
        document=row["doc_id"],
        question=row["arguments"][0],
        expected=max(answers, key=answers.count),
        predicted=row["filtered_resps"][0],
        score=float(item["score"] if isinstance(item, dict) else item),
    )


def _data(data: str, source) -> str | None:
    """The folder with the data, or ``None`` for the hub."""
    if data == "hub":
        return None
    if data == "auto":
        from fura_vlm.embedded.tiny import IMAGE_SIZE, VOCAB_SIZE

        config = source.config()
        small = config.vision_config.image_size == IMAGE_SIZE and config.text_config.vocab_size == VOCAB_SIZE
        return str(EMBEDDED) if small else None
    return str(EMBEDDED) if data == "embedded" else data


def _default_folder(config: EvalConfig, embedded: bool) -> Path:
    name = "eval-embedded" if embedded else "eval"
    if config.protocol == "paper":
        name += "-paper"
    folder = Path(config.adapter or config.model)
    if (folder / "adapter").is_dir() or (folder / "model").is_dir():
        return folder / name
    return Path("runs") / f"{name}-{folder.resolve().name if folder.is_dir() else folder.name}"


def _check_folder(folder: Path, identity: dict) -> None:
    results = folder / "results.json"
    if not results.is_file():
        return
    try:
        there = json.loads(results.read_text())["fingerprint"], json.loads(results.read_text())["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise SuiteError(f"{results} is no results file of this suite: choose another --output_dir") from error
    if there[0] != identity["fingerprint"]:
        raise SuiteError(f"{folder} holds the results of another model ({there[1]}): choose another --output_dir")


def _wait_for_main() -> None:
    """The other processes wait until the main one has made the data."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()


def _quiet() -> None:
    """lmms-eval's log lines below a warning, and the libraries' bars about loading, stay off the screen."""
    import datasets
    import lmms_eval.models  # noqa: F401  sets up its own log when it is imported
    from loguru import logger
    from transformers.utils import logging

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
