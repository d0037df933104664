"""Two real processes of which one fails: both end, and say why."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes_worker import PLACES

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ended(tmp_path_factory, mixture):
    """By place: the exit status of both processes, and what both printed."""
    folder = tmp_path_factory.mktemp("processes")
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in PLACES]
    ports = ",".join(str(taken.getsockname()[1]) for taken in sockets)
    for taken in sockets:
        taken.close()
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    workers = [
        subprocess.Popen([sys.executable, HERE / "processes_worker.py", str(rank), ports, folder, mixture], env=env)
        for rank in range(2)
    ]
    assert [worker.wait() for worker in workers] == [0, 0]
    statuses = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    output = {place: "".join((folder / f"{place}-{rank}.log").read_text() for rank in range(2)) for place in PLACES}
    return {place: ([status[place] for status in statuses], output[place]) for place in PLACES}


@pytest.mark.parametrize("place", ["settings", "processor", "data", "model", "prepare", "trainer", "saving"])
def test_a_refusal_of_one_process_ends_both(place, ended):
    statuses, output = ended[place]
    [rank] = PLACES[place][0]
    assert statuses == [1, 1], output
    said = f"fura-vlm train: process {rank} of 2, on {socket.gethostname()}: There is no model here: copy one"
    assert output.splitlines().count(said) == output.count("There is no model here") == 1, output
    assert "Traceback" not in output


def test_a_refusal_of_both_is_said_once(ended):
    statuses, output = ended["processor of both"]
    assert statuses == [1, 1], output
    assert output.splitlines().count("fura-vlm train: There is no model here: copy one") == 1, output
    assert output.count("There is no model here") == 1


def test_a_mistake_of_ours_in_one_process_ends_both_with_its_traceback(ended):
    statuses, output = ended["training"]
    assert statuses == [1, 1], output
    assert f"fura-vlm train: process 1 of 2, on {socket.gethostname()}: it failed\nTraceback" in output
    assert output.count("Traceback") == 1 and output.count("ZeroDivisionError: a mistake of ours") == 1


def test_a_process_that_is_killed_ends_the_other(ended):
    statuses, output = ended["killed"]
    assert statuses == [1, -9], output
    assert "lost the connection to another process, which was killed" in output
    assert "Traceback" not in output


def test_the_command_trains_by_itself_and_says_nothing_that_frightens(mixture, tmp_path):
    """Without a launcher, and with a compiler for GPUs where there is none. Of two turns a step."""
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    env = {name: value for name, value in os.environ.items() if name not in launcher + ("CUDA_HOME", "CUDA_PATH")}
    settings = {"output_dir": tmp_path / "run", "data_path": mixture / "train.json", "model_max_length": 512}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "save_steps": 1}
    settings |= {"bf16": "false", "dataloader_num_workers": 0, "report_to": "[]"}
    done = subprocess.run(
        [sys.executable, "-m", "fura_vlm.cli", "train", *(f"--{name}={value}" for name, value in settings.items())],
        env=env | {"CUDA_VISIBLE_DEVICES": "", "PATH": f"{tmp_path}:{env['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "run" / "report.md").is_file() and (tmp_path / "run" / "checkpoint-2").is_dir()
    for noise in ("mpi4py", "steps mismatch", "No CUDA runtime", "barrier()", "destroy_process_group", "Traceback"):
        assert noise not in done.stdout, done.stdout


def test_without_a_compiler_a_run_ends_in_one_sentence(mixture, tmp_path):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "CXX": "/nowhere/g++", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    settings = {"output_dir": tmp_path / "run", "data_path": mixture / "train.json", "bf16": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "fura_vlm.cli", "train", *(f"--{name}={value}" for name, value in settings.items())],
        env={name: value for name, value in env.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("fura-vlm train: DeepSpeed cannot compile "), done.stdout
    assert "/nowhere/g++: not found" in last and "apt install g++" in last and "Traceback" not in done.stdout
