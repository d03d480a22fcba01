"""What a run does when its folder is not as it left it, or may not be used."""

import math
import shutil

import pytest

import mptrain
from mptrain.errors import RunError
from tests import prepared
from tests.conftest import COMMAND_ENVIRONMENT
from tests.runs import rows


@pytest.fixture
def finished(config, tmp_path):
    """The folder of a finished run of 12 steps, with checkpoints at 6 and 12."""
    config.checkpoint.every_steps = 4
    mptrain.run(config, tmp_path / "run")
    return tmp_path / "run"


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    }


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["folder gone", "folder empty", "link that leads nowhere"])
def test_lost_checkpoints_are_not_taken_for_a_new_run(config, finished, tmp_path, loss):
    shutil.move(finished / "checkpoints", tmp_path / "elsewhere")
    if loss == "folder empty":
        (finished / "checkpoints").mkdir()
    if loss == "link that leads nowhere":
        (finished / "checkpoints").symlink_to(tmp_path / "nowhere")
    before = content(finished)
    with pytest.raises(RunError, match="goes to step 12: put the checkpoints back"):
        mptrain.run(config, finished)
    assert content(finished) == before
    (finished / "checkpoints").unlink() if loss.startswith("link") else None
    config.checkpoint.restart_if_damaged = True
    mptrain.run(config, finished)
    assert [row["step"] for row in rows(finished, split="eval")] == [4, 8, 12]


def test_run_killed_before_its_first_checkpoint_begins_anew(config, tmp_path):
    config.checkpoint.every_steps = 6
    mptrain.run(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text("".join(line for line in log.open() if '"finished"' not in line))
    mptrain.run(config, tmp_path / "run")  # 12 steps are what a run may log while a thread still writes its first checkpoint
    assert len(rows(tmp_path / "run", split="train", step=12)) == 1


def test_mode_train_on_a_finished_run_returns_its_last_loop_and_evaluates_nothing(config, finished, capfd):
    before = content(finished)
    outputs = mptrain.run(config, finished, "train")
    assert outputs["loss"] == rows(finished, split="train", step=12)[0]["loss"]
    assert not math.isnan(outputs["gradient_norm"])
    printed = capfd.readouterr().out
    assert "this run is finished: 12 of 12 steps are done\n" in printed
    assert "eval" not in printed
    checkpoints = {path: value for path, value in before.items() if path.parts[0] == "checkpoints"}
    assert checkpoints.items() <= content(finished).items()
    assert not rows(finished, split="eval", step=12)[1:]


def test_file_in_the_place_of_a_folder_is_one_line(config, finished):
    shutil.rmtree(finished / "eval")
    (finished / "eval").write_text("mine")
    with pytest.raises(RunError, match="eval"):
        mptrain.run(config, finished, "eval")
    assert (finished / "eval").read_text() == "mine"


def unprivileged(*flags):
    return prepared.run("tests.unprivileged", *flags, env=COMMAND_ENVIRONMENT)


@pytest.mark.slow
def test_evaluation_of_a_folder_that_cannot_be_written_is_printed_and_changes_nothing(command, tiny, tmp_path):
    run, flags = tmp_path / "run", [f"--config={tiny}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=20"]
    command(*flags)
    before, folders = content(run), [run, *(path for path in run.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    evaluated = unprivileged(*flags, "--mode=eval")
    refused = unprivileged(*flags)
    for folder in folders:
        folder.chmod(0o755)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "eval  step 20" in evaluated.stdout
    assert "cannot be written to: the evaluation is printed and not logged" in evaluated.stderr
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith("cannot be written to; name another folder")
    assert content(run) == before


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("checkpoints", 0o000), ("checkpoints", 0o555), ("train", 0o555), ("eval", 0o000)])
def test_folder_without_permission_ends_the_run_with_one_line(command, tiny, tmp_path, name, mode):
    run, flags = tmp_path / "run", [f"--config={tiny}", f"--workdir={tmp_path / 'run'}"]
    command(*flags, "--config.train.steps=20")
    before = content(run)
    newest = run / "checkpoints" / "ckpt-20" / "state.index"
    if mode == 0o555 and name == "checkpoints":
        newest.write_bytes(b"")  # so that it is put aside, which needs the right to rename it
    (run / name).chmod(mode)
    finished = unprivileged(*flags, "--config.train.steps=60")
    (run / name).chmod(0o755)
    assert finished.returncode == 1, finished.stderr
    assert "Traceback" not in finished.stderr
    assert name in finished.stderr.strip().splitlines()[-1]
    assert content(run).keys() >= before.keys()
