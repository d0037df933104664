"""The gated MLP of Llama and its kin, ``down(silu(gate(x)) * up(x))``, with an adapted ``down``.

Its product is as large as three of the layer's other results, and between its forward and backward pass only ``down``'s
adapter needs it. Told the two factors instead, the adapter makes it again from them, in the pass over memory that makes
their gradients: on a Llama-7B that leaves out 3 of 8 passes over tensors of that size, and the tensor itself.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from fura_vlm.fura.layer import FuraLinear


def join_gate(mlp: nn.Module) -> None:
    """Has a gated MLP hand both factors on to ``down_proj`` if that is adapted, and no longer if it is not.

    Other modules are left alone: an MLP is taken for one by its code, which must be that of transformers' ``LlamaMLP``
    (Mistral's, Qwen's and others' are), and its activation.
    """
    own = mlp.__dict__.get("forward")
    if own is not None and getattr(own, "__func__", None) is not forward:
        return  # somebody else's, who calls the class's
    if isinstance(getattr(mlp, "down_proj", None), FuraLinear) and _is_gated(mlp):
        mlp.forward = MethodType(forward, mlp)
    elif own is not None:
        del mlp.forward


def _is_gated(mlp: nn.Module) -> bool:
    code, llama = getattr(type(mlp).forward, "__code__", None), LlamaMLP.forward.__code__
    same = code and (code.co_code, code.co_names, code.co_consts) == (llama.co_code, llama.co_names, llama.co_consts)
    return bool(same) and isinstance(mlp.act_fn, (nn.SiLU, type(ACT2FN["silu"])))


def forward(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """In the place of ``LlamaMLP.forward``. Who looks at what goes into ``down_proj`` by a hook sees the product."""
    down = mlp.down_proj
    if isinstance(down, FuraLinear) and not (down._forward_hooks or down._forward_pre_hooks):
        return down(mlp.gate_proj(x), up=mlp.up_proj(x))
    return down(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
