"""The key-value cache of answers that are written together: each has a slot, and grows in it by itself.

transformers' own caches give all rows one length, so that shorter ones are padded on the left, and a row that comes or
goes moves all the others. Here a row begins at the first column of its slot, whatever the lengths of the others are:
a token is written in place, a newcomer takes the next slot, and the last slot moves where one becomes free. Nothing
else is copied, and the buffers stay where they are, as a CUDA graph needs it.
"""

from __future__ import annotations

import weakref

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

SPARE = 1.25
"""How much larger than any batch so far a cache may become, to serve all of them."""

ROOM = 256
"""Columns that a newcomer gets beyond its prompt, at the least; more are made when they are needed."""


class Slots(Cache):
    """Keys and values of up to ``capacity`` rows, of which the first ``count`` are in use.

    Attributes:
        lengths: tokens in each slot in use, as numbers on the host.
        places: the same for all slots, (capacity,) int64: the column that a row's next token is written to. Slots that
            are not in use have 0.
        columns: of the buffers.
        width: columns that a step hands to attention; ``None``: no more than the longest row needs.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.clear()

    def clear(self) -> None:
        """Lets go of the buffers, too."""
        self.layers.clear()
        self.lengths: list[int] = []
        self.places: torch.Tensor | None = None
        self.columns, self.width = 0, None

    @property
    def count(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        return 0 if self.places is None else len(self.places)

    def add(self, prompt: Cache, rows: int = 1) -> bool:
        """Takes in a row whose prompt is in a cache of its own, transformers' usual one, of batch 1.

        Args:
            rows: the capacity that is wanted at the least.

        Returns: whether the buffers are other ones than before.
        """
        length = prompt.get_seq_length()
        grew = self._grow(prompt, max(rows, self.count + 1), length + ROOM)
        for layer, new in zip(self.layers, prompt.layers, strict=True):
            layer.keys[self.count, :, :length] = new.keys[0]
            layer.values[self.count, :, :length] = new.values[0]
        self.places[self.count] = length
        self.lengths.append(length)
        return grew

    def read(self, pads: list[int], length: int, room: int, layers: int, device: torch.device) -> tuple[Cache, bool]:
        """Empties all slots for prompts that are read at once.

        Args:
            pads: how many of the ``length`` tokens of each row are padding, on the left.
            room: tokens that each row may get besides.
            layers: of the model.

        Returns: a cache to read them with, once, and whether the buffers are other ones than before.
        """
        rows, columns = len(pads), -(-(length + room) // 64) * 64
        grew = rows > self.capacity or columns > self.columns
        if grew:
            # Room for both what there was and what comes, but not where one is long and the other has many rows.
            most = max(rows * columns, self.capacity * self.columns)
            if max(rows, self.capacity) * max(columns, self.columns) <= SPARE * most:
                rows, columns = max(rows, self.capacity), max(columns, self.columns)
            self.clear()  # first: there may not be memory for both
            self.layers, self.columns = [SlotLayer(self) for _ in range(layers)], columns
            self.places = torch.zeros(rows, dtype=torch.long, device=device)
            self.numbers = torch.arange(rows, device=device)
        self.lengths = [length - pad for pad in pads]
        self.places.zero_()
        self.places[: len(pads)] = torch.tensor(self.lengths, device=device)
        sources = None
        if any(pads):
            sources = torch.arange(length, device=device) + torch.tensor(pads, device=device)[:, None]
            sources = sources.clamp_(max=length - 1)[:, None, :, None]
        return Cache(layers=[PromptLayer(layer, sources) for layer in self.layers]), grew

    def make_room(self) -> bool:
        """Sees to it that each row can take one token more. Returns whether the buffers are other ones than before."""
        return max(self.lengths) >= self.columns and self._grow(self, self.capacity, self.columns + 1)

    def advance(self) -> None:
        """After a step: each row in use has one token more."""
        self.places[: self.count] += 1
        self.lengths = [length + 1 for length in self.lengths]

    def keep(self, kept: list[int]) -> list[int]:
        """Frees all slots but these; returns the rows that are in the slots in use now, by their old numbers."""
        order = list(range(self.count))
        gone = sorted(set(order) - set(kept))
        for slot in gone:
            while order and order[-1] in gone:
                order.pop()
            if slot >= len(order):
                break
            self._move(order[-1], slot)
            order[slot] = order.pop()
        self.places[len(order) :] = 0
        self.lengths = [self.lengths[row] for row in order]
        return order

    def _move(self, source: int, target: int) -> None:
        length = self.lengths[source]
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]
        self.places[target] = self.places[source]

    def _grow(self, like: Cache, capacity: int, columns: int) -> bool:
        """Makes larger buffers if these do not do, each side at least doubled, with what is in use in them."""
        if capacity <= self.capacity and columns <= self.columns:
            return False
        rows = self.capacity if capacity <= self.capacity else max(capacity, 2 * self.capacity)
        columns = self.columns if columns <= self.columns else max(columns, 2 * self.columns)
        columns = -(-columns // 64) * 64
        longest = max(self.lengths, default=0)
        if not self.layers:
            self.layers = [SlotLayer(self) for _ in like.layers]
        for layer, old in zip(self.layers, like.layers, strict=True):
            # One layer after the other, so that hardly more memory is taken than the new buffers need.
            for name in ("keys", "values"):
                states, before = getattr(old, name), getattr(layer, name)
                buffer = states.new_zeros(rows, states.shape[1], columns, states.shape[3])
                if self.count:
                    buffer[: self.count, :, :longest] = before[: self.count, :, :longest]
                setattr(layer, name, buffer)
        places = torch.zeros(rows, dtype=torch.long, device=buffer.device)
        if self.count:
            places[: self.count] = self.places[: self.count]
        self.places, self.columns = places, columns
        self.numbers = torch.arange(rows, device=buffer.device)
        return True

    @property
    def bytes(self) -> int:
        """Of the buffers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.keys is not None)


class SlotLayer(CacheLayerMixin):
    """Keys and values (capacity, heads, columns, size) of one layer."""

    is_sliding = False  # layers with a window keep all tokens, too: what is out of sight is masked
    is_compileable = True

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self._slots = weakref.proxy(slots)  # in a circle of references the buffers would outlive the cache
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: ``Slots`` makes the buffers."""

    def make(self, heads: int, size: int, value_size: int, like: torch.Tensor) -> None:
        """Makes the buffers, if there are none yet."""
        if self.keys is None:
            shape = self._slots.capacity, heads, self._slots.columns
            self.keys, self.values = like.new_zeros(*shape, size), like.new_zeros(*shape, value_size)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Writes one token, (rows, heads, 1, size), for each of the first rows; returns (rows, heads, width, size)."""
        slots, rows = self._slots, len(key_states)
        at = slots.numbers[:rows], slots.places[:rows]
        self.keys.transpose(1, 2)[at] = key_states[:, :, 0]
        self.values.transpose(1, 2)[at] = value_states[:, :, 0]
        width = slots.width or self.get_seq_length() + 1
        return self.keys[:rows, :, :width], self.values[:rows, :, :width]

    def get_seq_length(self) -> int:
        return max(self._slots.lengths, default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._slots.width or self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self._slots.columns


class PromptLayer(CacheLayerMixin):
    """Takes prompts that are padded on the left into the slots of a layer, without a copy of its own.

    Args:
        slot: of the same layer.
        columns: those of the prompts that belong in the columns of the slots, (rows, 1, columns, 1) int64; ``None``:
            the same ones, for nothing is padded.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, slot: SlotLayer, columns: torch.Tensor | None) -> None:
        super().__init__()
        self._slot, self._columns, self._length = slot, columns, 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the buffers are the slots'."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Keeps the prompts' keys and values, (rows, heads, length, size), and returns them as they are."""
        rows, heads, self._length, size = key_states.shape
        self._slot.make(heads, size, value_states.shape[-1], key_states)
        for buffer, states in ((self._slot.keys, key_states), (self._slot.values, value_states)):
            if self._columns is not None:
                states = states.take_along_dim(self._columns, dim=2)
            buffer[:rows, :, : self._length] = states
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        return -1
