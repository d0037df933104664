"""Real runs: the script, the launcher, DeepSpeed, the embedded model, a mixture of a few dozen records."""

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from fura_vlm.embedded.embedded import EmbeddedConfig, write_embedded

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def mixture(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "embedded"
    write_embedded(EmbeddedConfig(output_dir=str(folder), train_records=48, eval_per_family=2, text_share=0.2))
    return folder


@dataclass
class Job:
    """A finished run: exit status, all it printed, its folder."""

    status: int
    output: str
    run: Path

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in self.metrics() if "loss" in row}


class Launcher:
    """Starts ``scripts/finetune_fura.sh`` with a small recipe of its own."""

    def __init__(self, folder: Path, mixture: Path):
        self.folder = folder
        self.recipe = {
            "model_name_or_path": "data/tiny-llava",
            "data_path": str(mixture / "train.json"),
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "mm_projector_lr": 1e-3,
            "model_max_length": 512,
            "bf16": False,
            "dataloader_num_workers": 0,
            "report_to": [],
            "max_steps": 6,
            "warmup_steps": 2,
        }

    def start(self, name: str, processes: int = 1, env: dict | None = None, **settings) -> subprocess.Popen:
        recipe = self.folder / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(self.recipe | {"output_dir": str(self.folder / name)} | settings))
        return subprocess.Popen(
            ["bash", "scripts/finetune_fura.sh", str(recipe)],
            cwd=ROOT,
            env=os.environ | {"NUM_PROCESSES": str(processes)} | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A shell that runs the tests in the background has them ignore Ctrl-C, and all that they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def finish(self, process: subprocess.Popen, name: str) -> Job:
        output, _ = process.communicate(timeout=600)
        return Job(process.returncode, output, self.folder / name)

    def __call__(self, name: str, processes: int = 1, env: dict | None = None, **settings) -> Job:
        return self.finish(self.start(name, processes, env, **settings), name)


@pytest.fixture
def launch(tmp_path, mixture) -> Launcher:
    return Launcher(tmp_path, mixture)


@pytest.fixture(scope="module")
def shared_launch(tmp_path_factory, mixture) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("runs"), mixture)
