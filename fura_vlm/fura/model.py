"""Puts FuRA adapters into a model, and takes them out again: PEFT's tuner for the method."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils import AuxiliaryTrainingWrapper, get_quantization_kwargs, resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn

from fura_vlm.fura.basis import effective_values
from fura_vlm.fura.config import FuraConfig
from fura_vlm.fura.errors import FuraError
from fura_vlm.fura.gate import join_gate
from fura_vlm.fura.joint import join_attention
from fura_vlm.fura.layer import FuraLayer, FuraLinear, matches_pattern, pattern_value
from fura_vlm.fura.weights import LINEAR, compare_fingerprints, dense_weight, fingerprint, gathered

logger = logging.getLogger(__name__)


class FuraModel(BaseTuner):
    """A model with FuRA adapters; made by `peft.get_peft_model` and `peft.PeftModel.from_pretrained`.

    Raises (from adding or loading an adapter, which leaves the model as it was):
        NoMatchingPeftModuleError: no target matches anything; PEFT's own, a ValueError.
        FuraError: a target is not a Linear; it lies in the vision tower of a vision-language model without being
            named there; its weight is tied, is not 2-D, holds NaN or Inf, cannot be dequantised, is offloaded,
            or has a dimension that cannot be cut into blocks; the base model is not the one a loaded adapter
            was made for.
    """

    prefix: str = "fura_"
    tuner_layer_cls = FuraLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: FuraConfig, model_config: dict) -> FuraConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _prepare_model(self, peft_config: FuraConfig, model: nn.Module) -> None:
        """What can be refused before the model is touched."""
        if peft_config.delta_only and not peft_config.inference_mode:
            raise FuraError(
                "FuRA: this adapter was exported for inference and cannot be trained; load the full adapter "
                "instead, or this one with is_trainable=False."
            )
        merged = [layer for layer in _fura_layers(model) if layer.merged]
        if merged:
            warnings.warn("An adapter is merged; it is unmerged before another one is added.", stacklevel=2)
            for layer in merged:
                layer.unmerge()
        offloaded = next((name for name, p in model.named_parameters() if p.is_meta), None)
        if offloaded and getattr(model, "hf_device_map", None):
            raise FuraError(
                f"{offloaded.rpartition('.')[0]}: accelerate keeps its weight on CPU or disk until it is used, and "
                "FuRA needs it in place; load the base without offloading, quantised if it is too large."
            )
        if peft_config.base_fingerprint is None:
            _check_vision(model, peft_config, self._check_target_module_exists)
        else:
            _check_base(model, peft_config.base_fingerprint)
        self._shared_weights = _shared_weights(model)
        self._all_linear = [target.lower() for target in _targets(peft_config)] == ["all-linear"]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Add an adapter; see the base class. What a user may not have meant is said in one log line each."""
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        merged = _merged(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            _withdraw(model, adapter_name)
            _merge_only(merged)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
            raise
        config = self.peft_config[adapter_name]
        layers = [layer for layer in _fura_layers(model) if adapter_name in layer.fura_adapters]
        for message in (*_oddities(config, adapter_name, layers), *self._untouched_experts(config, model)):
            logger.warning("FuRA: %s", message)
        if config.base_fingerprint is None and all(layer.fingerprint for layer in layers):
            # a copy: the caller's configuration is not tied to this base, and may be used for another one
            config = self.peft_config[adapter_name] = copy.copy(config)
            config.base_fingerprint = {layer.module_name: layer.fingerprint for layer in layers}

    def _untouched_experts(self, config: FuraConfig, model: nn.Module) -> Iterator[str]:
        """A word on weights that the configuration asks for and that no adapter can be put on: the experts that a
        mixture keeps in one tensor ``(experts, out, in)``, which no Linear holds."""

        def asked(*names: str) -> bool:
            if not self._all_linear:
                return self._check_target_module_exists(config, names[-1])
            probe = FuraConfig(target_modules=list(names), exclude_modules=config.exclude_modules)
            return all(self._check_target_module_exists(probe, name) for name in names)

        kept = set(config.modules_to_save or ())
        adapted = {part for layer in model.modules() if isinstance(layer, BaseTunerLayer) for part in layer.modules()}
        found = []
        for name, module in model.named_modules():
            is_other = isinstance(module, (*LINEAR, nn.modules.conv._ConvNd)) or module in adapted
            if is_other or kept & set(name.split(".")):
                continue
            for own, parameter in module.named_parameters(recurse=False):
                shape = getattr(parameter, "ds_shape", parameter.shape)
                whole = f"{name}.{own}"
                if len(shape) == 3 and min(shape) > 1 and asked(name, whole):
                    found.append(f"{whole} {tuple(shape)}")
        if found:
            yield (
                f"{found[0]} (of {len(found)} such) stays as it is: FuRA adapts weights of two dimensions, and the "
                "experts of a mixture are one weight of three. modules_to_save trains them in full, PEFT's LoRA adapts "
                "them with target_parameters."
            )

    def add_weighted_adapter(self, *args, **kwargs) -> None:
        """PEFT's name for a mixture of adapters, which FuRA does not make.

        Raises:
            FuraError: always; it says what to do instead.
        """
        raise FuraError(
            "FuRA: adapters are not combined into a new one by add_weighted_adapter. Several may be active at once, "
            "and their updates add: model.base_model.set_adapter(['first', 'second']), and merge_adapter() or "
            "merge_and_unload() writes the sum into the weights. For weights, use convert_to_lora and combine those."
        )

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        if isinstance(target, FuraLinear):
            target.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode)
            return
        quantization = get_quantization_kwargs(self)
        _check_linear(target, parent, current_key, resolve_quantization_backend(target, **quantization))
        tied = self._shared_weights.get(id(target._parameters.get("weight")))
        if tied:
            raise FuraError(
                f"{current_key}: its weight is tied to {', '.join(n for n in tied if n != current_key)}, "
                "which an adapter would not follow; untie them (tie_word_embeddings=False) or exclude it."
            )
        layer = FuraLinear(target, adapter_name, peft_config, module_name=current_key, **quantization)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        """Put a module in another's place. Layers are made on their device, so nothing is to be moved.

        The base class also copies ``child.weight``, which a module of modules_to_save need not have: a LLaVA
        with its projector there could not be unloaded.
        """
        setattr(parent, child_name, new_module)
        join_gate(parent)
        join_attention(parent)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Give adapter parameters the base's dtype; with autocast_adapter_dtype at least float32."""
        for layer in _fura_layers(self.model):
            if adapter_name in layer.fura_adapters:
                layer.ensure_basis(compute=False)  # PEFT calls this before and after it loads an adapter
                dtype = layer.base_dtype
                if autocast_adapter_dtype:
                    dtype = torch.promote_types(dtype, torch.float32)
                layer.cast_trained(adapter_name, dtype)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights (see [`FuraLinear.merge`]); if one layer cannot be, none is.

        Raises:
            FuraError: safe_merge found NaN or Inf in a layer, named in the message.
        """
        names = self._known(adapter_names)
        layers = _fura_layers(self.model)
        if all(set(names) & set(layer.fura_adapters) <= set(layer.merged_adapters) for layer in layers):
            warnings.warn(
                f"{layers[0].module_name}: {', '.join(names)} is merged already, in this and every layer; "
                "nothing to do.",
                stacklevel=2,
            )
            return
        before = _merged(self.model)
        try:
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        except Exception:
            _merge_only(before)
            raise

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        names = self._known(adapter_names)
        if merge and safe_merge:  # look at every layer before the first one is replaced
            for layer in _fura_layers(self.model):
                with onload_layer(layer):
                    layer.check_merge(names)
        return super()._unload_and_optionally_merge(merge, progressbar, False, adapter_names)

    def _known(self, adapter_names: list[str] | None) -> list[str]:
        """The names, or the active adapters'. Raises FuraError if there is no such adapter."""
        names = self.active_adapters if adapter_names is None else adapter_names
        unknown = sorted(set(names) - set(self.peft_config))
        if unknown:
            raise FuraError(f"FuRA: there is no adapter {', '.join(unknown)}, only {', '.join(self.peft_config)}.")
        return names

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """Inside, a call with ``adapter_names=`` hands each sample's adapter name on to the adapted layers.

        Raises:
            FuraError: the model is in training mode or merged, beam search is on, or a name is no adapter's.
        """
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise FuraError("adapter_names: mixed batches are for inference; call model.eval() first.")
        if any(layer.merged for layer in _fura_layers(self.model)):
            raise FuraError("adapter_names: mixed batches need the base weights; call unmerge_adapter() first.")
        if (kwargs.get("num_beams") or 1) > 1:
            raise FuraError("adapter_names: mixed batches do not work with beam search; set num_beams=1.")
        self._known([name for name in adapter_names if name != "__base__"])
        hook = partial(_name_adapters, adapter_names=list(adapter_names))
        receivers = [m for m in self.modules() if isinstance(m, (FuraLayer, AuxiliaryTrainingWrapper))]
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in receivers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for name, layer in model.named_modules():
            if not isinstance(layer, FuraLayer) or adapter_name not in layer.fura_adapters:
                continue
            adapter = layer.fura_adapters[adapter_name]
            keys = {part: f"{name}.fura_{part}.{adapter_name}" for part in ("V", "s0")}
            if not adapter.is_ready:  # the state dict was taken before, with zeros for the basis
                layer.ensure_basis()
                selected |= {key: adapter.get(part) for part, key in keys.items() if key in selected}
            # what the adapter was trained with, so that it is the same one over a base of a finer dtype
            if keys["s0"] in selected:
                selected[keys["s0"]] = effective_values(selected[keys["s0"]], layer.base_dtype)
        return selected

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Read by DistributedDataParallel, through PeftModel. The frozen basis is the same in every process;
        broadcasting it before each forward would cost as much traffic as the gradients do."""
        return [f"base_model.{name}" for name, _ in self.named_buffers() if ".fura_" in name]


def _fura_layers(model: nn.Module) -> list[FuraLayer]:
    return [module for module in model.modules() if isinstance(module, FuraLayer)]


def _oddities(config: FuraConfig, adapter_name: str, layers: list[FuraLayer]) -> Iterator[str]:
    """What of a new adapter is worth a word: values raised to the floor, blocks of a whole weight, idle entries."""
    adapters = {layer: layer.fura_adapters[adapter_name] for layer in layers}
    guarded = sum(adapter.guarded for adapter in adapters.values())
    if guarded:
        total = sum(adapter.s0.numel() for adapter in adapters.values())
        yield f"{guarded} of {total} singular values lie below the floor of their block and are raised to it."
    unasked = config.num_blocks is None and config.block_size is None
    single = [
        layer
        for layer, adapter in adapters.items()
        if adapter.blocks[0] == 1 and pattern_value(config.block_size_pattern, layer.module_name) is None
    ]
    if unasked and single:
        size = adapters[single[0]].blocks[1]
        yield (
            f"{single[0].module_name} (of {len(single)} such) has a prime dimension, {size}, and is one single block."
        )
    names = [layer.module_name for layer in layers]
    for entry in sorted([] if isinstance(config.target_modules, str) else config.target_modules):
        if not any(f".{name}".endswith(f".{entry}") for name in names):
            yield f"{entry!r} in target_modules matches no module."
    for pattern in config.block_size_pattern:
        if not any(matches_pattern(pattern, name) for name in names):
            yield f"{pattern!r} in block_size_pattern matches no adapted module."


def _withdraw(model: nn.Module, adapter_name: str) -> None:
    """Undo an injection that failed half way."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, FuraLayer) or adapter_name not in layer.fura_adapters:
            continue
        if len(layer.fura_adapters) > 1:
            layer.delete_adapter(adapter_name)
        else:
            path, _, child = name.rpartition(".")
            parent = model.get_submodule(path)
            setattr(parent, child, layer.base_layer)
            join_gate(parent)
            join_attention(parent)


def _merged(model: nn.Module) -> dict[FuraLayer, list[str]]:
    """The adapters merged into each layer."""
    return {layer: list(layer.merged_adapters) for layer in _fura_layers(model)}


def _merge_only(merged: dict[FuraLayer, list[str]]) -> None:
    """Go back to an earlier result of ``_merged``."""
    for layer, names in merged.items():
        if layer.merged_adapters == names:
            continue
        if layer.merged:
            layer.unmerge()
        if names:
            layer.merge(adapter_names=names)


def _name_adapters(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    """Forward pre-hook: pass the samples' adapter names to a layer."""
    return args, {**kwargs, "adapter_names": adapter_names}


def _check_linear(target: nn.Module, parent: nn.Module, name: str, backend: QuantizationBackend | None) -> None:
    """Refuse what FuRA cannot adapt. ``backend``: of the target's quantisation, or None."""
    linear = isinstance(target, LINEAR) if backend is None else backend.layer_type == "linear"
    if not linear or isinstance(target, BaseTunerLayer):
        raise FuraError(
            f"{name}: FuRA adapts torch.nn.Linear, plain or quantised, and transformers' Conv1D, and this is "
            f"{type(target).__name__}; leave it out of target_modules, or name it in exclude_modules."
        )
    if nn.utils.parametrize.is_parametrized(target, "weight"):
        raise FuraError(f"{name}: a parametrization makes its weight, which an adapter would not follow; exclude it.")
    if isinstance(parent, nn.MultiheadAttention):
        raise FuraError(f"{name}: torch.nn.MultiheadAttention reads its weight without calling it; exclude it.")


def _shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names of all modules that hold a weight, by the parameter's id, where there is more than one."""
    names = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            names[id(weight)].append(name)
    return {key: found for key, found in names.items() if len(found) > 1}


def _targets(config: FuraConfig) -> list[str]:
    return [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules)


def _check_vision(model: nn.Module, config: FuraConfig, matches) -> None:
    """Refuse targets inside the vision tower of a composite model, unless an entry of target_modules names
    it.

    A tower is any submodule whose own configuration is of the class of the model's ``vision_config``. Its
    attention has the same names (``q_proj``, ...) as the language model's, so that a plain list of suffixes,
    or ``"all-linear"``, would adapt it by mistake.
    """
    vision_config = getattr(getattr(model, "config", None), "vision_config", None)
    if vision_config is None:
        return
    towers = [n for n, m in model.named_modules() if n and type(getattr(m, "config", None)) is type(vision_config)]
    towers = [tower for tower in towers if not any(tower.startswith(other + ".") for other in towers)]
    targets = _targets(config)
    for tower in towers:
        short = tower.rpartition(".")[2]
        if any(short in re.sub(r"\(\?<?!.*?\)", "", entry) for entry in targets):  # what a regex excludes is not asked
            continue
        for name, module in model.get_submodule(tower).named_modules(prefix=tower):
            if [entry.lower() for entry in targets] == ["all-linear"]:
                probe = FuraConfig(target_modules=[name], exclude_modules=config.exclude_modules)
                hit = isinstance(module, LINEAR) and matches(probe, name)
            else:
                hit = matches(config, name)
            if hit:
                raise FuraError(
                    f"{name}: target_modules matches the vision tower without naming it; leave it out with "
                    f"exclude_modules=r'.*{short}.*', or adapt it by naming {short!r} in target_modules."
                )


def _check_base(model: nn.Module, wanted: dict[str, str]) -> None:
    """Compare the base weights with the fingerprints of an adapter about to be loaded.

    Raises:
        FuraError: a module is missing or its weight differs; the first one is named.
    """
    modules = dict(model.named_modules())
    missing = sorted(set(wanted) - set(modules))
    if missing:
        raise FuraError(
            f"{missing[0]}: the adapter was made for a base model with this module, and this model lacks it; load it "
            "over the base model it was trained on."
        )
    incomparable = []
    for name in (name for name in modules if name in wanted):
        module = modules[name]
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        backend = resolve_quantization_backend(layer, **get_quantization_kwargs(model))
        if any(parameter.is_meta for parameter in layer.parameters()) or not (backend or hasattr(layer, "weight")):
            continue
        with gathered(layer):
            try:
                found = fingerprint(dense_weight(layer, backend), backend)
            except (TypeError, NotImplementedError):  # cannot be dequantised: nothing to compare
                incomparable.append(name)
                continue
        if not compare_fingerprints(name, wanted[name], found):
            incomparable.append(name)
    if incomparable:
        logger.warning(
            "FuRA: %s (of %d such) is stored in another format than in the base the adapter was made for, and its "
            "values were not compared.",
            incomparable[0],
            len(incomparable),
        )
