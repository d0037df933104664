"""The processes of a run: how they meet, and how they end.

They end together. A process that fails writes its reason into the store that all of them met at; a thread in each of
the others looks there, because they may be waiting in a collective operation that will never be complete.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import sys
import sysconfig
import threading
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import active_children
from pathlib import Path
from subprocess import SubprocessError

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.rendezvous import rendezvous
from transformers.utils import logging

from fura_vlm.errors import first_line, sentence
from fura_vlm.training.errors import TrainingError

PATIENCE = timedelta(hours=1)  # how long processes wait for each other: the main process may have many images to check
LOOK = 0.5  # seconds between two looks at the store
GRACE = 2.0  # seconds to see whether all processes fail with the same message

LOST = "lost the connection to another process, which was killed; the system often does that when memory runs out"
# How Gloo, NCCL and the store say that the other side is gone.
CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


@contextmanager
def together(command: str = "train"):
    """Connects to the other processes, and disconnects at the end. Yields accelerate's ``PartialState``.

    If one process raises inside, all of them end within a few seconds with exit status 1. Each machine prints the
    message once, with the rank of the process unless all have the same message, under the name of the ``command``. A
    single process just raises.
    SystemExit and KeyboardInterrupt are not failures: all processes have to raise them.

    Raises:
        TrainingError: the port they meet on is in use.
    """
    cuda = torch.cuda.is_available()
    set_environment(cuda)
    store, rank, size = _meet()
    watch = Watch(store, rank, size, command) if size > 1 else None
    if watch:
        watch.start()
    try:
        yield _join(store, rank, size, cuda)
        if watch:
            watch.part()
    except SystemExit:
        if watch:
            watch.part()
        raise
    except Exception as error:
        if watch:
            watch.end_all(error)
        raise
    finally:
        _leave()


def set_environment(cuda: bool) -> None:
    """Sets what torch and DeepSpeed read from the environment, before they read it."""
    # Batches of many lengths would leave gaps in the GPU's memory that are too small to use.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Empty rather than unset: torch would find a compiler for GPUs by itself, and warn that there is no GPU.
        os.environ |= {"CUDA_HOME": "", "CUDA_PATH": ""}
    if "RANK" not in os.environ:  # started without a launcher: DeepSpeed would ask for MPI
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _meet() -> tuple[dist.Store, int, int]:
    """The store that all processes share, the rank of this one, and how many there are."""
    try:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        raise TrainingError(f"Port {port} is in use: set MASTER_PORT to a free one, or leave it unset") from error
    # torchrun's store outlives the processes that it starts again.
    return dist.PrefixStore(f"run{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), rank, size


def _join(store: dist.Store, rank: int, size: int, cuda: bool) -> PartialState:
    from torch.utils import cpp_extension  # after ``set_environment``: it warns of a missing GPU when it is imported

    if not cuda and (sign := re.search(r"[$:|\n]", sysconfig.get_path("purelib"))):
        raise TrainingError(
            f"{sys.prefix} has {sign[0]!r} in its name, and DeepSpeed cannot be compiled there: move the checkout to a"
            " folder without it"
        )
    # PyTorch writes this path as it is into the shell command that links what DeepSpeed compiles: a space would cut it.
    cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)
    import deepspeed

    backend = "nccl" if cuda else "gloo"
    if rank == 0:
        store.set("backend", backend)
    elif store.get("backend").decode() != backend:
        raise TrainingError(
            f"This process sees {'GPUs, and the main process none' if cuda else 'no GPU, and the main process does'}: "
            "start all processes on machines of one kind"
        )
    device = None
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    # With its device a barrier knows where to wait. DeepSpeed would not tell it to a process by itself.
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE, device_id=device)
    try:
        deepspeed.init_distributed(backend, timeout=PATIENCE, auto_mpi_discovery=False)
    except (OSError, RuntimeError, SubprocessError) as error:
        if cuda:  # nothing is compiled there
            raise
        lines = [line.strip() for line in str(error).splitlines() if "error: " in line or "not found" in line]
        raise TrainingError(
            f"DeepSpeed cannot compile the part that it needs without a GPU ({(lines or [first_line(error)])[0]}): "
            "install a C++ compiler (Debian: apt install g++) and start the same command again"
        ) from error
    if not cuda:
        unlink_shared_memory()
    state = PartialState(cpu=not cuda)
    if not state.is_main_process:  # one bar for each thing that is loaded, not one a process
        logging.disable_progress_bar()
    return state


def _leave() -> None:
    if dist.is_initialized():
        from deepspeed import comm

        # Where joining failed, DeepSpeed does not know of the group yet.
        (comm if comm.is_initialized() else dist).destroy_process_group()


def unlink_shared_memory() -> None:
    """Removes the name of the 66 MiB that a process shares on a CPU, once all have opened them. DeepSpeed never does,
    so the memory would stay in use after the run until the machine restarts. Without a name it is freed with the
    processes."""
    dist.barrier()
    address, port, rank = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


@contextmanager
def refusing(words: str):
    """Turns a library's ValueError into a TrainingError that begins with ``words``."""
    try:
        yield
    except ValueError as error:
        raise TrainingError(f"{words}: {error}") from error


class Watch(threading.Thread):
    """Ends this process when another one has failed, and the others when this one has.

    In the store: ``failed/RANK``, JSON with ``text``, ``lost`` (only the connection to another one that has failed) and
    ``host``; ``failures``, how many there are; ``speaker/HOST``, the rank that tells people on this machine.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, command: str = "train"):
        super().__init__(name="watch", daemon=True)
        self.store, self.rank, self.size = store.clone(), rank, size  # its own connection: a wait blocks the other one
        self.host, self.command = socket.gethostname(), command
        self._parted = threading.Event()
        self._ending = threading.Lock()

    def part(self) -> None:
        """All processes call this when they no longer need each other."""
        dist.barrier()
        self._parted.set()
        dist.barrier()  # the main process keeps the store, and leaves when nobody looks any longer

    def run(self) -> None:
        while not self._parted.wait(LOOK):
            try:
                failed = self.store.check(["failures"])
            except Exception:  # the main process is gone, and the store with it
                if not self._parted.is_set():
                    self._end(self._reasons())
                return
            if failed:
                self._end(self._reasons())

    def end_all(self, error: Exception) -> None:
        """Ends this process, which has failed, and the others."""
        text = sentence(error)
        lost = text is None and any(words in str(error) for words in CLOSED)
        if lost:
            text = LOST
        reason = {"text": text or _traceback(error), "lost": lost, "host": self.host}
        try:
            self.store.set(f"failed/{self.rank}", json.dumps(reason))
            self.store.add("failures", 1)
        except Exception:  # the main process is gone
            pass
        self._end({self.rank: reason})

    def _reasons(self) -> dict[int, dict]:
        keys = {rank: f"failed/{rank}" for rank in range(self.size)}
        try:
            return {rank: json.loads(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])}
        except Exception:
            return {}

    def _end(self, reasons: dict[int, dict]) -> None:
        """Prints the reason, if this process is the one to do it, and ends the process without waiting for anything."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # the other thread is about to end this process
        deadline = time.monotonic() + GRACE
        while len(reasons) < self.size and time.monotonic() < deadline:
            time.sleep(0.1)
            reasons |= self._reasons()
        if self._speaks():
            print(f"fura-vlm {self.command}: {explain(reasons, self.size)}", file=sys.stderr)
        if self.rank == 0:
            time.sleep(GRACE)  # the store goes with it, and others may still want to read
        for child in active_children():
            child.kill()  # data workers, which would stay for some seconds and ignore SIGTERM
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def _speaks(self) -> bool:
        try:
            return self.store.compare_set(f"speaker/{self.host}", "", str(self.rank)).decode() == str(self.rank)
        except Exception:  # the main process is gone
            return self.rank == 1 or os.environ.get("LOCAL_RANK") == "0"


def explain(reasons: dict[int, dict], size: int) -> str:
    """The message about why processes failed: the first cause, and where it happened.

    Args:
        reasons: by rank, as ``Watch`` has them; empty if a process was killed.
    """
    if not reasons:
        return f"A process {LOST}"
    causes = {rank: reason for rank, reason in reasons.items() if not reason["lost"]} or reasons
    first = min(causes)
    reason = causes[first]
    if len(causes) == size and all(other["text"] == reason["text"] for other in causes.values()):
        return reason["text"]
    return f"process {first} of {size}, on {reason['host']}: {reason['text']}"


def _traceback(error: Exception) -> str:
    return "it failed\n" + "".join(traceback.format_exception(error)).rstrip()
