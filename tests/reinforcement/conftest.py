"""Runs of ``fura-vlm grpo`` in processes of their own, on a small model."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from small_model import make_small_model

pytest.importorskip("trl", reason="the extra rl is not installed")

ROOT = Path(__file__).parents[2]


@dataclass
class Job:
    """A finished run: exit status, all it printed, its folder."""

    status: int
    output: str
    run: Path

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def copies():
    """A process that makes copies of itself (``tests/training/prefork.py``)."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "CUDA_HOME": "", "CUDA_PATH": "", "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(
        [sys.executable, ROOT / "tests/training/prefork.py", "fura_vlm.reinforcement.train"],
        cwd=ROOT,
        env=env | {"PYTHONWARNINGS": "ignore::FutureWarning"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.stdin.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    return make_small_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> Path:
    """Questions whose answer is one digit, as LLM-Adapters has them, and one whose answer is no number."""
    records = [
        {"instruction": f"What is {a} and {b} ?", "input": "", "output": "", "answer": str(float(a + b))}
        for a in range(5)
        for b in range(5)
    ]
    records.insert(3, {"instruction": "What is ?", "input": "", "output": "", "answer": ""})
    path = tmp_path_factory.mktemp("sums") / "sums.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="session")
def grpo(copies, tmp_path_factory, small_model, sums) -> Callable[..., Job]:
    """Runs the command with a small recipe; ``name`` is that of the run folder."""
    folder = tmp_path_factory.mktemp("grpo")
    recipe = {
        "model_name_or_path": str(small_model),
        "data_path": str(sums),
        "instruction": "",
        "prompts_per_step": 4,
        "num_generations": 8,
        "per_device_train_batch_size": 16,
        "max_steps": 3,
        "max_completion_length": 2,
        "learning_rate": 1e-2,
        "bf16": False,
        "report_to": [],
    }

    def run(name: str, processes: int = 1, **settings) -> Job:
        output, file = folder / f"{name}.log", folder / f"{name}.yaml"
        output.unlink(missing_ok=True)
        file.write_text(yaml.safe_dump(recipe | {"output_dir": str(folder / name)} | settings))
        common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        order = {
            "arguments": ["grpo", "--config", str(file)],
            "environments": [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)],
            "output": str(output),
        }
        copies.stdin.write(json.dumps(order) + "\n")
        copies.stdin.flush()
        statuses = json.loads(copies.stdout.readline())
        assert None not in statuses, output.read_text()
        return Job(next(filter(None, statuses), 0), output.read_text(), folder / name)

    return run
