"""`train.steps_per_loop="auto"`: loops of about a second, found out while training, by a loop that is traced once."""

import time
import types

import tensorflow as tf

import mptrain
from mptrain.loop_length import LoopLength
from mptrain.workers import Workers
from tests.runs import rows
from tests.trainers import ModuleTrainer

traces = []


class SlowTrainer(ModuleTrainer):
    """Each step takes 40 ms more than it need, so that a loop of about a second has a known length."""

    def replica_train_step(self, batch):
        traces.append(batch)
        wait = tf.py_function(lambda: time.sleep(0.04), [], [])
        with tf.control_dependencies([wait]):
            return super().replica_train_step(batch)


def stand_in(config):
    """Returns what of a Trainer is looked at."""
    return types.SimpleNamespace(config=config, workers=Workers(tf.distribute.get_strategy()), global_step=tf.Variable(0))


def length(config, seconds_a_step, overhead=0.0, boundary=10**9):
    """Returns the lengths of the loops under "auto" where a step takes so long, and each loop more; none crosses a boundary."""
    one = stand_in(config)
    loop_length = LoopLength(one)
    lengths = [loop_length.steps]
    for _ in range(12):
        step = int(one.global_step)
        steps = min(loop_length.steps, boundary - step % boundary)
        one.global_step.assign_add(steps)
        loop_length({"examples_per_second": config.data.batch_size * steps / (steps * seconds_a_step + overhead)})
        lengths.append(loop_length.steps)
    return lengths


def test_loops_of_auto_last_about_a_second_and_are_traced_once(config, tmp_path):
    config.trainer = "tests.test_loop_length.SlowTrainer"
    config.train.steps_per_loop, config.train.steps = "auto", 60
    config.eval.every_steps = config.checkpoint.every_steps = 60
    mptrain.run(config, tmp_path / "run", mode="train")
    steps = [row["step"] for row in rows(tmp_path / "run", split="train")]
    assert steps[0] == 1
    assert steps[-1] == 60
    assert 5 <= steps[-1] - steps[-2] <= 20
    assert len(traces) == 1


def test_lengths_grow_to_a_second_and_stay(config):
    config.train.steps_per_loop = "auto"
    assert length(config, 0.0009)[:5] == [1, 1, 10, 100, 1000]
    assert len(set(length(config, 0.0009)[5:])) == 1
    assert set(length(config, 3.0)) == {1}


def test_a_loop_cut_short_does_not_make_the_next_ones_short(config):
    config.train.steps_per_loop = "auto"
    lengths = length(config, 0.0001, overhead=0.005, boundary=20_003)  # after which one of 3 steps or so would take 50 times
    assert len(set(lengths[6:])) == 1


def test_lengths_of_auto_are_whole_accumulation_windows(config):
    config.train.steps_per_loop, config.optimizer.accumulation_steps = "auto", 3
    lengths = length(config, 0.01)
    assert lengths[0] == 3
    assert lengths[-1] == 60  # 0.6 s; 150 steps would take more than one


def test_length_that_still_fits_is_kept_when_steps_get_slower(config):
    config.train.steps_per_loop = "auto"
    one = stand_in(config)
    loop_length = LoopLength(one)

    def length_after(seconds_a_step):
        one.global_step.assign_add(loop_length.steps)
        loop_length({"examples_per_second": config.data.batch_size / seconds_a_step})
        return loop_length.steps

    assert [length_after(seconds) for seconds in (0.01, 0.01, 0.01, 0.01, 0.015)][-1] == 100
    assert length_after(0.05) == 20
