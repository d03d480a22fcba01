"""Real worker processes on loopback."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from mptrain.checkpoints import Checkpoints
from tests.conftest import ROOT
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
def workers(count, module, *arguments, only=None, own=()):
    """Starts `python -m module` in `count` worker processes (or those of them in `only`), and ends them all at the end.

    `own` holds further arguments of single workers, by index.
    """
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(count)]}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments, *dict(own).get(index, ())],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
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


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_killed_worker_stops_the_rest_and_the_restart_ends_with_the_same_bits(tiny, tmp_path, count):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
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
        assert "Traceback" not in stderr
    with workers(count, *flags(tiny, killed)) as processes:
        assert [status for status, _, _ in ended(processes)] == [0] * count
    assert_same_checkpoint(whole, killed, 300)
    assert [row["step"] for row in rows(killed, split="eval")] == [100, 200, 300]
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}
    assert not [path for path in (killed / "checkpoints").iterdir() if not path.name.startswith("ckpt-")]


@pytest.mark.slow
def test_signal_to_one_worker_saves_and_stops_all_and_the_end_has_the_same_bits(tiny, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with workers(2, *flags(tiny, whole)) as processes:
        assert [status for status, _, _ in ended(processes)] == [0, 0]
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
    assert time.monotonic() - begin < 30
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
