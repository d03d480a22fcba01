"""Kills, signals, damage and second processes, each with real processes of the command."""

import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from mptrain import RunError, runner, tensor_file, verify_resume
from mptrain.checkpoints import Checkpoints
from mptrain.errors import InputError
from mptrain.run_folder import RunFolder
from tests.conftest import ROOT
from tests.runs import assert_refused, assert_same_checkpoint, launch, rows, start
from tests.trainers import TinyTrainer

LONG_LOOPS = (
    "--config.train.steps_per_loop=100000",
    "--config.checkpoint.every_steps=100000",
    "--config.eval.every_steps=100000",
)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_says_how_to_go_on_and_the_end_has_the_same_bits(command, tiny, tmp_path, whole_run, number, status):
    (whole, _), interrupted = whole_run, tmp_path / "interrupted"
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
def test_killed_run_ends_with_the_same_bits(command, fresh_command, tiny, tmp_path, replicas):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--config.devices.strategy=mirrored", f"--config.devices.virtual_cpus={replicas}"]
    command(f"--config={tiny}", f"--workdir={whole}", *flags)
    process = start(tiny, killed, *flags)
    process.kill()
    process.communicate(timeout=120)
    assert 300 not in Checkpoints(killed / "checkpoints", {}, keep=1).steps()
    finished = fresh_command(f"--config={tiny}", f"--workdir={killed}", *flags)  # whose hash seed is another one
    assert finished.returncode == 0, finished.stderr
    assert len(rows(killed, event="resume")) == 1
    assert_same_checkpoint(whole, killed, 300)
    losses = [[row["loss"] for row in rows(folder, split="eval", step=300)] for folder in (whole, killed)]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_stops_at_once(tiny, tmp_path, number):
    process = launch(tiny, tmp_path / "run", "--config.trainer=tests.trainers.SlowStepTrainer", *LONG_LOOPS)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(3)  # into the first step, which takes a minute
    process.send_signal(number)
    time.sleep(0.2)
    process.send_signal(number)
    begin = time.time()
    _, stderr = process.communicate(timeout=120)
    assert time.time() - begin < 1
    assert process.returncode == 128 + number
    assert "a second one stops at once" in stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_status_is_the_signals_whenever_more_of_them_come(tiny, tmp_path, number):
    process = start(tiny, tmp_path / "run", "--config.train.steps=200000")
    while process.poll() is None:
        process.send_signal(number)
        time.sleep(0.02)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_signal_before_the_run_is_one_line(tiny, tmp_path, number, word):
    command = [sys.executable, "-m", "mptrain.main", f"--config={tiny}", f"--workdir={tmp_path / 'run'}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    time.sleep(1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stderr.strip() == f"mptrain: {word}"


def test_folder_of_a_killed_run_is_free_though_a_process_that_it_forked_lives_on(tmp_path):
    code = (
        "import os, sys; from mptrain.run_folder import RunFolder; folder = RunFolder(sys.argv[1]); folder.lock();"
        "os.fork() or print('forked', flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout.readline() == b"forked\n"
    with pytest.raises(InputError, match=f"in use by process {parent.pid} on "):
        RunFolder(tmp_path / "run").lock()
    parent.kill()
    parent.wait()
    RunFolder(tmp_path / "run").lock()


@pytest.mark.slow
def test_folder_in_which_another_run_began_while_the_model_was_built_is_refused(command, config, tiny, tmp_path):
    class SlowToBuild(TinyTrainer):
        def build_model(self):
            assert command(f"--config={tiny}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=20").returncode == 0
            return super().build_model()

    sys.modules[__name__].SlowToBuild = SlowToBuild
    config.trainer = f"{__name__}.SlowToBuild"
    config.update(data={"batch_size": 10}, optimizer={"learning_rate": 1e-3})
    with pytest.raises(InputError, match="holds another run: config.data.batch_size was 12 and is 10"):
        runner.run(config, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run", split="train")] == [10, 20]


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
    assert "ckpt-40 is damaged and passed over" in finished.stderr
    assert "restored step 20 of 40" in finished.stdout
    assert data.read_bytes() == whole
    assert len(rows(tmp_path / "run", event="fallback")) == 1
    assert [row["step"] for row in rows(tmp_path / "run", split="train")] == [10, 20, 30, 40]


@pytest.mark.slow
def test_one_signal_is_heard_within_seconds_however_long_the_loop(command, tiny, tmp_path):
    process = launch(tiny, tmp_path / "run", "--config.train.steps=200000", *LONG_LOOPS)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(5)
    process.send_signal(signal.SIGTERM)
    begin = time.time()
    process.communicate(timeout=60)
    assert time.time() - begin < 4
    assert process.returncode == 143
    (event,) = rows(tmp_path / "run", event="preemption")
    assert 0 < event["step"] < 100_000


@pytest.mark.slow
def test_signal_in_an_evaluation_saves_and_the_evaluation_comes_again(command, tiny, tmp_path):
    workdir = tmp_path / "run"
    flags = ["--config.train.steps=100", "--config.data.eval_batch_size=1", "--config.trainer=tests.trainers.SlowEvalTrainer"]
    process = start(tiny, workdir, *flags)
    while not rows(workdir, split="train", step=100):
        time.sleep(0.01)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    begin = time.time()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert time.time() - begin < 5
    assert not rows(workdir, split="eval")
    assert command(f"--config={tiny}", f"--workdir={workdir}", *flags).returncode == 0
    assert [row["step"] for row in rows(workdir, split="eval")] == [100]


@pytest.mark.slow
def test_evaluation_that_a_kill_swallowed_is_made_up_for(command, tiny, tmp_path):
    """As if the kill had come between the checkpoint and the evaluation of the same step."""
    workdir = tmp_path / "run"
    command(f"--config={tiny}", f"--workdir={workdir}", "--config.train.steps=200")
    log = workdir / "metrics.jsonl"
    whole = rows(workdir, split="eval")
    kept = [line for line in log.read_text().splitlines() if '"split": "eval"' not in line or '"step": 100' in line]
    log.write_text("\n".join(kept) + "\n")
    command(f"--config={tiny}", f"--workdir={workdir}", "--config.train.steps=300")
    again = rows(workdir, split="eval")
    assert [row["step"] for row in again] == [100, 200, 300]
    assert again[1]["loss"] == whole[1]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("python", [False, True])
def test_users_dataset_resumes_to_the_same_bits_and_the_log_says_how(command, tmp_path, python):
    config = tmp_path / "dataset.py"
    config.write_text(
        "from tests.runs import tiny_config\n\n\ndef get_config():\n    config = tiny_config()\n"
        "    config.trainer = 'tests.trainers.DatasetTrainer'\n"
        f"    config.model = {{'python': {python}}}\n    return config\n"
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command(f"--config={config}", f"--workdir={whole}")
    process = start(config, killed)
    process.kill()
    process.communicate(timeout=120)
    finished = command(f"--config={config}", f"--workdir={killed}")
    assert finished.returncode == 0, finished.stderr
    (event,) = rows(killed, event="resume")
    assert ("skips the batches it has seen" if python else "the iterator's state, saved") in event["data"]
    assert_same_checkpoint(whole, killed, 300)


@pytest.mark.slow
def test_asynchronous_saving_ends_with_the_same_bits_and_checkpoints(command, tiny, tmp_path, whole_run):
    finished = command(f"--config={tiny}", f"--workdir={tmp_path / 'async'}", "--config.checkpoint.async_save=True")
    assert finished.returncode == 0, finished.stderr
    folders = (whole_run[0], tmp_path / "async")
    names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in folders]
    assert names[0] == names[1]
    for step in (260, 280, 300):
        assert_same_checkpoint(*folders, step)


@pytest.mark.slow
def test_folder_that_vanishes_ends_the_run_with_one_line(tiny, tmp_path):
    process = start(tiny, tmp_path / "run", "--config.train.steps=1000000")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cannot be written" in stderr.strip().splitlines()[-1]
    assert "Traceback" not in stderr
    assert Checkpoints(tmp_path / "elsewhere" / "checkpoints", {}, keep=1).steps()


@pytest.mark.slow
def test_damaged_everywhere_is_refused_until_told_to_begin_anew(command, tiny, tmp_path):
    flags = [f"--config={tiny}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=40"]
    command(*flags)
    for file in (tmp_path / "run" / "checkpoints").glob("*/state.index"):
        file.write_bytes(b"")
    for _ in range(2):
        refused = command(*flags)
        assert refused.returncode == 1
        assert "restart_if_damaged=True" in refused.stderr.strip().splitlines()[-1]
    reasons = [event["reason"] for event in rows(tmp_path / "run", event="fallback")]
    assert ["ckpt-40" in reason for reason in reasons] == [True, False, True, False]  # newest first, both times
    assert command(*flags, "--mode=eval").returncode == 1
    finished = command(*flags, "--config.checkpoint.restart_if_damaged=True")
    assert finished.returncode == 0, finished.stderr
    assert [row["step"] for row in rows(tmp_path / "run", split="train")] == [10, 20, 30, 40]


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_storm_of_kills_leaves_no_trace(command, tiny, tmp_path, replicas):
    """Dropout, BatchNorm, Adam, averaged weights, loss scaling, accumulation and shuffling are all on."""
    finished = command(
        f"--config={tiny}",
        f"--workdir={tmp_path / 'run'}",
        "--mode=verify_resume",
        "--config.optimizer.ema_momentum=0.9",
        "--config.optimizer.accumulation_steps=2",
        "--config.checkpoint.async_save=True",
        f"--config.devices.virtual_cpus={replicas}",
        "--config.verify_resume.steps=200",
        "--config.verify_resume.kills=3",
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("kill ") == 3
    assert "equal to the last bit after 3 kills" in finished.stdout
    assert not (tmp_path / "run" / "verify_resume").exists()


@pytest.mark.slow
def test_run_that_cannot_be_resumed_exactly_is_found_out(command, tiny, tmp_path):
    finished = command(
        f"--config={tiny}",
        f"--workdir={tmp_path / 'run'}",
        "--mode=verify_resume",
        "--config.trainer=tests.trainers.RestlessTrainer",
        "--config.verify_resume.steps=60",
        "--config.verify_resume.kills=1",
    )
    assert finished.returncode == 1
    line = finished.stderr.strip().splitlines()[-1]
    assert "variables differ" in line
    assert "from bit" in line


def test_first_difference_is_named_to_the_bit(tmp_path):
    for name, value in (("left", 1.0), ("right", np.nextafter(np.float32(1.0), np.float32(2.0)))):
        (tmp_path / name).mkdir()
        tensor_file.write(tmp_path / name, {"a": np.zeros(3), "b": np.array([[1, 1], [1, value]], np.float32)})
    assert verify_resume.compare(tmp_path / "left", tmp_path / "left") == (2, 7)
    with pytest.raises(RunError, match=r"1 of 2 variables differ .* first b\[1, 1\]: .* from bit 0 down"):
        verify_resume.compare(tmp_path / "left", tmp_path / "right")


@pytest.mark.slow
def test_signals_of_the_users_own_do_not_stop_a_run(tiny, tmp_path):
    finished = launch(tiny, tmp_path / "run", "--config.trainer=tests.trainers.TimerTrainer")
    _, stderr = finished.communicate(timeout=120)
    assert finished.returncode == 0, stderr
    assert not rows(tmp_path / "run", event="preemption")


@pytest.mark.slow
def test_run_under_test_does_not_outlive_the_verification(tiny, tmp_path):
    process = launch(tiny, tmp_path / "run", "--mode=verify_resume", "--config.verify_resume.steps=100000")
    children = []
    while not children and process.poll() is None:
        children = psutil.Process(process.pid).children()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert not psutil.pid_exists(children[0].pid)
