"""Answers that are decoded together, a token each per step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fura_vlm.decoding.attention import FULL, WINDOW, kinds_of, prepare
from fura_vlm.decoding.attention import NAME as SLOTS
from fura_vlm.decoding.graphs import ROUNDING, Graphs
from fura_vlm.decoding.slots import Slots
from fura_vlm.families.base import Family
from fura_vlm.fura import kernels

KEPT = 8
"""Slots whose buffers are kept by default while nothing is written: many take much memory."""


def can_join(text_config) -> bool:
    """Whether rows of this model can be decoded together: all that is kept of a token are its keys and values. Layers
    with a window keep all of them, too: what is out of sight is masked."""
    kinds = {type(layer) for layer in DynamicCache(config=text_config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


class Decoder:
    """The part of a model that writes a token: decoder and head, or the model as a whole where its logits are more
    than what the head makes of the decoder's states.

    A step of a few rows takes as long as it takes to launch its kernels, so that whatever else is done delays every
    token.

    Args:
        model: without PEFT's wrapper, in evaluation mode.
        family: that of the model.
        graphs: steps are CUDA graphs, where the model is on one GPU and allows it.

    Attributes:
        records: whether they are.
        text_config: that of the decoder.
        dtype: of the model.
    """

    def __init__(self, model, family: Family, graphs: bool = False) -> None:
        self._model, self._parts = model, family.parts(model) if family.bare_head else None
        self.text_config, self.dtype = model.config.get_text_config(decoder=True), model.dtype
        devices = {parameter.device for parameter in model.parameters()}
        kind = devices.pop().type if len(devices) == 1 else None
        able = kind == "cuda" or kind == "cpu" and kernels.INTERPRETED
        self.records = graphs and able and self.dtype in ROUNDING and prepare(family.parts(model).decoder)

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, cache, mask=None) -> torch.Tensor:
        """What comes after ``tokens``.

        Args:
            tokens: (rows) int64.
            positions: theirs, (rows) int64.
            cache: with what is before them.
            mask: as the model takes it, or ``None``.

        Returns: (rows, vocabulary).
        """
        inputs = {
            "input_ids": tokens[:, None],
            "attention_mask": mask,
            "position_ids": positions[:, None],
            "past_key_values": cache,
            "use_cache": True,
        }
        if self._parts is None:
            return self._model(**inputs).logits[:, -1]
        return self._parts.head(self._parts.decoder(**inputs).last_hidden_state[:, -1])

    def modules(self) -> Iterator[torch.nn.Module]:
        """All of the model."""
        return self._model.modules()


class Rows:
    """Rows of one model, with one adapter or none, each in its slot of one cache.

    What a step needs stays on the device.

    Graphs of its steps are kept, with the cache's buffers, for the rows to come.

    Args:
        keeps: slots whose buffers are kept at most while nothing is written.

    Attributes:
        rows: what the caller has added, in the order of the slots.
        last: each row's last token, (rows) int64, which is not in the cache yet. The caller sets it after a step.
    """

    def __init__(self, decoder: Decoder, keeps: float = KEPT) -> None:
        self._decoder, self._most = decoder, keeps
        self._kinds = kinds_of(decoder.text_config)
        self._cache = Slots()
        self._graphs = Graphs(decoder, self._cache) if decoder.records else None
        self.clear()

    def clear(self) -> None:
        """Lets go of all rows."""
        self.rows: list = []
        if self.keeps:
            self._cache.keep([])
        else:
            self._cache.clear()
            self.forget()
        self.last: torch.Tensor | None = None
        self._offsets: torch.Tensor | None = None

    def forget(self) -> None:
        """Lets go of the graphs: something that they were recorded with has changed."""
        if self._graphs is not None:
            self._graphs.clear()

    @property
    def bytes(self) -> int:
        """Of the cache."""
        return self._cache.bytes

    @property
    def failed(self) -> bool:
        """The model cannot be recorded."""
        return self._graphs is None or self._graphs.failed

    @property
    def keeps(self) -> bool:
        """Whether there is something to keep for the rows to come."""
        return self._graphs is not None and not self._graphs.failed and 0 < self._cache.capacity <= self._most

    def add(self, row, prompt: DynamicCache, last: torch.Tensor, offset: int) -> None:
        """Adds a row.

        Args:
            row: whatever the caller knows it by.
            prompt: a cache with nothing but its prompt.
            last: (1) int64, the token after that.
            offset: how far the positions of its next tokens are from their places in the cache.
        """
        offsets = torch.full_like(last, offset)
        if self._cache.add(prompt):
            self.forget()
        self.last = last if not self.rows else torch.cat([self.last, last])
        self._offsets = offsets if not self.rows else torch.cat([self._offsets, offsets])
        self.rows.append(row)

    def read(self, pads: list[int], length: int, room: int, device: torch.device) -> Cache:
        """The cache for reading the prompts of all rows at once; `begin` is to follow. See `Slots.read`."""
        layers = len(DynamicCache(config=self._decoder.text_config).layers)
        prompts, grew = self._cache.read(pads, length, room, layers, device)
        if grew:
            self.forget()
        return prompts

    def begin(self, rows: list, last: torch.Tensor, offsets: torch.Tensor) -> None:
        """Adds the rows whose prompts have been read; all as for `add`, (rows) int64."""
        self.rows, self.last, self._offsets = rows, last, offsets

    def step(self) -> torch.Tensor:
        """Gives each row's last token to the model; returns what comes next, (rows, vocabulary)."""
        cache = self._cache
        if cache.make_room():
            self.forget()
        logits = self._plain() if self._graphs is None else self._graphs.step(self.last, self._offsets, self._plain)
        cache.advance()
        return logits

    def _plain(self) -> torch.Tensor:
        places = self._cache.places[: len(self.rows)]
        return self._decoder(self.last, places + self._offsets, self._cache, self._mask(places))

    def keep(self, kept: list[int]) -> None:
        """Takes out all rows but those of these numbers."""
        if len(kept) == len(self.rows):
            return
        if not kept:
            self.clear()
            return
        order = self._cache.keep(kept)
        indices = torch.tensor(order, device=self.last.device)
        self.rows = [self.rows[index] for index in order]
        self.last, self._offsets = self.last[indices], self._offsets[indices]

    def _mask(self, places: torch.Tensor):
        """What each row sees: its own tokens. Where all rows are of one length, attention needs no mask, and is faster.

        The model makes masks for windows by one length for all rows, so those are made here.
        """
        lengths = self._cache.lengths
        if min(lengths) == max(lengths):
            return None
        columns = torch.arange(max(lengths) + 1, device=places.device)
        seen = columns <= places[:, None]
        implementation = self._decoder.text_config._attn_implementation
        if WINDOW not in self._kinds or implementation not in ("sdpa", "eager", SLOTS):
            return seen.long()
        near = columns > places[:, None] - self._decoder.text_config.sliding_window
        masks = {FULL: seen, WINDOW: seen & near}
        for kind, mask in masks.items():
            masks[kind] = mask[:, None, None]
            if implementation == "eager":
                masks[kind] = torch.zeros_like(masks[kind], dtype=self._decoder.dtype).masked_fill_(
                    ~masks[kind], torch.finfo(self._decoder.dtype).min
                )
        return masks if len(self._kinds) > 1 else masks[WINDOW]


class Alone:
    """``Rows`` for one row, of a model that keeps more of a token than keys and values."""

    keeps = False

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.clear()

    def clear(self) -> None:
        self.rows: list = []
        self._cache = self.last = self._positions = None

    def add(self, row, prompt: DynamicCache, last: torch.Tensor, offset: int) -> None:
        self.rows, self._cache, self.last = [row], prompt, last
        self._positions = torch.full_like(last, prompt.get_seq_length() + offset)

    def step(self) -> torch.Tensor:
        logits = self._decoder(self.last, self._positions, self._cache)
        self._positions += 1
        return logits

    def keep(self, kept: list[int]) -> None:
        if not kept:
            self.clear()
