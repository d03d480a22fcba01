"""Real worker processes on loopback."""

import contextlib
import json
import os
import re
import signal
import socket
import time

import pytest

from mptrain.checkpoints import Checkpoints
from tests import prepared
from tests.runs import assert_same_checkpoint, rows


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextlib.contextmanager
def workers(count, module, *arguments, only=None, own=(), other_modules=(), environment=(), host="127.0.0.1"):
    """Starts `python -m module` in `count` worker processes (or those of them in `only`), and ends them all at the end.

    `own` holds further arguments of single workers, by index, `other_modules` modules that they run instead.
    """
    cluster = {"worker": [f"{host}:{port}" for port in free_ports(count)]}
    modules = dict(other_modules)
    processes = [
        prepared.Process(
            *(modules.get(index, module), *arguments, *dict(own).get(index, ())),
            env={
                **os.environ,
                **dict(environment),
                "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}),
            },
        )
        for index in only or range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(processes):
    """Waits for the processes and returns (status, stdout, stderr) of each."""
    outputs = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def run_workers(count, module, *arguments):
    """Runs `python -m module` in `count` worker processes; returns the last line of each, parsed."""
    with workers(count, module, *arguments) as processes:
        results = ended(processes)
    for status, _, stderr in results:
        assert status == 0, stderr
    return [json.loads(stdout.splitlines()[-1]) for _, stdout, _ in results]


def flags(tiny, workdir):
    return ["mptrain.main", f"--config={tiny}", f"--workdir={workdir}", "--config.devices.strategy=multi_worker"]


def wait_for_checkpoint(workdir, processes):
    checkpoints = Checkpoints(workdir / "checkpoints", {}, keep=1)
    while not checkpoints.steps() and all(process.poll() is None for process in processes):
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 2])
def test_overflow_on_either_of_two_workers_skips_the_update_on_both(window):
    first, second = run_workers(2, "tests.worker_loss_scale", str(window))
    assert first == second
    assert (first["applied"], first["skipped"], first["scale"]) == (2, 2, 2.0)
    assert [skip[:2] for skip in first["skips"]] == [[1, 8.0], [3, 4.0]]
    assert [len(skip[2]) for skip in first["skips"]] == [1, 1]
    assert first["kernel"] == pytest.approx([0.8, 1.8], abs=1e-3)  # two Adam steps of 0.1
    assert first["table"][0] == first["table"][3] == 0
    assert first["average"] != first["kernel"]
    assert first["all_reduces"] == (1 if window == 1 else 0)  # with accumulation only at a window's end


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """The folder of a whole run of two workers, and (status, stdout, stderr) of each."""
    place = tmp_path_factory.mktemp("two")
    (place / "tiny.py").write_text("from tests.runs import tiny_config as get_config\n")
    with workers(2, *flags(place / "tiny.py", place / "run")) as processes:
        return place / "run", ended(processes)


@pytest.mark.slow
def test_killed_worker_stops_the_rest_and_the_restart_ends_with_the_same_bits(tiny, tmp_path):
    whole, killed, count = tmp_path / "whole", tmp_path / "killed", 3
    with workers(count, *flags(tiny, whole)) as processes:
        results = ended(processes)
    assert [status for status, _, _ in results] == [0] * count, results
    assert [bool(stdout) for _, stdout, _ in results] == [True] + [False] * (count - 1)  # only the chief prints
    for index, (_, _, stderr) in enumerate(results):
        wanted = [f"mptrain: worker {index} of {count}: ready; the chief prints and writes"] if index else []
        assert [line for line in stderr.splitlines() if not (index == 0 and line.startswith("step "))] == wanted
    with workers(count, *flags(tiny, killed)) as processes:
        wait_for_checkpoint(killed, processes)
        processes[-1].kill()
        begin = time.monotonic()
        rest = ended(processes[:-1])
        assert time.monotonic() - begin < 60
    for index, (status, _, stderr) in enumerate(rest):
        assert status == 1, stderr
        assert f"worker {index} of {count}: another worker has gone, so this one stops: start all again" in stderr
        assert not re.search(r"\(\s*File|\{\{|\(\s*\)$", stderr), stderr
        assert "Traceback" not in stderr
    with workers(count, *flags(tiny, killed)) as processes:
        assert [status for status, _, _ in ended(processes)] == [0] * count
    assert_same_checkpoint(whole, killed, 300)
    assert [row["step"] for row in rows(killed, split="eval")] == [100, 200, 300]
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}
    assert not [path for path in (killed / "checkpoints").iterdir() if not path.name.startswith("ckpt-")]


@pytest.mark.slow
def test_signal_to_one_worker_saves_and_stops_all_and_the_end_has_the_same_bits(tiny, tmp_path, of_two):
    (whole, results), stopped = of_two, tmp_path / "stopped"
    assert [status for status, _, _ in results] == [0, 0]
    with workers(2, *flags(tiny, stopped)) as processes:
        wait_for_checkpoint(stopped, processes)
        processes[1].send_signal(signal.SIGTERM)
        results = ended(processes)
    assert [status for status, _, _ in results] == [143, 143], results
    (event,) = rows(stopped, event="preemption")
    assert f"stopped at step {event['step']}, saved" in results[0][1]
    with workers(2, *flags(tiny, stopped)) as processes:
        assert [status for status, _, _ in ended(processes)] == [0, 0]
    assert_same_checkpoint(whole, stopped, 300)


@pytest.mark.slow
def test_missing_worker_is_named_after_the_stated_time(tiny, tmp_path):
    begin = time.monotonic()
    with workers(3, *flags(tiny, tmp_path / "run"), "--config.devices.start_timeout=6", only=[0, 2]) as processes:
        results = ended(processes)
    assert time.monotonic() - begin < 60
    for index, (status, stdout, stderr) in zip((0, 2), results, strict=True):
        assert status == 1
        waiting, missing = stderr.splitlines()
        assert waiting.startswith(f"mptrain: worker {index} of 3: waiting for worker 1 at 127.0.0.1:")
        assert missing.startswith(f"mptrain: worker {index} of 3: worker 1 at 127.0.0.1:")
        assert missing.endswith("did not come within 6 s; start all workers")
        assert stdout == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_workers_with_different_configs_are_refused_by_the_fields_name(tiny, tmp_path):
    with workers(2, *flags(tiny, tmp_path / "run"), own={1: ["--config.seed=7"]}) as processes:
        results = ended(processes)
    for index, (status, _, stderr) in enumerate(results):
        assert status == 2, stderr
        assert f"mptrain: worker {index} of 2: config.seed is {7 * index} on worker {index}" in stderr
        assert "Traceback" not in stderr
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_two_workers_train_and_evaluate_as_two_replicas_of_one_process_do(command, tiny, tmp_path):
    together, apart = tmp_path / "together", tmp_path / "apart"
    same = ["--config.trainer=tests.trainers.EvenTrainer", "--config.precision.policy=float32", "--config.train.steps=60"]
    mirrored = ["--config.devices.strategy=mirrored", "--config.devices.virtual_cpus=2"]
    command(f"--config={tiny}", f"--workdir={together}", *same, *mirrored)
    with workers(2, *flags(tiny, apart), *same, "--config.devices.communication=ring") as processes:
        assert [status for status, _, _ in ended(processes)] == [0, 0]
    for split in ("train", "eval"):
        pairs = zip(rows(together, split=split), rows(apart, split=split), strict=True)
        for left, right in pairs:
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
    with workers(2, *flags(tiny, apart), *same, "--mode=eval") as processes:
        results = ended(processes)
    assert [status for status, _, _ in results] == [0, 0], results
    assert "eval  step 60" in results[0][1]


@pytest.mark.slow
def test_worker_that_goes_away_after_all_had_come_ends_the_others_in_one_line(tiny, tmp_path):
    begin = time.monotonic()
    timeout = "--config.devices.start_timeout=10"
    with workers(2, *flags(tiny, tmp_path / "run"), timeout, other_modules={1: "tests.worker_that_leaves"}) as processes:
        (status, stdout, stderr), _ = ended(processes)
    assert time.monotonic() - begin < 60
    assert status == 1
    assert "mptrain: worker 0 of 2: TensorFlow did not connect the workers within 10 s; start all again\n" in stderr
    assert len([line for line in stderr.splitlines() if "waiting for" not in line]) == 1, stderr
    assert stdout == ""


@pytest.mark.slow
def test_chief_that_dies_while_tensorflow_connects_the_workers_ends_them_in_one_line(tiny, tmp_path):
    arguments = [*flags(tiny, tmp_path / "run"), "--config.devices.start_timeout=40"]
    with workers(3, *arguments, other_modules={2: "tests.worker_that_leaves"}) as processes:
        processes[2].wait(60)
        time.sleep(3)  # in which the others reach TensorFlow's constructor
        processes[0].kill()
        status, _, stderr = ended(processes)[1]
    assert status == 1
    (line,) = [line for line in stderr.splitlines() if line.startswith("mptrain: ") and "waiting for" not in line]
    assert line.startswith("mptrain: worker 1 of 3: TensorFlow could not connect the workers; start all again (")
    assert "Traceback" not in stderr


def wait_until_waiting(process):
    """Returns when the process has said that it waits."""
    while "waiting\n" not in process.errors() and process.poll() is None:
        time.sleep(0.01)


@pytest.mark.slow
def test_sigterm_ends_a_worker_while_it_builds_its_model(tiny, tmp_path):
    arguments = [*flags(tiny, tmp_path / "run"), "--config.trainer=tests.waiting_trainer.WaitingTrainer"]
    with workers(2, *arguments, environment={"WAIT_IN": "build"}) as processes:
        for process in processes:
            wait_until_waiting(process)
        processes[1].send_signal(signal.SIGTERM)
        _, stderr = processes[1].communicate(timeout=30)
        assert "mptrain: worker 1 of 2: terminated\n" in stderr
        assert processes[1].returncode == 143


@pytest.mark.slow
def test_sigterm_ends_a_worker_that_evaluates(tiny, tmp_path):
    arguments = [*flags(tiny, tmp_path / "run"), "--config.trainer=tests.waiting_trainer.WaitingTrainer"]
    with workers(2, *arguments, "--mode=train", "--config.train.steps=20", host="[::1]") as processes:
        assert [status for status, _, _ in ended(processes)] == [0, 0]
    with workers(2, *arguments, "--mode=eval", "--config.train.steps=20", environment={"WAIT_IN": "eval"}) as processes:
        for process in processes:
            wait_until_waiting(process)
        processes[0].send_signal(signal.SIGTERM)
        _, stderr = processes[0].communicate(timeout=30)
        assert "mptrain: worker 0 of 2: terminated\n" in stderr
        assert processes[0].returncode == 143


@pytest.mark.slow
def test_error_of_the_users_code_says_whose_it_is(tiny, tmp_path):
    arguments = [*flags(tiny, tmp_path / "run"), "--config.trainer=tests.waiting_trainer.WaitingTrainer"]
    with workers(2, *arguments, environment={"FAIL_IN": "build"}) as processes:
        results = ended(processes)
    for index, (status, _, stderr) in enumerate(results):
        assert status == 1
        assert f"mptrain: worker {index} of 2: failed with the error below\nTraceback" in stderr
        assert "the user's own mistake" in stderr
