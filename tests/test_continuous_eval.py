"""`--mode=continuous_eval`: beside a real training process, and over folders as such processes leave them."""

import json
import shutil
import signal

import pytest
import tensorflow as tf

from mptrain import InputError, RunError, run, tensor_file
from mptrain.continuous_eval import LogTail
from tests.runs import launch, rows, tiny_config
from tests.trainers import ModuleTrainer


@pytest.fixture
def small():
    """A run of 12 steps with a checkpoint every two of them, that does not evaluate itself."""
    return small_config()


def small_config():
    config = tiny_config()
    config.trainer = "tests.trainers.ModuleTrainer"
    config.train.update(steps=12, steps_per_loop=2)
    config.checkpoint.update(every_steps=2, keep=10)
    config.eval.timeout = 1.0
    return config


@pytest.fixture(scope="module")
def once_trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(small_config(), folder, "train")
    return folder


@pytest.fixture
def folder(once_trained, tmp_path):
    """The folder of such a run, at its end."""
    return shutil.copytree(once_trained, tmp_path / "run")


def evaluated(folder):
    return [row["step"] for row in rows(folder, split="eval", mode="eval")]


def unfinish(folder):
    """Makes the folder that of a run that is still at step 10."""
    log = folder / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if '"finished"' not in line))
    shutil.rmtree(folder / "checkpoints" / "ckpt-12")


@pytest.mark.slow
def test_follower_evaluates_each_checkpoint_of_a_training_process_once_and_ends_with_it(tiny, tmp_path):
    folder = tmp_path / "run"
    flags = ["--config.train.steps_per_loop=20", "--config.train.steps=240", "--config.checkpoint.keep=2"]
    flags += ["--config.trainer=tests.action_trainers.PacedTrainer"]
    follower = launch(tiny, folder, *flags, "--mode=continuous_eval")
    training = launch(tiny, folder, *flags, "--mode=train")
    _, stderr = training.communicate(timeout=200)
    assert training.returncode == 0, stderr
    stdout, stderr = follower.communicate(timeout=100)
    assert follower.returncode == 0, stderr
    steps = evaluated(folder)
    assert len(steps) == len(set(steps)) >= 3
    assert 240 in steps
    assert [f"eval  step {step} " in stdout for step in steps] == [True] * len(steps)
    assert f"waiting for the first checkpoint in {folder}" in stdout
    assert f"the run has ended; {len(steps)} of its checkpoints were evaluated here" in stdout
    assert not rows(folder, event="failed")
    in_tensorboard = {
        event.step
        for file in (folder / "eval").iterdir()
        for event in tf.compat.v1.train.summary_iterator(str(file))
        if event.summary.value
    }
    assert in_tensorboard == set(steps)
    again = launch(tiny, folder, *flags, "--mode=continuous_eval")
    stdout, _ = again.communicate(timeout=100)
    assert again.returncode == 0
    assert "the run has ended; 0 of its checkpoints were evaluated here" in stdout
    assert evaluated(folder) == steps


@pytest.mark.slow
def test_ctrl_c_ends_a_follower_that_waits_and_leaves_nothing(tiny, tmp_path):
    follower = launch(tiny, tmp_path / "run", "--mode=continuous_eval")
    while "waiting for the first checkpoint" not in follower.output():
        assert follower.poll() is None
    follower.send_signal(signal.SIGINT)
    _, stderr = follower.communicate(timeout=60)
    assert follower.returncode == 130
    assert stderr.strip().splitlines()[-1] == "mptrain: interrupted"
    assert not (tmp_path / "run").exists()


def test_run_that_has_ended_is_evaluated_in_order_and_as_mode_eval_does(small, folder):
    outputs = run(small, folder, "continuous_eval")
    assert evaluated(folder) == [2, 4, 6, 8, 10, 12]
    assert run(small, folder, "eval") == outputs
    assert run(small, folder, "continuous_eval") == {}


def test_follower_that_lags_takes_the_newest_first_and_ends_without_news(small, folder, capsys):
    unfinish(folder)
    outputs = run(small, folder, "continuous_eval")
    assert evaluated(folder) == [10, 8, 6, 4, 2]
    assert outputs["loss"] == rows(folder, split="eval")[0]["loss"]
    assert "no news of the run for 1 s (config.eval.timeout), though it has not finished" in capsys.readouterr().err


def test_run_that_was_ended_early_has_ended(small, tmp_path):
    small.trainer = "tests.action_trainers.ActingTrainer"
    small.model = {"act": "reason", "notes": str(tmp_path / "notes")}
    small.eval.timeout = 0.0
    run(small, tmp_path / "run", "train")
    run(small, tmp_path / "run", "continuous_eval")
    assert evaluated(tmp_path / "run") == [2, 4, 6]


def test_run_that_has_failed_has_ended(small, folder, capsys):
    unfinish(folder)
    with open(folder / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"step": 10, "event": "failed", "reason": "a full disk"}) + "\n")
    run(small, folder, "continuous_eval")
    assert evaluated(folder) == [2, 4, 6, 8, 10]
    assert "the run has ended; 5 of its checkpoints were evaluated here" in capsys.readouterr().out


class PicturingTrainer(ModuleTrainer):
    def pictures(self):
        return {"dot": tf.zeros([2, 2, 1])}


def test_pictures_come_with_each_evaluation(small, tmp_path):
    small.trainer = f"{__name__}.PicturingTrainer"
    small.train.steps = 4
    run(small, tmp_path / "run", "train")
    run(small, tmp_path / "run", "continuous_eval")
    pictures = [
        (event.step, value.tag)
        for file in (tmp_path / "run" / "eval").iterdir()
        for event in tf.compat.v1.train.summary_iterator(str(file))
        for value in event.summary.value
        if value.tag == "dot"
    ]
    assert sorted(pictures) == [(2, "dot"), (4, "dot")]


def test_checkpoint_that_is_removed_while_it_is_read_is_passed_over(small, folder, monkeypatch, capsys):
    read = tensor_file.read

    def removed(path):
        if path.name == "ckpt-4":
            shutil.rmtree(path)
        return read(path)

    monkeypatch.setattr(tensor_file, "read", removed)
    run(small, folder, "continuous_eval")
    assert evaluated(folder) == [2, 6, 8, 10, 12]
    assert "damaged" not in capsys.readouterr().err


def test_damaged_checkpoint_is_told_of_and_passed_over(small, folder, capsys):
    (folder / "checkpoints" / "ckpt-4" / "state.index").write_bytes(b"")
    run(small, folder, "continuous_eval")
    assert evaluated(folder) == [2, 6, 8, 10, 12]
    assert capsys.readouterr().err.count("ckpt-4 is damaged and passed over") == 1


def test_nothing_to_follow_is_one_line_and_makes_no_folder(small, tmp_path):
    with pytest.raises(RunError, match=r"no checkpoint came to .* within 1 s \(config.eval.timeout\)"):
        run(small, tmp_path / "run", "continuous_eval")
    assert not (tmp_path / "run").exists()


def test_folder_of_another_run_is_refused(small, folder):
    small.optimizer.learning_rate = 0.5
    with pytest.raises(InputError, match="holds another run: config.optimizer.learning_rate was 0.001 and is 0.5"):
        run(small, folder, "continuous_eval")


def test_log_is_read_as_it_grows_and_anew_where_a_resumed_run_has_written_it_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = LogTail(path)
    assert not tail.read()
    lines = [{"step": 2, "split": "train"}, {"step": 2, "split": "eval", "mode": "eval"}, {"step": 4, "split": "eval"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "event": "fini')
    assert tail.read()
    assert (tail.evaluated, tail.ended) == ({2}, False)
    assert not tail.read()
    with open(path, "a") as file:
        file.write('shed"}\n')
    assert tail.read()
    assert tail.ended
    new = tmp_path / "new"
    new.write_text('{"step": 2, "split": "train"}\n{"step": 2, "event": "resume"}\n')
    new.replace(path)
    assert tail.read()
    assert (tail.evaluated, tail.ended) == (set(), False)
