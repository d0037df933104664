"""The processes of a run: how they meet, and how they agree."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers.utils import logging

from fura_vlm.errors import FuraVLMError
from fura_vlm.training.errors import TrainingError


def join() -> PartialState:
    """Meets the other processes. They wait an hour for one another: the main one may have many images to check."""
    cuda = torch.cuda.is_available()
    # Batches of ever new lengths would leave holes in the GPU's memory that nothing fits into.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        if "RANK" in os.environ:  # by way of DeepSpeed, which else believes itself alone under ZeRO-3
            deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=timedelta(hours=1), auto_mpi_discovery=False)
            if not cuda:
                unlink_shared_memory()
        state = PartialState(cpu=not cuda)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        raise TrainingError(f"Port {port} is in use: set MASTER_PORT to a free one, or leave it unset") from error
    if not state.is_main_process:  # one bar for each thing that is loaded, not one a process
        logging.disable_progress_bar()
    return state


def unlink_shared_memory() -> None:
    """Takes the name off the 66 MiB that a process shares on a CPU, once all have opened it. DeepSpeed never does: the
    memory would stay taken after the run, until the machine starts anew. Without a name it goes with the processes."""
    dist.barrier()
    address, port, rank = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


def agree(decide):
    """The main process decides, all others follow; its error ends them too."""
    state = PartialState()
    outcome = [None]
    if state.is_main_process:
        try:
            outcome = [decide()]
        except Exception as error:
            outcome = [error]
    if state.num_processes > 1:
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        if state.is_main_process:
            raise outcome[0]
        raise SystemExit(1)  # once on the screen is enough
    return outcome[0]


def alike(do, refusal: str = "These settings are refused"):
    """Every process does the same. Where that is refused, it is refused on all of them: the main one says so, and all
    end."""
    try:
        return do()
    except (FuraVLMError, ValueError) as error:  # a ValueError is a library's
        refused = error if isinstance(error, FuraVLMError) else TrainingError(f"{refusal}: {error}")
        return agree(lambda: _raise(refused))


def _raise(error: Exception) -> None:
    raise error
