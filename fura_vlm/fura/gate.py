"""The gated MLP of Llama and its kin, ``down(silu(gate(x)) * up(x))``, with an adapted ``down``.

Its product is as large as three of the layer's other results, and between its forward and backward pass only ``down``'s
adapter needs it. Told the two factors instead, the adapter makes it again from them, in the pass over memory that makes
their gradients: on a Llama-7B that leaves out 3 of 8 passes over tensors of that size, and the tensor itself.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP

from fura_vlm.fura.joint import has_hooks, outputs, set_forward
from fura_vlm.fura.layer import FuraLinear


def join_gate(mlp: nn.Module) -> None:
    """Has a gated MLP hand both factors on to ``down_proj`` if that is adapted, and no longer if it is not.

    Other modules are left alone: an MLP is taken for one by its code, which must be that of transformers' ``LlamaMLP``
    (Mistral's, Qwen's and others' are), and its activation.
    """
    set_forward(mlp, forward, isinstance(getattr(mlp, "down_proj", None), FuraLinear) and _is_gated(mlp))


def _is_gated(mlp: nn.Module) -> bool:
    code, llama = getattr(type(mlp).forward, "__code__", None), LlamaMLP.forward.__code__
    same = code and (code.co_code, code.co_names, code.co_consts) == (llama.co_code, llama.co_names, llama.co_consts)
    return bool(same) and _is_silu(mlp.act_fn)


def forward(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """In the place of ``LlamaMLP.forward``. Hooks of ``act_fn`` and ``down_proj`` are given what they always are."""
    down, act = mlp.down_proj, mlp.act_fn
    gate, up = outputs([mlp.gate_proj, mlp.up_proj], x) or (mlp.gate_proj(x), mlp.up_proj(x))
    if isinstance(down, FuraLinear) and _is_silu(act) and not (has_hooks(down) or has_hooks(act)):
        return down(gate, up=up)
    return down(act(gate) * up)


def _is_silu(act: nn.Module) -> bool:
    return type(act) is nn.SiLU or type(act) is SiLUActivation
