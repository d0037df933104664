"""Real runs: the script, the launcher, DeepSpeed, the embedded model, a mixture of a few dozen records."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from fura_vlm.embedded.embedded import EmbeddedConfig, write_embedded

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def mixture(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "embedded"
    write_embedded(
        EmbeddedConfig(output_dir=str(folder), train_records=48, eval_per_family=2, text_share=0.2, talk_share=0)
    )
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

    def write(self, name: str, settings: dict) -> Path:
        recipe = self.folder / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(self.recipe | {"output_dir": str(self.folder / name)} | settings))
        return recipe

    def start(self, name: str, processes: int = 1, env: dict | None = None, **settings) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "scripts/finetune_fura.sh", str(self.write(name, settings))],
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Trainer(Launcher):
    """The same without script and launcher: the command, on a CPU, in processes that have imported it already."""

    def __init__(self, folder: Path, mixture: Path, copies: subprocess.Popen):
        super().__init__(folder, mixture)
        self.copies = copies

    def __call__(
        self, name: str, processes: int = 1, env: dict | None = None, until: str | None = None, **settings
    ) -> Job:
        """``until``: a path within the run; once it is there, the processes are killed."""
        output = self.folder / f"{name}.log"
        output.unlink(missing_ok=True)
        common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": str(-(-os.cpu_count() // processes))}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        order = {
            "arguments": ["train", "--config", str(self.write(name, settings))],
            "environments": [common | rank | (env or {}) for rank in ranks],
            "output": str(output),
            "until": until and str(self.folder / name / until),
        }
        self.copies.stdin.write(json.dumps(order) + "\n")
        self.copies.stdin.flush()
        statuses = json.loads(self.copies.stdout.readline())
        assert None not in statuses, output.read_text()
        return Job(next(filter(None, statuses), 0), output.read_text(), self.folder / name)


@pytest.fixture(scope="session")
def copies():
    """A process that makes copies of itself (``prefork.py``)."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "CUDA_HOME": "", "CUDA_PATH": "", "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(
        [sys.executable, Path(__file__).with_name("prefork.py")],
        cwd=ROOT,
        env=env | {"PYTHONWARNINGS": "ignore::FutureWarning"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def launch(tmp_path, mixture) -> Launcher:
    return Launcher(tmp_path, mixture)


@pytest.fixture
def train(tmp_path, mixture, copies) -> Trainer:
    return Trainer(tmp_path, mixture, copies)


@pytest.fixture(scope="session")
def shared_launch(tmp_path_factory, mixture) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("runs"), mixture)


@pytest.fixture(scope="session")
def uninterrupted(shared_launch, mixture) -> Job:
    """What other ways to the same end are compared with."""
    job = shared_launch("uninterrupted", eval_data_path=str(mixture / "eval.json"), report_to=["tensorboard"])
    assert job.status == 0, job.output
    return job
