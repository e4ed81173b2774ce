"""The loader by itself: order, shards, position, workers."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lba_exp.data.loader import EpochOrder, ResumableLoader
from lba_exp.errors import DataError


class Numbers:
    """Sample i is (i, a random number that belongs to this sample in this epoch)."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def draw(self, index, rng):
        return torch.tensor([index, int(rng.integers(1 << 40))])


class Broken:
    def __len__(self):
        return 9

    def __getitem__(self, index):
        if index == 7:
            raise DataError("sample 7 cannot be read.")
        return index


def loader(size=23, batch=4, **settings):
    return ResumableLoader(Numbers(size), batch, **{"seed": 3, "shuffle": True, **settings})


def epoch(batches):
    return [batch.tolist() for batch in batches]


def orders(samples, batch, ranks, **settings):
    given = {"seed": 0, "shuffle": True, "drop_last": False, "equal_shards": True, **settings}
    return [EpochOrder(samples, batch, rank=rank, world_size=ranks, **given) for rank in range(ranks)]


def test_order_depends_on_seed_and_epoch_alone():
    first, again = loader(), loader()
    torch.manual_seed(0)
    np.random.seed(0)
    epochs = [epoch(first) for _ in range(3)]
    torch.manual_seed(1)
    np.random.seed(1)
    again.set_epoch(2)
    assert epoch(again) == epochs[2]
    assert sorted(sample for batch in epochs[0] for sample, _ in batch) == list(range(23))
    assert epochs[0] != epochs[1] != epochs[2]
    assert epoch(loader(seed=4)) != epochs[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_touches_torchs_random_state(workers):
    state = torch.get_rng_state()
    epoch(loader(workers=workers))
    assert torch.equal(state, torch.get_rng_state())


def test_augmentation_belongs_to_the_sample_and_the_epoch():
    def draws(number, **settings):
        chosen = loader(**settings)
        chosen.set_epoch(number)
        return dict(sample for batch in epoch(chosen) for sample in batch)

    first = draws(0)
    assert first == draws(0, batch=23, shuffle=False)
    assert len(set(first.values())) == 23
    assert not set(first.values()) & set(draws(1).values())


def test_workers_change_nothing_and_live_from_epoch_to_epoch():
    alone, helped = loader(), loader(workers=2)
    processes = []
    for _ in range(3):
        assert epoch(alone) == epoch(helped)
        processes.append([worker.pid for worker in helped._iterator._workers])
    assert processes[0] == processes[1] == processes[2]


def test_an_epoch_left_early_leaves_no_batch_behind():
    left, straight = loader(workers=2), loader(workers=2)
    batches = iter(left)
    next(batches), next(batches)
    left.set_epoch(1)
    straight.set_epoch(1)
    assert epoch(left) == epoch(straight)


def test_no_worker_starts_before_the_first_batch():
    lazy = loader(workers=2)
    batches = iter(lazy)
    assert lazy._iterator is None
    next(batches)
    assert len(lazy._iterator._workers) == 2


def test_workers_end_by_themselves_when_the_loader_is_collected_in_a_cycle():
    forgotten = loader(workers=2)
    batches = iter(forgotten)
    next(batches)
    workers = list(forgotten._iterator._workers)
    cycle = [forgotten, batches]
    cycle.append(cycle)
    del forgotten, batches, cycle
    gc.collect()
    assert [worker.exitcode for worker in workers] == [0, 0]  # not -15, terminated after a wait


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("position", [0, 1, 5, 6])
def test_a_loaded_position_goes_on_exactly(workers, position):
    whole = loader()
    whole.set_epoch(1)
    expected = [*epoch(whole), *epoch(whole)]
    stopped = loader(workers=workers)
    stopped.set_epoch(1)
    batches = iter(stopped)
    for _ in range(position):
        next(batches)
    fresh = loader(workers=workers)
    thrown_away = iter(fresh)
    fresh.load_state_dict(stopped.state_dict())
    assert fresh.state_dict() == stopped.state_dict()
    # from an epoch's border the next epoch follows, without an empty one in between
    assert [*epoch(fresh), *epoch(fresh)][: len(expected) - position] == expected[position:]
    assert len(fresh) == 6
    del thrown_away


def test_set_epoch_keeps_a_loaded_place_only_in_its_own_epoch():
    state = {**loader().state_dict(), "epoch": 1, "position": 2}
    same, next_one, whole = loader(), loader(), loader()
    same.load_state_dict(state)
    same.set_epoch(1)
    next_one.load_state_dict(state)
    next_one.set_epoch(2)
    whole.set_epoch(1)
    assert epoch(same) == epoch(whole)[2:]
    assert epoch(next_one) == epoch(whole)


@pytest.mark.parametrize("change", [{"batch": 5}, {"size": 24}, {"seed": 4}, {"shuffle": False}, {"drop_last": True}, {"world_size": 2}])
def test_a_place_in_another_order_is_refused(change):
    with pytest.raises(DataError, match=r"there, .* here"):
        loader(**change).load_state_dict(loader().state_dict())


def test_a_place_holds_for_other_ranks_with_the_same_global_batch():
    alone, state = loader(batch=6), {**loader(batch=6).state_dict(), "position": 2}
    shared = [loader(batch=2, rank=rank, world_size=3) for rank in range(3)]
    for one in (alone, *shared):
        one.load_state_dict(state)
    seen = [[[sample for sample, _ in batch] for batch in epoch(one)] for one in shared]
    for step, batch in enumerate(epoch(alone)):
        assert sorted(sample for sample, _ in batch) == sorted(sample for batches in seen for sample in batches[step])


@settings(max_examples=150, deadline=None)
@given(samples=st.integers(1, 60), batch=st.integers(1, 9), ranks=st.integers(1, 5), drop_last=st.booleans(), epoch=st.integers(0, 3))
def test_training_shards_are_equal_and_cover_the_data(samples, batch, ranks, drop_last, epoch):
    each = orders(samples, batch, ranks, drop_last=drop_last)
    shards = [order.batches(epoch) for order in each]
    assert len({len(shard) for shard in shards}) == 1
    assert all(0 < len(batch_) <= batch for shard in shards for batch_ in shard)
    seen = [i for order, shard in zip(each, shards, strict=True) for n, batch_ in enumerate(shard) if order.weight(n) for i in batch_]
    assert len(seen) == len(set(seen))
    if drop_last:
        assert all(len(batch_) == batch for shard in shards for batch_ in shard)
        assert samples - len(seen) < batch * ranks
    else:
        assert set(seen) == set(range(samples))


@settings(max_examples=150, deadline=None)
@given(
    samples=st.integers(1, 60),
    batch=st.integers(1, 9),
    ranks=st.integers(1, 5),
    accumulate=st.integers(1, 4),
    cut=st.integers(1, 9),
    drop_last=st.booleans(),
)
def test_weighed_means_of_batches_are_the_mean_over_a_steps_samples(samples, batch, ranks, accumulate, cut, drop_last):
    """Lightning averages over ranks and divides by ``accumulate``; every sample of a step has to count for the same share of it."""
    each = orders(samples, batch, ranks, drop_last=drop_last)
    batches = min(cut, len(each[0]))
    shards = [order.batches(1)[:batches] for order in each]
    for first in range(0, batches, accumulate):
        shares: dict[int, float] = {}
        for order, shard in zip(each, shards, strict=True):
            for number in range(first, min(first + accumulate, batches)):
                for index in shard[number]:
                    share = order.weight(number, accumulate, batches) / len(shard[number]) / ranks / accumulate
                    shares[index] = shares.get(index, 0.0) + share
        counted = [share for share in shares.values() if share]
        assert counted == pytest.approx([1 / len(counted)] * len(counted))
    assert samples < batch * ranks or each[0].weight(0) == 1.0


@settings(max_examples=150, deadline=None)
@given(samples=st.integers(1, 60), batch=st.integers(1, 9), ranks=st.integers(1, 5))
def test_evaluation_sees_each_sample_exactly_once(samples, batch, ranks):
    shards = [order.batches(0) for order in orders(samples, batch, ranks, shuffle=False, equal_shards=False)]
    assert sorted(index for shard in shards for batch_ in shard for index in batch_) == list(range(samples))
    assert all(0 < len(batch_) <= batch for shard in shards for batch_ in shard)
    if batch > 1 and samples >= ranks:
        assert len({len(shard) for shard in shards}) == 1


@pytest.mark.parametrize("samples", [48, 52])
def test_a_global_batch_is_the_same_for_any_number_of_ranks(samples):
    alone = orders(samples, 12, 1)[0].batches(2)
    shared = [order.batches(2) for order in orders(samples, 4, 3)]
    for step, batch in enumerate(alone):
        assert sorted(batch) == sorted(index for shard in shared for index in shard[step])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_sample_stays_one_sentence(workers):
    broken = ResumableLoader(Broken(), 3, seed=0, shuffle=False, workers=workers)
    batches = iter(broken)
    assert next(batches).tolist() == [0, 1, 2]
    next(batches)
    with pytest.raises(DataError, match=r"^sample 7 cannot be read\.$"):
        next(batches)


def test_no_batch_at_all_is_an_error():
    with pytest.raises(DataError, match=r"3 samples make no batch of 4"):
        loader(size=3, drop_last=True)
    with pytest.raises(DataError, match="0 samples"):
        loader(size=0)


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_repeated_samples_are_copies_with_draws_of_their_own(ranks):
    """600 samples, three copies: 512 an epoch (a multiple of 256), of 171 samples, which fall to the ranks in turn."""
    shared = [loader(600, 16, rank=rank, world_size=ranks, repeats=3) for rank in range(ranks)]
    batches = [epoch(one) for one in shared]
    assert {len(one) for one in batches} == {512 // (16 * ranks) + (512 % (16 * ranks) > 0)}
    drawn = [sample for one in batches for batch in one for sample in batch]
    counts = np.bincount([index for index, _ in drawn], minlength=600)
    assert len(drawn) == 512 == len({number for _, number in drawn}) and sorted(set(counts)) == [0, 2, 3] and (counts == 2).sum() == 1
    assert [sum(one.order.weight(number) for one in shared) for number in range(len(shared[0]))] == pytest.approx([ranks] * len(shared[0]))
    together = [index for index, _ in epoch(loader(600, 16 * ranks, repeats=3))[0]]
    assert [index for turn in zip(*(one[0] for one in batches), strict=True) for index, _ in turn] == together
    assert together[0] == together[1] == together[2] != together[3]


def test_a_loader_of_repeated_samples_goes_on_where_it_stood():
    whole = loader(300, 16, repeats=3)
    expected = [epoch(whole), epoch(whole)]
    half, rest = loader(300, 16, repeats=3), loader(300, 16, repeats=3)
    batches = iter(half)
    seen = [next(batches).tolist() for _ in range(5)]
    rest.load_state_dict(half.state_dict())
    assert seen + epoch(rest) == expected[0] and epoch(rest) == expected[1]
    assert {index for batch in expected[0] for index, _ in batch} != {index for batch in expected[1] for index, _ in batch}
    with pytest.raises(DataError, match="samples 256 there, 300 here"):
        loader(300, 16).load_state_dict(half.state_dict())
