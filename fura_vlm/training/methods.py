"""The ways to fine-tune, behind one switch: how the base is loaded, and which of its weights are trained.

fura       full-rank adaptation, this project's own (arXiv 2605.22869)
qfura      the same over a 4-bit base
lora       PEFT's LoRA (arXiv 2106.09685)
qlora      the same over a 4-bit base (arXiv 2305.14314)
dora       PEFT's DoRA (arXiv 2402.09353)
full       every weight of the language model
projector  the projector alone, in full: LLaVA's first stage (arXiv 2310.03744)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch._functorch.config
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fura_vlm.families.base import Family
from fura_vlm.fura import FuraConfig, set_fp8_backward
from fura_vlm.fura.fp8 import MULTIPLE
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.errors import TrainingError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Args:
        adapter: makes PEFT's configuration from the recipe and from what all adapters share; ``None`` if the weights
            themselves are trained.
        learning_rate: used if the recipe gives none.
        four_bits: the base is kept in 4 bits.
        language: the language model takes part, and not the projector alone.
        ours: PEFT knows its adapters once ``fura_vlm`` is imported.
        without_four_bits, with_four_bits: the name of the same method with the base in the other form, if any.
    """

    adapter: Callable[[TrainConfig, dict], PeftConfig] | None
    learning_rate: float = 2e-4
    four_bits: bool = False
    language: bool = True
    ours: bool = False
    without_four_bits: str | None = None
    with_four_bits: str | None = None


def _fura(config: TrainConfig, shared: dict) -> PeftConfig:
    return FuraConfig(
        **shared,
        block_size=config.block_size,
        block_size_pattern=dict(config.block_size_pattern),
        train_singular_values=config.train_singular_values,
    )


def _lora(config: TrainConfig, shared: dict, **more) -> PeftConfig:
    return LoraConfig(**shared, r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, **more)


def _dora(config: TrainConfig, shared: dict) -> PeftConfig:
    return _lora(config, shared, use_dora=True)


def _nothing(config: TrainConfig, shared: dict) -> PeftConfig:
    """An adapter that adapts nothing and holds a whole projector."""
    return LoraConfig(**shared | {"target_modules": DUMMY_TARGET_MODULES})


METHODS = {
    "fura": Method(_fura, ours=True, with_four_bits="qfura"),
    "qfura": Method(_fura, ours=True, four_bits=True, without_four_bits="fura"),
    "lora": Method(_lora, with_four_bits="qlora"),
    "qlora": Method(_lora, four_bits=True, without_four_bits="lora"),
    "dora": Method(_dora),
    "full": Method(None, learning_rate=2e-5),  # LLaVA-1.5's
    "projector": Method(_nothing, learning_rate=1e-3, language=False),  # LLaVA-1.5's
}


def method_of(config: TrainConfig) -> Method:
    return METHODS[config.method]


def takes_fp8(config: TrainConfig) -> bool:
    """Whether ``fp8_backward`` is possible with the method: FuRA over weights that are not quantised."""
    return method_of(config).ours and not method_of(config).four_bits


def learning_rate(config: TrainConfig) -> float:
    """The given learning rate, or the method's default."""
    return method_of(config).learning_rate if config.learning_rate is None else config.learning_rate


def quantization(config: TrainConfig, family: Family, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How the language model's weights are stored while loading: NF4 with double quantisation for the methods whose
    name begins with q (QLoRA, section 3), as they are for the others. Vision tower and projector stay as they are.

    Args:
        dtype: in which products are computed.
    """
    if not method_of(config).four_bits:
        return None
    names = family.names
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*filter(None, [names.tower]), *names.projectors, names.head],
    )


def adapter_config(config: TrainConfig, family: Family, model: PreTrainedModel) -> PeftConfig:
    """PEFT's configuration of the chosen method. All methods adapt the same modules. Projector and tower are adapted
    like them, trained in full (PEFT's ``modules_to_save``), or frozen; or only the projector is trained.

    Raises:
        TrainingError: the projector is to be trained, and the model has no projector.
    """
    method, names = method_of(config), family.names
    tower = config.vision_tower if names.tower else "frozen"
    if not names.projectors and not method.language:
        raise TrainingError(
            f"A model of the type {family.config.model_type} has no projector: take another method than {config.method}"
        )
    within = {name for name in names.projectors if names.tower and name.startswith(names.tower + ".")}
    projector = config.mm_projector if method.language else "full"
    linear = {
        "decoder": _linear(model, [names.decoder]),
        "projector": _linear(model, names.projectors),
        "tower": _linear(model, filter(None, [names.tower]), but=within),
    }
    if names.projectors and projector == "adapter" and not linear["projector"]:
        logger.warning(
            "The projector of a model of the type %s has no linear layers to adapt, so it is not trained: "
            "--mm_projector full trains it.",
            family.config.model_type,
        )
    adapted = ["decoder"] + ["projector"] * (projector == "adapter") + ["tower"] * (tower == "adapter")
    left_out = [] if config.target_modules is None else [each for part, each in linear.items() if part not in adapted]
    full = [] if projector != "full" else [name for name in names.projectors if tower != "full" or name not in within]
    shared = {
        "target_modules": config.target_modules or _pattern(linear[part] for part in adapted),
        "exclude_modules": _pattern(left_out) if any(left_out) else None,
        "modules_to_save": full + [names.tower] * (tower == "full") or None,
        "base_model_name_or_path": config.model_name_or_path,
        "task_type": "CAUSAL_LM",
    }
    return method.adapter(config, shared)


def _linear(model: nn.Module, parts: Iterable[str], but: set[str] = frozenset()) -> set[str]:
    """Patterns of the names of all linear layers in some parts: with any number for each number in them, if no other
    module has such a name (a projector's activation may stand between its layers)."""
    found = set()
    for part in parts:
        modules = dict(model.get_submodule(part).named_modules(prefix=part))
        others = "\n".join(name for name, module in modules.items() if not isinstance(module, nn.Linear))
        for name, module in modules.items():
            if isinstance(module, nn.Linear) and not any(name.startswith(other) for other in but):
                exact = re.escape(name)
                general = re.sub(r"(?<=\\\.)\d+(?=\\\.|$)", r"\\d+", exact)
                if general not in found:
                    found.add(exact if re.search(f"^{general}$", others, re.MULTILINE) else general)
    return found


def _pattern(names: Iterable[set[str]]) -> str:
    return "|".join(sorted(set().union(*names)))


def prepare(model: PreTrainedModel, config: TrainConfig, family: Family) -> PreTrainedModel | PeftModel:
    """``model``, all of it frozen, as ``config.method`` trains it.

    Raises:
        TrainingError, ValueError: the settings are refused by this project, or by PEFT.
    """
    if method_of(config).adapter is not None:
        wanted = config.target_modules
        if wanted and wanted != "all-linear":
            alone, names = LoraConfig(target_modules=wanted), [name for name, _ in model.named_modules()]
            if not any(BaseTuner._check_target_module_exists(alone, name) for name in names):
                raise ValueError(f"Target modules {wanted} not found in {config.model_name_or_path}")
        model = get_peft_model(model, adapter_config(config, family, model))
        if config.fp8_backward and takes_fp8(config):
            _set_fp8_backward(model)
        return model
    parts = family.parts(model)
    for part in (parts.decoder, parts.head):
        part.requires_grad_(True)
    if parts.tower is not None:
        parts.tower.requires_grad_(config.vision_tower != "frozen")
    for part in parts.projectors:
        part.requires_grad_(config.mm_projector != "frozen")
    return model


def _set_fp8_backward(model: PeftModel) -> None:
    taking, number = set_fp8_backward(model)
    why = f"only plain linear layers can have it, with sides that are multiples of {MULTIPLE}"
    if not taking:
        raise TrainingError(f"fp8_backward is possible in none of the {number} adapted layers ({why}): leave it out")
    if taking < number:
        logger.warning("fp8_backward leaves %d of the %d adapted layers as they are: %s.", number - taking, number, why)


def memory_budget(budget: float) -> None:
    """Sets the compiler's budget after ``compile_layers``; what was compiled with another one is dropped."""
    torch.compiler.reset()
    torch._functorch.config.activation_memory_budget = budget


def compile_layers(model: PreTrainedModel | PeftModel, family: Family, activation_memory_budget: float = 1.0) -> None:
    """``torch.compile`` on each layer of the language model and of the vision tower, with one graph for all layers of a
    kind and for batches of every size and length; on a tower's layers only if the family allows it.

    Args:
        activation_memory_budget: of the compiler, for the whole process: below 1 it computes cheap results again in the
            backward pass instead of keeping them.
    """
    torch._functorch.config.activation_memory_budget = activation_memory_budget
    parts = family.parts(model)
    seeing = [part for part in (parts.tower, *parts.projectors) if part is not None]
    if any(p.requires_grad for part in seeing for p in part.parameters()):
        # Only then are there gradients to the first layer's input; without pictures it would be another graph.
        # ``enable_input_require_grads`` sends gradients through the tower, too, where nothing needs them.
        parts.decoder.get_input_embeddings().register_forward_hook(lambda module, given, made: made.requires_grad_())
    for part in (parts.tower if family.compiles_tower else None, parts.decoder):
        for layer in part.modules() if part is not None else ():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.compile(dynamic=True)
