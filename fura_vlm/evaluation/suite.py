"""An evaluation: a model, and its base beside it, on a suite of tasks, to one table, a JSON and a page."""

from __future__ import annotations

import gc
import json
import os
import shlex
import sys
from dataclasses import MISSING, asdict, fields
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from fura_vlm.evaluation.config import EvalConfig
from fura_vlm.files import alone_in, write_text

NUMBERS = {"limit": 1, "max_new_tokens": 1, "num_workers": 0, "num_beams": 1}
"""The least that settings may be."""


def evaluate(config: EvalConfig) -> Path | None:
    """Runs the suite and returns the folder with the results; ``None`` on all processes but the main one.

    Raises:
        FuraVLMError: with one sentence, for everything that the user can fix.
    """
    if config.offline:  # read by the libraries when they are imported
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from fura_vlm.evaluation.base import SuiteError, is_main
    from fura_vlm.evaluation.source import find_model
    from fura_vlm.processes import agree

    _no_bars()
    for name, least in NUMBERS.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise SuiteError(f"{name} is {value}: give {least} or more, or leave it out")
    if config.server is not None:
        from fura_vlm.evaluation.served import find_served

        suite = _suite(config, find_served(config))
    elif config.server_key is not None:
        raise SuiteError("--server_key is the key of a server: give its address with --server")
    else:
        suite = _suite(config, find_model(config.model, config.adapter))
    source = suite.source
    folder = Path(config.output_dir) if config.output_dir else _default_folder(config, suite.folder)
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
            return _evaluate(config, suite, folder, identity)
    except KeyboardInterrupt:
        if is_main():
            print(f"\nStopped. The same command continues from the answers in {folder}.", file=sys.stderr)
        raise


def _suite(config: EvalConfig, source):
    """The suite that ``config`` names.

    Raises:
        SuiteError: a setting of another suite is given.
    """
    from fura_vlm.evaluation.base import SuiteError
    from fura_vlm.evaluation.commonsense import Commonsense
    from fura_vlm.evaluation.harness import Harness
    from fura_vlm.evaluation.mathematics import Mathematics
    from fura_vlm.evaluation.visual import Visual

    suites = {"visual": Visual, "commonsense": Commonsense, "math": Mathematics, "lm-eval": Harness}
    chosen = suites[config.suite]
    for name in _given(config):
        places = [suite for suite, each in suites.items() if name in each.settings]
        if places and config.suite not in places:
            raise SuiteError(f"{name} is no setting of the suite {config.suite} but of {' and '.join(places)}: leave "
                             "it out")  # fmt: skip
    return chosen(config, source)


def _evaluate(config: EvalConfig, suite, folder: Path, identity: dict) -> Path | None:
    from fura_vlm.evaluation import report, scores
    from fura_vlm.evaluation.base import is_main

    suite.load()
    source = suite.source
    sources = {"tuned" if source.adapter else "model": source}
    if source.adapter and config.base:
        sources["base"] = source.without_adapter
    reached, samples = {}, {}
    for name, each in sources.items():
        gc.collect()  # the model before is in reference cycles: two at once may not fit
        if is_main():
            print(
                f"{'Base model' if each.adapter is None else 'With adapter'}: {each.adapter or each.base}", flush=True
            )
        outcome = suite.run(each, folder)
        if is_main():
            reached[name], samples[name] = outcome
    if not is_main():
        return None

    paired = scores.paired(samples["base"], samples["tuned"]) if "base" in samples else {}
    published = suite.published(next(iter(reached.values())))
    packages = ("fura-vlm", *suite.packages, "transformers", "peft", "torch")
    results = identity | {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": _command(config),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "protocol": suite.protocol,
        "data": suite.data,
        "limit": config.limit,
        "max_new_tokens": suite.max_new_tokens,
        "versions": {name: version(name) for name in packages},
        "scores": {name: {task: asdict(score) for task, score in each.items()} for name, each in reached.items()},
        "average": {name: sum(s.score for s in each.values()) / len(each) for name, each in reached.items()},
        "paired": {task: test._asdict() for task, test in paired.items()},
        "published": published,
        "notes": suite.notes(reached, bool(published)),
    }
    for name, rows in samples.items():
        report.write_samples(folder / f"samples-{name}.jsonl", rows)
    write_text(folder / "results.md", report.markdown(results))
    write_text(folder / "index.html", report.page(results, samples, suite.pictures))
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")  # last: it says all is there
    console = Console()
    report.show(results, console)
    console.print(f"results  {folder / 'results.json'}, {folder / 'results.md'}", soft_wrap=True)
    console.print(f"page     {folder / 'index.html'}", soft_wrap=True)
    return folder


def _default_folder(config: EvalConfig, name: str) -> Path:
    folder = Path(config.adapter or config.model)
    if (folder / "adapter").is_dir() or (folder / "model").is_dir():
        return folder / name
    return Path("runs") / f"{name}-{folder.resolve().name if folder.is_dir() else folder.name}"


def _check_folder(folder: Path, identity: dict) -> None:
    from fura_vlm.evaluation.base import SuiteError

    results = folder / "results.json"
    if not results.is_file():
        return
    try:
        there = json.loads(results.read_text())["fingerprint"], json.loads(results.read_text())["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise SuiteError(f"{results} is not a results file of this program: choose another --output_dir") from error
    if there[0] != identity["fingerprint"]:
        raise SuiteError(f"{folder} holds the results of another model ({there[1]}): choose another --output_dir")


def _given(config: EvalConfig) -> dict:
    """The settings that are not the defaults, but for the model."""
    given = {}
    for each in fields(config)[1:]:
        value = getattr(config, each.name)
        if value != (each.default if each.default is not MISSING else each.default_factory()):
            given[each.name] = value
    return given


def _command(config: EvalConfig) -> str:
    """What to type for this evaluation."""
    words = ["fura-vlm", "eval", config.model]
    for name, value in _given(config).items():
        shown = ",".join(value) if isinstance(value, list) else value
        words += [f"--{name}", str(shown).lower() if isinstance(value, bool) else str(shown)]
    return shlex.join(words)


def _no_bars() -> None:
    """Hides the libraries' progress bars about loading."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
