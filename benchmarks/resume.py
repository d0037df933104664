"""Going on from a checkpoint with another number of GPUs: the losses of a run that was killed and resumed, against
those of an uninterrupted one. For a machine with two GPUs::

    python benchmarks/resume.py                  # ZeRO-1, 2 and 3, from 2 GPUs to 1 and from 1 to 2

Each run is the embedded model's on the embedded mixture with torch's fused AdamW in float32, started as
``scripts/launch.sh`` starts it. A run that goes on differently costs a traceback or another loss: exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
STEPS, SAVE, TOLERANCE = 8, 3, 1e-3  # two GPUs add up in another order than one
NOISE = (
    "Gradient accumulation steps mismatch",
    "destroy_process_group() was not called",
    "barrier(): using the device",
    "No CUDA runtime is found",
    "Traceback",
)


def start(folder: Path, name: str, gpus: int, stage: int, log) -> subprocess.Popen:
    recipe = folder / f"{name}.yaml"
    settings = {
        "data_path": str(folder / "embedded" / "train.json"),
        "output_dir": str(folder / name),
        "deepspeed": f"scripts/zero{stage}.json",
        "train_batch_size": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "mm_projector_lr": 1e-3,
        "model_max_length": 512,
        "bf16": False,
        "tf32": False,
        "dataloader_num_workers": 0,
        "report_to": [],
        "max_steps": STEPS,
        "warmup_steps": 2,
        "save_steps": SAVE,
    }
    recipe.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical", "--no_local_rank"]
    command += ["--num_gpus", str(gpus), "--master_port", str(29500 + os.getpid() % 1000 + len(list(folder.iterdir())))]
    command += ["--module", "fura_vlm.cli", "train", "--config", str(recipe)]
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def losses(run: Path) -> dict[int, float]:
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def finish(folder: Path, name: str, gpus: int, stage: int) -> dict[int, float]:
    with (folder / f"{name}.log").open("a") as log:
        status = start(folder, name, gpus, stage, log).wait(300)
    if status:
        raise SystemExit(f"{name} ended with {status}:\n{(folder / f'{name}.log').read_text()[-4000:]}")
    return losses(folder / name)


def killed(folder: Path, name: str, gpus: int, stage: int) -> None:
    """Starts a run and kills it, all of its processes, as soon as its first checkpoint is there."""
    with (folder / f"{name}.log").open("a") as log:
        process = start(folder, name, gpus, stage, log)
        while not (folder / name / f"checkpoint-{SAVE}").exists():
            if process.poll() is not None:
                raise SystemExit(f"{name} ended by itself:\n{(folder / f'{name}.log').read_text()[-4000:]}")
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(["pkill", "-KILL", "-f", str(folder / f"{name}.yaml")], check=False)  # in sessions of their own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fura-resume-"))
    embedded = ["data", "embedded", "--output_dir", str(folder / "embedded"), "--train_records", "96"]
    subprocess.run([sys.executable, "-m", "fura_vlm.cli", *embedded], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    print("| ZeRO | run | last loss | largest difference to 2 GPUs uninterrupted |", flush=True)
    print("|---:|---|---:|---:|", flush=True)
    worst = 0.0
    for stage in options.stages:
        wanted = finish(folder, f"whole-{stage}", 2, stage)
        print(f"| {stage} | 2 GPUs, uninterrupted | {wanted[STEPS]:.6f} | |", flush=True)
        for before, after in ((2, 1), (1, 2)):
            name = f"from-{before}-to-{after}-zero{stage}"
            killed(folder, name, before, stage)
            found = finish(folder, name, after, stage)
            if found.keys() != wanted.keys():
                raise SystemExit(f"{name} logged the steps {sorted(found)}")
            difference = max(abs(found[step] - wanted[step]) / wanted[step] for step in wanted)
            worst = max(worst, difference)
            print(f"| {stage} | {before} killed at step {SAVE}, resumed on {after} | {found[STEPS]:.6f} | "
                  f"{difference:.1e} |", flush=True)  # fmt: skip
    text = "".join(log.read_text() for log in folder.glob("*.log"))
    print("\nLines that would frighten, in all logs together: " + ", ".join(f"{n!r} {text.count(n)}" for n in NOISE))
    print(f"\nWithin {TOLERANCE:g}: {'yes' if worst <= TOLERANCE else 'NO'}")
    raise SystemExit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
