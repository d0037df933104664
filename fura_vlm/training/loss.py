"""The training step's forward pass, without what it does not need.

Of the tokens of an instruction record most are the picture's and the question's, and no loss is on them. transformers
multiplies all of them with the language model's head, 32 thousand logits a token in float32 and as much again for
their gradients; here the head sees the supervised positions only. The loss is transformers' own, number for number.
With a third of 7,200 tokens supervised, the head is 0.7 % of a 7B's arithmetic: fusing it with the loss, as other
libraries do for memory's sake, has nothing to win here.

- Padding is on the right (``Collator``), where a causal model never looks at it from a real token. So no mask is
  needed, and attention takes its fastest form with the same shape of graph for every batch.
- If the vision tower trains nothing, it runs without autograd, whatever gradient checkpointing switches on.
"""

from __future__ import annotations

import functools

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from fura_vlm.data.conversation import IGNORE

ROWS_AT_ONCE = 2048  # 32,064 logits in float32 for so many rows are 0.25 GiB


def train_on_labels_only(model: LlavaForConditionalGeneration) -> None:
    """Changes the forward pass of ``model`` for calls with ``labels``: they return a loss and no logits.

    Such a call takes ``input_ids`` (or ``inputs_embeds``), ``labels`` and ``attention_mask``, (rows, length), padded
    on the right; ``pixel_values``; and transformers' ``num_items_in_batch``: if given, the sum of the losses is
    divided by it and not by the number of labels. Other calls are left as they are. What is trained must be decided
    before.
    """
    as_it_was = model.forward

    @functools.wraps(as_it_was)
    def forward(*args, labels: torch.Tensor | None = None, num_items_in_batch=None, **inputs):
        if labels is None:
            return as_it_was(*args, **inputs)
        # The position before a label predicts it. Looked up first, while there is nothing to wait for on the device.
        rows, before = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        targets = labels[rows, before + 1]
        inputs.pop("attention_mask", None)
        # The language model has a switch of its own for its cache; with one, every layer would be another graph.
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


def _summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float(), targets, reduction="sum")
