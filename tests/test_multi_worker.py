"""Real worker processes on loopback."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def run_workers(count, module, *arguments):
    """Runs `python -m module` in `count` worker processes; returns the last line of each, parsed."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(count)]}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}),
            },
        )
        for index in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, stderr
    return [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]


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
