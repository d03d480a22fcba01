"""The order of examples: permutations, seams, slices of thousands of workers."""

import numpy as np
import pytest

from mptrain.data import order


def stream(steps, *, batch_size, examples, seed=0, start=0, places=None):
    """Returns the numbers of the examples of each global batch, [steps, batch_size]."""
    places = places or range(batch_size)
    each = [
        order.training(start + step, places, batch_size=batch_size, examples=examples, seed=seed).numpy()
        for step in range(steps)
    ]
    return np.stack(each)


def test_every_epoch_is_a_permutation_and_batches_span_the_seam():
    epochs = stream(15, batch_size=4, examples=10).reshape(6, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 6


@pytest.mark.parametrize("examples", [4, 10, 100, 1000])
def test_permutations_are_as_random_as_they_should_be(examples):
    """A uniform permutation leaves one example in its place on average, and one pair of neighbours together."""
    epochs = 400
    numbers = stream(epochs, batch_size=examples, examples=examples)
    in_place = (numbers == np.arange(examples)).sum(axis=1).mean()
    neighbours = (np.diff(numbers, axis=1) == 1).sum(axis=1).mean()
    assert in_place == pytest.approx(1, abs=5 / np.sqrt(epochs))
    assert neighbours == pytest.approx((examples - 1) / examples, abs=5 / np.sqrt(epochs))


@pytest.mark.parametrize("start", [1, 7, 10**9, 10**15])
def test_any_step_is_a_function_of_its_number(start):
    later = stream(3, batch_size=8, examples=1000, start=start + 1)
    np.testing.assert_array_equal(stream(4, batch_size=8, examples=1000, start=start)[1:], later)


def test_another_seed_gives_another_order():
    first, second = (stream(1, batch_size=100, examples=100, seed=seed) for seed in (0, 1))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 64, 1000, 4096])
@pytest.mark.parametrize("local", [1, 8])
def test_the_union_of_all_workers_is_the_global_batch(workers, local):
    replicas = workers * local
    batch_size, examples, step = 3 * replicas, 10 * replicas + 1, 10**9
    shards = [order.shard(batch_size, worker * local, local, replicas) for worker in range(workers)]
    assert [place for shard in shards for place in shard] == list(range(batch_size))
    arguments = {"batch_size": batch_size, "examples": examples, "seed": 3}
    whole = order.training(step, range(batch_size), **arguments).numpy()
    for worker in {0, 1 % workers, workers // 2, workers - 1}:
        mine = order.training(step, shards[worker], **arguments).numpy()
        np.testing.assert_array_equal(mine, whole[shards[worker].start : shards[worker].stop])


@pytest.mark.slow
def test_every_count_of_workers_up_to_4096_covers_the_batch_without_gap_or_overlap():
    for workers in range(1, 4097):
        batch_size = 2 * workers
        ends = [(shard.start, shard.stop) for shard in (order.shard(batch_size, w, 1, workers) for w in range(workers))]
        assert ends[0][0] == 0
        assert ends[-1][1] == batch_size
        assert all(left[1] == right[0] for left, right in zip(ends, ends[1:], strict=False))


@pytest.mark.parametrize("replicas", [1, 2, 3, 64, 4096])
@pytest.mark.parametrize(("examples", "batch_size"), [(10, 4), (12, 4), (1, 4), (7, 7), (100, 32), (10_000, 5_000)])
def test_evaluation_gives_weight_one_to_every_example_exactly_once(replicas, examples, batch_size):
    seen = []
    for step in range(-(-examples // batch_size)):
        everything = range(order.shard(batch_size, replicas - 1, 1, replicas).stop)
        index, weight = order.evaluation(step, everything, batch_size=batch_size, examples=examples)
        seen += index.numpy()[weight.numpy() == 1].tolist()
    assert sorted(seen) == list(range(examples))
