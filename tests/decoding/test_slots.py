"""The cache with a slot for each row against rows that are kept apart."""

import random
import weakref

import pytest
import torch
from transformers import DynamicCache

from fura_vlm.decoding.slots import ROOM, Slots

LAYERS, HEADS, SIZE = 2, 3, 4


def prompt(length: int) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(torch.randn(1, HEADS, length, SIZE), torch.randn(1, HEADS, length, SIZE), layer)
    return cache


class Apart:
    """Each row's keys and values of each layer as tensors of its own, (heads, tokens, size)."""

    def __init__(self):
        self.rows = []

    def add(self, cache):
        self.rows.append([[layer.keys[0], layer.values[0]] for layer in cache.layers])

    def write(self, states):
        for row, kept in enumerate(self.rows):
            for layer, pair in enumerate(kept):
                for part in range(2):
                    pair[part] = torch.cat([pair[part], states[layer][part][row]], dim=1)


@pytest.mark.parametrize("seed", range(5))
def test_rows_come_write_and_go(seed):
    rng, slots, apart = random.Random(seed), Slots(), Apart()
    torch.manual_seed(seed)
    for _ in range(40):
        what = rng.random()
        if not apart.rows or what < 0.2 and len(apart.rows) < 9:
            new = prompt(rng.choice([1, 5, 70]))
            slots.add(new)
            apart.add(new)
        elif what < 0.35:
            kept = sorted(rng.sample(range(len(apart.rows)), rng.randint(0, len(apart.rows))))
            order = slots.keep(kept)
            assert sorted(order) == kept
            apart.rows = [apart.rows[row] for row in order]
        else:
            slots.make_room()
            states = [
                [torch.randn(len(apart.rows), HEADS, 1, SIZE) for _ in range(2)] for _ in range(LAYERS)
            ]  # fmt: skip
            apart.write(states)
            for layer, (keys, values) in enumerate(states):
                found = slots.update(keys, values, layer)
                assert found[0].shape[2] == max(kept[0][0].shape[1] for kept in apart.rows)
                for row, kept in enumerate(apart.rows):
                    for part in range(2):
                        expected = kept[layer][part]
                        assert torch.equal(found[part][row, :, : expected.shape[1]], expected)
            slots.advance()
        assert slots.lengths == [kept[0][0].shape[1] for kept in apart.rows]
        assert slots.places.tolist() == slots.lengths + [0] * (slots.capacity - slots.count)


def test_buffers_stay_where_they_are_until_they_are_full():
    slots = Slots()
    assert slots.add(prompt(10))
    memory = slots.layers[0].keys.data_ptr()
    for _ in range(slots.columns - 10):
        assert not slots.make_room()
        for layer in range(LAYERS):
            slots.update(torch.randn(1, HEADS, 1, SIZE), torch.randn(1, HEADS, 1, SIZE), layer)
        slots.advance()
    assert slots.layers[0].keys.data_ptr() == memory and slots.lengths == [slots.columns] and slots.columns > ROOM
    before = slots.layers[1].values[0].clone()
    assert slots.make_room()
    assert torch.equal(slots.layers[1].values[0, :, : before.shape[1]], before)


def test_buffers_go_with_the_cache():
    slots = Slots()
    slots.add(prompt(10))
    buffer = weakref.ref(slots.layers[0].keys)
    del slots
    assert buffer() is None


@pytest.mark.parametrize("pads", [[0, 0, 0], [0, 4, 1]])
def test_prompts_read_at_once_are_those_read_alone(pads):
    """Padded on the left, and nothing is left of what was in the slots before."""
    length, slots = 9, Slots()
    slots.add(prompt(5))
    states = [[torch.randn(3, HEADS, length, SIZE) for _ in range(2)] for _ in range(LAYERS)]
    reader, grew = slots.read(pads, length, 60, LAYERS, torch.device("cpu"))
    assert grew and reader.get_seq_length() == 0
    for layer, pair in enumerate(states):
        returned = reader.update(*pair, layer)
        assert all(torch.equal(*both) for both in zip(returned, pair, strict=True))
    assert reader.get_seq_length() == length and slots.columns >= length + 60
    assert slots.lengths == slots.places.tolist() == [length - pad for pad in pads]
    for layer, pair in zip(slots.layers, states, strict=True):
        for buffer, expected in zip((layer.keys, layer.values), pair, strict=True):
            for row, pad in enumerate(pads):
                assert torch.equal(buffer[row, :, : length - pad], expected[row, :, pad:])
    memory = slots.layers[0].keys.data_ptr()
    assert not slots.read([2, 0], 7, 50, LAYERS, torch.device("cpu"))[1]
    assert slots.layers[0].keys.data_ptr() == memory and slots.lengths == [5, 7] and slots.places.tolist() == [5, 7, 0]


def test_long_prompts_after_many_short_ones_take_no_more_than_they_need():
    slots = Slots()
    for pads, length in (([0] * 40, 50), ([0] * 3, 900)):
        reader, _ = slots.read(pads, length, 10, LAYERS, torch.device("cpu"))
        for layer in range(LAYERS):
            reader.update(*(torch.randn(len(pads), HEADS, length, SIZE) for _ in range(2)), layer)
    assert slots.capacity == 3 and slots.columns >= 910
