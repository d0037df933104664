"""Run by test_processes.py, once for each of two processes: python processes_worker.py RANK PORTS FOLDER MIXTURE.

Goes through the places where a process can fail, each in a copy of this process, which has imported everything already:
trains there, with a fault of one of the two. FOLDER/PLACE-RANK.log is what it printed; FOLDER/RANK.json its exit
status by place, or None where it had to be killed.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import fura_vlm.training.train as recipe
from fura_vlm.modelling.shards import ModelError
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.trainer import FuraTrainer

PATIENCE = 240  # seconds, on a machine that does much else


def refuse(*args, **kwargs):
    raise ModelError("There is no model here: copy one")


def mistake(*args, **kwargs):
    raise ZeroDivisionError("a mistake of ours")


def be_killed(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


# By place: whose fault it is, whose attribute, and what it does instead.
PLACES = {
    "settings": ((1,), recipe, "training_arguments", refuse),
    "processor": ((1,), recipe, "load_family", refuse),
    "processor of both": ((0, 1), recipe, "load_family", refuse),
    "data": ((0,), recipe, "open_index", refuse),
    "model": ((1,), recipe, "load_base", refuse),
    "prepare": ((1,), recipe, "prepare", refuse),
    "trainer": ((1,), recipe, "FuraTrainer", refuse),
    "training": ((1,), FuraTrainer, "training_step", mistake),
    "killed": ((1,), FuraTrainer, "training_step", be_killed),
    "saving": ((1,), FuraTrainer, "save_model", refuse),
}
# What is gone through at once: processes that end one another mostly wait. Two that fail have to do so at one time.
GROUPS = [
    ["processor of both"],
    ["settings", "processor", "data"],
    ["model", "prepare", "trainer"],
    ["training", "killed", "saving"],
]


def fail(place: str, rank: int, port: str, folder: Path, mixture: str) -> None:
    """In the copy: what a process started by a launcher does."""
    log = os.open(folder / f"{place}-{rank}.log", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "2"}
    ranks, owner, name, fault = PLACES[place]
    if rank in ranks:
        setattr(owner, name, fault)
    recipe.train(
        TrainConfig(
            data_path=f"{mixture}/train.json", output_dir=str(folder / place), per_device_train_batch_size=2,
            model_max_length=512, bf16=False, dataloader_num_workers=0, report_to=[], max_steps=1,
        )
    )  # fmt: skip


def status_of(process: int) -> int | None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def main() -> None:
    rank, ports, folder, mixture = int(sys.argv[1]), sys.argv[2].split(","), Path(sys.argv[3]), sys.argv[4]
    port_of, statuses = dict(zip(PLACES, ports, strict=True)), {}
    for group in GROUPS:
        processes = {}
        for place in group:
            processes[place] = os.fork()
            if not processes[place]:
                try:
                    fail(place, rank, port_of[place], folder, mixture)
                finally:
                    os._exit(7)  # neither ended by a failure nor trained to the end without one
        for place, process in processes.items():
            statuses[place] = status_of(process)
    (folder / f"{rank}.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main()
