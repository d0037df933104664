"""The 7B recipe's own command on 1, 2, 4, ... GPUs of one host: tokens per second, memory, start; a killed process.

    python benchmarks/scaling.py --folder /tmp/scaling                      all GPUs, all settings; then the table
    python benchmarks/scaling.py --folder /tmp/scaling --minutes 9          stops before so long, and goes on next time
    python benchmarks/scaling.py --folder /tmp/scaling --tiny               the embedded model, on a CPU

LLaVA-1.5-7B's shapes with random weights, scenes of the embedded mixture at 336 pixels, and texts as long as those of
the 665k mixture (benchmarks/pipeline.py). Each run trains as scripts/finetune_fura.sh does, and leaves its folder. A
row of rows.jsonl is written when a run ends; a run that has one is not made again.

Then one process is killed (SIGKILL) in the middle of a run on all GPUs, and the run goes on, once on half of them and
once on all: its losses beside those of the uninterrupted one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
import yaml
from pipeline import mixture, write_picture
from shapes import family_of_336, random_llava
from transformers import AutoConfig

from fura_vlm.plan.costs import GIB, GPUS, Setting, memory, step_seconds
from fura_vlm.plan.page import zero_of
from fura_vlm.plan.shapes import Counts
from fura_vlm.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "data/tiny-llava"
RECIPE = ROOT / "scripts/configs/llava-1.5-7b.yaml"
PICTURES = 200
PLAIN = {"gradient_checkpointing": False, "per_device_train_batch_size": 8}
SETTINGS = {
    "as shipped": {},
    "ZeRO-1, 8 records": {"deepspeed": "zero1", **PLAIN},
    "ZeRO-2, 8 records": {"deepspeed": "zero2", **PLAIN},
    "ZeRO-3, 8 records": {"deepspeed": "zero3", **PLAIN},
}
LABELLED = 0.25  # share of the tokens that have a loss
TOLERANCE = 2e-2  # of a loss: bfloat16, and sums in another order


def main() -> None:
    options = parse()
    folder, started = options.folder.absolute(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder, options.tiny)
    make_data(folder, options)
    counts = [n for n in options.gpus if n <= options.available]
    for name in options.settings:
        for gpus in counts:
            once(folder, f"{name}, {gpus}", options, started, lambda n=name, g=gpus: measure(folder, n, g, options))
    if max(counts) > 1:
        for gpus in (max(counts) // 2, max(counts)):
            once(folder, f"resumed, {gpus}", options, started, lambda g=gpus: recover(folder, g, counts, options))
    text = report(folder, options)
    print(text)
    (folder / "scaling.md").write_text(text)
    draw(folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the model (13 GB), the data and the runs")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=8, help="of a run; the first half is not timed")
    parser.add_argument("--records", type=int, default=128, help="of a step, on all GPUs together")
    parser.add_argument("--limit", type=float, default=240, help="seconds after which a run is ended")
    parser.add_argument("--minutes", type=float, default=1e9, help="no run begins later than a limit before this")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.available = 2 if options.tiny else torch.cuda.device_count()
    if not options.available:
        parser.error("there is no GPU; --tiny runs anywhere")
    return options


def once(folder: Path, key: str, options, started: float, run) -> None:
    """Appends the row of ``run`` under ``key``, if it is not there and there is time."""
    if key in rows(folder):
        return
    if time.monotonic() - started + options.limit > 60 * options.minutes:
        print(f"{key}: no time is left for it; the same command goes on", flush=True)
        return
    row = {"key": key} | run()
    with (folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def rows(folder: Path) -> dict[str, dict]:
    file = folder / "rows.jsonl"
    return {row["key"]: row for row in map(json.loads, file.read_text().splitlines())} if file.is_file() else {}


# ------------------------------------------------------------------------------------------------ model and data


def make_model(folder: Path, tiny: bool) -> None:
    if (folder / "model").is_dir():
        return
    if tiny:
        shutil.copytree(EMBEDDED, folder / "model")
        return
    family, building = family_of_336(str(EMBEDDED)), folder / "model.making"
    random_llava(family.run_id).save_pretrained(building)
    family.processor.save_pretrained(building)
    torch.cuda.empty_cache()  # the runs are other processes
    building.rename(folder / "model")


def make_data(folder: Path, options) -> None:
    """Records of the lengths of the 665k mixture, with words that are one token each."""
    if (folder / "train.json").is_file():
        return
    (folder / "images").mkdir(exist_ok=True)
    for number in range(PICTURES):
        write_picture((number, 112 if options.tiny else 336, str(folder / "images")))
    files = sorted(path.name for path in (folder / "images").iterdir())
    shape = (64, 400, 0.1) if options.tiny else (576, 2048, 1.0)
    lengths, has_image, answered = mixture(options.steps * options.records, *shape)
    records = []
    for number, (length, seen, share) in enumerate(zip(lengths, has_image, answered, strict=True)):
        words = max(2, int(length) - seen * shape[0] - 45)  # besides the system prompt and the roles
        answer = max(1, round(share * words))
        question = " ".join(["red"] * max(1, words - answer))
        records.append({
            "id": str(number),
            **({"image": files[number % len(files)]} if seen else {}),
            "conversations": [
                {"from": "human", "value": ("<image>\n" if seen else "") + question},
                {"from": "gpt", "value": " ".join(["red"] * answer)},
            ],
        })  # fmt: skip
    (folder / "train.json").write_text(json.dumps(records))


# --------------------------------------------------------------------------------------------------------- runs


def start(folder: Path, name: str, setting: str, gpus: int, options, log) -> subprocess.Popen:
    """Trains in ``folder/runs/name``, in a process group of its own."""
    settings = yaml.safe_load(RECIPE.read_text()) | {
        "model_name_or_path": str(folder / "model"),
        "data_path": str(folder / "train.json"),
        "image_folder": str(folder / "images"),
        "output_dir": str(folder / "runs" / name),
        "train_batch_size": options.records,
        "max_steps": options.steps,
        "save_steps": options.steps // 2,
        "logging_steps": 1,
        "report_to": [],
        **SETTINGS[setting],
    }
    if options.tiny:
        settings |= {"bf16": False, "tf32": False, "compile_layers": False, "model_max_length": 400}
        settings |= {"per_device_train_batch_size": 2}
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical", "--no_local_rank"]
    with socket.socket() as free:
        free.bind(("", 0))
        command += ["--num_gpus", str(gpus), "--master_port", str(free.getsockname()[1])]
    command += ["--module", "fura_vlm.cli", "train", "--config", str(recipe)]
    environment = dict(os.environ) | ({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} if options.tiny else {})
    return subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
    )


def metrics(folder: Path, name: str) -> list[dict]:
    file = folder / "runs" / name / "metrics.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [row for row in found if "loss" in row]


def train(folder: Path, name: str, setting: str, gpus: int, options, kill_at: int | None = None) -> dict:
    """A run, to its end or until one of its processes is killed after the step ``kill_at``.

    Returns: ``status`` of the launcher, and ``first``, seconds until the first step was done.
    """
    began, first = time.monotonic(), None
    with (folder / f"{name}.log").open("a") as log:
        launcher = start(folder, name, setting, gpus, options, log)
        before = len(metrics(folder, name))
        while launcher.poll() is None:
            done = metrics(folder, name)
            if first is None and len(done) > before:
                first = time.monotonic() - began
            if kill_at is not None and done and done[-1]["step"] >= kill_at:
                trains = [
                    child for child in psutil.Process(launcher.pid).children(recursive=True) if is_training(child)
                ]
                trains[-1].kill()
                kill_at = None
            if time.monotonic() - began > options.limit:
                os.killpg(launcher.pid, signal.SIGKILL)
                return {"status": "out of time", "first": first}
            time.sleep(0.05)
    return {"status": launcher.returncode, "first": first}


def is_training(process: psutil.Process) -> bool:
    """And no copy of such a process, which loads data."""
    pairs = [list(zip(p.cmdline(), p.cmdline()[1:], strict=False)) for p in (process, process.parent())]
    return ("-m", "fura_vlm.cli") in pairs[0] and ("-m", "fura_vlm.cli") not in pairs[1]


def measure(folder: Path, setting: str, gpus: int, options) -> dict:
    name = f"{setting.replace(',', '').replace(' ', '-')}-{gpus}"
    shutil.rmtree(folder / "runs" / name, ignore_errors=True)  # of a call that was ended
    ended = train(folder, name, setting, gpus, options)
    logged = metrics(folder, name)
    if ended["status"] != 0 or not logged:
        return {"setting": setting, "gpus": gpus, **ended, "log": (folder / f"{name}.log").read_text()[-600:]}
    timed = logged[len(logged) // 2 :]
    return {
        "setting": setting,
        "gpus": gpus,
        **ended,
        "tokens/s": statistics.median(row["tokens_per_second"] for row in timed),
        "peak": max(row["peak_memory_gib"] for row in logged),
        "losses": [row["loss"] for row in logged],
        **predicted(folder, name, gpus, options),
    }


def predicted(folder: Path, name: str, gpus: int, options) -> dict:
    """What the plan says of the same run: GiB on a GPU and tokens per second."""
    config = TrainConfig(**yaml.safe_load((folder / "runs" / name / "config.yaml").read_text()))
    counts = Counts(AutoConfig.from_pretrained(folder / "model"), config)
    batch = config.per_device_train_batch_size
    setting = Setting(
        config.method, gpus, *zero_of(config), config.gradient_checkpointing, batch, config.compile_layers
    )
    parts = memory(config, counts, setting, LABELLED)
    lengths, *_ = mixture(options.steps * options.records, *((64, 400, 0.1) if options.tiny else (576, 2048, 1.0)))
    tokens = int(lengths.mean())
    seconds = step_seconds(counts, setting, batch * tokens, dataclasses.replace(GPUS[80], peak=989e12))
    return {
        "planned peak": (sum(parts.values()) - parts["reserve"]) / GIB,
        "planned tokens/s": gpus * batch * tokens / seconds,
    }


def recover(folder: Path, gpus: int, counts: list[int], options) -> dict:
    """Kills one process of a run on all GPUs after its checkpoint, and goes on with ``gpus``."""
    most, setting, name = max(counts), "ZeRO-1, 8 records", f"resumed-{gpus}"
    shutil.rmtree(folder / "runs" / name, ignore_errors=True)
    killed = train(folder, name, setting, most, options, kill_at=options.steps // 2 + 1)
    ended = train(folder, name, setting, gpus, options)
    whole = {row["step"]: row["loss"] for row in metrics(folder, f"ZeRO-1-8-records-{most}")}
    found = {row["step"]: row["loss"] for row in metrics(folder, name)}
    difference = max((abs(found[s] - whole[s]) / whole[s] for s in found.keys() & whole.keys()), default=None)
    if killed["status"] == 0:
        raise SystemExit(f"{name} had ended before it was killed: give more --steps")
    complete = bool(found) and found.keys() == whole.keys()
    return {"gpus": gpus, "killed": killed["status"], **ended, "complete": complete, "difference": difference}


# ------------------------------------------------------------------------------------------------------- report


def report(folder: Path, options) -> str:
    hardware = f"{options.available} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "CPU"
    done = rows(folder)
    lines = [
        "# Scaling: the 7B recipe on one host\n",
        f"{time.strftime('%Y-%m-%d')}, {hardware}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{options.steps} steps of {options.records} records, the first half not timed.",
        f"`python {' '.join(sys.argv)}`\n",
        "| setting | GPUs | tokens/s | of linear | planned | GiB a GPU | planned | first step after, s | last loss |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in done.values():
        if "setting" not in row:
            continue
        if "tokens/s" not in row:
            lines.append(f"| {row['setting']} | {row['gpus']} | ended with {row['status']} | | | | | | |")
            continue
        single = done.get(f"{row['setting']}, 1", {}).get("tokens/s")
        share = f"{row['tokens/s'] / single / row['gpus']:.1%}" if single else ""
        lines.append(
            f"| {row['setting']} | {row['gpus']} | {row['tokens/s']:,.0f} | {share} | {row['planned tokens/s']:,.0f} | "
            f"{row['peak']:.1f} | {row['planned peak']:.1f} | {row['first']:.0f} | {row['losses'][-1]:.4f} |"
        )
    lines += [
        "\n| one process killed, then on | ended with | all steps | largest difference of a loss |",
        "|---|---|---|---:|",
    ]
    for row in done.values():
        if "difference" in row:
            apart = "" if row["difference"] is None else f"{row['difference']:.1e}"
            lines.append(f"| {row['gpus']} GPUs | {row['status']} | {'yes' if row['complete'] else 'no'} | {apart} |")
    worst = max((row["difference"] for row in done.values() if row.get("difference") is not None), default=None)
    if worst is not None:
        lines.append(f"\nWithin {TOLERANCE:g}: {'yes' if worst <= TOLERANCE else 'NO'}")
    return "\n".join(lines) + "\n"


def draw(folder: Path) -> None:
    """Tokens per second over GPUs, a line for each setting, with what would be linear."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [row for row in rows(folder).values() if "tokens/s" in row]
    if not done:
        return
    figure, axes = plt.subplots(figsize=(6, 4))
    for setting in dict.fromkeys(row["setting"] for row in done):
        line = sorted((row["gpus"], row["tokens/s"]) for row in done if row["setting"] == setting)
        axes.plot(*zip(*line, strict=True), marker="o", label=setting)
        axes.plot([1, line[-1][0]], [line[0][1] / line[0][0], line[0][1] / line[0][0] * line[-1][0]], ":", color="grey")
    axes.set_xlabel("GPUs (dotted: linear)")
    axes.set_ylabel("tokens/s")
    axes.legend()
    figure.savefig(folder / "scaling.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
