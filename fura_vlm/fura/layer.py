"""The adapted Linear: the base layer, left as it is, behind a block-diagonal map of its input or output."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from fura_vlm.fura.adapter import FuraAdapter
from fura_vlm.fura.basis import (
    apply_blocks,
    block_shape,
    computing_dtype,
    fold_pays,
    folded_linear,
    mix,
    multiply_columns,
    narrowed,
)
from fura_vlm.fura.config import FuraConfig
from fura_vlm.fura.errors import FuraError
from fura_vlm.fura.kernels import gated
from fura_vlm.fura.weights import (
    LINEAR,
    SavedWeight,
    dense_weight,
    fingerprint,
    gathered,
    is_partitioned,
    is_whole,
    keep_differentiable,
)


class FuraLayer(BaseTunerLayer):
    """The FuRA adapters of one Linear, by name in ``fura_adapters``: a `FuraAdapter` each. Their tensors are registered
    here, in ``fura_dR`` and the other containers: see there.

    With several adapters active their block matrices add, as LoRA's updates do, so that their order is of no
    importance and merging gives the same: ``y = (I + sum D_out) W (I + sum D_in) x + bias``.
    """

    adapter_layer_names = ("fura_dR", "fura_ds")
    other_param_names = ("fura_V", "fura_s0", "fura_D", "fura_adapters")

    def __init__(self, base_layer: nn.Module, module_name: str, **kwargs) -> None:
        self.base_layer = base_layer
        self.module_name = module_name  # for messages
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.fura_dR = nn.ParameterDict()
        self.fura_ds = nn.ParameterDict()
        self.fura_V = BufferDict(persistent=True)
        self.fura_s0 = BufferDict(persistent=True)
        self.fura_D = BufferDict(persistent=True)
        self.fura_adapters: dict[str, FuraAdapter] = {}
        self.fingerprint: str | None = None
        self._disable_adapters = False
        self.merged_adapters = []
        self._unmerged: SavedWeight | None = None  # the base weight, while it is replaced by a merged one
        # block matrices while answering, by adapters and dtype, each with the version of what it was computed from;
        # DeepSpeed writes to parameters without a change of their version, but not in evaluation mode
        self._kept_blocks: dict[tuple, tuple[list[tuple[int, int]] | None, list[torch.Tensor]]] = {}
        # whether they keep their memory through training, too, as a CUDA graph needs it
        self.blocks_stay = False

    def _get_available_adapters(self) -> set[str]:
        return set(self.fura_adapters)

    def update_layer(self, adapter_name: str, config: FuraConfig, inference_mode: bool = False) -> None:
        """Add an adapter.

        Its basis is computed here, unless the configuration comes from a saved adapter: then the basis is
        about to be loaded with the weights, and is computed on first use only if it was not.

        Raises:
            FuraError: the weight is not 2-D, holds NaN or Inf, cannot be dequantised, or its dimension cannot
                be cut into blocks.
        """
        layer = self.get_base_layer()
        weight = getattr(layer, "weight", None)
        shape = tuple(getattr(weight, "ds_shape", getattr(weight, "shape", ())))
        if self.quantization_backend is None and len(shape) != 2:
            raise FuraError(f"{self.module_name}: FuRA adapts 2-D weights and this one has shape {shape}; exclude it.")

        if not inference_mode:
            keep_differentiable(layer, self.quantization_backend, self.module_name)

        dim, other = self.in_features, self.out_features
        if config.train_side == "output":
            dim, other = other, dim
        size = pattern_value(config.block_size_pattern, self.module_name)
        if size is not None:
            N, b = block_shape(dim, None, size, self.module_name)
        else:
            N, b = block_shape(dim, config.num_blocks, config.block_size, self.module_name)

        device = self.base_device
        self._kept_blocks.clear()
        containers = {
            "dR": self.fura_dR, "ds": self.fura_ds, "V": self.fura_V, "s0": self.fura_s0, "D": self.fura_D
        }  # fmt: skip
        self.fura_adapters[adapter_name] = FuraAdapter(
            adapter_name, containers, config, (N, b), min(b, other), self.base_dtype, device
        )
        if not config.delta_only and config.base_fingerprint is None and device != torch.device("meta"):
            self.compute_basis(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def base_device(self) -> torch.device | None:
        layer = self.get_base_layer()
        device, _ = self._get_base_layer_device_and_dtype(layer)
        if device is None and getattr(layer, "device", None) is not None:  # HQQ: no weight to ask
            device = torch.device(layer.device)
        return device

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype the base layer computes in; float32 where a quantised layer does not say."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return dtype if dtype is not None and dtype.is_floating_point else torch.float32

    def get_base_weight(self) -> torch.Tensor:
        """The base weight ``(out, in)``, dequantised if need be. Not a copy otherwise.

        Raises:
            FuraError: it is quantised in a way that cannot be dequantised.
        """
        try:
            return dense_weight(self.get_base_layer(), self.quantization_backend)
        except (TypeError, NotImplementedError) as error:
            raise FuraError(
                f"{self.module_name}: its {self.quantization_backend.backend_name} weight cannot be dequantised, "
                "which a new adapter and merging need; make the adapter over an NF4 or a dense base, and load it "
                "over this one."
            ) from error

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """Put a dense weight ``(out, in)`` in the place of the base's, quantised anew if need be."""
        is_transposed = isinstance(self.get_base_layer(), Conv1D)
        super().set_base_weight(weight_data.T.contiguous() if is_transposed else weight_data)

    @torch.inference_mode(False)  # the basis may be made by the first use, and trained with later
    @torch.no_grad()
    def compute_basis(self, adapter_name: str) -> None:
        """Decompose the base weight into the adapter's V and s0, and take the weight's fingerprint.

        Raises:
            FuraError: the weight holds NaN or Inf, or cannot be dequantised.
        """
        with gathered(self.get_base_layer()):
            weight = self.get_base_weight()
            if not torch.isfinite(weight).all():
                raise FuraError(f"{self.module_name}: the base weight holds NaN or Inf; repair or exclude it.")
            self.fingerprint = fingerprint(weight, self.quantization_backend)
            self.fura_adapters[adapter_name].compute_basis(weight)
        self._kept_blocks.clear()

    def ensure_basis(self, compute: bool = True) -> None:
        """Take note of every basis that has been loaded, and compute those that were not.

        Args:
            compute: False leaves them for the first use of the adapter: the weights may be about to be
                loaded.
        """
        for name, adapter in self.fura_adapters.items():
            if not adapter.is_ready and not adapter.look_at_basis() and compute and not adapter.s0.is_meta:
                self.compute_basis(name)

    def delta(
        self, adapter_name: str, dtype: torch.dtype | None = None, resolution: torch.dtype | None = None
    ) -> torch.Tensor:
        """The adapter's block matrices as they multiply a column from the left: ``(N, b, b)``.

        ``y = W (x + D x)`` for an adapter of the input side, ``y = W x + D (W x)`` for one of the output
        side.

        Args:
            dtype: dtype to compute in; None: the widest of the adapter's own.
            resolution: dtype of the weight and of what it is multiplied with, the coarser one; None: that of the base.
                In a 16-bit one small singular values are raised, see `basis.divisor_floor`.
        """
        resolution = self.base_dtype if resolution is None else resolution
        return self.fura_adapters[adapter_name].delta(dtype, resolution)

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """What the adapter adds to the base weight: ``(out, in)``, in float32 or wider; like PEFT, as the base layer
        holds it: for GPT-2's Conv1D ``(in, out)``.

        Raises:
            FuraError: an adapter is merged, so that the base weight is not what it was.
        """
        if self.merged:
            merged = ", ".join(self.merged_adapters)
            raise FuraError(f"{self.module_name}: {merged} is merged into its weight; call unmerge_adapter() first.")
        weight = self.get_base_weight()
        delta = self._adapted(weight, [adapter_name]) - weight
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's `convert_to_lora` takes what `get_delta_weight` gives, and approximates it at the rank asked for."""
        return True

    def _adapted(self, weight: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """``(I + sum D_out) W (I + sum D_in)`` in float32, or the weight's dtype if wider."""
        self.ensure_basis()
        resolution = weight.dtype
        weight = weight.to(torch.promote_types(resolution, torch.float32))
        by_side = {"input": [], "output": []}
        for name in adapter_names:
            by_side[self.fura_adapters[name].side].append(self.delta(name, weight.dtype, resolution))
        weight = sum((multiply_columns(weight, D) for D in by_side["input"]), weight)
        return sum((multiply_columns(weight.T, D.mT).T for D in by_side["output"]), weight)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; see the base class."""
        self._kept_blocks.clear()
        super().delete_adapter(adapter_name)

    def cast_trained(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Cast what an adapter trains (or its D, if exported for inference); the basis keeps its dtype."""
        self._kept_blocks.clear()
        self.fura_adapters[adapter_name].cast_trained(dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        """Move an adapter to the base layer's device. Its dtypes stay: the base's may be coarser."""
        device = self.base_device if device is None else device
        self._kept_blocks.clear()
        if device is not None and adapter_name in self.fura_adapters:
            self.fura_adapters[adapter_name].move(device)


class FuraLinear(nn.Module, FuraLayer):
    """A Linear, plain or quantised, or GPT-2's Conv1D, with FuRA adapters."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: FuraConfig, module_name: str, **kwargs
    ) -> None:
        super().__init__()
        FuraLayer.__init__(self, base_layer, module_name, **kwargs)
        self._active_adapter = adapter_name
        self.register_load_state_dict_post_hook(_look_at_loaded_basis)
        self.update_layer(adapter_name, config, inference_mode=config.inference_mode)

    def train(self, mode: bool = True) -> FuraLinear:
        if self.blocks_stay:
            self._kept_blocks = {key: (None, blocks) for key, (_, blocks) in self._kept_blocks.items()}
        else:
            self._kept_blocks.clear()
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> FuraLinear:
        """Moves the layer as always, but its basis keeps its dtype (`basis_dtype`) when the model is cast.

        In float16 a small ``s0`` would become the zero that ``ds`` is divided by. In a weight cast to 16 bits the
        directions of small singular values are lost, and what was learned along them with them (`divisor_floor`):
        merge before the cast to keep it.
        """
        self._kept_blocks.clear()
        before = [
            (adapter, adapter.V, adapter.s0) for adapter in self.fura_adapters.values() if not adapter.is_exported
        ]
        super()._apply(fn, recurse)
        for adapter, V, s0 in before:
            adapter.keep_basis(V, s0)
        return self

    def forward(
        self,
        x: torch.Tensor,
        *args,
        adapter_names: list[str] | None = None,
        up: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """``x (..., in)`` to ``(..., out)``; while untrained, the base layer's own result bit for bit.

        Args:
            adapter_names: one adapter (or ``"__base__"``) per sample of the batch, instead of the active
                ones.
            up: like x; if given, the layer's input is ``silu(x) * up``, and while training no copy of it is kept where
                it can be had again at no cost.
        """
        mixed = adapter_names is not None
        if up is not None and (self.disable_adapters or self.merged or mixed or up.dtype != x.dtype):
            x, up = gated(x, up), None
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        if not all(adapter.is_ready for adapter in self.fura_adapters.values()):
            self.ensure_basis()
        if adapter_names is not None:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        return self._forward_adapted(x, self.active_adapters, *args, up=up, **kwargs)

    def _forward_adapted(
        self, x: torch.Tensor, adapter_names: list[str], *args, up: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        layer, computed = self.base_layer, computing_dtype(x)
        names = [name for name in adapter_names if name in self.fura_adapters]
        if self._is_finer(computed) and any(self.fura_adapters[name].is_too_coarse(computed) for name in names):
            return linear(gated(x, up), self._adapted(self.get_base_weight(), names), layer.bias)
        inner = self._blocks(names, "input", x.dtype, computed)
        outer = self._blocks(names, "output", x.dtype, computed)
        folds = len(inner) == 1 and type(layer) is nn.Linear and fold_pays(x, layer.weight, inner[0])
        if folds and not (args or kwargs) and self._is_plain():
            y = folded_linear(x, layer.weight, layer.bias, inner[0], up)
        else:
            y = layer(mix(x, inner, up), *args, **kwargs)
        bias = getattr(self.get_base_layer(), "bias", None) if outer else None
        if bias is None:
            return mix(y, outer)
        return sum((apply_blocks(y - bias, D) for D in outer), y)

    def _is_finer(self, dtype: torch.dtype) -> bool:
        """Whether the weight holds more than products in this dtype take of it, as under autocast.

        Then small singular values, which ``x + D x`` in this dtype has no room for, are in ``W + W D`` where they
        should be, and what is trained is what is merged: it is rounded once, as autocast rounds W.
        """
        return (
            dtype.itemsize < 4
            and type(self.base_layer) in LINEAR
            and self.base_layer.weight.dtype.itemsize >= 4
            and self._is_plain()
        )

    def _blocks(
        self, adapter_names: list[str], side: str, dtype: torch.dtype, computed: torch.dtype
    ) -> list[torch.Tensor]:
        """The block matrices of the named adapters on one side, summed where they have the same shape.

        Args:
            dtype: of x.
            computed: of its product with the weight.

        Between the tokens of an answer they stay the same: in evaluation mode, without gradients, they are kept.
        """
        names = [name for name in adapter_names if self.fura_adapters[name].side == side]
        if not names:
            return []
        key, version = (*names, dtype, computed), self._written(names)
        if version is not None and key in self._kept_blocks and self._kept_blocks[key][0] == version:
            return self._kept_blocks[key][1]
        by_shape: dict[torch.Size, torch.Tensor] = {}
        for name in names:
            D = self.delta(name, resolution=computed)
            by_shape[D.shape] = by_shape[D.shape] + D if D.shape in by_shape else D
        blocks = [narrowed(D, computed) for D in by_shape.values()]
        if version is not None:
            blocks = [D.to(dtype) for D in blocks]
            if self.blocks_stay and key in self._kept_blocks:
                blocks = [kept.copy_(D) for kept, D in zip(self._kept_blocks[key][1], blocks, strict=True)]
            self._kept_blocks[key] = version, blocks
        return blocks

    def kept_blocks(self) -> list[torch.Tensor]:
        """What is kept of the adapters for answering."""
        return [D for _, blocks in self._kept_blocks.values() for D in blocks]

    def _written(self, adapter_names: list[str]) -> list[tuple[int, int]] | None:
        """A value that changes whenever a tensor of the adapters is written to or replaced, or None if what follows
        from them is not to be kept: it needs gradients, or these tensors do not tell (compiled, partitioned, made in
        inference mode). What is written to ``tensor.data`` is seen after the next `train` or `eval`."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        tensors = [tensor for name in adapter_names for tensor in self.fura_adapters[name].tensors()]
        if any(tensor.is_inference() or is_partitioned(tensor) for tensor in tensors):
            return None
        try:
            return [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        except RuntimeError:  # no memory of its own, as within torch.func's transforms
            return None

    def _is_plain(self) -> bool:
        """Whether all that calling the base layer, one of LINEAR, does is multiply by its frozen weight and add its
        frozen bias."""
        layer = self.base_layer
        return (
            self.quantization_backend is None
            and not (layer.weight.requires_grad or layer.bias is not None and layer.bias.requires_grad)
            and not (layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook"))
            and not is_partitioned(layer.weight)
        )

    def _forward_mixed(self, x: torch.Tensor, adapter_names: list[str], *args, **kwargs) -> torch.Tensor:
        if len(adapter_names) != len(x):
            raise FuraError(
                f"{self.module_name}: its input holds {len(x)} samples and adapter_names {len(adapter_names)} names."
            )
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for name in dict.fromkeys(adapter_names):
            rows = [i for i, other in enumerate(adapter_names) if other == name]
            y[rows] = self._forward_adapted(x[rows], [name], *args, **kwargs).to(y.dtype)
        return y

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base weight by the adapted one, computed in float32 or wider and rounded once.

        The original is kept beside it until [`unmerge`], which puts it back: no arithmetic undoes the
        rounding of a merge. That costs one more copy of each adapted weight while merged; `merge_and_unload`
        frees it layer by layer.

        Args:
            safe_merge: raise rather than write a weight that holds NaN or Inf.
            adapter_names: adapters to merge; None: the active ones.

        Raises:
            FuraError: safe_merge found NaN or Inf; the weight cannot be dequantised, or is partitioned.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.fura_adapters]
        if not names:
            return
        if not is_whole(self.get_base_layer()):
            raise FuraError(
                f"{self.module_name}: its weight is partitioned over processes; save the adapter and merge it in "
                "one process, or merge inside deepspeed.zero.GatheredParameters."
            )
        if self.merged:
            names = self.merged_adapters + names
            self.unmerge()
        layer = self.get_base_layer()
        original = self.get_base_weight()
        weight = self._adapted(original, names).to(original.dtype)
        if safe_merge:
            self._check_finite(weight, names)
        self._unmerged = SavedWeight(layer, self.quantization_backend)
        self.set_base_weight(weight)
        self.merged_adapters = names

    @torch.no_grad()
    def check_merge(self, adapter_names: list[str]) -> None:
        """Raise FuraError, as `merge(safe_merge=True)` would, without merging."""
        names = [name for name in adapter_names if name in self.fura_adapters and name not in self.merged_adapters]
        weight = self.get_base_weight()
        self._check_finite(self._adapted(weight, names).to(weight.dtype), names)

    def _check_finite(self, weight: torch.Tensor, adapter_names: list[str]) -> None:
        if not torch.isfinite(weight).all():
            names, dtype = ", ".join(adapter_names), str(weight.dtype).removeprefix("torch.")
            raise FuraError(
                f"{self.module_name}: merging {names} gives NaN or Inf in {dtype}; the adapter is broken, or has "
                "outgrown what the dtype can hold."
            )

    def unmerge(self) -> None:
        """Put the original base weight back, exactly."""
        if not self.merged:
            warnings.warn(f"{self.module_name}: no adapter is merged; nothing to unmerge.", stacklevel=2)
            return
        layer = self._unmerged.restore()
        if self.get_base_layer() is not layer:  # some quantisation backends replace the layer itself
            self.base_layer = layer
        self._unmerged = None
        self.merged_adapters = []

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Loads as always, but refuses the tensors of an adapter with other blocks.

        Raises:
            FuraError: a tensor has another shape, is missing, or is trained in one of the two only; one of the two
                was exported for inference.
        """
        # PEFT gives a key an adapter's name only where that adapter has such a tensor
        if f"{prefix}fura_D" in state_dict or f"{prefix}fura_dR" in state_dict:
            raise FuraError(
                f"{self.module_name}: the model has an adapter of the same name and of another kind (one is for "
                "training, one was exported for inference); load the saved one under another name."
            )
        for name, adapter in self.fura_adapters.items():
            if adapter.is_exported:
                continue
            saved = {part: state_dict.get(f"{prefix}fura_{part}.{name}") for part in ("dR", "ds", "V", "s0")}
            if all(tensor is None for tensor in saved.values()):
                continue
            for part, tensor in saved.items():
                if tensor is None and part in ("V", "s0"):
                    continue  # only what is trained was saved; the basis stays
                own = adapter.get(part)
                if tensor is not None and own is not None and tensor.shape == own.shape:
                    continue  # under ZeRO-3 also what is left of it in a process, as a checkpoint may hold it
                there, here = ("none" if t is None else list(getattr(t, "ds_shape", t.shape)) for t in (tensor, own))
                if there != here:
                    raise FuraError(
                        f"{self.module_name}: the saved adapter's fura_{part} is {there} and that of adapter {name!r} "
                        f"{here}; load it under another name, or add the adapter with the blocks and "
                        "train_singular_values of the saved one."
                    )
            adapter.forget_basis()
        self._kept_blocks.clear()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __repr__(self) -> str:
        return "fura." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def _look_at_loaded_basis(layer: FuraLinear, _) -> None:
    layer.ensure_basis(compute=False)


def singular_values(model: nn.Module) -> list[nn.Parameter]:
    """What the adapters of a model train of the singular values, ``ds (N, r)`` of each."""
    return [ds for layer in model.modules() if isinstance(layer, FuraLayer) for ds in layer.fura_ds.values()]


def matches_pattern(pattern: str, module_name: str) -> bool:
    """Whether a key of block_size_pattern matches the module's full name, or a part of it after a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", module_name) is not None


def pattern_value(patterns: dict[str, int], module_name: str) -> int | None:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in patterns.items() if matches_pattern(pattern, module_name)), None)
