"""Flags: their faults all at once, the config that they make of a file, and the file that --print_config writes."""

import pytest

from mptrain import command_line, config_check, config_text, default_config
from mptrain import config as config_lib
from tests.runs import assert_refused

FLAGS = {
    "--config.train.epochs=abc": "--config.train.epochs=abc: write a value of type float",
    "--config.train.steps=1.5": "--config.train.steps=1.5: write a value of type int",
    "--config.seed=True": "--config.seed=True: write a value of type int",
    "--config.loss_scale.dynamic=maybe": "--config.loss_scale.dynamic=maybe: write a value of type bool",
    "--config.train.step=3": "unknown config field 'train.step': did you mean 'train.steps'?",
    "--config.train=5": "--config.train is a group of fields",
    "--config.schedule.factors=(1,": "--config.schedule.factors=(1,: write a value of type tuple",
    "--mode=trian": "--mode=trian: value should be one of",
    "--workdri=x": "unknown flag --workdri: did you mean --workdir?",
}


@pytest.fixture(scope="module", autouse=True)
def flags_of_main():
    import mptrain.main  # noqa: F401  defines the flags


@pytest.mark.parametrize("flag", FLAGS)
def test_wrong_flag_is_named_and_left_out(flag):
    line = command_line.read(["main", "--config=x.py", flag, "--config.seed=3"])
    assert line.argv == ["main", "--config=x.py", "--config.seed=3"]
    assert line.faults[0].startswith(FLAGS[flag])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config.seed=3"],
        ["--config.seed", "3"],
        ["--config.loss_scale.dynamic", "--config.seed=3"],
        ["--noconfig.loss_scale.dynamic"],
        ["--config.precision.float32_layers=dense"],
        ["--config.optimizer.groups=({'match': 'a'},)"],
        ["--config.train.jit_compile=True"],
        ["--config.model.width=3"],
        ["--mode=train", "--workdir", "x"],
        ["--verbosity=1"],
        ["--print_config"],
    ],
)
def test_good_flags_are_left_to_absl(arguments):
    line = command_line.read(["main", *arguments])
    assert (line.argv, line.faults, line.options) == (["main", *arguments], [], {})


def test_options_of_the_optimizer_need_no_place_in_the_file():
    line = command_line.read(["main", "--config.optimizer.options.momentum=0.9", "--config.optimizer.options.kind", "none"])
    assert line.options == {"optimizer.options.momentum": 0.9, "optimizer.options.kind": "none"}


def test_faults_of_flags_and_values_are_told_together(command, tiny, tmp_path):
    values = ["--config.data.batch_size=-1", "--config.optimizer.learning_rate=nan", "--config.precision.float32_layers=("]
    finished = command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}", *FLAGS, *values)
    assert finished.returncode == 2
    first, *lines = finished.stderr.strip().splitlines()
    assert first == f"mptrain: {len(FLAGS) + 3} faults:"
    for message in FLAGS.values():
        assert any(line.strip().startswith(message) for line in lines), message
    for field in ("data.batch_size is -1", "optimizer.learning_rate is nan", "precision.float32_layers: '(' is no regular"):
        assert any(line.strip().startswith(f"config.{field}") for line in lines), field
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fields", [{}, {"trainer": None, "train.steps": "x", "seed": True, "data.shape": "28", "model": 5}])
def test_wrong_types_do_not_hide_wrong_values(fields):
    config = default_config()
    config.trainer, config.train.steps = "a.B", 3
    config.loss_scale.growth_factor, config.eval.every_steps, config.devices.start_timeout = 0.5, -3, float("inf")
    for path, value in fields.items():
        holder, leaf = config_lib.place(config, path)
        with holder.unlocked(), holder.ignore_type():
            holder[leaf] = value
    found = config_check.faults(config)
    wanted = {"loss_scale.growth_factor", "eval.every_steps", "devices.start_timeout", *(path for path in fields)}
    assert {path for path in wanted if any(f"config.{path} is" in fault for fault in found)} == wanted
    assert len(found) == len(wanted)


def test_printed_config_is_a_config_file_of_every_field_with_marks(command, tiny, tmp_path):
    flags = ["--config.train.epochs=2", "--config.optimizer.options.beta_1=0.8", "--config.eval.every_epochs=0.5"]
    groups = "--config.optimizer.groups=({'match': 'dense', 'learning_rate_factor': 0.5},)"
    finished = command(f"--config={tiny}", "--print_config", *flags, groups)
    assert (finished.returncode, finished.stderr) == (0, "")
    text = finished.stdout
    for path, _ in config_lib.fields(default_config()):
        assert f"\n    config.{path} = " in text
    assert "    config.seed = 0\n" in text
    assert "    config.train.epochs = 2.0  # default: None\n" in text  # the flag replaced the file's steps
    assert "    config.train.steps = None\n" in text
    assert "    config.optimizer.options = {'beta_1': 0.8}  # default: {}\n" in text
    names = {}
    exec(text, names)
    config = names["get_config"]()
    config_check.validate(config)
    assert config_text.config_text(config) == text
    assert (config.train.epochs, config.eval.every_steps, config.optimizer.groups[0]["match"]) == (2.0, None, "dense")
    assert list(tmp_path.iterdir()) == [tiny]


WITH_SIZE = """
from tests.runs import tiny_config

def get_config({arguments}):
    config = tiny_config()
    {body}
    return config
"""


@pytest.mark.parametrize(
    ("arguments", "body", "given", "message"),
    [
        ("", "pass", ":small", "get_config takes none: write"),
        ("size", "pass", "", "get_config needs an argument: write"),
    ],
)
def test_argument_that_a_config_file_does_not_take_is_one_line(command, tmp_path, arguments, body, given, message):
    path = tmp_path / "sized.py"
    path.write_text(WITH_SIZE.format(arguments=arguments, body=body))
    assert_refused(command(f"--config={path}{given}", "--print_config"), message)


def test_config_file_takes_an_argument_and_an_unknown_one_is_one_line(command):
    small = command("--config=configs/mnist.py:small", "--print_config")
    assert "config.train.epochs = 2.0" in small.stdout
    assert "'width': 8" in small.stdout
    assert_refused(command("--config=configs/mnist.py:smal"), "there is no size 'smal': write one of small, base, large")


@pytest.mark.parametrize(
    ("file", "name"),
    [("configs/mnist.py", "mnist"), ("configs/mnist.py:small", "mnist-small"), ("/a/b.py:x=1,y/../z", "b-x-1-y-..-z")],
)
def test_runs_are_named_after_the_config_and_its_argument(file, name):
    from mptrain import main

    assert main._run_name(file) == name


def test_both_units_on_the_command_line_are_refused_even_if_one_is_the_default(command, tiny):
    flags = ["--config.checkpoint.every_steps=1000", "--config.checkpoint.every_epochs=1"]
    assert_refused(command(f"--config={tiny}", *flags), "config.checkpoint.every_epochs: both are set")
