"""The dense weight behind a Linear, be it plain, quantised, or partitioned by DeepSpeed ZeRO-3."""

from __future__ import annotations

import copy
import hashlib
from contextlib import contextmanager

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from transformers.pytorch_utils import Conv1D

from fura_vlm.fura.errors import FuraError

LINEAR = (nn.Linear, Conv1D)  # GPT-2's Conv1D is a Linear that holds its weight as (in, out)

SAMPLE = 1024  # entries of a weight that its fingerprint looks at, evenly spread


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 or FSDP spreads this tensor over the processes, be it gathered just now or not."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "full_tensor")


def is_whole(layer: nn.Module) -> bool:
    """Whether all of the layer's weight is in this process now."""
    weight = getattr(layer, "weight", None)
    return not is_partitioned(weight) or weight.shape == getattr(weight, "ds_shape", None)


@contextmanager
def gathered(layer: nn.Module):
    """Inside, `dense_weight` gives the whole weight in every process, also under ZeRO-3; then it is partitioned
    again."""
    if is_whole(layer) or not hasattr(layer.weight, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([layer.weight]):
        yield


def is_packed(layer: nn.Module) -> bool:
    """Whether bitsandbytes has repacked the layer's 4-bit weight, as it does in inference on some CPUs."""
    return getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False)


def keep_differentiable(layer: nn.Module, backend: QuantizationBackend | None, module: str) -> None:
    """See to it that gradients pass through a quantised layer that is to be trained through.

    On CPUs with AVX512-BF16 the first inference with a 4-bit weight of bitsandbytes repacks it, and through a
    repacked weight no gradient ever passes again: an evaluation would end the training without a word. And
    some formats of torchao, those that quantise activations too, pass none at all.

    Raises:
        FuraError: no gradients pass.
    """
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False
        if is_packed(layer):
            raise FuraError(
                f"{module}: bitsandbytes has repacked its 4-bit weight for inference, and it passes no "
                "gradients; load the base model again and add the adapter before its first use."
            )
    if backend is not None and backend.backend_name == "torchao" and not layer.weight.is_meta:
        with torch.enable_grad():
            x = torch.zeros(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
            if not layer(x.requires_grad_()).requires_grad:
                raise FuraError(
                    f"{module}: its torchao format passes no gradients, so nothing before it would be "
                    "trained; quantise the weights only, with Int8WeightOnlyConfig or bitsandbytes."
                )


def dense_weight(layer: nn.Module, backend: QuantizationBackend | None) -> torch.Tensor:
    """The layer's weight ``(out, in)`` as a plain tensor, dequantised if need be. Not a copy otherwise."""
    if backend is None:
        weight = layer.weight.data
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        return weight.T if isinstance(layer, Conv1D) else weight
    if is_packed(layer):
        # dequantisation does not know this order, but the layer does: unit vectors give its columns
        identity = torch.eye(layer.in_features, dtype=layer.compute_dtype or torch.float32)
        with torch.no_grad():
            columns = layer(identity) if layer.bias is None else layer(identity) - layer.bias
        return columns.T.contiguous()
    return backend.get_base_weight(layer)


class SavedWeight:
    """A layer's weight as it is now, to be put back exactly after it has been replaced.

    Holds the weight itself, not a copy: merging makes a new one.
    """

    def __init__(self, layer: nn.Module, backend: QuantizationBackend | None) -> None:
        self.layer, self.weight, self.quantised = layer, getattr(layer, "weight", None), backend is not None
        if not self.quantised:
            self.data = layer.weight.data
            return
        # a backend makes a new parameter, but changes attributes of the layer and of the old one on the way
        self.layer_attributes = {**layer.__dict__, "_parameters": dict(layer._parameters)}
        if "state" in self.layer_attributes:
            self.layer_attributes["state"] = copy.copy(layer.state)
        self.weight_attributes = dict(getattr(self.weight, "__dict__", {}))

    def restore(self) -> nn.Module:
        """Put the weight back; returns the layer that holds it."""
        if not self.quantised:
            weight = self.layer.weight
            weight.data = self.data.to(weight.device, weight.dtype)  # the model may have been moved while merged
            return self.layer
        for target, attributes in ((self.layer, self.layer_attributes), (self.weight, self.weight_attributes)):
            if target is not None:  # HQQ has no weight of that name, and makes a new layer instead
                target.__dict__.clear()
                target.__dict__.update(attributes)
        return self.layer


def fingerprint(weight: torch.Tensor, backend: QuantizationBackend | None) -> str:
    """What identifies a base weight to an adapter: ``"<out>x<in> <kind> <hash>"``.

    The kind is ``float`` for float64, float32 and bfloat16, ``float16``, or the quantisation's name. The hash
    covers ``SAMPLE`` entries spread evenly over the weight: rounded to bfloat16 for a float weight, so that
    one checkpoint loaded in float32 and in bfloat16 has one fingerprint; only their signs for a quantised
    weight, since the last bits of a dequantised entry differ between devices.

    Args:
        weight: the dense weight ``(out, in)``, dequantised if need be.
        backend: PEFT's quantisation backend of the layer, or None.
    """
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLE, flat.numel()), dtype=torch.float64).long()
    sample = flat[index.to(flat.device)].cpu()
    if backend is not None:
        kind, sample = backend.backend_name.replace(" ", "-"), sample.sign().to(torch.int8)
    else:
        kind = "float16" if weight.dtype == torch.float16 else "float"
        sample = sample.to(torch.bfloat16).view(torch.int16)
    digest = hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16]
    return f"{weight.shape[0]}x{weight.shape[1]} {kind} {digest}"


def compare_fingerprints(module: str, wanted: str, found: str) -> bool:
    """Check one base weight against the fingerprint in an adapter.

    Returns: True if they were comparable and agree; False if only the shapes could be compared, because one
        of the two bases is quantised, or quantised in another way: an adapter trained over an NF4 base is
        meant to be usable over its bfloat16 parent, and D, which multiplies the weight, stays valid there.

    Raises:
        FuraError: the weight has another shape, or is another weight.
    """
    wanted_shape, wanted_kind, wanted_hash = wanted.split()
    found_shape, found_kind, found_hash = found.split()
    if wanted_shape != found_shape:
        raise FuraError(
            f"{module}: the adapter was made for a weight of shape {wanted_shape}, and this base model's is "
            f"{found_shape}; load the adapter over the base model it was trained on."
        )
    if wanted_kind != found_kind:
        return False
    if wanted_hash != found_hash:
        raise FuraError(
            f"{module}: this base model's weight is not the one the adapter was made for; load it over the base model "
            "it was trained on."
        )
    return True
