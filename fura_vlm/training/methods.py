"""The ways to fine-tune, behind one switch: in which form the base is loaded and what of it is trained.

fura       full-rank adaptation, this project's own (arXiv 2605.22869)
qfura      the same over a 4-bit base
lora       PEFT's LoRA (arXiv 2106.09685)
qlora      the same over a 4-bit base (arXiv 2305.14314)
dora       PEFT's DoRA (arXiv 2402.09353)
full       every weight of the language model
projector  the projector alone, in full: LLaVA's first stage (arXiv 2310.03744)
"""

from __future__ import annotations

import torch
import torch._functorch.config
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from fura_vlm.fura import FuraConfig
from fura_vlm.training.config import TrainConfig

PROJECTOR = "multi_modal_projector"
ADAPTER_LEARNING_RATE = 2e-4
LEARNING_RATES = {"full": 2e-5, "projector": 1e-3}  # of the others: LLaVA-1.5's


def quantization(method: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How the language model's weights are stored while loading: NF4 with double quantisation for the methods whose
    name begins with q (QLoRA, section 3), as they are for the others. Vision tower and projector stay as they are.

    Args:
        method: one of the names above.
        dtype: in which products are computed.
    """
    if method not in ("qfura", "qlora"):
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["vision_tower", PROJECTOR, "lm_head"],
    )


def adapter_config(config: TrainConfig) -> PeftConfig:
    """PEFT's configuration of the chosen method. All methods adapt the same modules; the projector is adapted with
    them, or trained in full (PEFT's ``modules_to_save``), or left alone; or it is all that is trained."""
    shared = {
        "target_modules": config.target_modules,
        "exclude_modules": None if config.mm_projector == "adapter" else rf".*{PROJECTOR}.*",
        "modules_to_save": [PROJECTOR] if config.mm_projector == "full" else None,
        "base_model_name_or_path": config.model_name_or_path,
        "task_type": "CAUSAL_LM",
    }
    if config.method in ("fura", "qfura"):
        return FuraConfig(**shared, block_size=config.block_size, train_singular_values=config.train_singular_values)
    if config.method == "projector":  # an adapter that adapts nothing and holds a whole projector
        return LoraConfig(**shared | {"target_modules": DUMMY_TARGET_MODULES, "modules_to_save": [PROJECTOR]})
    return LoraConfig(
        **shared,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_dora=config.method == "dora",
    )


def learning_rate(config: TrainConfig) -> float:
    """What is given, or the recipe's for the method."""
    if config.learning_rate is not None:
        return config.learning_rate
    return LEARNING_RATES.get(config.method, ADAPTER_LEARNING_RATE)


def prepare(model: LlavaForConditionalGeneration, config: TrainConfig) -> LlavaForConditionalGeneration | PeftModel:
    """``model``, all of it frozen, as ``config.method`` trains it."""
    if config.method != "full":
        return get_peft_model(model, adapter_config(config))
    model.model.language_model.requires_grad_(True)
    model.lm_head.requires_grad_(True)
    model.model.multi_modal_projector.requires_grad_(config.mm_projector != "frozen")
    return model


def compile_layers(model: LlavaForConditionalGeneration | PeftModel, activation_memory_budget: float = 1.0) -> None:
    """``torch.compile`` on each layer of the language model and of the vision tower, once for all of each and for
    batches of every size and length.

    Args:
        activation_memory_budget: of the compiler, for the whole process: below 1 it computes cheap results again in
            the backward pass rather than keep them.
    """
    torch._functorch.config.activation_memory_budget = activation_memory_budget
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if any(p.requires_grad for p in base.model.multi_modal_projector.parameters()):
        # Only then are there gradients to the first layer's input; without pictures it would be another graph.
        base.enable_input_require_grads()
    for part in (base.model.vision_tower, base.model.language_model):
        for layer in part.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.compile(dynamic=True)
