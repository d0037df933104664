"""Commonsense questions with a small real model: the base, and what each method makes of it, on each set.

    fura-vlm data smollm2
    python benchmarks/commonsense.py FOLDER                                  all methods, two epochs, on a GPU
    python benchmarks/commonsense.py FOLDER --methods fura --steps 3 --limit 4 --seeds 1     a quick try, anywhere

FOLDER holds LLM-Adapters' records: NAME-train.json of some sets, which are trained on together, and NAME-test.json or
NAME/test.json of those that are asked. Training and evaluation are the project's own commands with the recipe
commonsense-smollm2. What is done already in --runs is not done again, so a stopped benchmark goes on.

The learning rates are those at which a first look (docs/evidence.md) found each method at its best; they were not
chosen on a validation part. The choice is the likeliest, unless --score answers is given.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

import torch

from fura_vlm.evaluation.commonsense import CHOICES
from fura_vlm.tables import Table

LEARNING_RATES = {"fura": 5e-4, "qfura": 5e-4, "lora": 1e-3, "qlora": 1e-3, "dora": 1e-3, "full": 1e-4}


def call(*words: object) -> None:
    """A command of the project, in a process of its own, which frees all of its memory."""
    subprocess.run([sys.executable, "-m", "fura_vlm.cli", *map(str, words)], check=True)


def mixture(data: Path, file: Path) -> list[str]:
    """Writes the train parts into one file; returns the sets they are of."""
    names = [name for name in CHOICES if (data / f"{name}-train.json").is_file()]
    if not names:
        sys.exit(f"{data} holds no train part, such as boolq-train.json")
    records = [record for name in names for record in json.loads((data / f"{name}-train.json").read_text())]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(records))
    return names


def scores(model: Path, folder: Path, arguments: argparse.Namespace, asked: list[str]) -> dict[str, float]:
    """What a model reached in each set, in percent."""
    if not (folder / "results.json").is_file():
        settings = ["--suite", "commonsense", "--data", arguments.data, "--tasks", ",".join(asked), "--base", "false"]
        settings += ["--score", arguments.score, "--conversation", "alpaca", "--output_dir", folder]
        settings += ["--limit", arguments.limit] if arguments.limit else []
        call("eval", model, *settings)
    [reached] = json.loads((folder / "results.json").read_text())["scores"].values()
    return {name: 100 * score["score"] for name, score in reached.items()}


def tune(method: str, seed: int, arguments: argparse.Namespace, file: Path) -> Path:
    """The run folder of one method."""
    run = arguments.runs / f"{method}-{seed}"
    if not (run / "report.md").is_file():
        settings = ["--method", method, "--seed", seed, "--learning_rate", LEARNING_RATES[method]]
        settings += ["--model_name_or_path", arguments.model, "--data_path", file, "--output_dir", run]
        settings += ["--per_device_train_batch_size", 32 if torch.cuda.is_available() else 16]  # a step is the same
        settings += ["--max_steps", arguments.steps] if arguments.steps else []
        begun = time.time()
        call("train", "--config", "commonsense-smollm2", *settings)
        (run / "seconds.txt").write_text(f"{time.time() - begun:.0f}")
    return run


def row(name: str, rate: str, seeds: list[dict[str, float]], asked: list[str], trained: list[str]) -> list[str]:
    """Means over seeds; that of all sets with its standard deviation where there are several."""
    groups = [[set_] for set_ in asked] + [
        [set_ for set_ in asked if set_ in trained],
        [set_ for set_ in asked if set_ not in trained],
        asked,
    ]
    each = [[mean(one[set_] for set_ in group) for one in seeds] for group in groups if group]
    cells = [f"{mean(values):.1f}" for values in each]
    if len(seeds) > 1:
        cells[-1] += f" ± {stdev(each[-1]):.1f}"
    return [name, rate, *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--methods", default="fura,qfura,lora,qlora,full")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, help="in place of the recipe's epochs")
    parser.add_argument("--limit", type=int, help="questions of each set")
    parser.add_argument("--score", default="likelihood", choices=["likelihood", "answers"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time: on one GPU they share it")
    parser.add_argument("--runs", type=Path, default=Path("runs/commonsense-benchmark"))
    parser.add_argument("--output", type=Path, help="a Markdown file to write the table to as well")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]

    file = arguments.runs / "train.json"
    trained = mixture(arguments.data, file)
    asked = [
        name
        for name in CHOICES
        if (arguments.data / f"{name}-test.json").is_file() or (arguments.data / name / "test.json").is_file()
    ]

    def one(job: tuple[str, int] | None) -> dict[str, float]:
        if job is None:
            return scores(Path(arguments.model), arguments.runs / "base", arguments, asked)
        run = tune(*job, arguments, file)
        return scores(run, run / "eval", arguments, asked)

    methods = arguments.methods.split(",")
    jobs = [*((method, seed) for seed in seeds for method in methods), None]  # None: the base
    with ThreadPoolExecutor(arguments.jobs) as pool:
        reached = dict(zip(jobs, pool.map(one, jobs), strict=True))
    rows = [row("base", "", [reached[None]], asked, trained)]
    for method in methods:
        of_seeds = [reached[method, seed] for seed in seeds]
        rows.append(row(method, f"{LEARNING_RATES[method]:.0e}", of_seeds, asked, trained))

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    groups = [
        *(["trained sets"] if set(asked) & set(trained) else []),
        *(["other sets"] if set(asked) - set(trained) else []),
        "all",
    ]
    means = ["learning rate", *asked, *groups]
    told = [
        f"{arguments.model} on {device}; torch {torch.__version__}.",
        f"Trained on {', '.join(trained)} ({len(json.loads(file.read_text()))} records), "
        + (f"{arguments.steps} steps" if arguments.steps else "the recipe's epochs")
        + f"; seeds {arguments.seeds}.",
        f"Score: percent right, by {arguments.score}"
        + (f", only the first {arguments.limit} questions of each set." if arguments.limit else "."),
    ]
    text = "\n".join([*(f"- {line}" for line in told), "", Table(["method", *means], rows).markdown()]) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(f"# Commonsense questions\n\n{text}")


if __name__ == "__main__":
    main()
