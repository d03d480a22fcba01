"""Random numbers for augmentation: functions of the seed, the step and the place in the global batch."""

import numpy as np
import pytest
import tensorflow as tf

from mptrain.randomness import StepRandomness


def drawn(strategy, step, *, seed=0, batch_size=12, calls=1):
    """Returns the numbers of the last of `calls` draws for the whole global batch, [batch_size, 3]."""
    with strategy.scope():
        randomness = StepRandomness(seed, tf.Variable(step, dtype=tf.int64), batch_size)

    @tf.function
    def numbers():
        def replica():
            randomness.begin_step()
            for _ in range(calls):
                mine = randomness.per_example(3)
            return mine

        return strategy.experimental_local_results(strategy.run(replica))

    return np.concatenate([part.numpy() for part in numbers()])


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_an_example_gets_the_same_numbers_on_any_number_of_replicas(mirrored, replicas):
    np.testing.assert_array_equal(drawn(mirrored(replicas), 5), drawn(mirrored(1), 5))


def test_numbers_differ_between_examples_steps_calls_and_seeds(mirrored):
    strategy = mirrored(1)
    first = drawn(strategy, 5)
    assert len(np.unique(first)) == first.size
    for other in (drawn(strategy, 6), drawn(strategy, 5, calls=2), drawn(strategy, 5, seed=1)):
        assert not np.intersect1d(first, other).size


def test_numbers_are_uniform_between_zero_and_one(mirrored):
    numbers = drawn(mirrored(1), 0, batch_size=10_000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.mean() == pytest.approx(0.5, abs=0.01)
    assert numbers.std() == pytest.approx(np.sqrt(1 / 12), abs=0.01)
