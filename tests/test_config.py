import pathlib

import pytest

from mptrain import InputError, config_check
from mptrain import config as config_lib
from mptrain.run_folder import RunFolder


def refuse(config, *messages):
    with pytest.raises(InputError) as caught:
        config_check.validate(config)
    for message in messages:
        assert message in str(caught.value)
    return str(caught.value)


def test_whole_config_is_accepted(config):
    config_check.validate(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("precision.policy", "mixed_flot16", "did you mean 'mixed_float16'?"),
        ("schedule.name", "cosin", "did you mean 'cosine'?"),
        ("devices.strategy", "parameter_server", "write one of auto, one_device, mirrored"),
        ("train.jit_compile", 1, "write one of auto, True, False"),
        ("train.steps", 0, "config.train.steps is 0: write a number above 0"),
        ("data.batch_size", -1, "config.data.batch_size is -1"),
        ("train.steps_per_loop", "many", "is 'many': write a number of steps above 0, or 'auto'"),
        ("train.steps_per_loop", True, "is True: write a number of steps above 0, or 'auto'"),
        ("eval.every_steps", 0, "write a number above 0"),
        ("numerics.every_steps", -1, "write 0 or a number above"),
        ("seed", 2**31, "below 2**31"),
        ("devices.port", 70000, "config.devices.port is 70000: write a port, 1 to 65535"),
        ("loss_scale.initial_scale", 2.0**30, "must lie between min_scale"),
        ("loss_scale.growth_factor", 1.0, "above 1"),
        ("loss_scale.backoff_factor", 1.0, "between 0 and 1"),
        ("optimizer.learning_rate", float("nan"), "config.optimizer.learning_rate is nan"),
        ("data.name", "idx", "config.data.dir is empty"),
        ("optimizer.accumulation_steps", 5, "config.checkpoint.every_steps is 6: write a multiple"),
        ("optimizer.accumulation_steps", 6, "config.eval.every_steps is 4: write a multiple"),
        ("optimizer.ema_momentum", 1.0, "below 1"),
        ("early_stop.mode", "mean", "config.early_stop.mode is 'mean': write one of min, max"),
        ("early_stop.patience", 0, "config.early_stop.patience is 0: write a number above 0"),
        ("plateau.factor", 1.0, "config.plateau.factor is 1.0: write a number below 1"),
        ("profile.steps", -1, "write 0 or a number above"),
        ("eval.checkpoint", "newst", "config.eval.checkpoint is 'newst': write newest, best, or the step of a checkpoint"),
        ("train.time_limit", "soon", "'soon' is no length of time: write seconds, or days, hours"),
        ("log.loggers", ("comet",), "config.log.loggers names 'comet': write wandb, mlflow, or 'package.module.Class'"),
        ("trainer", "MnistTrainer", "module path and class"),
        ("train.epochs", 1.0, "both are set; set exactly one"),
    ],
)
def test_wrong_value_is_refused_with_what_to_write(config, field, value, message):
    config.update_from_flattened_dict({field: value})
    refuse(config, message)


def test_neither_steps_nor_epochs_is_refused(config):
    config.train.steps = None
    refuse(config, "neither is set; set exactly one")


def test_all_faults_are_told_at_once(config):
    config.train.steps_per_loop = 0
    config.precision.policy = "half"
    refuse(config, "2 faults", "config.train.steps_per_loop", "config.precision.policy")


def test_unknown_field_is_refused_with_the_nearest_name(config):
    with config.unlocked():
        config.train.step = 3
    refuse(config, "unknown config field 'train.step': did you mean 'train.steps'?")


def test_missing_field_and_wrong_type_are_refused():
    config = config_lib.default_config()
    with config.unlocked():
        del config.eval.every_steps
    refuse(config, "config field 'eval.every_steps' is missing")
    config = config_lib.default_config().copy_and_resolve_references()
    with config.unlocked(), config.train.ignore_type():
        config.train.steps = "many"
    refuse(config, "config.train.steps is 'many': write a value of type int")


def test_copy_takes_values_of_all_types_that_the_config_took(config):
    config.train.steps_per_loop, config.train.jit_compile, config.train.time_limit = "auto", True, "2h"
    config.export.checkpoint, config.model = 12, {"sizes": (3, 4), "inner": {"rate": 0.5}}
    copy = config_lib.copied(config)
    assert dict(config_lib.fields(copy)) == dict(config_lib.fields(config))
    copy.train.steps_per_loop, copy.train.jit_compile, copy.train.time_limit, copy.export.checkpoint = 5, "auto", 0, "best"
    copy.model.more = 1
    assert "more" not in config.model
    assert config.train.steps_per_loop == "auto"


def test_the_experiments_own_fields_are_free(config):
    config.model = {"width": 3}
    config_check.validate(config)


def test_every_field_has_a_place_in_the_table_of_the_readme():
    table = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
    missing = [path for path, _ in config_lib.fields(config_lib.default_config()) if f"`{path.split('.')[-1]}`" not in table]
    assert missing == []


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"config": []}', '{"config": {}}', '{"config": [1], "precision": "x"}'])
def test_damaged_config_json_is_one_line(tmp_path, config, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="config.json is damaged"):
        RunFolder(tmp_path).changes(config)


@pytest.mark.parametrize("value", [{1, 2}, print, object()])
def test_models_field_that_config_json_cannot_hold_is_refused_by_name(config, value):
    config.model.odd = value
    refuse(config, "config.model.odd is a ", "which config.json cannot hold")
