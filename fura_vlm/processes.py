"""What several processes decide together, in training and in an evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

Decision = TypeVar("Decision")


def agree(decide: Callable[[], Decision]) -> Decision:
    """What the main process decides, on all of them; the others wait for it. A process by itself just decides.

    Raises:
        Exception: the main process's own, there, where it says why.
        SystemExit: 1, in the others, if the main one failed.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return decide()
    state = PartialState(cpu=not torch.cuda.is_available())
    error, outcome = None, (None, False)
    if state.is_main_process:
        try:
            outcome = decide(), True
        except Exception as caught:
            error = caught
    told = [outcome]
    dist.broadcast_object_list(told, src=0)
    if error is not None:
        raise error
    decision, done = told[0]
    if not done:
        raise SystemExit(1)
    return decision


def least(number: float) -> float:
    """The least of what all processes give; each of them has to call this."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return number
    PartialState(cpu=not torch.cuda.is_available())
    given = [None] * dist.get_world_size()
    dist.all_gather_object(given, number)
    return min(given)
