"""The processes of a run: how they meet, agree, fail together and part.

A process that fails tells the others through the store that they met by, and waits until they know. Each of them has
a thread that looks there twice a second, so that one which waits for the failed process (in a broadcast, or amid a
step) ends, too, and does not wait for ever. One of them says on the screen what happened: the main process, unless it
is another that has failed.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.utils import cpp_extension
from transformers.utils import logging

from fura_vlm.errors import FuraVLMError, first_line

T = TypeVar("T")
LOOK_EVERY = 0.5  # seconds
WAIT_FOR_OTHERS = 20.0  # seconds: longer than they need to notice


class TrainingError(FuraVLMError):
    """A run that cannot start or go on; the message says why and what to do."""


def prepare_environment() -> None:
    """What DeepSpeed reads when it is imported, so that this comes first."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if not os.environ.get("CUDA_HOME"):
            os.environ.setdefault("CUDA_PATH", "")  # a compiler for GPUs alone is no reason to warn of a missing GPU
    # PyTorch writes this path as it is into the shell command that links what DeepSpeed compiles: a space would cut it.
    cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)
    # Batches of ever new lengths would leave holes in the GPU's memory that nothing fits into.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def join() -> PartialState:
    """Meets the other processes; alone, if nobody has started this one as one of several. They wait an hour for one
    another: the main one may have many images to check.

    Raises:
        TrainingError: the port they were to meet on is taken.
    """
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        _alone(cuda)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    try:
        # Which GPU is this process's has to be known: barriers and checkpoints ask.
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=timedelta(hours=1),
            device_id=torch.device("cuda", rank) if cuda else None,
        )
    except (dist.DistNetworkError, RuntimeError) as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        raise TrainingError(f"Port {port} is in use: set MASTER_PORT to a free one, or leave it unset") from error
    import deepspeed  # after ``prepare_environment``

    # By way of DeepSpeed, too, which else believes itself alone under ZeRO-3.
    deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    if not cuda:
        unlink_shared_memory()
    state = PartialState(cpu=not cuda)
    if not state.is_main_process:  # one bar for each thing that is loaded, not one a process
        logging.disable_progress_bar()
    return state


def _alone(cuda: bool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if cuda and torch.cuda.device_count() > 1:
        print(
            f"One process trains on one of {torch.cuda.device_count()} GPUs: bash scripts/finetune_fura.sh starts one "
            "for each",
            file=sys.stderr,
        )


def unlink_shared_memory() -> None:
    """Takes the name off the 66 MiB that a process shares on a CPU, once all have opened it. DeepSpeed never does: the
    memory would stay taken after the run, until the machine starts anew. Without a name it goes with the processes."""
    dist.barrier()
    address, port, rank = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


def agree(decide: Callable[[], T]) -> T:
    """The main process decides, all others follow."""
    state = PartialState()
    outcome = [decide() if state.is_main_process else None]
    if state.num_processes > 1:
        dist.broadcast_object_list(outcome, src=0)
    return outcome[0]


def refused(do: Callable[[], T], refusal: str = "These settings are refused") -> T:
    """What ``do`` returns; a library's ``ValueError`` is a refusal of the settings.

    Raises:
        TrainingError: in its place.
    """
    try:
        return do()
    except ValueError as error:
        raise TrainingError(f"{refusal}: {first_line(error)}") from error


@contextmanager
def together():
    """What happens within concerns all processes: if one fails, all end, within seconds and with one message."""
    state = PartialState()
    failures = Failures(state) if state.num_processes > 1 else None
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit):  # stopped and saved: every process comes to this end by itself
            part()
        elif failures is not None:
            failures.tell(error)
        raise
    finally:
        if failures is not None:
            failures.stop_looking()
    part()


def part() -> None:
    """Takes leave of the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Failures:
    """What has gone wrong, on whichever process, known to all of them through their store."""

    def __init__(self, state: PartialState):
        self.rank, self.number = state.process_index, state.num_processes
        # A connection of its own: one that waits for an answer keeps others from asking.
        self.store = dist.PrefixStore("failures", dist.distributed_c10d._get_default_store().clone())
        self.over = threading.Event()
        threading.Thread(target=self._look, name="failures", daemon=True).start()

    def tell(self, error: BaseException) -> None:
        """Makes the failure of this process known, and waits until the others are about to end. A process other than
        the main one does not return if the main one has said it."""
        self.over.set()
        known = isinstance(error, FuraVLMError)
        said = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
        try:
            self.store.set(f"failed/{self.rank}", said)
            self.store.set(f"knows/{self.rank}", "")
            if self.rank == 0:
                self.store.set("said", "by itself")
                self._wait_for([f"knows/{rank}" for rank in range(1, self.number)])
                return
            # The launcher ends all processes with the first: the main one has to say it before.
            self._wait_for(["said"])
            time.sleep(2 * LOOK_EVERY)  # it is being said
        except (RuntimeError, dist.DistStoreError):  # the main process, which keeps the store, is gone
            pass
        if known:
            os._exit(1)
        # A traceback of a fault that nobody has foreseen is for this process to show.

    def stop_looking(self) -> None:
        self.over.set()

    def _wait_for(self, keys: list[str]) -> None:
        until = time.monotonic() + WAIT_FOR_OTHERS
        while not self.store.check(keys) and time.monotonic() < until:
            time.sleep(LOOK_EVERY / 5)

    def _look(self) -> None:
        while not self.over.wait(LOOK_EVERY):
            try:
                failed = [rank for rank in range(self.number) if self.store.check([f"failed/{rank}"])]
            except (RuntimeError, dist.DistStoreError):
                os._exit(1)  # the main process is gone
            if failed:
                self._end(failed)

    def _end(self, failed: list[int]) -> None:
        if self.rank == 0:
            # It may be about to fail for the same reason: then it says so itself, as if it were alone.
            if self.over.wait(4 * LOOK_EVERY):
                return
            rank = failed[0]
            said = self.store.get(f"failed/{rank}").decode()
            where = f"process {rank} of {self.number}, counted from 0"
            print(f"fura-vlm train: {where}, failed: {said}", file=sys.stderr, flush=True)
            self.store.set("said", "for it")
            time.sleep(2 * LOOK_EVERY)
            os._exit(1)
        try:
            self.store.set(f"knows/{self.rank}", "")
            if 0 in failed:  # until it has spoken and its store is gone
                self._wait_for(["never"])
            else:
                self._wait_for(["said"])
                time.sleep(2 * LOOK_EVERY)
        except (RuntimeError, dist.DistStoreError):
            pass
        os._exit(1)
