"""Several machines, and going on with another number of processes than a checkpoint was written by."""

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, free_port
from safetensors.torch import load_file
from test_runs import wait_for


def assert_same(job, uninterrupted):
    assert job.status == 0, job.output
    assert job.losses() == pytest.approx(uninterrupted.losses(), rel=1e-5)
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (job.run, uninterrupted.run))
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] - other[name]).abs().max() < 2e-5, name


# A cluster of two nodes that are both this machine: what the script asks of SLURM, done in the way SLURM does it.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
status=0
for ((node = 1; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" &
done
SLURM_NODEID=0 "$@" || status=$?
wait
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
    show) printf '127.0.0.1\\n127.0.0.1\\n' ;;
    *) echo "$@" >> "$SLURM_SUBMIT_DIR_LOG" ;;
esac
"""


def test_slurm_job_on_two_nodes_stops_in_time_and_one_process_goes_on(uninterrupted, launch, train, tmp_path):
    """ZeRO-3 on two nodes until the signal that SLURM sends before a job's time is up; then on one."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    settings = {"train_batch_size": 4, "per_device_train_batch_size": 2, "deepspeed": "scripts/zero3.json"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(launch.recipe | {"output_dir": str(launch.folder / "job")} | settings))
    port = free_port()
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_JOB_NODELIST": "nodes[0-1]", "SLURM_SUBMIT_DIR_LOG": str(tmp_path / "scontrol.log")}
    process = subprocess.Popen(
        ["bash", "scripts/slurm.sh", "scripts/finetune_fura.sh", str(recipe)],
        cwd=ROOT,
        env=os.environ
        | slurm
        | {"NUM_PROCESSES": "1", "MASTER_PORT": str(port), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    run = launch.folder / "job"
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 2, process)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {os.getpid()}\n"
    [checkpoint] = run.glob("checkpoint-*")
    assert json.loads((checkpoint / "written_by.json").read_text()) == {"processes": 2, "train_batch_size": 4}

    job = train("job", **settings)
    assert f"stopped: {checkpoint}" in job.output
    assert "mismatch" not in job.output  # two turns a step now, and one before
    assert_same(job, uninterrupted)
    assert not list(run.rglob("*universal*"))


@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_go_on_where_one_was_killed(stage, uninterrupted, launch, train):
    """The step stays as large as it was, though nothing says how large."""
    settings = {"save_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings["deepspeed"] = f"scripts/zero{stage}.json"
    port = free_port()
    process = launch.start("killed", env={"MASTER_PORT": str(port)}, **settings)
    checkpoint = launch.folder / "killed" / "checkpoint-3"
    wait_for(checkpoint.exists, process)
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        member.kill()
    process.communicate()
    assert not list(Path("/dev/shm").glob(f"*{port}*"))  # no memory that nobody has any longer

    refused = train("killed", **settings | {"per_device_train_batch_size": 3})
    assert "train_batch_size 4 is not a multiple of the 3 records that 1 processes take at once" in refused.output
    refused = train("killed", train_batch_size=8, **settings)
    assert f"{checkpoint} was written with 4 records a step, and train_batch_size is now 8" in refused.output
    job = train("killed", processes=2, **settings)
    assert_same(job, uninterrupted)
    # The main process alone writes what there is one of.
    both = {path.name for path in (launch.folder / "killed" / "checkpoint-6").iterdir()}
    alone = {path.name for path in checkpoint.iterdir()}
    assert both - alone == {"rng_state_0.pth", "rng_state_1.pth", "global_step6"}
    assert alone - both == {"rng_state.pth", "global_step3"}


def test_more_processes_than_gpus(launch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: one of them'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    job = launch("eight", processes=8, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert job.status == 1
    assert job.output.splitlines()[-1].startswith("NUM_PROCESSES is 8 and this machine has 1 GPU(s): leave it unset")


def test_several_machines_have_to_know_one_another(launch):
    assert "say which one this machine is, from 0" in launch("who", env={"NUM_NODES": "2"}).output
    assert "say the name or address of machine 0" in launch("where", env={"NUM_NODES": "2", "NODE_RANK": "0"}).output
