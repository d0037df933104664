"""What `fura-vlm plan` says of a run, beside what the run measured.

    python benchmarks/plan.py RUN [RUN ...] [--gpus 1] [--output FILE.md]

A run is the folder that training leaves: its config.yaml is planned for the GPU at hand, its metrics.jsonl has the
peak memory and the tokens a second (medians after the first rows). The longest record of the data decides the peak:
--longest says how many tokens it has, where that is less than model_max_length.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig

from fura_vlm.plan.costs import GIB, GPUS, Setting, memory, step_seconds
from fura_vlm.plan.page import zero_of
from fura_vlm.plan.shapes import Counts
from fura_vlm.training.auto import as_chosen
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.report import read_metrics


def row(run: Path, args) -> str:
    """A line of the table."""
    train = as_chosen(TrainConfig(**yaml.safe_load((run / "config.yaml").read_text())), run)
    train = dataclasses.replace(train, model_max_length=args.longest or train.model_max_length)
    model = AutoConfig.from_pretrained(train.model_name_or_path)
    counts = Counts(model, train)
    batch = train.per_device_train_batch_size
    compiled = train.compile_layers
    checkpointing, budget = train.gradient_checkpointing, train.activation_memory_budget
    setting = Setting(train.method, args.gpus, *zero_of(train), checkpointing, batch, compiled, budget)
    parts = memory(train, counts, setting, args.labelled)
    planned = (sum(parts.values()) - parts["reserve"]) / GIB  # torch's own peak has no context and no slack
    logged = [row for row in read_metrics(run / "metrics.jsonl") if "tokens_per_second" in row]
    measured = max(row["peak_memory_gib"] for row in logged)
    speed = statistics.median(row["tokens_per_second"] for row in logged[len(logged) // 3 :])
    tokens = args.tokens or train.model_max_length
    seconds = step_seconds(counts, setting, batch * tokens, dataclasses.replace(GPUS[80], peak=args.peak * 1e12))
    told = args.gpus * batch * tokens / seconds
    by_part = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if name != "reserve")
    return (
        f"| {run.name} | {planned:.1f} | {measured:.1f} | {planned / measured:.3f} | {told:,.0f} | {speed:,.0f} "
        f"| {told / speed:.3f} | {by_part} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--gpus", type=int, default=1, help="that the run had")
    parser.add_argument("--longest", type=int, help="tokens of the longest record")
    parser.add_argument("--tokens", type=int, help="of a record, on average; default: the longest")
    parser.add_argument("--labelled", type=float, default=0.25, help="share of the tokens that have a loss")
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of the GPU in dense bfloat16")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = [
        "# The plan beside measured runs",
        "",
        f"{time.strftime('%Y-%m-%d')}, {hardware}, torch {torch.__version__}.",
        f"`python benchmarks/plan.py {' '.join(map(str, args.runs))} --gpus {args.gpus} --longest {args.longest} "
        f"--tokens {args.tokens} --labelled {args.labelled} --peak {args.peak}`",
        "",
        "| run | GiB planned | measured | ratio | tokens/s planned | measured | ratio | GiB by part |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
        *(row(run, args) for run in args.runs),
    ]
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
