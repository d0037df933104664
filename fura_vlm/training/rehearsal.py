"""One batch, as a training step takes it, to see whether it fits into memory; nothing is left of it."""

from __future__ import annotations

import gc
import random
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from fura_vlm.families.base import Family
from fura_vlm.training.loss import positions
from fura_vlm.training.memory import is_out_of_memory


def rehearse(
    model: nn.Module,
    family: Family,
    batch: dict[str, torch.Tensor],
    held: float,
    dtype: torch.dtype,
    checkpointing: bool,
) -> int | None:
    """A forward and a backward pass, beside as much memory as optimizer, gradients and DeepSpeed will hold.

    It asks no other process, so that each finds out for itself: where ZeRO-3 has divided the weights, a layer computes
    with zeros in their place. DeepSpeed has not seen the model yet; the model is moved and cast here as it will do.

    Args:
        model: as it will be trained, with ``train_on_labels_only``.
        batch: as ``Collator`` makes it.
        held: bytes.
        dtype: in which the model is trained.

    Returns: the most bytes that PyTorch had in use on the GPU (0 without one), or ``None`` if they were not enough.

    Raises:
        RuntimeError: whatever else the model raises.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    peak = None
    try:
        peak = _step(model, family, batch, int(held), device, dtype, checkpointing)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()  # the error is gone, and with it the frames that held tensors; now what is in cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return peak


def _step(
    model, family: Family, batch: dict, held: int, device: torch.device, dtype: torch.dtype, checkpointing: bool
) -> int:
    """Returns the most bytes in use."""
    cuda = device.type == "cuda"
    _place(model, device, dtype)
    with ExitStack() as stack:
        for context in (
            same_random_numbers(), same_mode(model), whole_weights(model, device), without_gradients_kept(model)
        ):  # fmt: skip
            stack.enter_context(context)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            stack.callback(model.activation_checkpointing_disable)
        batch = batch | positions(batch, family.run_id)
        placed = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype) for name, value in batch.items()
        }
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        beside = torch.empty(held if cuda else 0, dtype=torch.uint8, device=device)
        model(**placed, num_items_in_batch=len(placed["supervised"].T)).loss.backward()
        del beside
        return torch.cuda.max_memory_allocated() if cuda else 0


def _place(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """As DeepSpeed does when it takes a model; a model that ZeRO-3 has divided is in its place."""
    if _divided(model):
        return
    for parameter in model.parameters():
        if dtype == torch.bfloat16 and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.to(device)


def _divided(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_shape") for parameter in model.parameters())


@contextmanager
def same_random_numbers():
    """Puts back the states of all generators that training draws from."""
    numbers, others = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(others)


@contextmanager
def same_mode(model: nn.Module):
    """In training mode inside, and each module as it was afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def without_gradients_kept(model: nn.Module):
    """Lets go of each gradient as soon as it is there: where DeepSpeed puts them is counted apart."""

    def let_go(parameter: nn.Parameter) -> None:
        parameter.grad = None

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(let_go) for parameter in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:  # an error may have come between a gradient and its hook
            parameter.grad = None


@contextmanager
def whole_weights(model: nn.Module, device: torch.device):
    """Gives weights that ZeRO-3 has divided their whole shape inside: all of them read the same zeros. DeepSpeed is
    told that they are there, or its linear layers would ask the other processes for them in the backward pass."""
    if not _divided(model):
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    tensors = [*model.parameters(), *model.buffers()]
    before = [(tensor, tensor.data) for tensor in tensors]
    divided = [tensor for tensor in tensors if hasattr(tensor, "ds_shape")]
    status = [tensor.ds_status for tensor in divided]
    try:
        largest = max(tensor.ds_shape.numel() for tensor in divided)
        zeros = {dtype: torch.zeros(largest, dtype=dtype, device=device) for dtype in {t.dtype for t in divided}}
        for tensor in divided:
            tensor.data = zeros[tensor.dtype][: tensor.ds_shape.numel()].view(tensor.ds_shape)
            tensor.ds_status = ZeroParamStatus.AVAILABLE
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data
        for tensor, was in zip(divided, status, strict=True):
            tensor.ds_status = was
