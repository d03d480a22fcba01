"""Four logical CPU devices for every test, and the small configs that the tests share."""

import gc
import os
import pathlib
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest
import tensorflow as tf

from mptrain import default_config, devices
from tests import prepared

ROOT = pathlib.Path(__file__).parent.parent
COMMAND_ENVIRONMENT = {**os.environ, "COLUMNS": "120"}

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first in each half: two processes begin with a half each, and so neither ends with them."""
    files = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    halves = ([], [])
    for file in sorted(files.values(), key=lambda file: all(item.get_closest_marker("slow") is None for item in file)):
        min(halves, key=len).extend(file)
    items[:] = halves[0] + halves[1]


def pytest_collection_finish():
    gc.freeze()  # what TensorFlow has made on import, over a million objects, is not looked through in every test


@pytest.fixture
def config():
    """A whole run of tests.trainers.TinyTrainer: 12 steps, four loops, three evaluations, two checkpoints."""
    config = default_config()
    config.trainer = "tests.trainers.TinyTrainer"
    config.precision.policy = "mixed_float16"
    config.loss_scale.initial_scale = 2.0**10
    config.optimizer.learning_rate = 1e-2
    config.data.batch_size = 12
    config.data.eval_batch_size = 32
    config.train.steps = 12
    config.train.steps_per_loop = 3
    config.eval.every_steps = 4
    config.checkpoint.every_steps = 6
    return config


@pytest.fixture
def mirrored():
    """Returns a MirroredStrategy of n logical CPUs."""

    def strategy(n):
        config = default_config().devices
        config.strategy, config.virtual_cpus = "mirrored", n
        return devices.strategy(config)

    return strategy


@pytest.fixture
def tiny(tmp_path):
    """The path of a config file for TinyTrainer."""
    path = tmp_path / "tiny.py"
    path.write_text("from tests.runs import tiny_config as get_config\n")
    return path


@pytest.fixture
def command():
    """Runs `python -m mptrain.main` with the given flags in the repository's root; returns the finished process."""

    def run(*flags, **options):
        return prepared.run("mptrain.main", *flags, env=COMMAND_ENVIRONMENT, **options)

    return run


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """The folder of a whole run of the command with tests.runs.tiny_config, to be left as it is, and the finished process."""
    place = tmp_path_factory.mktemp("whole")
    (place / "tiny.py").write_text("from tests.runs import tiny_config as get_config\n")
    flags = (f"--config={place / 'tiny.py'}", f"--workdir={place / 'run'}")
    finished = prepared.run("mptrain.main", *flags, env=COMMAND_ENVIRONMENT)
    assert finished.returncode == 0, finished.stderr
    return place / "run", finished


@pytest.fixture
def fresh_command():
    """Like `command`, in a process that was not forked from any: it imports TensorFlow itself."""

    def run(*flags, **options):
        return subprocess.run(
            [sys.executable, "-m", "mptrain.main", *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            env=COMMAND_ENVIRONMENT,
            **options,
        )

    return run
