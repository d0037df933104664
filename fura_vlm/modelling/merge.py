"""Merges an adapter into its base weight by weight, on the CPU, in the memory of one shard and one layer."""

from __future__ import annotations

from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

from fura_vlm.families.base import model_class
from fura_vlm.fura.weights import compare_fingerprints, fingerprint
from fura_vlm.modelling.config import MergeConfig
from fura_vlm.modelling.load import find_parts, load_adapter, load_family, read_adapter_config, read_config
from fura_vlm.modelling.shards import (
    ModelError,
    WeightFiles,
    building,
    parameter_names,
    refuse_existing,
    size_of,
    write_sharded,
)


def merge(config: MergeConfig) -> None:
    """Writes base and adapter merged into one plain model with its processor; the names are those of the base's files.

    The base is read from its files, never as a whole, and not quantised: an adapter trained over a base in 4 bits is
    merged into the original base. What is adapted is computed in float32 and rounded once.

    Raises:
        ModelError: ``output_dir`` exists, ``model`` has no adapter, adapter and base do not belong together, a file is
            missing or damaged, or the disk has no room.
    """
    refuse_existing(Path(config.output_dir))
    base, adapter, processor = find_parts(config.model)
    if adapter is None and not Path(base).expanduser().is_dir():
        raise ModelError(f"There is neither a run nor an adapter at {config.model}: give the folder of one")
    if adapter is None:
        raise ModelError(f"{config.model} is a model without an adapter: there is nothing to merge")
    family = load_family(processor, base)
    files = WeightFiles(base, "model")
    merging = Merging(base, adapter, files)
    tensors = files.tensors
    if config.dtype != "auto":
        merging.config.dtype = dtype = getattr(torch, config.dtype)
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    with building(config.output_dir, size_of(tensors)) as folder:
        write_sharded(folder, tensors, merging.read, config.max_shard_size)
        merging.config.save_pretrained(folder)
        _generation_config(base, merging.config).save_pretrained(folder)
        family.processor.save_pretrained(folder)
    print(f"The merged model is in {config.output_dir}")


class Merging:
    """The base's weights with the adapter merged in, by their names in the base's files.

    The adapter is loaded by PEFT over a model whose weights take no memory. When a weight of a layer is asked for, the
    weights of that layer are loaded, PEFT's layer merges, and then they are freed together with the adapter of that
    layer.

    Raises:
        ModelError: adapter and base do not belong together, or the method cannot be merged.
    """

    def __init__(self, base: str, adapter: str, files: WeightFiles):
        self.files, self.adapter = files, adapter
        self.config = read_config(base)
        if getattr(self.config, "quantization_config", None):
            raise ModelError(
                f"{base} is stored quantised, so nothing can be merged into it: name the model it was made from"
            )
        with torch.device("meta"):
            model = model_class(self.config).from_config(self.config)
        self._name = parameter_names(model, files)
        self._parameter = {name: parameter for parameter, name in self._name.items()}
        peft_config = read_adapter_config(adapter)
        if peft_config.is_prompt_learning:
            raise ModelError(f"{adapter} is of the method {peft_config.peft_type.value}, which cannot be merged")
        self._fingerprints = getattr(peft_config, "base_fingerprint", None) or {}
        if self._fingerprints:  # to be compared when there are weights
            peft_config.base_fingerprint = {}
        self._nothing = _empty(model)
        peft = load_adapter(model, adapter, config=peft_config, low_cpu_mem_usage=True, torch_device="cpu")
        self.model = peft.get_base_model()
        self._layers: dict[str, tuple[str, BaseTunerLayer]] = {}
        self._ready: dict[str, torch.Tensor] = {}  # by parameter: what takes the place of the base's
        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer):
                self._layers |= {f"{name}.{part}": (name, module) for part, _ in _weights(module.get_base_layer())}
            elif isinstance(module, ModulesToSaveWrapper):
                saved = module.modules_to_save[module.active_adapter]
                self._ready |= {f"{name}.{part}": weight.data for part, weight in saved.named_parameters()}
            elif isinstance(module, AuxiliaryTrainingWrapper):
                raise ModelError(f"{adapter} trains single rows of {name}, which cannot be merged from files")
            else:  # biases that PEFT loaded beside the adapter
                loaded = {f"{name}.{part}": weight.data for part, weight in _weights(module) if self._is_there(weight)}
                self._ready |= {parameter: data for parameter, data in loaded.items() if parameter in self._name}

        if tied := sorted((self._layers.keys() | self._ready.keys()) - self._name.keys()):
            raise ModelError(
                f"{adapter} trains {tied[0]}, which the files at {base} do not hold, because it is tied to "
                "another weight"
            )

    def read(self, name: str) -> torch.Tensor:
        """The merged weight with this name in the files.

        Raises:
            ModelError: the weight is not the one that the adapter was trained over, or the merged one is not finite.
        """
        parameter = self._parameter.get(name)
        if parameter in self._layers:
            self._merge(*self._layers[parameter])
        if parameter in self._ready:
            return self._ready.pop(parameter)
        return self.files.read(name)

    def _is_there(self, weight: torch.Tensor) -> bool:
        return weight.data_ptr() != self._nothing.data_ptr()

    def _merge(self, module_name: str, layer: BaseTunerLayer) -> None:
        base = layer.get_base_layer()
        parts = dict(_weights(base))
        for part, weight in parts.items():
            if self._is_there(weight):  # a bias that came with the adapter
                continue
            weight = self.files.read(self._name[f"{module_name}.{part}"])
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            setattr(base, part, nn.Parameter(weight, requires_grad=False))
        try:
            if module_name in self._fingerprints:
                compare_fingerprints(module_name, self._fingerprints[module_name], fingerprint(base.weight, None))
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise ModelError(f"The adapter at {self.adapter} cannot be merged: {error}") from error
        for part in parts:
            self._ready[f"{module_name}.{part}"] = getattr(base, part).data
            del self._layers[f"{module_name}.{part}"]
        parent, _, child = module_name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, nn.Identity())  # frees the layer and its adapter


def _empty(model: nn.Module) -> torch.Tensor:
    """Gives a model on the meta device weights on the CPU that all share one number. PEFT puts adapters on the device
    and in the dtype of the weights they adapt; returns that number."""
    nothing = torch.zeros(())
    for module in model.modules():
        for name, weight in _weights(module):
            setattr(module, name, nn.Parameter(nothing.expand(weight.shape), requires_grad=False))
    return nothing


def _weights(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))


def _generation_config(base: str, config: PretrainedConfig) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(base)
    except OSError:  # it has none
        return GenerationConfig.from_model_config(config.get_text_config())
