"""What a plan knows of a model: the shapes in its configuration, and what a method trains of it.

The counts come from the model itself, built without memory, and from the code that trains it; no processor is needed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from fura_vlm.families.base import Parts, model_class
from fura_vlm.families.registry import family_class
from fura_vlm.fura.kernels import MAX_BLOCK
from fura_vlm.fura.layer import FuraLinear
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.methods import METHODS, Method, prepare

# NF4 with double quantisation: half a byte, a byte for 64 weights, four bytes for 256 of those (QLoRA, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Shapes:
    """Widths in a stack of transformer layers, in numbers a token.

    Args:
        layers: how many there are.
        hidden: between the layers.
        queries, keys: of all heads together; values are as wide as keys.
        intermediate: of the MLP; with experts, of all that a token passes through.
        normed: of what the norms of a layer read, all together.
        vocabulary: of the logits.
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    intermediate: int
    normed: int
    vocabulary: int = 0


def text_shapes(config: PreTrainedConfig, decoder: nn.Module) -> Shapes:
    """Of the language model of a configuration, and its module, which knows the norms."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    queries, keys = head * heads, head * (getattr(text, "num_key_value_heads", None) or heads)
    layer = next(module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer))
    widths = {"q_norm": queries, "k_norm": keys}  # of each head's
    norms = [name.rpartition(".")[2] for name, m in layer.named_modules() if "norm" in type(m).__name__.lower()]
    return Shapes(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        queries=queries,
        keys=keys,
        intermediate=_intermediate(text),
        normed=sum(widths.get(name, text.hidden_size) for name in norms),
        vocabulary=text.vocab_size,
    )


def _intermediate(text: PreTrainedConfig) -> int:
    at_once = getattr(text, "num_experts_per_tok", None)
    if not at_once:
        return getattr(text, "intermediate_size", None) or 4 * text.hidden_size  # GPT-2 leaves it out
    own = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    return at_once * own + shared


def tower_shapes(vision: PreTrainedConfig) -> Shapes:
    """Of a vision tower, whose layers are taken for ones with a gated MLP and two norms."""
    hidden = vision.hidden_size
    layers = getattr(vision, "num_hidden_layers", None) or vision.depth
    return Shapes(layers, hidden, hidden, hidden, vision.intermediate_size, 2 * hidden)


class Counts:
    """What a method trains of a model, counted on the model without memory.

    Args:
        config: the model's.
        train: the recipe, with its method.
        picture_tokens: of a record; by default those of one picture.

    Attributes:
        method: as ``METHODS`` has it.
        text, tower_shapes: the widths of the layers; ``tower_shapes`` is ``None`` in a language model.
        total: parameters of the model.
        base: parameters that are frozen, or all if none are.
        base_bytes: theirs, as they are kept.
        linear: those of them in the language model's layers, which 4-bit methods quantise.
        used: parameters that multiply each token of the text.
        tower: parameters of the vision tower.
        trained: parameters with gradients.
        buffers: bytes of the adapter's buffers, which no ZeRO stage divides.
        copies: bytes of the frozen weights' copies in FP8 (``fp8_backward``).
        in_kernels: whether FuRA's kernels take its blocks.
        drops: whether LoRA's dropout keeps a copy of what goes into each linear layer.
        dora: whether DoRA needs the base's output beside its own.
        trains_projector, tower_passes: whether the projector is trained; the passes over the tower, of two
            operations a weight.
        projected: numbers that the projector keeps of a picture's token.
        picture_tokens, patches: of a record, in the text and in the tower.
    """

    def __init__(self, config: PreTrainedConfig, train: TrainConfig, picture_tokens: int | None = None):
        family = family_class(config)(None, config)
        self.method: Method = METHODS[train.method]
        with torch.device("meta"):
            model = model_class(config).from_config(config, dtype=torch.float32).requires_grad_(False)
        model.tie_weights()
        model.name_or_path = train.model_name_or_path
        self._of_model(model, config, family.parts(model))
        self.picture_tokens = family.picture_tokens if picture_tokens is None else picture_tokens
        if self.tower_shapes is None:
            self.picture_tokens = 0
        self.patches = self.picture_tokens * family.patches().per_token
        own = set(dict(model.named_buffers()))
        in_full = dataclasses.replace(train, method=self.method.without_four_bits or train.method)
        self._of_method(prepare(model, in_full, family), own)
        self.trains_projector = bool(self.projected) and (train.mm_projector != "frozen" or not self.method.language)
        in_tower = {"frozen": 1, "adapter": 2, "full": 3}
        self.tower_passes = in_tower[train.vision_tower if self.method.language else "frozen"]

    def _of_model(self, model: nn.Module, config: PreTrainedConfig, parts: Parts) -> None:
        self.text = text_shapes(config, parts.decoder)
        self.tower_shapes = None if parts.tower is None else tower_shapes(config.vision_config)
        self.total = model.num_parameters()
        self.tower = 0 if parts.tower is None else sum(p.numel() for p in parts.tower.parameters())
        self.linear = sum(m.weight.numel() for m in parts.decoder.modules() if isinstance(m, nn.Linear))
        words = model.get_input_embeddings().weight
        looked_up = 0 if words is parts.head.weight else words.numel()  # and multiplies nothing
        self.used = self.total - self.tower - looked_up - _idle(config, parts.decoder)
        products = [p for projector in parts.projectors for p in projector.parameters() if p.dim() == 2]
        self.projected = sum(sum(p.shape) for p in products)

    def _of_method(self, model: nn.Module, own: set[str]) -> None:
        adapter = model.peft_config["default"] if isinstance(model, PeftModel) else None
        self.drops = isinstance(adapter, LoraConfig) and adapter.lora_dropout > 0
        self.dora = isinstance(adapter, LoraConfig) and adapter.use_dora
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        layers = [m for m in model.modules() if isinstance(m, FuraLinear)]
        blocks = [adapter.blocks[1] for layer in layers for adapter in layer.fura_adapters.values()]
        self.copies = 0 if self.method.four_bits else sum(layer.fp8_bytes for layer in layers)
        self.in_kernels = 0 < max(blocks, default=0) <= MAX_BLOCK
        self.base = self.total - (0 if adapter else self.trained)
        self.base_bytes = 2 * self.base + self.method.four_bits * self.linear * (NF4_BYTES - 2)
        new = (b for name, b in model.named_buffers() if name.removeprefix("base_model.model.") not in own)
        self.buffers = sum(b.nbytes for b in new if b.is_floating_point()) if adapter else 0


def _idle(config: PreTrainedConfig, decoder: nn.Module) -> int:
    """Parameters of the experts that a token does not pass through, on average."""
    text = config.get_text_config()
    number = next((n for name in ("num_experts", "num_local_experts") if (n := getattr(text, name, None))), None)
    if not number:
        return 0
    # One expert after the other in three dimensions, or as a list of modules.
    experts = [m for name, m in decoder.named_modules() if name.endswith(".experts")]
    weights = sum(p.numel() for each in experts for p in each.parameters())
    return round(weights * (1 - text.num_experts_per_tok / number))
