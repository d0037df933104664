"""The recipe's own command with the settings that it finds (auto), beside what it was before, on one GPU or several.

    python benchmarks/auto.py                     all rows below, as many as begin within 5 minutes; again for the rest
    python benchmarks/auto.py --rows auto-24      one of them
    python benchmarks/auto.py --processes 2       on two GPUs
    python benchmarks/auto.py --tiny              the embedded model, runs on a CPU

Rows: `before` is the recipe with 16 records at once and gradient checkpointing, `auto` as it is shipped, and `auto-48`
and `auto-24` with --gpu_memory 48 and 24, where PyTorch gets no more than on such a GPU. What a GPU of that size
computes in a second is another matter: these rows are planned for the GPU that is there.

LLaVA-1.5-7B's shapes with random weights, made on the GPU in the place of the model's folder; everything else is
`fura-vlm train` with scripts/configs/llava-1.5-7b.yaml. The records are drawn as for pipeline.py, and written as a
mixture in LLaVA's form. Tokens a second are the median of the steps after the warm-up, memory is the peak of what
PyTorch had in use. Finished rows are kept in --folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

import torch
from pipeline import EMBEDDED, Rows, Setting, write_picture
from shapes import family_of_336, random_llava

ROOT = Path(__file__).parents[1]
BEFORE = {"per_device_train_batch_size": 16, "gradient_checkpointing": True, "activation_memory_budget": 1.0}
ROWS = {"before": BEFORE, "auto": {}, "auto-48": {"gpu_memory": 48}, "auto-24": {"gpu_memory": 24}}
RECORDS, PICTURES = 4000, 100
LATEST = 300  # seconds after which no other row begins, so that a call ends within ten minutes
LONGEST = 540  # seconds that a row may take


def write_mixture(folder: Path) -> Path:
    """A mixture as LLaVA's, with lengths as they are drawn for pipeline.py."""
    file = folder / "mixture.json"
    if file.is_file():
        return file
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(write_picture, [(n, 336, str(folder / "pictures")) for n in range(PICTURES)], chunksize=16))
    setting = Setting(False, 8, 1, 0, 0, 0, True, False, False, 1.0, "", RECORDS, PICTURES)
    rows = Rows(family_of_336(EMBEDDED), folder / "pictures", 576, setting)
    records = []
    for row in range(len(rows)):
        answered = max(1, round(rows.answers[row] * min(rows.words[row], 0.9 * rows.max_length)))
        asked = " ".join([rows.word] * max(1, int(rows.words[row]) - answered))
        picture = {"image": rows.files[row % len(rows.files)].name} if rows.has_image[row] else {}
        turns = [
            {"from": "human", "value": f"<image>\n{asked}" if picture else asked},
            {"from": "gpt", "value": " ".join([rows.word] * answered)},
        ]
        records.append({"id": str(row), **picture, "conversations": turns})
    file.write_text(json.dumps(records))
    return file


def child(arguments: list[str], tiny: bool) -> None:
    """The command, with a model of the 7B's shapes in the place of the one that the recipe names."""
    import fura_vlm.training.auto as auto
    import fura_vlm.training.train as recipe
    from fura_vlm.cli import main

    if not tiny:
        family = family_of_336(EMBEDDED)
        recipe.load_family = auto.load_family = lambda *args, **kwargs: family
        recipe.load_base = lambda *args, **kwargs: random_llava(family.run_id)
    main(["train", *arguments])


def run(name: str, args, folder: Path) -> dict:
    """A row of the table."""
    settings = {"output_dir": folder / name, "max_steps": args.warmup + args.steps, "save_steps": 100_000}
    settings |= {"logging_steps": 1, "report_to": "[]", "method": args.method} | ROWS[name]
    if args.tiny:
        settings |= {"model_name_or_path": EMBEDDED, "data_path": ROOT / "data/embedded/train.json", "bf16": "false"}
        settings |= {"train_batch_size": 8, "compile_layers": "false", "dataloader_num_workers": 0}
        settings |= {"per_device_train_batch_size": 4} if name == "before" else {}
        settings.pop("gpu_memory", None)
    else:
        settings |= {"model_name_or_path": EMBEDDED, "data_path": write_mixture(folder), "dataloader_num_workers": 8}
        settings |= {"image_folder": folder / "pictures"}
    started = [sys.executable]
    if args.processes > 1:
        started += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    started += [__file__, *(["--tiny"] if args.tiny else []), "--child", "--config", "llava-1.5-7b"]
    started += [f"--{key}={value}".replace("=True", "=true") for key, value in settings.items()]
    shutil.rmtree(folder / name, ignore_errors=True)
    log = folder / f"{name}.log"
    with log.open("w") as file:
        done = subprocess.run(started, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=LONGEST, check=False)
    said = [line for line in log.read_text().splitlines() if line.startswith(("auto: ", "time "))]
    print("\n".join(said), flush=True)
    if done.returncode:
        raise SystemExit(f"{name} failed: see {log}")
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "tokens_per_second" in row]
    chosen = folder / name / "chosen.json"
    found = json.loads(chosen.read_text()) if chosen.is_file() else {key: settings[key] for key in BEFORE}
    return {
        "name": name,
        "found": found,
        "GiB": max(row["peak_memory_gib"] for row in rows),
        "tokens/s": statistics.median(row["tokens_per_second"] for row in rows[args.warmup :]),
        "said": said,
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| row | records at once | checkpointing | budget | GiB planned | measured | ratio | tokens/s planned "
        "| measured | ratio | of before | where the time went |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    before = next((row["tokens/s"] for row in rows if row["name"] == "before"), None)
    for row in rows:
        found, size, rate = row["found"], row["GiB"], row["tokens/s"]
        planned, told = found.get("planned_gib"), found.get("planned_tokens_per_second")
        time_went = next((line.removeprefix("time").strip() for line in row["said"] if line.startswith("time")), "")
        cells = [row["name"], found["per_device_train_batch_size"], "yes" if found["gradient_checkpointing"] else "no"]
        cells += [found["activation_memory_budget"], f"{planned:.1f}" if planned else "", f"{size:.1f}"]
        cells += [f"{planned / size:.3f}" if planned else "", f"{told:,.0f}" if told else "", f"{rate:,.0f}"]
        cells += [f"{told / rate:.3f}" if told else "", f"{rate / before:.2f}" if before else "", time_went]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    if "--child" in sys.argv:
        at = sys.argv.index("--child")
        child(sys.argv[at + 1 :], tiny="--tiny" in sys.argv[:at])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--method", default="fura")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=4, help="steps that compile and warm up")
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs" / "benchmark-auto", help="for mixture, runs and rows"
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, help="a Markdown file")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not args.tiny and not cuda:
        parser.error("the 7B shapes need a GPU; --tiny runs anywhere")
    device = torch.cuda.get_device_name() if cuda else "CPU"
    key = f"{device}, {args.processes}, {args.method}, {args.tiny}, {args.warmup} + {args.steps}"
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "rows.jsonl"
    kept = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    done = {row["name"]: row for row in kept if row["key"] == key}
    begun = time.monotonic()
    for name in args.rows:
        if name in done:
            continue
        if time.monotonic() - begun > LATEST:
            print("time is up: start the same command again for the other rows")
            break
        done[name] = run(name, args, args.folder) | {"key": key}
        with file.open("a") as rows:
            rows.write(json.dumps(done[name]) + "\n")
    text = (
        f"# Settings that are found: {'embedded model' if args.tiny else 'LLaVA-1.5-7B shapes, random weights'}\n\n"
        f"{time.strftime('%Y-%m-%d')}, {args.processes} x {device}, torch {torch.__version__}, {args.method}; "
        f"{args.steps} steps after {args.warmup}.\n"
        f"`python benchmarks/auto.py {' '.join(sys.argv[1:])}`\n\n{table([done[n] for n in ROWS if n in done])}\n"
    )
    print("\n" + text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
