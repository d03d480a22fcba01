"""Where an overflow comes from: named by a second look at the skipped step, which leaves no trace in the run."""

import numpy as np
import pytest

import mptrain
from tests.runs import assert_same_checkpoint, rows, tiny_config


@pytest.fixture
def overflowing():
    """Returns the config of a run that overflows in its first steps."""

    def config(name="tests.trainers.TinyTrainer", **fields):
        config = tiny_config()
        config.trainer = name
        config.train.steps = 40
        config.loss_scale.initial_scale = 2.0**24
        config.update_from_flattened_dict(fields)
        return config

    return config


def test_backward_overflow_names_the_gradient_its_size_and_the_weights(overflowing, tmp_path, capfd):
    mptrain.run(overflowing(), tmp_path / "run")
    events = rows(tmp_path / "run", event="provenance")
    assert [event["step"] for event in events] == [0, 1, 2]  # then they are rationed
    assert len(rows(tmp_path / "run", event="overflow")) > 3
    first = events[0]
    assert (first["layer"], first["tensor"], first["forward"]) == ("sequential/dropout", "gradient", False)
    assert first["largest"] > 65_504
    assert "sequential/conv2d/kernel" in first["variables"]
    assert "sequential/dense/kernel" not in first["variables"]  # it computes in float32
    sizes = [event["largest"] for event in events]
    assert sizes[0] > 1.2 * sizes[1] > 1.2**2 * sizes[2]  # each at half the scale
    lines = [line for line in capfd.readouterr().err.splitlines() if "sequential/dropout" in line]
    assert len(lines) == 3
    assert "which loss scaling cures" in lines[0]


def test_forward_overflow_is_told_apart_with_its_size_in_float32(overflowing, tmp_path, capfd):
    config = overflowing("tests.sick_trainers.LoudTrainer", **{"loss_scale.initial_scale": 1.0})
    mptrain.run(config, tmp_path / "run")
    first = rows(tmp_path / "run", event="provenance")[0]
    assert (first["layer"], first["tensor"], first["forward"]) == ("sequential/loud", "output", True)
    assert first["largest"] > 65_504
    assert "no loss scale cures that" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("replica", [0, 1])
def test_overflow_of_one_replica_is_found(overflowing, tmp_path, replica):
    config = overflowing("tests.trainers.PoisonedTrainer", **{"devices.virtual_cpus": 2, "loss_scale.initial_scale": 1.0})
    config.model.poisoned_steps, config.model.poisoned_replica, config.model.poison = (5, 25), replica, 1e6
    mptrain.run(config, tmp_path / "run")
    events = rows(tmp_path / "run", event="provenance")
    assert [event["step"] for event in events] == [5, 25]
    assert all(event["forward"] for event in events)
    assert all(event["layer"] == "before sequential" for event in events)  # the cast of the inputs, not a layer


def test_overflow_inside_a_window_is_found_in_its_step(overflowing, tmp_path):
    config = overflowing("tests.trainers.PoisonedTrainer", **{"optimizer.accumulation_steps": 4, "eval.every_steps": 40})
    config.loss_scale.initial_scale = 1.0
    config.model.poisoned_steps, config.model.poisoned_replica, config.model.poison = (6,), 0, 1e6
    mptrain.run(config, tmp_path / "run")
    assert [event["step"] for event in rows(tmp_path / "run", event="provenance")] == [6]


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", ["TinyTrainer", "TfKerasTrainer"])
def test_looking_into_overflows_leaves_the_bits_of_a_run_that_does_not(overflowing, tmp_path, name, replicas):
    for look in (True, False):
        config = overflowing(f"tests.trainers.{name}", **{"devices.virtual_cpus": replicas, "numerics.provenance": look})
        mptrain.run(config, tmp_path / str(look))
        assert bool(rows(tmp_path / str(look), event="provenance")) == look
    assert_same_checkpoint(tmp_path / "True", tmp_path / "False", 40)


def test_data_that_cannot_be_read_again_is_left_alone(overflowing, tmp_path):
    mptrain.run(overflowing("tests.trainers.DatasetTrainer"), tmp_path / "run")
    assert rows(tmp_path / "run", event="overflow")
    assert not rows(tmp_path / "run", event="provenance")


def test_infinite_input_is_not_called_an_overflow_of_float16(overflowing, tmp_path, capfd):
    config = overflowing("tests.trainers.PoisonedTrainer", **{"loss_scale.initial_scale": 1.0})
    config.model.poisoned_steps, config.model.poisoned_replica, config.model.poison = (3,), 0, np.inf
    mptrain.run(config, tmp_path / "run")
    [event] = rows(tmp_path / "run", event="provenance")
    assert event["largest"] is None
    assert event["in_float32"]
    assert event["layer"] == "before sequential"
    assert "is not finite in float32 either" in capfd.readouterr().err


@pytest.mark.slow
def test_generator_of_the_users_own_goes_on_as_if_nothing_had_looked(overflowing, tmp_path):
    for look in (True, False):
        config = overflowing("tests.sick_trainers.KeywordTrainer", **{"numerics.provenance": look})
        mptrain.run(config, tmp_path / str(look))
        assert bool(rows(tmp_path / str(look), event="provenance")) == look
    assert_same_checkpoint(tmp_path / "True", tmp_path / "False", 40)


@pytest.mark.slow
def test_step_that_cannot_be_looked_at_trains_on(overflowing, tmp_path, capfd):
    for name in ("FunctionTrainer", "FailingLookTrainer"):
        mptrain.run(overflowing(f"tests.sick_trainers.{name}"), tmp_path / name)
        assert rows(tmp_path / name, event="finished")
    assert "skipped steps cannot be looked into (traced once more)" in capfd.readouterr().err
