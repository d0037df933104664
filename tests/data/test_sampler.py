import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from fura_vlm.data.sampler import ModalityLengthSampler

ROWS = 12_000
HAS_IMAGE = np.arange(ROWS) % 16 != 0


@pytest.fixture(scope="module")
def lengths():
    """As in LLaVA's mixture: images take 576 tokens, answers are short or long, text-only records longer."""
    rng = np.random.default_rng(0)
    return np.where(HAS_IMAGE, 576 + rng.lognormal(4.5, 0.8, ROWS), rng.lognormal(5.5, 0.9, ROWS)).astype(int)


def steps(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


def micro_steps(sampler, batch_size, world_size):
    """What accelerate gives the processes: for each time a list with one batch for each process."""
    batches = BatchSampler(sampler, batch_size, drop_last=False)
    shards = [list(BatchSamplerShard(batches, world_size, rank)) for rank in range(world_size)]
    return [list(time) for time in zip(*shards, strict=True)]


def padding(batches, lengths):
    """The share of padding, if the processes wait for the longest row among them at each time."""
    used = sum(lengths[batch].sum() for time in batches for batch in time)
    paid = sum(max(lengths[batch].max() for batch in time) * sum(map(len, time)) for time in batches)
    return 1 - used / paid


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 64, 1000])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 2, 2), (16, 1, 1)])
def test_every_row_comes_once(lengths, rows, shape):
    sampler = ModalityLengthSampler(lengths[:rows], HAS_IMAGE[:rows], *shape)
    assert len(sampler) == rows
    assert sorted(sampler) == list(range(rows))


@pytest.mark.parametrize("only", [True, False])
def test_a_mixture_of_one_modality(lengths, only):
    sampler = ModalityLengthSampler(lengths, np.full(ROWS, only), 8, 2)
    assert sorted(sampler) == list(range(ROWS))


def test_optimizer_steps_have_one_modality(lengths):
    sampler = ModalityLengthSampler(lengths, HAS_IMAGE, batch_size=4, world_size=2, gradient_accumulation_steps=4)
    kinds = [set(HAS_IMAGE[step]) for step in steps(list(sampler), 32)]
    mixed = [n for n, kind in enumerate(kinds) if len(kind) > 1]
    assert set(mixed) <= {len(kinds) - 1, len(kinds) - 2}  # the rest of both modalities comes last
    # In random order: the few steps of text are neither all at the beginning nor all at the end.
    text = [n for n, kind in enumerate(kinds[:-2]) if kind == {False}]
    assert len(text) == (~HAS_IMAGE).sum() // 32
    assert min(text) < len(kinds) // 4 and max(text) > 3 * len(kinds) // 4


def test_the_processes_see_one_modality_at_a_time(lengths):
    sampler = ModalityLengthSampler(lengths, HAS_IMAGE, batch_size=4, world_size=4, gradient_accumulation_steps=2)
    times = micro_steps(sampler, 4, 4)
    mixed = [n for n, time in enumerate(times) if len(set(HAS_IMAGE[sum(time, [])])) > 1]
    assert len(mixed) <= 1 and all(n >= len(times) - 4 for n in mixed)


def test_rows_are_dealt_evenly(lengths):
    sampler = ModalityLengthSampler(lengths, HAS_IMAGE, batch_size=4, world_size=3)
    times = micro_steps(sampler, 4, 3)
    assert all([len(batch) for batch in time] == [4, 4, 4] for time in times)
    assert {row for time in times for batch in time for row in batch} == set(range(ROWS))


def test_the_order_follows_from_seed_and_epoch(lengths):
    def order(seed, epoch):
        sampler = ModalityLengthSampler(lengths, HAS_IMAGE, 8, seed=seed)
        sampler.set_epoch(epoch)
        assert list(sampler) == list(sampler)
        return tuple(sampler)

    assert order(1, 2) == order(1, 2)
    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_all_processes_agree(lengths):
    np.random.seed(1)
    first = list(ModalityLengthSampler(lengths, HAS_IMAGE, 8, world_size=2, seed=3))
    np.random.seed(2)
    assert list(ModalityLengthSampler(lengths.tolist(), HAS_IMAGE.tolist(), 8, world_size=2, seed=3)) == first


def test_the_longest_row_is_in_the_first_step(lengths):
    order = list(ModalityLengthSampler(lengths, HAS_IMAGE, batch_size=8, world_size=2))
    whole = [row for step in steps(order, 16) if len(step) == 16 and len(set(HAS_IMAGE[step])) == 1 for row in step]
    assert lengths[order[:16]].max() == lengths[whole].max()


@pytest.mark.parametrize("world_size", [1, 8])
def test_less_padding_than_in_random_order(lengths, world_size):
    random = np.random.default_rng(0).permutation(ROWS).tolist()
    grouped = ModalityLengthSampler(lengths, HAS_IMAGE, 16, world_size)
    shares = [padding(micro_steps(order, 16, world_size), lengths) for order in (random, grouped)]
    assert shares[0] > 0.3
    assert shares[1] < shares[0] / 2


@pytest.mark.parametrize(("batch_size", "world_size", "accumulation"), [(16, 8, 1), (16, 1, 8), (8, 1, 16), (4, 8, 4)])
def test_little_padding_in_the_recipe(batch_size, world_size, accumulation):
    """128 records a step of a mixture like the 665k one, lengths rounded up to 8 as in training."""
    rng = np.random.default_rng(0)
    rows, has_image = 60_000, np.arange(60_000) % 16 != 0
    lengths = np.where(has_image, 621 + rng.lognormal(5.4, 0.5, rows), rng.lognormal(7.3, 0.9, rows))
    lengths = np.minimum(lengths, 2048).astype(int)
    sampler = ModalityLengthSampler(lengths, has_image, batch_size, world_size, accumulation)
    times = micro_steps(sampler, batch_size, world_size)
    used = sum(lengths[batch].sum() for time in times for batch in time)
    paid = sum(-(-lengths[batch].max() // 8) * 8 * len(batch) for time in times for batch in time)
    assert 1 - used / paid < 0.02


def test_epochs_of_a_small_mixture_have_other_batches(lengths):
    sampler = ModalityLengthSampler(lengths[:128], HAS_IMAGE[:128], 16)
    first = {frozenset(step) for step in steps(list(sampler), 16)}
    sampler.set_epoch(1)
    assert len(first & {frozenset(step) for step in steps(list(sampler), 16)}) <= 1


def test_numbers_that_cannot_be():
    with pytest.raises(ValueError, match="2 lengths for 1 rows"):
        ModalityLengthSampler([1, 2], [True], 1)
    with pytest.raises(ValueError, match="at least 1"):
        ModalityLengthSampler([1], [True], 0)
