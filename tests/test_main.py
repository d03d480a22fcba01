"""The command line as a user meets it: real processes, real exit statuses, one line for each mistake."""

import json
import shutil

import pytest

from mptrain.checkpoints import Checkpoints
from tests.runs import assert_refused, mostly_slow, rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "process"), [("mixed_float16", "command"), ("mixed_bfloat16", "command"), ("float32", "fresh_command")]
)
def test_main_job_learns_mnist_in_a_few_steps(request, tmp_path, precision, process):
    finished = request.getfixturevalue(process)(
        "--config=configs/mnist.py",
        "--config.train.steps=60",
        "--config.eval.steps=4",
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


@pytest.mark.slow
def test_run_folder_holds_what_the_design_promises(whole_run):
    folder, _ = whole_run
    names = {path.name for path in folder.iterdir()}
    assert names == {".lock", "config.json", "precision_plan.txt", "metrics.jsonl", "train", "eval", "checkpoints", "report"}
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
def test_every_line_appears_once_and_tensorflow_is_silent(fresh_command, tiny, tmp_path):
    finished = fresh_command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}")
    lines = [line for line in (finished.stdout + finished.stderr).splitlines() if line.strip()]
    assert len(lines) == len(set(lines))
    for noise in ("oneDNN", "cuda", "CUDA", "rebuild TensorFlow", "WARNING", "| step:", "steps/sec"):
        assert noise not in finished.stdout + finished.stderr


@pytest.mark.slow
def test_verbosity_1_brings_the_logs_back(fresh_command, tiny, tmp_path):
    finished = fresh_command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}", "--verbosity=1", "--config.train.steps=20")
    assert "train | step:" in finished.stderr


@pytest.mark.slow
def test_finished_run_is_evaluated_and_says_so(command, tiny, tmp_path, whole_run):
    folder, first = whole_run
    shutil.copytree(folder, tmp_path / "run")
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


@pytest.mark.parametrize("mistake", mostly_slow(BAD_FLAGS))
def test_mistake_ends_in_one_line_and_status_2_and_writes_nothing(command, tiny, tmp_path, mistake):
    flags, message = BAD_FLAGS[mistake]
    assert_refused(command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}", *flags), message)
    assert not (tmp_path / "run").exists()


CHANGED = """
from tests.runs import tiny_config

def get_config():
    config = tiny_config()
    {change}
    return config
"""
BAD_FILES = {
    "missing": (None, "not found"),
    "unknown field": (CHANGED.format(change="config.train.stepz = 3"), "line 6: unknown config field 'stepz': did you mean"),
    "wrong type": (CHANGED.format(change="config.train.steps = 'x'"), "line 6"),
    "neither": (CHANGED.format(change="config.train.steps = None"), "neither is set"),
    "syntax": ("def get_config(:\n", "line 1"),
    "no get_config": ("x = 1\n", "get_config"),
    "import": ("import no_such_module\n", "no_such_module"),
    "returns nothing": ("def get_config():\n    pass\n", "returns None: end it with `return config`"),
    "returns a number": ("def get_config():\n    return 5\n", "returns 5: end it with"),
    "raises": ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("mistake", mostly_slow(BAD_FILES))
def test_bad_config_file_ends_in_one_line_and_status_2(command, tmp_path, mistake):
    content, message = BAD_FILES[mistake]
    path = tmp_path / "bad.py"
    if content:
        path.write_text(content)
    assert_refused(command(f"--config={path}", f"--workdir={tmp_path / 'run'}"), message)


def test_no_config_at_all_is_refused(command):
    assert_refused(command(), "no config given: write --config=FILE")


@pytest.mark.parametrize("flag", ["--config.seed=3", "--noconfig.loss_scale.dynamic", "--config.optimizer.options.kind=a"])
def test_a_field_without_a_config_is_refused(command, tmp_path, flag):
    message = f"{flag} changes a field of a config file: add --config=FILE"
    assert_refused(command("--mode=export", f"--workdir={tmp_path / 'run'}", flag), message)


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


@pytest.mark.parametrize(
    "kind", mostly_slow(["a file", "below a file", "somebody's folder", "damaged config.json", "not writable"])
)
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


@pytest.mark.slow
def test_run_that_always_overflows_ends_with_status_1_and_the_layer(command, tmp_path):
    path = tmp_path / "overflow.py"
    change = "config.trainer = 'tests.trainers.PoisonedTrainer'\n    config.loss_scale.max_consecutive_skips = 20"
    model = "\n    config.model = {'poisoned_steps': list(range(300)), 'poisoned_replica': 0}"
    path.write_text(CHANGED.format(change=change + model))
    finished = command(f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert finished.returncode == 1
    *looks, line = [line for line in finished.stderr.splitlines() if line.startswith("mptrain: ")]
    assert len(looks) == 3  # into the first skipped steps
    assert "20 updates in a row were skipped" in line
    assert "the loss itself is not finite" in line
    assert "First layer: sequential/conv2d" in line
    events = rows(tmp_path / "run", event="overflow")
    assert [event["step"] for event in events] == list(range(20))
    assert events[1]["loss_scale"] == 2.0**9
    assert events[0]["layer"] == "sequential/conv2d"
    assert "sequential/dense/bias" in events[0]["variables"]
