"""The training step's forward pass, without what it does not need.

Of the tokens of an instruction record most are the picture's and the question's, and no loss is on them. transformers
multiplies all of them with the language model's head, 32 thousand logits a token in float32 and as much again for
their gradients; here the head sees the supervised positions only. The loss is transformers' own, number for number.
With a third of 7,200 tokens supervised, the head is 0.7 % of a 7B's arithmetic: fusing it with the loss, as other
libraries do for memory's sake, has nothing to win here.

- Padding is on the right (``Collator``), where a causal model never looks at it from a real token. So no mask is
  needed, and attention takes its fastest form with the same shape of graph for every batch.
- If the vision tower trains nothing, it runs without autograd, whatever gradient checkpointing switches on.
- Nothing is looked up on the device: transformers reads there whether pictures and their tokens are equally many, where
  these are (forward and once more backward), and whether rows hold several records each. A GPU that is waited for in
  every batch, amid the work of launching what comes next, stands still for several percent of the time. So it is
  asked once a step, before the first batch, where labels and pictures are (``positions``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import LlamaModel, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from fura_vlm.data.conversation import IGNORE

OF_PICTURES = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy", "image_sizes")
ROWS_AT_ONCE = 2048  # 32,064 logits in float32 for so many rows are 0.25 GiB


def train_on_labels_only(model: LlavaForConditionalGeneration) -> None:
    """Changes the forward pass of ``model`` for calls with ``labels``: they return a loss and no logits.

    Such a call takes ``input_ids`` (or ``inputs_embeds``), ``labels`` and ``attention_mask``, (rows, length), padded
    on the right; ``pixel_values``; and transformers' ``num_items_in_batch``: if given, the sum of the losses is
    divided by it and not by the number of labels; and what ``positions`` makes of a batch: without it the call waits
    for the device. Other calls are left as they are. What is trained must be decided before.

    Raises:
        ValueError: from a call whose pictures have more or fewer features than there are tokens for them.
    """
    as_it_was, without_looking = model.forward, _without_looking(model)

    @functools.wraps(as_it_was)
    def forward(
        *args, labels: torch.Tensor | None = None, num_items_in_batch=None, supervised=None, pictured=None, **inputs
    ):
        if labels is None:
            return as_it_was(*args, **inputs)
        rows, before = _supervised(labels) if supervised is None else supervised
        targets = labels[rows, before + 1]
        inputs.pop("attention_mask", None)
        if pictured is not None:
            of_pictures = {name: inputs.pop(name) for name in OF_PICTURES if name in inputs}
            inputs["inputs_embeds"] = _embedded(model, inputs.pop("input_ids"), pictured, of_pictures)
        # The language model has a switch of its own for its cache; with one, every layer would be another graph.
        with without_looking():
            hidden = model.model(*args, **inputs | {"use_cache": False}).last_hidden_state
        # One call of the head whatever the number of rows: under ZeRO-3 it gathers weights in step with the others.
        logits = model.lm_head(hidden[rows, before])
        total = sum(
            checkpoint(_summed, *part, use_reentrant=False)
            for part in zip(logits.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
        )
        items = len(targets) if num_items_in_batch is None else num_items_in_batch
        return LlavaCausalLMOutputWithPast(loss=total / items)

    model.forward = forward
    tower = model.model.vision_tower
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        tower.forward = torch.no_grad()(tower.forward)


def _embedded(
    model: LlavaForConditionalGeneration, input_ids: torch.Tensor, pictured: torch.Tensor, of_pictures: dict
) -> torch.Tensor:
    """Words, and the features of pictures in their places: (rows, length, hidden size), as ``LlavaModel`` makes it."""
    words = model.get_input_embeddings()(input_ids)
    features = torch.cat(list(model.model.get_image_features(**of_pictures, return_dict=True).pooler_output))
    if len(features) != pictured.shape[1]:
        raise ValueError(
            f"Image features and image tokens do not match, tokens: {pictured.shape[1]}, features: {len(features)}"
        )
    return words.index_put(tuple(pictured), features.to(words))


def _without_looking(model: LlavaForConditionalGeneration) -> Callable[[], AbstractContextManager]:
    """Gives the language model of ``model`` a short form that does not look anything up on the device.

    Returns: makes the context in which it takes it, for rows that are no longer than one record each.
    """
    decoder = model.model.language_model
    decode, short = decoder.forward, False

    @functools.wraps(decode)
    def forward(*args, **inputs):
        given = {name for name, value in inputs.items() if value is not None and value is not False}
        # Without a mask attention is causal only where PyTorch's own function computes it.
        if not short or args or given != {"inputs_embeds"} or decoder.config._attn_implementation != "sdpa":
            return decode(*args, **inputs)
        hidden = inputs["inputs_embeds"]
        position_ids = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        position_embeddings = decoder.rotary_emb(hidden, position_ids=position_ids)
        for layer in decoder.layers:
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                past_key_values=None,
                use_cache=False,
            )
        return BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden))

    @contextmanager
    def without_looking():
        nonlocal short
        short = True
        try:
            yield
        finally:
            short = False

    if isinstance(decoder, LlamaModel):
        decoder.forward = forward
    return without_looking


def positions(batch: dict[str, torch.Tensor], image_token_id: int) -> dict[str, torch.Tensor]:
    """What a call in training is told of its batch besides, rows and positions, (2, number) int64 each: ``supervised``,
    of what predicts a label, the position before it; and, if there are pictures, ``pictured``, of their tokens.

    How many there are has to come from the device, which is waited for."""
    found = {"supervised": _supervised(batch["labels"])}
    if "pixel_values" in batch:
        found["pictured"] = (batch["input_ids"] == image_token_id).nonzero().T
    return found


def _supervised(labels: torch.Tensor) -> torch.Tensor:
    return (labels[:, 1:] != IGNORE).nonzero().T


def _summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float(), targets, reduction="sum")
