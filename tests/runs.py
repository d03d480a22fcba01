"""Whole runs of the command: a small config, and what they leave behind."""

import json
import time

import pytest

from mptrain import verify_resume
from mptrain.checkpoints import Checkpoints
from tests import prepared
from tests.conftest import COMMAND_ENVIRONMENT


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


def rows(workdir, **wanted):
    """Returns the rows of metrics.jsonl that hold the wanted values."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if wanted.items() <= row.items()]


def assert_same_checkpoint(left, right, step):
    """The checkpoints of `step` in two run folders are equal to the last bit."""
    variables, values = verify_resume.compare(*(folder / "checkpoints" / f"ckpt-{step}" for folder in (left, right)))
    assert variables > 20
    assert values > 700


def launch(tiny, workdir, *flags):
    """Starts a run and returns its process."""
    flags = [f"--config={tiny}", f"--workdir={workdir}", *flags]
    return prepared.Process("mptrain.main", *flags, env=COMMAND_ENVIRONMENT)


def start(tiny, workdir, *flags):
    """Starts a run and returns its process once the first checkpoint is there."""
    process = launch(tiny, workdir, *flags)
    checkpoints = Checkpoints(workdir / "checkpoints", {}, keep=1)
    while not checkpoints.steps() and process.poll() is None:
        time.sleep(0.005)
    return process


def assert_refused(finished, message):
    assert finished.returncode == 2, finished.stderr
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1


def mostly_slow(cases, fast=2):
    """Returns test cases of which each starts a process: the first few for `make test-fast`, the others marked slow."""
    cases = list(cases)
    return cases[:fast] + [pytest.param(case, marks=pytest.mark.slow) for case in cases[fast:]]
