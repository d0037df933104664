"""An adapter for inference alone: the block matrices D, without what only training needs."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from peft import PeftModel

from fura_vlm.fura.basis import narrowed
from fura_vlm.fura.errors import FuraError
from fura_vlm.fura.layer import FuraLayer


@torch.no_grad()
def export_delta(
    model: PeftModel,
    directory: str | os.PathLike,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
) -> Path:
    """Save an adapter as its block matrices ``D (N, b, b)``: about half the size, or a quarter in bfloat16.

    The result loads with `PeftModel.from_pretrained` and the other ways PEFT has, needs no basis, computes
    the same and can be merged; it cannot be trained. Biases and modules_to_save go along.

    Args:
        model: a model with the adapter.
        directory: where to; an adapter not called "default" gets a folder of its name in it, as PEFT does it.
        dtype: dtype of D in the file; None: as the adapter computes it. In a 16-bit one small singular values are
            raised as over a base of that dtype, so name the one in which the model will answer.

    Returns:
        The folder that holds ``adapter_model.safetensors`` and ``adapter_config.json``.

    Raises:
        FuraError: there is no such adapter.
    """
    if adapter_name not in model.peft_config:
        raise FuraError(f"export_delta: there is no adapter {adapter_name!r}, only {', '.join(model.peft_config)}.")
    state = model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, FuraLayer) and adapter_name in layer.fura_adapters:
            layer.ensure_basis()
            for part in ("fura_dR", "fura_ds", "fura_V", "fura_s0"):
                state.pop(f"{name}.{part}.{adapter_name}", None)
            base = layer.base_dtype
            D = layer.delta(adapter_name, resolution=dtype if dtype and dtype.itemsize < base.itemsize else base)
            state[f"{name}.fura_D.{adapter_name}"] = narrowed(D, dtype or D.dtype).to(dtype or D.dtype).contiguous()

    config = model.peft_config[adapter_name]
    was = config.delta_only
    config.delta_only = True
    try:
        model.save_pretrained(directory, selected_adapters=[adapter_name], state_dict=state)
    finally:
        config.delta_only = was
    return Path(directory) if adapter_name == "default" else Path(directory) / adapter_name
