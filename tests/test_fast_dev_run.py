"""`--fast_dev_run` tries everything, says what failed, and leaves nothing behind, however it ends."""

import os
import signal
import tempfile
import time

import pytest

from mptrain import InputError, RunError
from mptrain.fast_dev_run import fast_dev_run
from tests import prepared
from tests.trainers import TinyTrainer

PARTS = ["build", "train", "save", "evaluate", "restore", "go on", "export"]


class BrokenEvaluation(TinyTrainer):
    def replica_eval_step(self, batch):
        raise ValueError("broken evaluation")


class BrokenServing(TinyTrainer):
    def serve(self, batch):
        return batch["targets"]


class BrokenRestoring(TinyTrainer):
    def restore_position(self, folder):
        raise RunError("broken restoring")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary files go, which must be empty at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.chdir(tmp_path)
    yield folder
    assert list(folder.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]


def states(printed):
    """Returns {part: "ok", "failed" or "not tried"} of the printed list."""
    lines = [line for line in printed.splitlines() if line.startswith("  ")]
    return {line[2:12].strip(): line[12:23].strip() for line in lines}


@pytest.mark.slow
def test_all_parts_work_with_windows_replicas_and_best_checkpoints(config, temporary, capsys):
    config.devices.virtual_cpus = 2
    config.optimizer.accumulation_steps = 3
    config.optimizer.ema_momentum = 0.9
    config.train.steps, config.eval.every_steps, config.checkpoint.every_steps = 1200, 120, 120
    config.checkpoint.keep_best, config.checkpoint.async_save = 1, True
    config.numerics.every_steps = 600
    config.schedule.name, config.schedule.warmup_steps = "cosine", 100
    fast_dev_run(config)
    printed = capsys.readouterr().out
    assert states(printed) == dict.fromkeys(PARTS, "ok")
    assert "fast_dev_run: 6 steps in a temporary folder" in printed
    assert "  export    ok         inputs float32 [batch, 6, 6, 1]; outputs float32 [batch, 3]" in printed
    assert config.train.steps == 1200


@pytest.mark.slow
def test_epochs_a_time_limit_a_chosen_export_and_loggers_give_way(config, temporary, capsys):
    config.train.steps, config.train.epochs = None, 2.0
    config.eval.every_steps, config.eval.every_epochs = None, 0.5
    config.checkpoint.every_steps, config.checkpoint.every_epochs, config.numerics.every_epochs = None, 0.5, 1.0
    config.train.time_limit, config.export.checkpoint = "1s", "best"
    config.log.loggers, config.log.mlflow_uri = ("mlflow",), f"sqlite:///{temporary.parent}/kept.db"
    fast_dev_run(config)
    assert states(capsys.readouterr().out) == dict.fromkeys(PARTS, "ok")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "failed", "error", "message"),
    [
        ("BrokenEvaluation", "evaluate", ValueError, "broken evaluation"),
        ("BrokenRestoring", "restore", RunError, "^--fast_dev_run: restore failed: broken restoring$"),
        (
            "BrokenServing",
            "export",
            RunError,
            r"^--fast_dev_run: export failed: BrokenServing.serve\(\) reads ",
        ),
    ],
)
def test_first_part_that_fails_is_named_and_nothing_is_left(config, temporary, capsys, trainer, failed, error, message):
    config.trainer = f"tests.test_fast_dev_run.{trainer}"
    with pytest.raises(error, match=message):
        fast_dev_run(config)
    place = PARTS.index(failed)
    expected = ["ok"] * place + ["failed"] + ["not tried"] * (len(PARTS) - place - 1)
    assert states(capsys.readouterr().out) == dict(zip(PARTS, expected, strict=True))


def test_several_workers_are_refused(config, temporary):
    config.devices.strategy = "multi_worker"
    with pytest.raises(InputError, match="--fast_dev_run tries a run in one process: use another devices.strategy"):
        fast_dev_run(config)


@pytest.mark.slow
def test_command_leaves_the_workdir_alone_and_refuses_a_mode(command, tiny, tmp_path):
    finished = command(f"--config={tiny}", "--fast_dev_run", f"--workdir={tmp_path / 'run'}")
    assert finished.returncode == 0, finished.stderr
    assert states(finished.stdout) == dict.fromkeys(PARTS, "ok")
    assert finished.stderr == ""
    assert not (tmp_path / "run").exists()
    refused = command(f"--config={tiny}", "--fast_dev_run", "--mode=eval")
    assert (refused.returncode, refused.stderr) == (2, "mptrain: --fast_dev_run tries all that a run does: leave out --mode\n")
    failed = command(f"--config={tiny}", "--fast_dev_run", "--config.trainer=tests.test_fast_dev_run.BrokenServing")
    assert failed.returncode == 1
    assert failed.stderr.startswith("mptrain: --fast_dev_run: export failed: BrokenServing.serve() reads batch['targets']")
    assert len(failed.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("trained", [False, True])
def test_signal_leaves_nothing_behind(tiny, tmp_path, number, status, trained):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    arguments = ["mptrain.main", f"--config={tiny}", "--fast_dev_run"]
    process = prepared.Process(*arguments, env={**os.environ, "TMPDIR": str(temporary)})
    pattern = "*/run/checkpoints/*" if trained else "mptrain-fast_dev_run-*"
    while not list(temporary.glob(pattern)) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    deadline = time.monotonic() + 10  # after a SIGKILL another process removes it
    while list(temporary.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(temporary.iterdir()) == []
