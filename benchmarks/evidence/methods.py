"""A model as one of a study's methods trains it: the project's own methods, with what a study changes in them."""

from __future__ import annotations

import copy
import re

import torch
from peft import get_peft_model
from torch import nn

from evidence.configuration import EvidenceError, Study, Variant
from fura_vlm.families.base import Family
from fura_vlm.fura.layer import singular_values
from fura_vlm.modelling.load import load_base
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.methods import adapter_config, method_of, prepare, quantization


def train_config(study: Study, variant: Variant) -> TrainConfig:
    """The project's settings of a method."""
    return TrainConfig(model_name_or_path=study.model, method=variant.method)


def load(study: Study, variant: Variant | None, family: Family, device: str) -> nn.Module:
    """The base on a device, all of it frozen, in float32; in 4 bits for the methods that have it so."""
    if variant is None or not method_of(train_config(study, variant)).four_bits:
        return load_base(study.model, torch.float32).to(device)
    compute = torch.bfloat16 if device == "cuda" else torch.float32
    found = quantization(train_config(study, variant), family, compute)
    model = load_base(study.model, torch.float32, quantization_config=found)
    return model if next(model.parameters()).device.type == device else model.to(device)


def build(base: nn.Module, study: Study, variant: Variant, family: Family) -> nn.Module:
    """A copy of the base as the method trains it.

    Raises:
        EvidenceError: the method's settings are none of PEFT's for it.
    """
    config = train_config(study, variant)
    model = base if method_of(config).four_bits else copy.deepcopy(base)
    if method_of(config).adapter is None:
        model = prepare(model, config, family)
        if variant.trains == "linear":
            adapted = linear_names(model, study, family)
            model.requires_grad_(False)
            for name in adapted:
                model.get_submodule(name).weight.requires_grad_(True)
        return model
    known = adapter_config(config, family, model)
    shared = {name: getattr(known, name) for name in ("target_modules", "exclude_modules", "modules_to_save",
                                                      "base_model_name_or_path", "task_type")}  # fmt: skip
    if variant.method == "dora":
        shared["use_dora"] = True
    try:
        return get_peft_model(model, type(known)(**shared | variant.adapter))
    except TypeError as error:
        raise EvidenceError(f"{variant.name}: its adapter has a setting that PEFT does not know ({error})") from error


def linear_names(model: nn.Module, study: Study, family: Family) -> list[str]:
    """The linear layers of a plain model that the adapters adapt."""
    pattern = adapter_config(TrainConfig(model_name_or_path=study.model), family, model).target_modules
    return [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]


def groups(model: nn.Module, variant: Variant, family: Family, rate: float) -> list[dict]:
    """Groups for an optimizer: what is trained, with its learning rate."""
    factors = {id(p): variant.projector for part in family.parts(model).projectors for p in part.parameters()}
    factors |= {id(p): variant.singular_values for p in singular_values(model)}
    found: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            found.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
    return [{"params": parameters, "lr": rate * factor} for factor, parameters in found.items()]
