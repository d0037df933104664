"""Mathematics by reward with a small real model: what FuRA, LoRA and full fine-tuning make of the same start.

    fura-vlm data smollm2
    python benchmarks/grpo.py FOLDER                         until all is done, or for --minutes; then call it again
    python benchmarks/grpo.py FOLDER --jobs 9                runs side by side: on one GPU they share it
    python benchmarks/grpo.py FOLDER --methods fura --seeds 1 --steps 2 --limit 2 --small      a quick try, anywhere

FOLDER holds LLM-Adapters' math_data.json and MultiArith-test.json, AddSub-test.json, SingleEq-test.json and
SVAMP-test.json. The steps are the project's own commands with the recipes math-smollm2 (a short fine-tuning of every
weight on math_data.json, the start of all) and grpo-smollm2 (by reward on its questions). What is done already in
--runs is not done again; a call that ends in the midst of a run goes on from its checkpoint. Rows are written as they
come, to rows.jsonl in --runs.

Most questions of the test files stand in math_data.json, too. Only the others are asked: those are held out.
The learning rates are the release's and were not searched; --rates fura=3e-4,lora=3e-4 takes others.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

import torch

from fura_vlm.tables import Table
from fura_vlm.training.report import read_metrics

SETS = ("MultiArith", "AddSub", "SingleEq", "SVAMP")
SMALL = ["--prompts_per_step", 2, "--num_generations", 2, "--per_device_train_batch_size", 2]
SMALL += ["--max_completion_length", 16]
GRACE = 60.0  # seconds that a stopped run has for its checkpoint


class OutOfTime(Exception):
    """The minutes of this call are over."""


class Clock:
    """Starts the project's commands, and ends those that are running when the time is over: they go on in the next
    call."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def call(self, *words: object) -> None:
        """A command in a process of its own, which frees all of its memory."""
        left = self.end - GRACE - time.monotonic()
        if left < GRACE:
            raise OutOfTime
        process = subprocess.Popen([sys.executable, "-m", "fura_vlm.cli", *map(str, words)])
        try:
            status = process.wait(left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # a training saves a checkpoint; an evaluation has kept its answers
            process.wait()
            raise OutOfTime from None
        if status:
            sys.exit(f"fura-vlm {' '.join(map(str, words))} ended with status {status}")


def plain(text: str) -> str:
    """A question without what differs between two copies of it."""
    return re.sub(r"\W+", " ", text.casefold()).strip()


def held_out(data: Path, folder: Path) -> dict[str, int]:
    """Writes the test questions that are not trained on; returns their numbers by set."""
    trained = {plain(record["instruction"]) for record in json.loads((data / "math_data.json").read_text())}
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {}
    for name in SETS:
        records = json.loads((data / f"{name}-test.json").read_text())
        kept = [record for record in records if plain(record["instruction"]) not in trained]
        (folder / f"{name}-test.json").write_text(json.dumps(kept))
        numbers[name] = len(kept)
    return numbers


def scores(model: Path, folder: Path, arguments: argparse.Namespace, clock: Clock) -> dict[str, float]:
    """What a model reached in each set, in percent."""
    if not (folder / "results.json").is_file():
        settings = ["--suite", "math", "--data", arguments.runs / "held-out", "--tasks", ",".join(SETS)]
        settings += ["--base", "false", "--instruction", "", "--output_dir", folder]
        settings += ["--limit", arguments.limit, "--max_new_tokens", 16] if arguments.limit else []
        clock.call("eval", model, *settings)
    [reached] = json.loads((folder / "results.json").read_text())["scores"].values()
    return {name: 100 * score["score"] for name, score in reached.items()}


def start(arguments: argparse.Namespace, clock: Clock) -> Path:
    """The model that all begin with."""
    run = arguments.runs / "start"
    if not (run / "report.md").is_file():
        settings = ["--method", "full", "--model_name_or_path", arguments.model, "--output_dir", run]
        settings += ["--data_path", arguments.data / "math_data.json"]
        settings += ["--max_steps", 2, "--train_batch_size", 2, "--per_device_train_batch_size", 2] * arguments.small
        clock.call("train", "--config", "math-smollm2", *settings)
    return run


def by_reward(method: str, seed: int, arguments: argparse.Namespace, clock: Clock) -> Path:
    """The run folder of one method."""
    run = arguments.runs / f"{method}-{seed}"
    if not (run / "report.md").is_file():
        settings = ["--method", method, "--seed", seed, "--max_steps", arguments.steps, "--output_dir", run]
        settings += ["--model_name_or_path", arguments.runs / "start", "--data_path", arguments.data / "math_data.json"]
        settings += ["--learning_rate", arguments.rates[method]] if method in arguments.rates else []
        settings += ["--per_device_train_batch_size", arguments.batch] if arguments.batch else []
        clock.call("grpo", "--config", "grpo-smollm2", *settings, *(SMALL if arguments.small else []))
    return run


def rewards(run: Path) -> list[float]:
    """The mean reward of each step."""
    return [row["reward"] for row in read_metrics(run / "metrics.jsonl") if "reward" in row]


def work(arguments: argparse.Namespace, clock: Clock, write) -> None:
    """Everything, in this order; ``write`` takes a row."""
    begin = start(arguments, clock)

    def one(method: str, seed: int) -> None:
        run = by_reward(method, seed, arguments, clock) if seed else begin
        reached = scores(run, run / "eval", arguments, clock)
        write({"method": method, "seed": seed, "scores": reached} | ({"rewards": rewards(run)} if seed else {}))

    # A seed of every method first: what there is can be compared.
    jobs = [("start", 0), *((method, seed) for seed in arguments.seeds for method in arguments.methods)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for done in [pool.submit(one, *job) for job in jobs]:
            done.result()


def table(rows: list[dict]) -> Table:
    """A line for each method: means over its seeds, with the standard deviation of the last column."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        cells = [f"{mean(row['scores'][name] for row in own):.1f}" for name in SETS]
        means = [mean(row["scores"].values()) for row in own]
        last = f"{mean(means):.1f}" + (f" ± {stdev(means):.1f}" if len(means) > 1 else "")
        ends = ["", ""]
        if "rewards" in own[0]:
            some = max(1, len(own[0]["rewards"]) // 10)
            ends = [
                f"{mean(mean(row['rewards'][part]) for row in own):.3f}" for part in (slice(some), slice(-some, None))
            ]
        lines.append([method, str(len(own)) if method != "start" else "", *ends, *cells, last])
    return Table(["method", "seeds", "reward, first tenth", "reward, last tenth", *SETS, "mean of the sets"], lines)


def curve(rows: list[dict], path: Path) -> None:
    """The reward over the steps: a thin line for each seed, a thick one for their mean over ten steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    methods = dict.fromkeys(row["method"] for row in rows if "rewards" in row)
    for color, method in zip(("#1f5fc8", "#f58214", "#2c962c", "#8d4ab8", "#b8b8b8"), methods, strict=False):
        own = [row["rewards"] for row in rows if row["method"] == method]
        for one in own:
            axis.plot(range(1, len(one) + 1), one, color=color, linewidth=0.6, alpha=0.35)
        steps = min(map(len, own))
        means = [mean(one[step] for one in own) for step in range(steps)]
        smooth = [mean(means[max(0, step - 9) : step + 1]) for step in range(steps)]
        axis.plot(range(1, steps + 1), smooth, color=color, linewidth=2, label=f"{method}, {len(own)} seeds")
    axis.set(xlabel="step", ylabel="mean reward of the answers", title="Mathematics by reward, SmolLM2-135M")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--methods", default="fura,lora,full")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rates", default="", help="learning rates in place of the release's: fura=3e-4,lora=3e-4")
    parser.add_argument("--batch", type=int, help="answers trained on at once, in place of the recipe's number")
    parser.add_argument("--limit", type=int, help="questions of each set")
    parser.add_argument("--small", action="store_true", help="steps of a few short answers, to see that it works")
    parser.add_argument("--minutes", type=float, default=9.0, help="of one call")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--runs", type=Path, default=Path("runs/grpo-benchmark"))
    parser.add_argument("--output", type=Path, help="a Markdown file for the table; the curve is a PNG beside it")
    arguments = parser.parse_args()
    arguments.methods = arguments.methods.split(",")
    arguments.seeds = [int(seed) for seed in arguments.seeds.split(",")]
    arguments.rates = dict(pair.split("=") for pair in arguments.rates.split(",") if pair)

    numbers = held_out(arguments.data, arguments.runs / "held-out")
    rows: list[dict] = []  # in the order in which they come
    file = arguments.runs / "rows.jsonl"
    file.unlink(missing_ok=True)

    def write(row: dict) -> None:
        rows.append(row)
        with file.open("a") as opened:
            opened.write(json.dumps(row) + "\n")

    try:
        work(arguments, Clock(arguments.minutes), write)
        end = "All is done."
    except OutOfTime:
        end = "Not all is done: call it again, and it goes on."
    if not rows:
        sys.exit(end)
    order = ["start", *arguments.methods]
    rows.sort(key=lambda row: (order.index(row["method"]), row["seed"]))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    asked = ", ".join(f"{name} {min(number, arguments.limit or number)}" for name, number in numbers.items())
    told = [
        f"{arguments.model} on {device}; torch {torch.__version__}.",
        f"Start: every weight fine-tuned on math_data.json; then {arguments.steps} steps by reward on its questions.",
        f"Asked, greedily, are the questions of the test files that are not in math_data.json: {asked}.",
        "Learning rates: the release's (9e-5; full 1e-5)"
        + "".join(f", but {method} {rate}" for method, rate in arguments.rates.items()) + ".",
        *(["Steps of a few short answers (--small): it works, and nothing is said of the methods."] * arguments.small),
    ]  # fmt: skip
    text = "\n".join([*(f"- {line}" for line in told), "", table(rows).markdown()]) + "\n"
    print(f"{text}\n{end}")
    if arguments.output:
        arguments.output.write_text(f"# Mathematics by reward\n\n{text}\n![reward]({arguments.output.stem}.png)\n")
    if any("rewards" in row for row in rows):
        curve(rows, (arguments.output or arguments.runs / "reward.md").with_suffix(".png"))


if __name__ == "__main__":
    main()
