"""The evaluation suite: a model, and its base beside it, on the four benchmarks, to one table, a JSON and a page."""

from __future__ import annotations

import gc
import json
import os
import shlex
import sys
from argparse import Namespace
from dataclasses import MISSING, asdict, fields
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from fura_vlm.errors import FuraVLMError
from fura_vlm.evaluation.config import EvalConfig
from fura_vlm.files import alone_in, write_text

EMBEDDED = Path("data/benchmarks")
RECIPE = "recipe.json"  # what write_benchmarks leaves beside the benchmarks


class SuiteError(FuraVLMError):
    """Settings that cannot be combined, or a folder that holds something else."""


def evaluate(config: EvalConfig) -> Path | None:
    """Runs the suite and returns the folder with the results; ``None`` on all processes but the main one.

    Raises:
        FuraVLMError: with one sentence, for everything that the user can fix.
    """
    if config.offline:  # read by the libraries when they are imported
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from fura_vlm.evaluation.source import find_model
    from fura_vlm.processes import agree

    _quiet()
    for name, least in (("limit", 1), ("max_new_tokens", 1), ("num_workers", 0)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise SuiteError(f"{name} is {value}: give {least} or more, or leave it out")
    source = find_model(config.model, config.adapter)
    data = _data(config.data, source)
    folder = Path(config.output_dir) if config.output_dir else _default_folder(config, embedded=_is_embedded(data))
    identity = {
        "model": config.model,
        "adapter": source.adapter,
        "base": source.base,
        "fingerprint": source.fingerprint(),
    }
    _check_folder(folder, identity)
    try:
        busy = f"Another evaluation is under way in {folder}: wait for its end, stop it, or choose another --output_dir"
        with alone_in(folder, agree, SuiteError(busy)):
            return _evaluate(config, source, data, folder, identity)
    except KeyboardInterrupt:
        if _is_main():
            print(f"\nStopped. The same command continues from the answers in {folder}.", file=sys.stderr)
        raise


def _evaluate(config: EvalConfig, source, data: str | None, folder: Path, identity: dict) -> Path | None:
    from fura_vlm.evaluation import report, scores
    from fura_vlm.evaluation.tasks import TASKS, load_tasks
    from fura_vlm.processes import agree

    if data == str(EMBEDDED):
        agree(_make_embedded)
    max_new_tokens = config.max_new_tokens or (16 if _is_embedded(data) else None)
    tasks = load_tasks(config.tasks or list(TASKS[config.protocol]), data, config.limit, max_new_tokens)
    sources = {"tuned" if source.adapter else "model": source}
    if source.adapter and config.base:
        sources["base"] = source.without_adapter
    reached, samples = {}, {}
    for name, each in sources.items():
        outcome = _run(each, tasks, config, folder)
        if _is_main():
            reached[name], samples[name] = outcome
    if not _is_main():
        return None

    paired = scores.paired(samples["base"], samples["tuned"]) if "base" in samples else {}
    results = identity | {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": _command(config),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "protocol": "own choice" if config.tasks else config.protocol,
        "data": data or "hub",
        "limit": config.limit,
        "max_new_tokens": max_new_tokens,
        "versions": {name: version(name) for name in ("fura-vlm", "lmms-eval", "transformers", "peft", "torch")},
        "scores": {name: {task: asdict(score) for task, score in each.items()} for name, each in reached.items()},
        "average": {name: sum(s.score for s in each.values()) / len(each) for name, each in reached.items()},
        "paired": {task: test._asdict() for task, test in paired.items()},
        "published": {} if _is_embedded(data) else report.PUBLISHED,
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

    from fura_vlm.evaluation import scores
    from fura_vlm.evaluation.lmms_model import FuraVLM

    gc.collect()  # the model before is in reference cycles: two at once may not fit
    model = FuraVLM(
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
    reached, samples = {}, []
    for name, loaded in tasks.items():
        rows = sorted(outcome["samples"][name], key=lambda row: row["doc_id"])
        metrics = {
            key.removesuffix(",none"): value
            for key, value in outcome["results"][name].items()
            if key.endswith(",none") and "stderr" not in key and isinstance(value, (int, float))
        }
        reached[name] = scores.score(loaded, rows, metrics)
        samples += [scores.sample(name, loaded, row) for row in rows]
    return reached, samples


def _data(data: str, source) -> str | None:
    """The folder with the data, or ``None`` for the hub."""
    if data == "hub":
        return None
    if data == "auto":
        from fura_vlm.embedded.tiny import is_embedded

        return str(EMBEDDED) if is_embedded(source.config()) else None
    return str(EMBEDDED) if data == "embedded" else data


def _is_embedded(data: str | None) -> bool:
    """Whether these are the project's own benchmarks, wherever they are and made already or not."""
    return data is not None and (data == str(EMBEDDED) or (Path(data) / RECIPE).is_file())


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
        raise SuiteError(f"{results} is not a results file of this program: choose another --output_dir") from error
    if there[0] != identity["fingerprint"]:
        raise SuiteError(f"{folder} holds the results of another model ({there[1]}): choose another --output_dir")


def _command(config: EvalConfig) -> str:
    """What to type for this evaluation: the settings that are not the defaults."""
    words = ["fura-vlm", "eval", config.model]
    for each in fields(config)[1:]:
        value = getattr(config, each.name)
        default = each.default if each.default is not MISSING else each.default_factory()
        if value != default:
            shown = ",".join(value) if isinstance(value, list) else value
            words += [f"--{each.name}", str(shown).lower() if isinstance(value, bool) else str(shown)]
    return shlex.join(words)


def _make_embedded() -> None:
    from fura_vlm.embedded.benchmarks import write_benchmarks

    with FileLock(EMBEDDED.with_name(f"{EMBEDDED.name}.lock.tmp")):  # an evaluation in another folder makes them too
        if write_benchmarks(EMBEDDED):
            print(f"The embedded benchmarks are in {EMBEDDED}")


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _quiet() -> None:
    """Hides lmms-eval's log lines below a warning, and the libraries' progress bars about loading."""
    import datasets
    import lmms_eval.models  # noqa: F401  sets up its own log when it is imported
    from loguru import logger
    from transformers.utils import logging

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
