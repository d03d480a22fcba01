"""The command line as a user meets it: real processes, real exit statuses, one line for each mistake."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from mptrain.checkpoints import Checkpoints
from tests.conftest import ROOT

TINY = """
from tests.test_main import tiny_config as get_config
"""


def tiny_config():
    """The whole run of the tests: TinyTrainer, 300 steps, a checkpoint every 20."""
    from mptrain import default_config

    config = default_config()
    config.trainer = "tests.trainers.TinyTrainer"
    config.precision.policy = "mixed_float16"
    config.loss_scale.initial_scale = 2.0**10
    config.data.batch_size = 12
    config.train.steps = 300
    config.train.steps_per_loop = 10
    config.eval.every_steps = 100
    config.checkpoint.every_steps = 20
    return config


@pytest.fixture
def tiny(tmp_path):
    """The path of a config file for TinyTrainer."""
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return path


def rows(workdir, **wanted):
    """Returns the rows of metrics.jsonl that hold the wanted values."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if wanted.items() <= row.items()]


def tensors(workdir, step):
    """Returns {name: array} of a checkpoint."""
    reader = tf.train.load_checkpoint(str(workdir / "checkpoints" / f"ckpt-{step}" / "state"))
    names = [name for name in reader.get_variable_to_dtype_map() if name != "_CHECKPOINTABLE_OBJECT_GRAPH"]
    return {name: reader.get_tensor(name) for name in names}


def assert_same_checkpoint(left, right, step):
    left, right = tensors(left, step), tensors(right, step)
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)


@pytest.mark.parametrize(
    "precision",
    ["mixed_float16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixed_bfloat16", "float32"))],
)
def test_main_job_learns_mnist_in_a_few_steps(command, tmp_path, precision):
    finished = command(
        "--config=configs/mnist.py",
        "--config.train.steps=60",
        f"--config.precision.policy={precision}",
        f"--workdir={tmp_path / 'run'}",
    )
    assert finished.returncode == 0, finished.stderr
    (evaluation,) = rows(tmp_path / "run", split="eval")
    assert evaluation["accuracy"] > 0.7
    compute = precision.removeprefix("mixed_")
    assert f"cnn/conv1      {compute}" in finished.stdout
    assert "eval  step 60" in finished.stdout
    assert "wall time" in finished.stdout
    assert (tmp_path / "run" / "precision_plan.txt").read_text().count(compute) >= 8


def test_run_folder_holds_what_the_design_promises(command, tiny, tmp_path):
    finished = command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}")
    assert finished.returncode == 0, finished.stderr
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert names == {".lock", "config.json", "precision_plan.txt", "metrics.jsonl", "train", "eval", "checkpoints"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"ckpt-260", "ckpt-280", "ckpt-300"}
    content = json.loads((folder / "config.json").read_text())
    assert content["config"]["train.steps"] == 300
    assert content["versions"]["tensorflow"].startswith("2.")
    train = rows(folder, split="train")
    assert [row["step"] for row in train] == list(range(10, 301, 10))
    wanted = {"loss", "accuracy", "learning_rate", "loss_scale", "gradient_norm", "applied_steps", "skipped_steps"}
    assert wanted | {"examples_per_second", "time"} <= train[0].keys()
    assert [row["step"] for row in rows(folder, split="eval")] == [100, 200, 300]


@pytest.mark.slow
def test_every_line_appears_once_and_tensorflow_is_silent(command, tiny, tmp_path):
    finished = command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}")
    lines = [line for line in (finished.stdout + finished.stderr).splitlines() if line.strip()]
    assert len(lines) == len(set(lines))
    for noise in ("oneDNN", "cuda", "CUDA", "rebuild TensorFlow", "WARNING", "| step:", "steps/sec"):
        assert noise not in finished.stdout + finished.stderr


@pytest.mark.slow
def test_verbosity_1_brings_the_logs_back(command, tiny, tmp_path):
    finished = command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}", "--verbosity=1")
    assert "train | step:" in finished.stderr


@pytest.mark.slow
def test_finished_run_is_evaluated_and_says_so(command, tiny, tmp_path):
    first = command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}")
    second = command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}")
    assert second.returncode == 0, second.stderr
    assert "this run is finished: 300 of 300 steps are done" in second.stdout
    line = next(line for line in first.stdout.splitlines() if line.startswith("eval  step 300"))
    assert line.split("  in ")[0] in second.stdout


@pytest.mark.slow
def test_mode_eval_evaluates_the_newest_checkpoint_and_trains_nothing(command, tiny, tmp_path):
    command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}", "--mode=train")
    finished = command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}", "--mode=eval")
    assert finished.returncode == 0, finished.stderr
    assert "eval  step 300" in finished.stdout
    assert [row["step"] for row in rows(tmp_path / "run", split="eval")] == [300]


def launch(tiny, workdir, *flags):
    """Starts a run and returns its process."""
    return subprocess.Popen(
        [sys.executable, "-m", "mptrain.main", f"--config={tiny}", f"--workdir={workdir}", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
    )


def start(tiny, workdir, *flags):
    """Starts a run and returns its process once the first checkpoint is there."""
    process = launch(tiny, workdir, *flags)
    checkpoints = Checkpoints(workdir / "checkpoints", {}, keep=1)
    while not checkpoints.steps() and process.poll() is None:
        time.sleep(0.005)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_says_how_to_go_on_and_the_end_has_the_same_bits(command, tiny, tmp_path, number, status):
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    command(f"--config={tiny}", f"--workdir={whole}")
    process = start(tiny, interrupted)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == status, stderr
    assert f"go on with the same command and --workdir={interrupted}" in stdout
    (event,) = rows(interrupted, event="preemption")
    assert event["step"] < 300
    finished = command(f"--config={tiny}", f"--workdir={interrupted}")
    assert f"restored step {event['step']} of 300" in finished.stdout
    assert_same_checkpoint(whole, interrupted, 300)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_killed_run_ends_with_the_same_bits(command, tiny, tmp_path, replicas):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--config.devices.strategy=mirrored", f"--config.devices.virtual_cpus={replicas}"]
    command(f"--config={tiny}", f"--workdir={whole}", *flags)
    process = start(tiny, killed, *flags)
    process.kill()
    process.communicate(timeout=120)
    assert 300 not in Checkpoints(killed / "checkpoints", {}, keep=1).steps()
    assert command(f"--config={tiny}", f"--workdir={killed}", *flags).returncode == 0
    assert len(rows(killed, event="resume")) == 1
    assert_same_checkpoint(whole, killed, 300)
    losses = [[row["loss"] for row in rows(folder, split="eval", step=300)] for folder in (whole, killed)]
    assert losses[0] == losses[1]


BAD_FLAGS = {
    "unknown field": (["--config.train.step=3"], "unknown config field 'train.step': did you mean 'train.steps'?"),
    "unknown group": (["--config.optimiser.name=sgd"], "did you mean 'optimizer.name'?"),
    "unknown flag": (["--workdri=x"], "workdri"),
    "wrong type": (["--config.train.steps=many"], "train.steps"),
    "unknown mode": (["--mode=trian"], "mode"),
    "stray argument": (["configs/mnist.py"], "unexpected argument 'configs/mnist.py'"),
    "steps and epochs": (
        ["--config.train.steps=3", "--config.train.epochs=1"],
        "config.train.steps and config.train.epochs: both are set; set exactly one",
    ),
    "unknown precision": (["--config.precision.policy=fp16"], "config.precision.policy is 'fp16'"),
    "trainer without module": (["--config.trainer=no.such.Trainer"], "config.trainer is 'no.such.Trainer'"),
    "trainer without class": (["--config.trainer=tests.trainers.Missing"], "has no class 'Missing'"),
    "no trainer": (["--config.trainer=tests.trainers.TinyModule"], "not a subclass of mptrain.Trainer"),
    "batch and replicas": (
        ["--config.devices.virtual_cpus=5"],
        "config.data.batch_size is 12: it is the global batch and must be divisible by the 5 replicas",
    ),
    "missing data": (
        ["--config.trainer=experiments.mnist.MnistTrainer", "--config.data.name=idx", "--config.data.dir=/nowhere"],
        "/nowhere/train-images-idx3-ubyte (or train-images-idx3-ubyte.gz) not found",
    ),
    "unknown optimizer": (["--config.optimizer.name=adagrda"], "did you mean 'adagrad'?"),
    "eval of nothing": (["--mode=eval"], "holds no checkpoint"),
    "a space for an equals sign": (
        ["--config.train.step", "3"],
        "unknown config field 'train.step': did you mean 'train.steps'?",
    ),
    "a group": (["--config.train=5"], "--config.train is a group of fields"),
    "unknown model field": (["--config.model.width=3"], "unknown config field 'model.width'"),
    "odd trainer": (["--config.trainer=.foo"], "config.trainer is '.foo'"),
    "missing model field": (
        ["--config.trainer=experiments.mnist.MnistTrainer", "--config.data.name=mnist"],
        "reads the config field 'dropout', which is not there: set it in config.model",
    ),
}


def assert_refused(finished, message):
    assert finished.returncode == 2, finished.stderr
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("mistake", BAD_FLAGS)
def test_mistake_ends_in_one_line_and_status_2_and_writes_nothing(command, tiny, tmp_path, mistake):
    flags, message = BAD_FLAGS[mistake]
    assert_refused(command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}", *flags), message)
    assert not (tmp_path / "run").exists()


CHANGED = """
from tests.test_main import tiny_config

def get_config():
    config = tiny_config()
    {change}
    return config
"""
BAD_FILES = {
    "missing": (None, "not found"),
    "unknown field": (CHANGED.format(change="config.train.stepz = 3"), "line 6: unknown config field 'stepz': did you mean"),
    "wrong type": (CHANGED.format(change="config.train.steps_per_loop = 'x'"), "line 6"),
    "neither": (CHANGED.format(change="config.train.steps = None"), "neither is set"),
    "syntax": ("def get_config(:\n", "line 1"),
    "no get_config": ("x = 1\n", "get_config"),
    "import": ("import no_such_module\n", "no_such_module"),
    "returns nothing": ("def get_config():\n    pass\n", "returns None: end it with `return config`"),
    "returns a number": ("def get_config():\n    return 5\n", "returns 5: end it with"),
    "raises": ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("mistake", BAD_FILES)
def test_bad_config_file_ends_in_one_line_and_status_2(command, tmp_path, mistake):
    content, message = BAD_FILES[mistake]
    path = tmp_path / "bad.py"
    if content:
        path.write_text(content)
    assert_refused(command(f"--config={path}", f"--workdir={tmp_path / 'run'}"), message)


def test_no_config_at_all_is_refused(command):
    assert_refused(command(), "no config given: write --config=FILE")


@pytest.mark.slow
def test_workdir_of_another_run_is_refused_and_left_as_it_was(command, tiny, tmp_path):
    command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=20")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    finished = command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}", "--config.optimizer.learning_rate=0.5")
    assert_refused(finished, "config.optimizer.learning_rate was 0.001 and is 0.5")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_longer_run_in_the_same_folder_goes_on_and_says_so(command, tiny, tmp_path):
    command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=20")
    finished = command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=40")
    assert "config.train.steps was 20 and is 40 from here on" in finished.stdout
    assert "restored step 20 of 40" in finished.stdout
    assert 40 in Checkpoints(tmp_path / "run" / "checkpoints", {}, keep=1).steps()


@pytest.mark.parametrize("kind", ["a file", "below a file", "somebody's folder", "damaged config.json", "not writable"])
def test_folder_that_cannot_be_used_is_refused(command, tiny, tmp_path, kind):
    workdir = tmp_path / "place"
    if kind == "somebody's folder":
        (workdir / "checkpoints").mkdir(parents=True)
    elif kind == "damaged config.json":
        workdir.mkdir()
        (workdir / "config.json").write_text("{")
    elif kind == "not writable":
        workdir = "/proc/mptrain"
    else:
        workdir.write_text("mine")
        workdir = workdir / "run" if kind == "below a file" else workdir
    finished = command(f"--config={tiny}", f"--workdir={workdir}")
    assert finished.returncode == 2, finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1
    assert "Traceback" not in finished.stderr
    assert str(workdir) in finished.stderr


LONG_LOOPS = (
    "--config.train.steps_per_loop=100000",
    "--config.checkpoint.every_steps=100000",
    "--config.eval.every_steps=100000",
)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_stops_at_once(tiny, tmp_path, number):
    process = launch(tiny, tmp_path / "run", "--config.train.steps=200000", *LONG_LOOPS)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(3)  # into the first loop, which takes a minute
    process.send_signal(number)
    time.sleep(0.2)
    process.send_signal(number)
    begin = time.time()
    _, stderr = process.communicate(timeout=60)
    assert time.time() - begin < 1
    assert process.returncode == 128 + number
    assert "a second one stops at once" in stderr
    assert "Traceback" not in stderr


def test_ctrl_c_before_the_run_is_one_line(tiny, tmp_path):
    process = launch(tiny, tmp_path / "run")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip() == "mptrain: interrupted"


@pytest.mark.slow
def test_run_that_always_overflows_ends_with_status_1_and_the_layer(command, tmp_path):
    path = tmp_path / "overflow.py"
    change = "config.trainer = 'tests.trainers.PoisonedTrainer'\n    config.loss_scale.max_consecutive_skips = 20"
    model = "\n    config.model = {'poisoned_steps': list(range(300)), 'poisoned_replica': 0}"
    path.write_text(CHANGED.format(change=change + model))
    finished = command(f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert finished.returncode == 1
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("mptrain: ")]
    assert "20 updates in a row were skipped" in line
    assert "the loss itself is not finite" in line
    assert "First layer: sequential/conv2d" in line
    events = rows(tmp_path / "run", event="overflow")
    assert [event["step"] for event in events] == list(range(20))
    assert events[1]["loss_scale"] == 2.0**9
    assert events[0]["layer"] == "sequential/conv2d"
    assert "sequential/dense/bias" in events[0]["variables"]


@pytest.mark.slow
def test_second_process_in_the_same_folder_is_refused_by_the_firsts_name(command, tiny, tmp_path):
    first = start(tiny, tmp_path / "run", "--config.train.steps=1000000")
    finished = command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=1000000")
    first.kill()
    first.communicate(timeout=60)
    assert_refused(finished, f"is in use by process {first.pid} on ")


@pytest.mark.slow
def test_damaged_checkpoint_is_put_aside_and_its_step_saved_again(command, tiny, tmp_path):
    flags = [f"--config={tiny}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=40"]
    command(*flags)
    data = tmp_path / "run" / "checkpoints" / "ckpt-40" / "state.data-00000-of-00001"
    whole = data.read_bytes()
    data.write_bytes(whole[:10])
    finished = command(*flags)
    assert "ckpt-40 is damaged, passed over and put aside" in finished.stderr
    assert "restored step 20 of 40" in finished.stdout
    assert data.read_bytes() == whole
    assert len(rows(tmp_path / "run", event="fallback")) == 1
    assert [row["step"] for row in rows(tmp_path / "run", split="train")] == [10, 20, 30, 40]
