"""Early ends in real processes: killed ones, and several workers, which must all decide alike."""

import re

import pytest

from mptrain import verify_resume
from tests.runs import rows, start
from tests.test_multi_worker import ended, flags, workers

CONFIG = """
from tests.runs import tiny_config

def get_config():
    config = tiny_config()
    config.trainer = "tests.action_trainers.{trainer}"
    config.eval.every_steps = 20
    config.model = {model}
    {more}
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    def written(trainer, model, *more):
        path = tmp_path / "config.py"
        path.write_text(CONFIG.format(trainer=trainer, model=model, more="\n    ".join(more)))
        return path

    return written


def steady(config_file):
    """A run of 300 steps whose evaluations stay as they are: its rate is reduced, and it ends at step 80."""
    more = (
        "config.plateau.update(metric='loss', patience=1, factor=0.5)",
        "config.early_stop.update(metric='loss', patience=3)",
    )
    return config_file("ScriptedTrainer", {"evaluations": [1.0]}, *more)


@pytest.mark.slow
def test_killed_run_is_stopped_early_at_the_same_step_with_the_same_bits(command, config_file, tmp_path):
    path = steady(config_file)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(f"--config={path}", f"--workdir={whole}").returncode == 0
    process = start(path, killed)
    process.kill()
    process.communicate(timeout=60)
    assert not rows(killed, event="finished")
    finished = command(f"--config={path}", f"--workdir={killed}")
    assert finished.returncode == 0, finished.stderr
    assert "ended at step 80 of 300, saved: early stop" in finished.stdout
    for folder in (whole, killed):
        assert [row["step"] for row in rows(folder, event="finished")] == [80]
        assert [row["step"] for row in rows(folder, event="plateau")] == [40, 60, 80]
    variables, _ = verify_resume.compare(*(folder / "checkpoints" / "ckpt-80" for folder in (whole, killed)))
    assert variables > 10


@pytest.mark.slow
def test_two_workers_reduce_and_stop_at_the_same_step(config_file, tmp_path):
    with workers(2, *flags(steady(config_file), tmp_path / "run")) as processes:
        results = ended(processes)
    assert [status for status, _, _ in results] == [0, 0], results
    assert [row["step"] for row in rows(tmp_path / "run", event="finished")] == [80]
    assert [row["step"] for row in rows(tmp_path / "run", event="plateau")] == [40, 60, 80]


@pytest.mark.slow
@pytest.mark.parametrize("act", ["reason", "raise"])
def test_what_one_workers_action_decides_holds_for_all(config_file, tmp_path, act):
    more = ("config.train.steps_per_loop = 6",)
    path = config_file("OneWorkerActsTrainer", {"act": act, "notes": str(tmp_path / "notes")}, *more)
    with workers(2, *flags(path, tmp_path / "run")) as processes:
        results = ended(processes)
    status = {"reason": 0, "raise": 1}[act]
    assert [code for code, _, _ in results] == [status, status], results
    assert (tmp_path / "run" / "checkpoints" / "ckpt-6").exists()
    if act == "raise":
        assert "worker 0 of 2: an action failed on another worker at step 6, which is saved" in results[0][2]
        assert re.search("failed with the error below\nTraceback.*the user's own mistake", results[1][2], re.DOTALL)
    else:
        (event,) = rows(tmp_path / "run", event="finished")
        assert event["reason"] == "an action on another worker asked for it"


@pytest.mark.slow
def test_time_limit_on_the_command_line_ends_with_status_0_and_a_failing_action_with_1(command, config_file, tmp_path):
    path = config_file("ActingTrainer", {"act": "raise", "notes": str(tmp_path / "notes")})
    limit = ("--config.train.time_limit=1s", "--config.train.steps=1000000", "--config.train.steps_per_loop=100000")
    limited = command(f"--config={path}", f"--workdir={tmp_path / 'run'}", "--config.checkpoint.every_steps=100000", *limit)
    assert limited.returncode == 0, limited.stderr
    (event,) = rows(tmp_path / "run", event="time_limit")
    assert f"time limit of 1s reached at step {event['step']}, saved; go on with the same command" in limited.stdout
    failed = command(f"--config={path}", f"--workdir={tmp_path / 'other'}", "--config.train.steps_per_loop=6")
    assert failed.returncode == 1
    assert failed.stderr.rstrip().endswith('KeyError: "the user\'s own mistake"')
    assert "Traceback" in failed.stderr
    assert (tmp_path / "other" / "checkpoints" / "ckpt-6").exists()
