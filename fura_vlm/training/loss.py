"""The forward pass of a training step, without the work that it does not need.

Most tokens of an instruction record are those of the picture and the question, which have no loss. transformers
multiplies all of them with the language model's head: 32 thousand logits a token in float32, and as much again for
their gradients. Here the head gets only the supervised positions, which a hook picks from its input. If a model caps or
scales its logits afterwards, it does so as always. The loss is exactly transformers' own. With a third of 7,200 tokens
supervised, the head is 0.7 % of a 7B's arithmetic: fusing it with the loss, as other libraries do to save memory, would
gain nothing here.

- Padding is on the right (``Collator``), where a causal model never looks at it from a real token. So no mask is
  needed, and attention takes its fastest form with the same shape of graph for every batch.
- If the vision tower trains nothing, it runs without autograd, whatever gradient checkpointing switches on.
- If the family allows it, nothing is read back from the device. transformers reads back whether there are as many
  pictures as picture tokens, where these are (in the forward and again in the backward pass), and whether rows hold
  several records. When every batch waits for the GPU, the GPU is idle for several percent of the time. So the places of
  labels and pictures are read once a step, before the first batch (``positions``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager

import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from fura_vlm.families.base import IGNORE, Family

OF_TEXT = ("input_ids", "inputs_embeds", "position_ids")
ROWS_AT_ONCE = 2048  # 32,064 logits in float32 for so many rows are 0.25 GiB


def train_on_labels_only(model: nn.Module, family: Family) -> None:
    """Changes the forward pass of ``model`` for calls with ``labels``: they return a loss and no logits.

    Such a call takes ``input_ids`` (or ``inputs_embeds``), ``labels`` and ``attention_mask``, (rows, length), padded
    on the right; the family's tensors of pictures; and transformers' ``num_items_in_batch``: if given, the sum of the
    losses is divided by it and not by the number of labels; and what ``positions`` makes of a batch: without it the
    call waits for the device. Other calls are left as they are. What is trained must be decided before. A second
    call of this function changes nothing.

    Raises:
        ValueError: from a call whose pictures have more or fewer features than there are tokens for them.
    """
    if hasattr(model.forward, "on_labels_only"):
        return
    parts = family.parts(model)
    if parts.tower is not None:
        family.prepare_tower(parts.tower)
    as_it_was, without_looking = model.forward, _without_looking(parts.decoder)
    wanted = None  # the rows and positions that the head gets

    def choose(head, args):
        return None if wanted is None else (args[0][tuple(wanted)][None], *args[1:])

    parts.head.register_forward_pre_hook(choose)

    @functools.wraps(as_it_was)
    def forward(
        *args, labels: torch.Tensor | None = None, num_items_in_batch=None, supervised=None, pictured=None, **inputs
    ):
        nonlocal wanted
        if labels is None:
            return as_it_was(*args, **inputs)
        rows, before = _supervised(labels) if supervised is None else supervised
        targets = labels[rows, before + 1]
        inputs.pop("attention_mask", None)
        if pictured is not None:
            of_pictures = {
                name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and name not in OF_TEXT
            }
            said = {name for name, value in inputs.items() if value is not None} - {*of_pictures, "input_ids"}
            # Other arguments, such as the tower's layer, are for the model itself.
            embedded = None if said else family.embed(model, inputs["input_ids"], pictured, of_pictures)
            if embedded is not None:
                inputs = {name: value for name, value in inputs.items() if name not in (*of_pictures, "input_ids")}
                inputs["inputs_embeds"] = embedded
        wanted = torch.stack([rows, before])
        try:
            # The language model has a switch of its own for its cache; with one, every layer would be another graph.
            with without_looking():
                logits = as_it_was(*args, **inputs | {"use_cache": False}).logits[0]
        finally:
            wanted = None
        total = sum(
            checkpoint(_summed, *part, use_reentrant=False)
            for part in zip(logits.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
        )
        items = len(targets) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / items)

    forward.on_labels_only = True
    model.forward = forward
    if parts.tower is not None and not any(parameter.requires_grad for parameter in parts.tower.parameters()):
        parts.tower.forward = torch.no_grad()(parts.tower.forward)


def _without_looking(decoder: nn.Module) -> Callable[[], AbstractContextManager]:
    """Gives a language model a shorter forward pass that reads nothing back from the device.

    Returns: makes the context in which it takes it, for rows that are no longer than one record each.
    """
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


def use_all_parts(model: nn.Module, family: Family) -> None:
    """Makes a text-only batch pass through vision tower and projector too, with no effect on the result.

    With several processes every one of them must use the same parameters in a step: ZeRO reduces gradients, and
    ZeRO-3 gathers weights, in step with the others. A process whose batch has no picture would leave out the
    projector. It therefore sees a blank picture, whose features enter the sum multiplied by zero.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    if family.parts(model).tower is None:
        return
    blank = family.blank()
    # Where pictures are put in place, so that a process with pictures and one without call modules in the same order:
    # ZeRO-3 gathers the weights of those that come next by the order of the step before.
    place = model.model if type(family).embed is Family.embed else model
    as_it_was = place.forward

    @functools.wraps(as_it_was)
    def forward(input_ids=None, *args, **inputs):
        # Embeddings that are given have their pictures in place already.
        if input_ids is None or inputs.get("pixel_values") is not None or not model.training:
            return as_it_was(input_ids, *args, **inputs)
        embeddings = model.get_input_embeddings()(input_ids)
        of_blank = {
            name: value.to(embeddings.device, embeddings.dtype if value.is_floating_point() else value.dtype)
            for name, value in blank.items()
        }
        features = family.picture_features(model, of_blank)
        inputs["inputs_embeds"] = embeddings + 0 * sum(each.sum() for each in features)
        # Told, since some models would go on from the positions of the pictures that they saw last.
        length = embeddings.shape[1]
        inputs["position_ids"] = torch.arange(length, device=embeddings.device).expand(len(embeddings), length)
        return as_it_was(None, *args, **inputs)

    place.forward = forward


def positions(batch: dict[str, torch.Tensor], run_id: int) -> dict[str, torch.Tensor]:
    """More about a batch for a call in training, as rows and positions, (2, number) int64 each: ``supervised``,
    of what predicts a label, the position before it; and, if there are pictures, ``pictured``, of their tokens.

    Their number has to come from the device, so this waits for it."""
    found = {"supervised": _supervised(batch["labels"])}
    if "pixel_values" in batch:
        found["pictured"] = (batch["input_ids"] == run_id).nonzero().T
    return found


def _supervised(labels: torch.Tensor) -> torch.Tensor:
    return (labels[:, 1:] != IGNORE).nonzero().T


def _summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float(), targets, reduction="sum")
