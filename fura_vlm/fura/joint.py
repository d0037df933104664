"""Adapted Linears that take the same input: q, k and v of an attention; gate and up of an MLP (`gate.py`).

One by one, each of them reads the input again in the backward pass, and writes a gradient for it that is then read to
be added to the others'. Together they read it once and write one sum: 6 passes over tensors of that size for 12 of q, k
and v, those of the norm before them included, and 5 for 8 of gate and up.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType

import torch
from torch import nn

from fura_vlm.fura.basis import joint_linear, joint_takes
from fura_vlm.fura.layer import FuraLinear

NAMES = ("q_proj", "k_proj", "v_proj")


def outputs(layers: Sequence[nn.Module], x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """What 2 or 3 layers make of x ``(..., in)``, each ``(..., out)``; None where each is to be called by itself.

    They are taken together while training, where the kernels run, if all are plain Linears, adapted with the same
    blocks of at most ``kernels.JOINT_BLOCK``. Layers with hooks, as ZeRO-3 has them, want to be called.
    """
    if not torch.is_grad_enabled() or not all(isinstance(each, FuraLinear) and not has_hooks(each) for each in layers):
        return None
    blocks = {layer.input_blocks() for layer in layers}
    weights = [layer.base_layer.weight for layer in layers]
    if len(blocks) > 1 or None in blocks or not joint_takes(x, weights, blocks.pop()[1]):
        return None
    return joint_linear(
        x, weights, [layer.base_layer.bias for layer in layers], [layer.input_delta(x) for layer in layers]
    )


def join_attention(attention: nn.Module) -> None:
    """Has the adapted q, k and v of a self-attention computed together, and no longer if one is not adapted."""
    adapted = all(isinstance(getattr(attention, name, None), FuraLinear) for name in NAMES)
    set_forward(attention, forward, adapted and _is_self_attention(attention))


def _is_self_attention(attention: nn.Module) -> bool:
    """Whether its forward takes ``hidden_states`` first and no other states, gives them to q, k and v itself, and would
    not notice that `_Attention` stands in for the module."""
    forward = inspect.unwrap(type(attention).forward)
    taken = [name for name in inspect.signature(forward).parameters if name.endswith("_states")]
    code = forward.__code__
    changes_itself = any(step.opname in ("STORE_ATTR", "DELETE_ATTR") for step in dis.get_instructions(code))
    return (
        taken == ["hidden_states"]
        and set(NAMES) <= set(code.co_names)
        and "__class__" not in code.co_freevars  # of super()
        and not changes_itself
    )


class _Attention:
    """An attention for one call of its forward: its q, k and v have been called with x.

    The outputs are not kept on the modules instead: within a checkpoint the compiler allows no change of what is
    outside.
    """

    def __init__(self, attention: nn.Module, x: torch.Tensor, made: Sequence[torch.Tensor]) -> None:
        self._attention = attention
        self.q_proj, self.k_proj, self.v_proj = (
            partial(_output, getattr(attention, name), x, y) for name, y in zip(NAMES, made, strict=True)
        )

    def __getattr__(self, name: str):
        return getattr(self._attention, name)


def _output(layer: nn.Module, known: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y if x is known else layer(x)


def forward(attention: nn.Module, *args, **kwargs):
    """In the place of an attention's own forward, which it calls."""
    x = args[0] if args else kwargs["hidden_states"]
    made = outputs([getattr(attention, name) for name in NAMES], x)
    seen = attention if made is None else _Attention(attention, x, made)
    return type(attention).forward(seen, *args, **kwargs)


def set_forward(module: nn.Module, forward: Callable, wanted: bool) -> None:
    """Puts a function in the place of a module's forward, or takes it away; leaves that of somebody else alone."""
    own = module.__dict__.get("forward")
    if own is not None and getattr(own, "__func__", None) not in (
        forward,
        type(module).forward,
    ):  # the latter: unpickled
        return  # somebody else's, who calls the class's
    if wanted:
        module.forward = MethodType(forward, module)
    elif own is not None:
        del module.forward


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to know when the module is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
