"""Durations in steps or in epochs: one of them, rounded as a user would, and the same run whichever it was."""

import json

import pytest

from mptrain import InputError, config_check, default_config, durations, runner
from mptrain import config as config_lib


def resolved(examples=100, batch=12, window=1, **fields):
    config = default_config()
    config.trainer, config.data.batch_size, config.optimizer.accumulation_steps = "a.B", batch, window
    config.train.epochs = 1
    for path, value in fields.items():
        config_lib.set_field(config, path, value)
    config_check.validate(config)
    return durations.resolve(config, lambda: examples)


def test_every_field_in_epochs_has_a_twin_in_steps():
    found = dict(durations.pairs())
    assert found["train.steps"] == "train.epochs"
    assert found["checkpoint.every_steps"] == "checkpoint.every_epochs"
    assert found["schedule.boundaries_steps"] == "schedule.boundaries_epochs"
    named = [path for path, _ in config_lib.fields(default_config()) if path.endswith("epochs")]
    assert sorted(found.values()) == sorted(named)


@pytest.mark.parametrize(
    ("epochs", "examples", "batch", "window", "steps"),
    [
        (1, 100, 12, 1, 9),
        (6, 60_000, 128, 1, 2813),
        (0.01, 100, 12, 1, 1),
        (1.1, 1000, 10, 1, 110),  # 1.1 * 100 is 110.00000000000001
        (0.7, 1000, 10, 1, 70),
        (1, 100, 10, 4, 12),
        (1.1, 1000, 10, 11, 110),
    ],
)
def test_epochs_are_rounded_up_to_whole_steps_and_windows(epochs, examples, batch, window, steps):

    config = resolved(examples, batch, window, **{"train.epochs": epochs, "checkpoint.every_epochs": 1})
    assert config.train.steps == steps
    assert config.train.epochs is None


def test_all_durations_are_resolved_in_one_place():
    fields = {
        "checkpoint.every_epochs": 0.5,
        "schedule.warmup_epochs": 2,
        "numerics.every_epochs": 3,
        "schedule.name": "piecewise",
    }
    boundaries = {"schedule.boundaries_epochs": (1, 2.5), "schedule.factors": (0.5, 0.1)}
    config = resolved(100, 10, **fields, **boundaries)
    assert (config.train.steps, config.eval.every_steps, config.checkpoint.every_steps) == (10, 10, 5)
    assert (config.schedule.warmup_steps, config.numerics.every_steps) == (20, 30)
    assert config.schedule.boundaries_steps == (10, 25)
    assert durations.open_fields(config) == set()
    config_check.validate(config)


def test_steps_stay_as_they_are_and_ask_nobody_for_the_size_of_the_data():
    config = resolved(**{"train.steps": 7, "train.epochs": None, "eval.every_steps": 3, "checkpoint.every_steps": 5})

    def unknown():
        raise InputError("the data never ends")

    again = durations.resolve(config, unknown)
    assert dict(config_lib.fields(again)) == dict(config_lib.fields(config))
    assert (again.train.steps, again.eval.every_steps, again.checkpoint.every_steps) == (7, 3, 5)
    config.eval.every_steps, config.eval.every_epochs = None, 1.0  # the default, which --mode=train does not need
    assert durations.resolve(config, unknown).eval.every_steps is None
    config.eval.every_epochs = 2.0
    with pytest.raises(InputError, match="never ends"):
        durations.resolve(config, unknown)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train.steps": 5}, "config.train.steps and config.train.epochs: both are set"),
        ({"train.epochs": None}, "config.train.steps and config.train.epochs: neither is set"),
        ({"eval.every_steps": 5, "eval.every_epochs": 2}, "config.eval.every_steps and config.eval.every_epochs: both"),
        ({"eval.every_epochs": None}, "config.eval.every_steps and config.eval.every_epochs: neither"),
        ({"checkpoint.every_steps": 5, "checkpoint.every_epochs": 2}, "config.checkpoint.every_epochs: both"),
        ({"schedule.warmup_steps": 5, "schedule.warmup_epochs": 2}, "config.schedule.warmup_epochs: both"),
        ({"checkpoint.every_epochs": float("nan")}, "config.checkpoint.every_epochs is nan: write a number above 0"),
        ({"eval.every_epochs": 0}, "config.eval.every_epochs is 0.0: write a number above 0"),
        ({"train.epochs": float("inf")}, "config.train.epochs is inf"),
        ({"schedule.warmup_epochs": -1}, "config.schedule.warmup_epochs is -1.0: write 0"),
    ],
)
def test_both_units_neither_and_no_duration_are_refused(fields, message):
    with pytest.raises(InputError) as caught:
        resolved(**fields)
    assert message in str(caught.value)


def test_one_epoch_and_its_steps_are_the_same_run(config, tmp_path, capsys):
    config.train.steps = config.eval.every_steps = None
    config.train.epochs, config.schedule.warmup_epochs, config.checkpoint.every_epochs = 1, 0.5, 0.3
    config.checkpoint.every_steps = 1000
    runner.run(config, tmp_path, "train")
    written = json.loads((tmp_path / "config.json").read_text())["config"]
    assert (written["train.steps"], written["train.epochs"], written["eval.every_steps"]) == (9, None, 9)
    assert (written["schedule.warmup_steps"], written["checkpoint.every_steps"]) == (5, 3)
    capsys.readouterr()
    in_steps = config_lib.from_fields(written)
    runner.run(in_steps, tmp_path, "train")
    assert "from here on" not in capsys.readouterr().out
    runner.run(config, tmp_path, "train")
    assert "from here on" not in capsys.readouterr().out
    in_steps.schedule.warmup_steps = 4
    with pytest.raises(InputError, match="config.schedule.warmup_steps was 5 and is 4"):
        runner.run(in_steps, tmp_path, "train")
    config.schedule.warmup_epochs = 0.4
    with pytest.raises(InputError, match="config.schedule.warmup_steps was 5 and is 4"):
        runner.run(config, tmp_path, "train")
