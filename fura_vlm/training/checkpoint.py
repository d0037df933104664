"""Going on from a checkpoint with another number of processes than wrote it.

A DeepSpeed checkpoint holds the optimizer as the processes that wrote it had it divided among them. DeepSpeed's
universal form (``deepspeed.checkpoint.ds_to_universal``) holds it by parameter; it is made from the checkpoint when it
is needed, loaded, and removed.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path

import torch
from safetensors import safe_open
from torch.optim.lr_scheduler import LRScheduler

from fura_vlm.errors import FuraVLMError
from fura_vlm.files import write_text

NAME = "written_by.json"


class CheckpointError(FuraVLMError):
    """A checkpoint that cannot be gone on from; the message says why and what to do."""


@dataclass
class WrittenBy:
    """What a checkpoint notes of the run that wrote it: its processes, and the records of an optimizer step."""

    processes: int
    train_batch_size: int

    def save(self, checkpoint: Path) -> None:
        write_text(checkpoint / NAME, json.dumps(asdict(self)))

    @classmethod
    def of(cls, checkpoint: str | Path) -> WrittenBy:
        """Raises CheckpointError if the checkpoint does not say."""
        try:
            return cls(**json.loads((Path(checkpoint) / NAME).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{checkpoint} has no usable {NAME}, so this checkpoint is not complete: remove it, and the run "
                "continues from the one before"
            ) from error


def make_universal(checkpoint: str | Path) -> None:
    """Adds the universal form to a checkpoint: about as much again on the disk, and twice that while it is made.

    Raises:
        CheckpointError: a file of the checkpoint is missing or damaged, or the disk has no room.
    """
    from deepspeed.checkpoint import ds_to_universal  # here, because training can do without DeepSpeed

    source = _state(Path(checkpoint))
    target = source.with_name(source.name + "_universal")
    remove_universal(checkpoint)
    needed = 2 * sum(file.stat().st_size for file in source.glob("*.pt"))
    free = shutil.disk_usage(source).free
    if needed > free:
        raise CheckpointError(
            f"To continue from {checkpoint} with another number of processes, its disk needs {needed / 1e9:.1f} GB for "
            f"a while, and {free / 1e9:.1f} GB are free: make room, or start as many processes as before"
        )
    # One worker: more would be copies of a process that talks to a GPU and to others.
    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with redirect_stdout(StringIO()):  # it reports to programmers; its progress bars go to stderr
            ds_to_universal.main(arguments)
    except Exception as error:  # a broken file raises as it likes
        remove_universal(checkpoint)
        raise CheckpointError(
            f"{checkpoint} cannot be converted to another number of processes, because a file is missing or damaged "
            f"({error}): remove it, and the run continues from the one before"
        ) from error


def remove_universal(checkpoint: str | Path) -> None:
    """Takes the universal form out of a checkpoint again."""
    checkpoint = Path(checkpoint)
    (checkpoint / "latest_universal").unlink(missing_ok=True)
    shutil.rmtree(checkpoint / (_state(checkpoint).name + "_universal"), ignore_errors=True)


@torch.no_grad()
def load_buffers(model: torch.nn.Module, checkpoint: str | Path) -> None:
    """Puts back the buffers of an adapter, which the universal form leaves out.

    FuRA's frozen basis is in buffers, and what it trains is expressed in this very basis: over one that another
    machine computes, with other signs, the adapter would be another.
    """
    path = Path(checkpoint) / "adapter_model.safetensors"
    if not path.is_file():  # every weight is trained; the buffers of the base are those of the base
        return
    with safe_open(path, "pt") as saved:
        names = set(saved.keys())
        for name, buffer in model.named_buffers():
            key = name.removesuffix(".default")  # PEFT leaves the adapter's name out of the file
            if key in names:
                buffer.copy_(saved.get_tensor(key))


def mend_optimizer(optimizer, scheduler: LRScheduler) -> None:
    """What an optimizer needs after DeepSpeed has loaded the universal form into it.

    ZeRO-3 gives every group the rate of the first one, and all parameters one counter of steps, which each then
    advances. ZeRO-1, 2 and 3 leave that counter on the CPU, where torch's fused AdamW refuses it.

    Args:
        optimizer: torch's own, or whatever wraps it in an attribute ``optimizer``, as DeepSpeed and accelerate do.
        scheduler: with its own state loaded.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    rates = zip(scheduler.get_last_lr(), scheduler.base_lrs, strict=True)
    for group, (rate, base) in zip(optimizer.param_groups, rates, strict=True):
        group.update(lr=rate, initial_lr=base)
    # torch keeps the counter on the CPU unless a kernel on the GPU reads it. ZeRO-3 leaves its groups without
    # parameters, but all of them have the same settings.
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                stays = name == "step" and not beside
                state[name] = value.to("cpu" if stays else parameter.device, copy=name == "step")


def _state(checkpoint: Path) -> Path:
    """The folder of DeepSpeed's files in a checkpoint."""
    return checkpoint / (checkpoint / "latest").read_text().strip()
