"""FP8 in FuRA's backward pass (fp8_backward) beside none: the speed of the pipeline, and the loss of a real model.

    python benchmarks/fp8.py speed                       LLaVA-1.5-7B shapes, random weights, one GPU
    python benchmarks/fp8.py loss --records FOLDER       SmolLM2-135M on LLM-Adapters' records: 300 steps, three seeds
    python benchmarks/fp8.py tables                      Markdown of the rows that are there
    python benchmarks/fp8.py speed --tiny                the embedded model, runs on a CPU
    python benchmarks/fp8.py loss --records FOLDER --limit 40 --steps 3 --batch 4                as a try on a CPU

speed: the trainer of pipeline.py, loader, DeepSpeed and all, in one process in which FP8 is switched on and off from
step to step (off, on, on, off, ...). A step's time is from before its batches are fetched until its optimizer is done.
Copying the weights is not in it, since a run does that once. Both forms are compiled in the steps that warm up. With
8 records at once a GPU of 80 GB has no room for the copies: take --batch 4 there, and compare the fastest settings of
both with pipeline.py, too (docs/speed.md).

loss: the base in bfloat16 as in a recipe, what is trained in float32, the loop and the learning rates of the study
(evidence). A seed is an order of the records. Some records are held out, on which the loss is taken at the end; that of
the last 20 steps stands beside it.

It is worth keeping if the pipeline trains at least 1.10 times as many tokens a second, and the mean held-out loss with
FP8 differs from that without by no more than the seeds without differ among themselves (largest less smallest).

Rows are added to --rows one by one. loss begins no run after --minutes; the same command goes on with those that are
missing. speed takes a few minutes and measures anew each time; a call that was cut off leaves the rows that it has.
SmolLM2 is made by ``fura-vlm data smollm2``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

import numpy as np
import torch
from evidence.configuration import Study, Training, Variant
from evidence.data import Data, Rows, encode
from evidence.methods import build
from evidence.runs import append_row
from evidence.training import batches, train
from pipeline import Setting, Timed, compiled_graphs, make_trainer, synchronize, write_picture
from transformers import TrainerCallback

from fura_vlm.evaluation.commonsense import ANSWER, read_set
from fura_vlm.fura import set_fp8_backward
from fura_vlm.modelling.load import load_base, load_family

SETS = ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")  # that the study of evidence/text.yaml trains on
SEEDS = (1, 2, 3)
HELD_OUT = 512
LAST = 20
GAIN = 1.10


def read_rows(file: Path, what: str) -> list[dict]:
    """Those of ``speed`` or ``loss``; a last line that was cut off is left out."""
    lines = file.read_text("utf-8").split("\n")[:-1] if file.is_file() else []
    return [row for row in map(json.loads, lines) if row["what"] == what]


def where() -> dict:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d %H:%M")}


# ----------------------------------------------------------------------------------------------------------- speed


class Alternating(Timed):
    """Switches FP8 before each step, and writes a row after it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(WritesRows(self))

    def get_batch_samples(self, *args, **kwargs):
        self.fp8 = self.state.global_step % 4 in (1, 2)
        set_fp8_backward(self.model, self.fp8)
        self.model.train()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.before = compiled_graphs()
        synchronize()
        self.begun = time.perf_counter()
        step = super().get_batch_samples(*args, **kwargs)
        self.tokens = sum(int(batch["attention_mask"].sum()) for batch in step[0])
        return step


class WritesRows(TrainerCallback):
    def __init__(self, trainer: Alternating):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        trainer = self.trainer
        seconds = time.perf_counter() - trainer.begun
        row = {
            "fp8": trainer.fp8,
            "step": state.global_step,
            "warm": state.global_step > trainer.warmup,
            "seconds": seconds,
            "tokens": trainer.tokens,
            "new_graphs": compiled_graphs() - trainer.before,
            "peak": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        }
        append_row(trainer.rows, trainer.about | row)


def speed(options: argparse.Namespace) -> None:
    setting = Setting(
        tiny=options.tiny, batch=options.batch, accumulation=options.accumulation, warmup=options.warmup,
        steps=options.steps, workers=options.workers, compile=options.compile, static=False, checkpointing=False,
        budget=1.0, deepspeed="scripts/zero1.json", rows=4000, files=100,
    )  # fmt: skip
    torch._dynamo.config.recompile_limit = 64  # there are two forms of each graph
    with tempfile.TemporaryDirectory() as folder:
        for number in range(setting.files):
            write_picture((number, 112 if setting.tiny else 336, folder))
        trainer = make_trainer("fura-fp8", setting, Path(folder), Alternating)
        shapes = "the embedded model" if setting.tiny else "LLaVA-1.5-7B shapes"
        form = f"{shapes}, {setting.batch} records x {setting.accumulation}"
        form += ", layers compiled" if setting.compile else ""
        trainer.rows, trainer.about = options.rows, {"what": "speed", "form": form, **where()}
        trainer.train()


def speed_table(rows: list[dict]) -> list[str]:
    """By call: tokens a second without and with FP8."""
    lines = [
        "| GPU, form | steps | tokens/s | with FP8 | ratio | peak, GiB | with FP8 | compiled again |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for call in dict.fromkeys((row["date"], row["device"], row["form"]) for row in rows):
        mine = [row for row in rows if (row["date"], row["device"], row["form"]) == call and row["warm"]]
        forms = [[row for row in mine if row["fp8"] is fp8] for fp8 in (False, True)]
        if not all(forms):
            continue
        rates = [sum(row["tokens"] for row in form) / sum(row["seconds"] for row in form) for form in forms]
        peaks = [max(row["peak"] or 0 for row in form) for form in forms]
        steps = " + ".join(str(len(form)) for form in forms)
        lines.append(
            f"| {call[1]}, {call[2]} ({call[0]}) | {steps} | {rates[0]:,.0f} | {rates[1]:,.0f} "
            f"| {rates[1] / rates[0]:.3f} (wanted {GAIN:.2f}) | {peaks[0]:.1f} | {peaks[1]:.1f} "
            f"| {sum(row['new_graphs'] for row in mine)} |"
        )
    return lines


# ------------------------------------------------------------------------------------------------------------ loss


def read_records(family, folder: str, limit: int | None) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out, the same ones each time."""
    items = [item for name in SETS for item in read_set(folder, name, "train")[:limit]]
    found = encode(family, [(item.text, ANSWER.format(item.answer), -1) for item in items], 512)
    order = np.random.default_rng(0).permutation(len(items)).tolist()
    held = min(HELD_OUT, len(items) // 4)
    return tuple(
        Rows(*([part[place] for place in places] for part in (found.ids, found.labels, found.pictures)))
        for places in (order[held:], order[:held])
    )


@torch.no_grad()
def held_out_loss(model, data: Data, family, study: Study) -> float:
    """The mean over all labels of the records that ``data`` has to train on."""
    device = next(model.parameters()).device
    total = number = 0
    for batch in batches(data, family, replace(study, training=replace(study.training, epochs=1, steps=None)), 0):
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch["supervised"].shape[1]
        total += model(**batch).loss.item() * labels
        number += labels
    return total / number


def loss(options: argparse.Namespace) -> None:
    started, device = time.monotonic(), "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    family = load_family(options.model, conversation="alpaca")
    base = load_base(options.model, torch.bfloat16).to(device)
    rows, held = read_records(family, options.records, options.limit)
    epochs = math.ceil(options.steps * options.batch / len(rows))
    settings = Training(options.batch, epochs, options.steps, precision="float32")  # no autocast
    variant = Variant("fura", "fura", (options.rate,))
    study = Study("fp8", "text", options.model, "", (variant,), {}, "", training=settings)
    to_train, to_test = (Data(part, {}, {}, torch.zeros(0)) for part in (rows, held))
    about = {"what": "loss", "steps": options.steps, "batch": options.batch, "rate": options.rate,
             "records": len(rows), "device": where()["device"]}  # fmt: skip
    for seed in SEEDS:
        for fp8 in (False, True):
            this = about | {"seed": seed, "fp8": fp8}
            if any(this.items() <= row.items() for row in read_rows(options.rows, "loss")):
                continue
            if time.monotonic() - started > 60 * options.minutes:
                print("The time is over: the same command makes the other runs.")
                return
            begun = time.monotonic()
            torch.manual_seed(seed)
            model = build(base, study, variant, family)
            taking = set_fp8_backward(model, fp8)
            found = train(model, to_train, family, study, variant, options.rate, seed)
            row = this | where() | {
                "loss": mean(found.losses[-LAST:]), "held_out": held_out_loss(model, to_test, family, study),
                "losses": found.losses, "layers": taking, "seconds": round(time.monotonic() - begun, 1),
            }  # fmt: skip
            append_row(options.rows, row)
            print(f"seed {seed}, {'FP8' if fp8 else 'exact'}: held out {row['held_out']:.4f}, last {row['loss']:.4f}, "
                  f"{row['seconds']} s", flush=True)  # fmt: skip


def loss_table(rows: list[dict]) -> list[str]:
    """By setting: both losses of each seed, and whether their means lie within the seeds' spread."""
    names = ("device", "steps", "batch", "rate", "records")
    lines = []
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        mine = [row for row in rows if tuple(row[name] for name in names) == key]
        by = {fp8: {row["seed"]: row for row in mine if row["fp8"] is fp8} for fp8 in (False, True)}
        seeds = sorted(by[False].keys() & by[True].keys())
        lines += ["", ", ".join(f"{name} {value}" for name, value in zip(names, key, strict=True)), ""]
        lines += ["| seed | held out | with FP8 | last steps | with FP8 |", "|---:|---:|---:|---:|---:|"]
        for seed in seeds:
            figures = [by[fp8][seed][what] for what in ("held_out", "loss") for fp8 in (False, True)]
            lines.append(f"| {seed} | " + " | ".join(f"{figure:.4f}" for figure in figures) + " |")
        if len(seeds) < len(SEEDS):
            continue
        exact, ours = ([by[fp8][seed]["held_out"] for seed in seeds] for fp8 in (False, True))
        spread, difference = max(exact) - min(exact), mean(ours) - mean(exact)
        within = "within" if abs(difference) <= spread else "beyond"
        lines += ["", f"With FP8 the mean is {difference:+.4f}, {within} the seeds' spread of {spread:.4f}."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fast = commands.add_parser("speed")
    fast.add_argument("--batch", type=int, default=8, help="records at once")
    fast.add_argument("--accumulation", type=int, default=8, help="batches in a step")
    fast.add_argument("--warmup", type=int, default=8, help="steps before those that count, half of each form")
    fast.add_argument("--steps", type=int, default=16, help="steps that count")
    fast.add_argument("--workers", type=int, default=8)
    fast.add_argument("--no-compile", dest="compile", action="store_false")
    fast.add_argument("--tiny", action="store_true")
    real = commands.add_parser("loss")
    real.add_argument("--records", required=True, help="the folder of LLM-Adapters' records")
    real.add_argument("--model", default="models/smollm2-135m-instruct")
    real.add_argument("--steps", type=int, default=300)
    real.add_argument("--batch", type=int, default=64)
    real.add_argument("--rate", type=float, default=5e-4)
    real.add_argument("--limit", type=int, help="the most records of each set")
    real.add_argument("--minutes", type=float, default=7, help="no run begins after so many")
    tables = commands.add_parser("tables")
    for command in (fast, real, tables):
        command.add_argument("--rows", type=Path, default=Path("runs/fp8/rows.jsonl"))
    options = parser.parse_args()
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    if options.command == "speed":
        if not options.tiny and not torch.cuda.is_available():
            parser.error("the 7B shapes need a GPU; --tiny runs anywhere")
        speed(options)
    elif options.command == "loss":
        loss(options)
    print("\n".join([*speed_table(read_rows(options.rows, "speed")), *loss_table(read_rows(options.rows, "loss"))]))


if __name__ == "__main__":
    main()
