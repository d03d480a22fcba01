"""What ends a run early or changes its course: each in whole runs, as a user has them."""

import math
import shutil

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from mptrain import InputError, Interrupted, RunError, config_check, run, tensor_file, time_span
from mptrain.actions.improvement import reductions, without_improvement
from mptrain.checkpoints import Checkpoints
from tests.action_trainers import ScriptedTrainer, TfKerasOptimizerTrainer
from tests.runs import rows


def steps(folder):
    return Checkpoints(folder / "checkpoints", {}, keep=1).steps()


def saved(folder, step):
    return tensor_file.read(folder / "checkpoints" / f"ckpt-{step}")


@pytest.fixture
def scripted(config):
    """A run of 24 steps with six evaluations, whose losses a test sets."""

    def with_losses(*losses):
        config.trainer = "tests.action_trainers.ScriptedTrainer"
        config.precision.policy = "float32"
        config.train.steps = 24
        config.checkpoint.update(every_steps=4, keep=10)
        config.model = ConfigDict({"evaluations": list(losses)})
        return config

    return with_losses


# Whether a metric still gets better.


@pytest.mark.parametrize(
    ("ratings", "min_delta", "stale"),
    [
        ([], 0.0, 0),
        ([1.0], 0.0, 0),
        ([1.0, 2.0, 3.0], 0.0, 0),
        ([3.0, 3.0, 2.0], 0.0, 2),
        ([1.0, 1.05, 1.2, 1.25], 0.1, 1),  # against the best, and not against the last
        ([1.0, math.nan, 2.0, math.nan], 0.0, 1),
        ([math.nan, math.nan], 0.0, 2),
        ([math.nan, -math.inf, -5.0], 0.0, 0),
    ],
)
def test_evaluations_without_improvement_are_counted(ratings, min_delta, stale):
    assert without_improvement(ratings, min_delta) == stale


@pytest.mark.parametrize(
    ("ratings", "patience", "cooldown", "count"),
    [
        ([1.0, 1.0, 1.0], 2, 0, 1),
        ([1.0, 1.0, 1.0, 1.0, 1.0], 2, 0, 2),
        ([1.0, 1.0, 1.0, 1.0, 1.0], 2, 1, 1),
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2, 1, 2),
        ([1.0, 1.0, 2.0, 2.0], 2, 0, 0),
    ],
)
def test_reductions_are_counted(ratings, patience, cooldown, count):
    assert reductions(ratings, 0.0, patience, cooldown) == count


# Early stopping.


@pytest.mark.slow
def test_early_stop_ends_the_run_saved_and_evaluated_and_a_killed_run_ends_at_the_same_step(scripted, tmp_path, capsys):
    config = scripted(3.0, 2.0, 2.0, 1.99, 1.0, 0.5)
    config.early_stop.update(metric="loss", patience=2, min_delta=0.1)
    whole = tmp_path / "whole"
    assert run(config, whole)["loss"] == pytest.approx(1.99)
    assert "ended at step 16 of 24, saved: early stop: loss has not improved in 2 evaluations" in capsys.readouterr().out
    (finished,) = rows(whole, event="finished")
    assert (finished["step"], finished["reason"]) == (16, "early stop: loss has not improved in 2 evaluations")
    assert steps(whole)[-1] == 16
    assert [row["step"] for row in rows(whole, split="eval")] == [4, 8, 12, 16]
    scalars = [len(list(tf.compat.v1.train.summary_iterator(str(file)))) for file in (whole / "eval").iterdir()]
    assert sum(scalars) > 4 * 3  # the last evaluation is in TensorBoard as well

    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)  # as a kill in the middle of step 13 leaves it
    shutil.rmtree(killed / "checkpoints" / "ckpt-16")
    assert run(config, killed)["loss"] == pytest.approx(1.99)
    assert steps(killed) == steps(whole)
    assert [row["step"] for row in rows(killed, event="finished")] == [16]
    for path, value in saved(whole, 16).items():
        np.testing.assert_array_equal(value, saved(killed, 16)[path], err_msg=path)

    run(config, whole)  # a finished run stays finished
    assert "this run is finished: 16 of 24 steps are done, early stop: loss has not improved" in capsys.readouterr().out
    config.early_stop.patience = 3
    run(config, whole)
    assert steps(whole)[-1] == 24


# Plateau.


def test_plateau_reduces_the_rate_down_to_its_floor_and_a_killed_run_has_the_same_bits(scripted, tmp_path, capsys):
    config = scripted(1.0)
    config.plateau.update(metric="loss", patience=1, factor=0.1, min_learning_rate=5e-4)
    config.schedule.name = "linear"
    whole = tmp_path / "whole"
    run(config, whole)
    rates = {row["step"]: row["learning_rate"] for row in rows(whole, split="train")}
    schedule = {step: 1e-2 * (1 - step / 24) for step in rates}
    assert rates[8] == pytest.approx(schedule[8])
    assert rates[12] == pytest.approx(0.1 * schedule[12])
    assert rates[16] == pytest.approx(5e-4)  # not 0.01 of the schedule
    assert rates[24] == pytest.approx(schedule[24], abs=1e-9)  # the schedule itself may go below
    events = rows(whole, event="plateau")
    assert [event["step"] for event in events] == [8]  # of what is at the floor nothing is reduced
    assert "step 8: loss has not improved in 1 evaluations; learning rate 0.00667 -> 0.000667" in capsys.readouterr().out
    assert saved(whole, 12)["optimizer/learning_rate_factor"] == np.float32(0.1)

    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    for step in (12, 16, 20, 24):  # killed behind the evaluation of step 8, whose reduction no checkpoint holds
        shutil.rmtree(killed / "checkpoints" / f"ckpt-{step}")
    assert saved(killed, 8)["optimizer/learning_rate_factor"] == 1.0
    run(config, killed)
    for step in (12, 24):
        for path, value in saved(whole, step).items():
            np.testing.assert_array_equal(value, saved(killed, step)[path], err_msg=path)
    assert [event["step"] for event in rows(killed, event="plateau")] == [8]


def test_plateau_under_two_replicas_and_accumulation_reduces_both_alike(scripted, tmp_path):
    config = scripted(1.0)
    config.plateau.update(metric="loss", patience=1, factor=0.5)
    config.optimizer.accumulation_steps = 2
    config.devices.update(strategy="mirrored", virtual_cpus=2)
    config.train.update(steps=12, steps_per_loop=4)
    run(config, tmp_path)
    assert [row["learning_rate"] for row in rows(tmp_path, split="train")] == pytest.approx([1e-2, 1e-2, 5e-3])
    assert saved(tmp_path, 12)["optimizer/learning_rate_factor"] == 0.5
    (tmp_path / "metrics.jsonl").unlink()  # then the checkpoint alone knows
    config.train.steps = 16
    run(config, tmp_path)
    assert [row["learning_rate"] for row in rows(tmp_path, split="train")] == pytest.approx([5e-3])


def test_checkpoint_from_before_there_was_a_factor_is_restored(scripted, tmp_path):
    config = scripted(1.0)
    config.train.steps = 4
    run(config, tmp_path / "run")
    assert "optimizer/learning_rate_factor" not in saved(tmp_path / "run", 4)
    config.plateau.metric = "loss"
    trainer = ScriptedTrainer(config)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", trainer.state, keep=1)
    assert checkpoints.restore_newest(print) == 4
    assert trainer.learning_rate_factor.numpy() == 1.0


def test_plateau_with_an_optimizer_whose_rate_cannot_be_multiplied_is_refused(scripted):
    config = scripted(1.0)
    config.plateau.metric = "loss"
    with pytest.raises(InputError, match="return one of keras.optimizers from build_optimizer"):
        TfKerasOptimizerTrainer(config)


@pytest.mark.parametrize("field", ["early_stop.metric", "plateau.metric", "checkpoint.best_metric", "nan_guard.metrics"])
def test_metric_that_does_not_exist_is_refused_before_anything_is_written(scripted, tmp_path, field):
    config = scripted(1.0)
    config.checkpoint.keep_best = 1
    config.update_from_flattened_dict({field: ("F1",) if field.endswith("s") else "F1"})
    with pytest.raises(InputError, match=f"config.{field} names the metric 'F1': write one of loss, accuracy"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Time limit.


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(0, 0), (90, 90), (1.5, 1.5), ("45", 45), ("2h30m", 9000), ("1d 12H", 129600), ("90s", 90), ("0.5h", 1800), ("1m1s", 61)],
)
def test_lengths_of_time_are_understood(text, seconds):
    assert time_span.seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "30m2h", "2h30", -1, math.inf, math.nan, True, None, "h"])
def test_what_is_no_length_of_time_is_refused(config, text):
    config.train.time_limit = text
    with pytest.raises(InputError, match=r"config.train.time_limit: .* is no length of time: write seconds, or"):
        config_check.validate(config)


@pytest.mark.slow
def test_time_limit_saves_and_ends_in_good_order_and_the_next_command_goes_on(config, tmp_path, capsys):
    config.trainer = "tests.trainers.ModuleTrainer"
    config.eval.every_steps = 10**6
    config.checkpoint.every_steps = 10**6
    config.train.update(steps=10**6, steps_per_loop=10**5, time_limit="2s")
    for _ in range(2):
        with pytest.raises(Interrupted) as caught:
            run(config, tmp_path)
        assert caught.value.exit_status == 0
    first, second = rows(tmp_path, event="time_limit")
    assert 0 < first["step"] < second["step"] < 10**6
    assert steps(tmp_path) == [first["step"], second["step"]]
    assert f"time limit of 2s reached at step {first['step']}, saved; go on with the same command" in capsys.readouterr().out
    logged = [row["step"] for row in rows(tmp_path, split="train")]
    assert first["step"] in logged
    scalars = [
        event.step
        for file in sorted((tmp_path / "train").iterdir())
        for event in tf.compat.v1.train.summary_iterator(str(file))
        if event.summary.value
    ]
    assert first["step"] in scalars


# NaN guard.


@pytest.fixture
def sick(config):
    def with_nan(first, end, **settings):
        config.trainer = "tests.action_trainers.NanLossTrainer"
        config.train.update(steps=24, steps_per_loop=2)
        config.checkpoint.update(every_steps=2, keep=2)
        config.eval.every_steps = 24
        config.model = ConfigDict({"nan_from": first, "nan_to": end})
        config.nan_guard.update(settings)
        return config

    return with_nan


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_loss_that_stays_nan_ends_the_run_and_the_good_checkpoints_stay(sick, tmp_path, precision):
    config = sick(8, 1000)
    config.precision.policy = precision
    with pytest.raises(RunError, match=r"step 14: loss is not finite in 3 loops .*checkpoint of step 8, from before, is kept"):
        run(config, tmp_path)
    assert steps(tmp_path) == [6, 8]
    (event,) = rows(tmp_path, event="failed")
    assert "loss is not finite" in event["reason"]
    skipped = [row["skipped_steps"] for row in rows(tmp_path, split="train")]
    assert skipped[-1] == 0  # the gradients are finite, so the optimizer sees nothing


def test_loss_that_recovers_is_forgiven_and_nothing_is_saved_meanwhile(sick, tmp_path):
    config = sick(8, 12)
    config.checkpoint.keep = 20
    run(config, tmp_path)
    assert steps(tmp_path) == [2, 4, 6, 8, 14, 16, 18, 20, 22, 24]


def test_run_does_not_end_with_a_loss_that_is_not_finite_as_if_all_were_well(sick, tmp_path):
    with pytest.raises(RunError, match="step 24: the loss is not finite since step 22, and the run is at its end"):
        run(sick(22, 1000), tmp_path)
    assert steps(tmp_path) == [20, 22]


def test_guard_can_be_turned_off_and_told_what_to_watch(sick, tmp_path):
    run(sick(8, 1000, patience=0), tmp_path / "off")
    assert steps(tmp_path / "off") == [22, 24]
    run(sick(8, 1000, metrics=("accuracy",), patience=3), tmp_path / "accuracy")
    assert steps(tmp_path / "accuracy") == [22, 24]


def test_weights_that_a_step_makes_inf_are_never_saved(config, tmp_path):
    config.trainer = "tests.action_trainers.ExplodingTrainer"
    config.precision.policy = "float32"
    config.optimizer.update(name="sgd", learning_rate=1e30)
    config.checkpoint.every_steps = 3
    with pytest.raises(RunError, match=r"step 3: model/b and 1 more variables are not finite, so nothing is saved"):
        run(config, tmp_path)
    assert steps(tmp_path) == []


def test_evaluations_that_stay_nan_end_the_run_and_the_oldest_checkpoint_is_kept(scripted, tmp_path):
    config = scripted(1.0, math.nan)
    config.checkpoint.update(every_steps=1, keep=2)
    with pytest.raises(RunError, match=r"step 16: loss is not finite in 3 evaluations .*there is no checkpoint from before"):
        run(config, tmp_path)
    assert steps(tmp_path) == [7, 15, 16]


# Profile.


def test_profile_covers_exactly_its_steps(config, tmp_path, capsys):
    config.trainer = "tests.trainers.ModuleTrainer"
    config.eval.every_steps = 12
    config.train.steps_per_loop = 12
    config.profile.update(start_step=4, steps=3)
    run(config, tmp_path)
    assert [row["step"] for row in rows(tmp_path, split="train")] == [4, 6, 7, 12]
    assert profiled_steps(tmp_path) == [4, 5, 6]
    (event,) = rows(tmp_path, event="profile")
    assert (event["first"], event["last"]) == (4, 6)
    assert "profile of the steps 4 to 6 in " in capsys.readouterr().out


def test_profile_of_windows_and_replicas_and_of_a_run_that_ends_inside(config, tmp_path):
    config.trainer = "tests.trainers.ModuleTrainer"
    config.optimizer.accumulation_steps = 2
    config.devices.update(strategy="mirrored", virtual_cpus=2)
    config.eval.every_steps = 12
    config.train.update(steps=6, steps_per_loop=12)
    config.profile.update(start_step=0, steps=100)
    run(config, tmp_path)
    assert profiled_steps(tmp_path) == [0, 2, 4]
    config.profile.start_step = 3
    with pytest.raises(InputError, match="config.profile.start_step is 3: write a multiple of optimizer.accumulation_steps"):
        config_check.validate(config)


def profiled_steps(folder):
    (file,) = (folder / "train").glob("plugins/profile/*/*.xplane.pb")
    space = xplane_pb2.XSpace.FromString(file.read_bytes())
    found = []
    for plane in space.planes:
        names = {key: value.name for key, value in plane.stat_metadata.items()}
        for line in plane.lines:
            for event in line.events:
                if plane.event_metadata[event.metadata_id].name == "train":
                    stats = {names[stat.metadata_id]: stat.int64_value or stat.uint64_value for stat in event.stats}
                    found.append(stats["step_num"])
    return found


# Actions of the user's own.


@pytest.fixture
def acting(config, tmp_path):
    def with_act(act):
        config.trainer = "tests.action_trainers.ActingTrainer"
        config.checkpoint.every_steps = 12
        config.model = ConfigDict({"act": act, "notes": str(tmp_path / "notes")})
        return config

    return with_act


@pytest.mark.parametrize(
    ("act", "reason"), [("True", "ActingTrainer.act asked for it"), ("reason", "seen enough"), ("StopRun", "enough of it")]
)
def test_action_ends_the_run_saved_evaluated_and_finished(acting, tmp_path, act, reason):
    outputs = run(acting(act), tmp_path / "run")
    assert steps(tmp_path / "run") == [6]
    (event,) = rows(tmp_path / "run", event="finished")
    assert (event["step"], event["reason"]) == (6, reason)
    assert [row["step"] for row in rows(tmp_path / "run", split="eval")] == [4, 6]
    assert outputs["loss"] == rows(tmp_path / "run", split="eval")[-1]["loss"]


def test_actions_get_step_and_outputs_of_loops_and_evaluations(acting, tmp_path):
    run(acting(""), tmp_path / "run")
    expected = [("loop", 3), ("loop", 4), ("evaluation", 4), ("loop", 6), ("loop", 8), ("evaluation", 8)]
    expected += [("loop", 9), ("loop", 12), ("evaluation", 12)]
    noted = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    assert [(what, int(step)) for what, step, _ in noted] == expected
    splits = {"loop": "train", "evaluation": "eval"}
    for what, step, loss in noted:
        (row,) = rows(tmp_path / "run", split=splits[what], step=int(step))
        assert float(loss) == pytest.approx(row["loss"], rel=1e-5)


def test_action_that_fails_ends_the_run_with_its_own_error_when_the_step_is_saved(acting, tmp_path):
    with pytest.raises(KeyError, match="the user's own mistake"):
        run(acting("raise"), tmp_path / "run")
    assert steps(tmp_path / "run") == [6]
    assert [row["step"] for row in rows(tmp_path / "run", split="train")][-1] == 6
    assert rows(tmp_path / "run", event="failed")[0]["step"] == 6


def test_mode_train_says_that_it_cannot_stop_by_evaluations(scripted, tmp_path, capsys):
    config = scripted(1.0)
    config.early_stop.update(metric="loss", patience=1)
    run(config, tmp_path, "train")
    assert steps(tmp_path)[-1] == 24
    assert "--mode=train does not evaluate, so config.early_stop cannot act" in capsys.readouterr().err


# The best checkpoint.


def test_best_checkpoint_is_shown_at_the_end_and_can_be_evaluated(scripted, tmp_path, capsys):
    config = scripted(3.0, 1.0, 2.0)
    config.checkpoint.update(keep=1, keep_best=1)
    run(config, tmp_path)
    assert steps(tmp_path) == [8, 24]
    assert f"best{tmp_path}/checkpoints/ckpt-8(loss1)" in "".join(capsys.readouterr().out.split())
    config.eval.checkpoint = "best"
    assert run(config, tmp_path, "eval")["loss"] == 1.0
    config.eval.checkpoint = 24
    assert run(config, tmp_path, "eval")["loss"] == 2.0
    config.eval.checkpoint = 12
    with pytest.raises(InputError, match="config.eval.checkpoint is 12, .*: write newest, best, or one of 8, 24"):
        run(config, tmp_path, "eval")
