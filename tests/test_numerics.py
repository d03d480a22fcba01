"""The range report on cases with a known answer: planted faults, each named first, each mended by the advice."""

import importlib.util
import json

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.util import event_pb2

import mptrain
from mptrain import runner
from mptrain.errors import InputError, RunError
from mptrain.numerics.collection import Collector
from mptrain.numerics.probe import Probe, variables
from tests.runs import assert_same_checkpoint, tiny_config
from tests.sick_trainers import FAINT


@pytest.fixture
def sick():
    """Returns the config of a trainer with a planted fault."""

    def config(name, steps=30, **fields):
        config = tiny_config()
        config.trainer = f"tests.sick_trainers.{name}"
        config.optimizer.learning_rate = 1e-2
        config.numerics.steps = steps
        config.update_from_flattened_dict(fields)
        return config

    return config


def report_of(config, workdir):
    mptrain.run(config, workdir, "numerics")
    return json.loads((workdir / "report" / "numerics.json").read_text())


def riskiest(report):
    return max(report["layers"], key=lambda layer: layer["risk"])


def batch(trainer, step=0):
    return next(trainer.training_batches.open(step))


FAULTS = {
    "activations above 65,504": ("LoudTrainer", "sequential/loud", "65,504", {}),
    "before a layer that passes on": ("PassingOnTrainer", "sequential/loud", "65,504", {}),
    "the same in tf_keras": ("OldKerasTrainer", "sequential/loud", "65,504", {}),
    "gradients below 2**-24": (
        "FaintTrainer",
        "sequential/second",
        "vanishes at loss scale 1",
        {"loss_scale.dynamic": False, "loss_scale.initial_scale": 1.0},
    ),
    "softmax in float16": ("SoftmaxTrainer", "sequential/softmax", "not finite in float16", {}),
    "a tiny epsilon": ("NormTrainer", "sequential/norm", "not finite in float16", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_named_first_and_the_advice_mends_the_run(sick, tmp_path, fault):
    trainer, path, words, fields = FAULTS[fault]
    config = sick(trainer, **fields)
    report = report_of(config, tmp_path / "run")
    assert riskiest(report)["path"] == path
    assert riskiest(report)["at_risk"]
    assert words in riskiest(report)["verdict"]
    assert report["summary"].startswith(path)
    check = report["advice"]["check"]
    assert check["after"]["layers at risk"] == 0 < check["before"]["layers at risk"]
    assert check["after"]["skipped steps"] <= check["before"]["skipped steps"]

    try:
        sick_loss = mptrain.run(config, tmp_path / "sick")["loss"]
    except RunError:  # every step was skipped
        sick_loss = np.inf
    spec = importlib.util.spec_from_file_location("advice", tmp_path / "run" / "report" / "float32_layers.py")
    advice = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(advice)
    advice.hold_in_float32(config)
    mended = mptrain.run(config, tmp_path / "mended")
    assert mended["accuracy"] > 0.7
    assert mended["loss"] < 0.8 * sick_loss


def test_healthy_network_is_told_nothing(sick, tmp_path):
    report = report_of(sick("VectorTrainer"), tmp_path / "run")
    assert not any(layer["at_risk"] for layer in report["layers"])
    assert report["advice"] is None
    assert report["summary"] == "All 3 layers fit."
    assert not (tmp_path / "run" / "report" / "float32_layers.py").exists()
    low, high = report["loss_scale"]["recommended"]
    assert low <= 2.0**10 <= high  # the scale it was trained with


def test_vanished_gradients_are_those_of_a_count_by_hand_in_float64(sick):
    config = sick("FaintTrainer", **{"loss_scale.dynamic": False, "loss_scale.initial_scale": 1.0})
    trainer = runner.build_trainer(config)
    first, second, logits = (layer.kernel.numpy().astype(np.float64) for layer in trainer.model.layers)
    examples = batch(trainer)
    x, targets = examples["inputs"].numpy().astype(np.float64), examples["targets"].numpy()
    a = np.maximum(x @ first, 0)
    b = np.maximum(a @ second, 0)
    p = np.exp(b @ logits)
    p /= p.sum(-1, keepdims=True)
    at_second = FAINT / len(x) * (p - np.eye(3)[targets]) @ logits.T
    at_first = np.where(b > 0, at_second, 0) @ second.T
    sight = Probe(trainer, reference=True)(examples)
    found = {(site.path, site.kind): row for site, row in zip(sight.sites, sight.counts, strict=True)}
    for path, gradient in (("sequential/second", at_second), ("sequential/first", at_first)):
        row = found[path, "gradient"]
        assert row[0] == gradient.size
        assert row[2] == (gradient == 0).sum()
        assert row[3] == ((gradient != 0) & (np.abs(gradient) <= 2.0**-25)).sum()
    own = Probe(trainer)(examples)
    zeros = {site.path: row[2] for site, row in zip(own.sites, own.counts, strict=True) if site.kind == "gradient"}
    assert zeros["sequential/second"] == (np.abs(at_second) <= 2.0**-25).sum()


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("reference", [True, False])
def test_looking_changes_nothing(sick, replicas, window, reference):
    config = sick("VectorTrainer", **{"optimizer.accumulation_steps": window, "optimizer.ema_momentum": 0.9})
    config.trainer, config.devices.virtual_cpus = "tests.trainers.TinyTrainer", replicas
    trainer = runner.build_trainer(config)
    trainer.train(tf.constant(2 * window))
    parts = [p for v in variables(trainer) for p in trainer.strategy.experimental_local_results(v)]
    before = [part.numpy() for part in parts]
    policies = [layer.dtype_policy.name for layer in trainer.model.layers]
    Probe(trainer, reference=reference)(batch(trainer), step=7, loss_scale=4.0)
    assert all(b.tobytes() == part.numpy().tobytes() for b, part in zip(before, parts, strict=True))
    assert [layer.dtype_policy.name for layer in trainer.model.layers] == policies
    assert trainer.precision.name == "mixed_float16"


@pytest.mark.parametrize("name", ["TinyTrainer", "TfKerasTrainer"])
def test_step_that_is_looked_at_trains_as_one_that_is_not(sick, name):
    config = sick("VectorTrainer")
    config.trainer = f"tests.trainers.{name}"
    looked_at, plain = (runner.build_trainer(config) for _ in range(2))
    Collector(looked_at, reference_every=2).train(6)
    plain.train(tf.constant(6))
    for path, variable in plain.state.items():
        assert variable.numpy().tobytes() == looked_at.state[path].numpy().tobytes(), path


def test_replicas_are_counted_together(sick):
    sights = []
    for replicas in (1, 3):
        config = sick("VectorTrainer", **{"devices.virtual_cpus": replicas})
        trainer = runner.build_trainer(config)
        sights.append(Probe(trainer, reference=True)(batch(trainer)))
    one, three = sights
    outputs = [place for place, site in enumerate(one.sites) if site.kind == "output"]
    assert [site.path for site in one.sites] == [site.path for site in three.sites]
    np.testing.assert_array_equal(one.counts[outputs, 0], three.counts[outputs, 0])
    np.testing.assert_allclose(one.largest[outputs], three.largest[outputs], rtol=1e-5)


def test_window_that_is_skipped_has_no_loss(sick):
    trainer = runner.build_trainer(sick("LoudTrainer", **{"optimizer.accumulation_steps": 2}))
    found = Collector(trainer, 8).train(4)
    assert len(found.skips) == 2
    assert not np.isfinite(found.losses).any()


def test_plain_module_shows_its_scopes_and_what_is_watched(sick, tmp_path):
    report = report_of(sick("ScopedTrainer"), tmp_path / "run")
    assert [layer["path"] for layer in report["layers"] if layer["output"]] == ["first", "loud", "logits"]
    assert riskiest(report)["path"] == "loud"
    assert "compute 'loud' in float32" in report["advice"]["text"]
    assert report["advice"]["check"] is None


@pytest.mark.slow
def test_advice_can_be_pasted_into_the_config_of_the_same_folder(sick, tmp_path):
    config = sick("LoudTrainer", steps=4)
    report = report_of(config, tmp_path / "run")
    config.precision.float32_layers = tuple(report["advice"]["float32_layers"])
    config.train.steps = 20
    mptrain.run(config, tmp_path / "run", "train")


def test_module_without_scopes_is_told_how_to_show_itself(sick, tmp_path):
    config = sick("VectorTrainer")
    config.trainer = "tests.trainers.ModuleTrainer"
    report = report_of(config, tmp_path / "run")
    assert all(layer["output"] is None for layer in report["layers"])


def test_watch_costs_nothing_outside_of_a_report():
    tensor = tf.ones([2])
    assert mptrain.numerics.watch("x", tensor) is tensor


def test_report_from_a_checkpoint_begins_there_and_leaves_the_run_as_it_was(config, tmp_path):
    mptrain.run(config, tmp_path / "run")
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    config.numerics.steps = 4
    report = report_of(config, tmp_path / "run")
    assert (report["first_step"], report["last_step"]) == (12, 16)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == checkpoints


@pytest.mark.slow
def test_float32_run_is_told_what_float16_would_do(sick, tmp_path):
    config = sick("LoudTrainer", **{"precision.policy": "float32"})
    report = report_of(config, tmp_path / "run")
    assert report["precision"] == "float32"
    assert riskiest(report)["path"] == "sequential/loud"
    assert report["advice"]["check"]["before"]["skipped steps"] == 30
    assert report["advice"]["check"]["after"]["skipped steps"] == 0


def test_tensorboard_gets_exponents_of_the_chosen_layers_at_the_interval_and_the_run_keeps_its_bits(config, tmp_path):
    config.numerics.layers = ("dense$",)
    for every in (5, 0):
        config.numerics.every_steps = every
        mptrain.run(config, tmp_path / str(every))
    assert_same_checkpoint(tmp_path / "5", tmp_path / "0", 12)
    found = {}
    for file in (tmp_path / "5" / "train").iterdir():
        for record in tf.data.TFRecordDataset(str(file)):
            event = event_pb2.Event.FromString(record.numpy())
            for value in event.summary.value:
                if value.tag.startswith("numerics/"):
                    found.setdefault(value.tag, {})[event.step] = tf.make_ndarray(value.tensor)
    histogram = found["numerics/weight/sequential/dense/kernel"]
    assert sorted(histogram) == [5, 10]
    assert all(rows[:, 2].sum() == 4 * 4 * 4 * 3 for rows in histogram.values())  # every weight has an exponent
    np.testing.assert_array_equal(histogram[5][:, 1] - histogram[5][:, 0], 1.0)
    assert "numerics/output/sequential/dense/largest" in found
    assert not any("conv2d" in tag for tag in found)


def test_tensorboard_of_a_dataset_that_cannot_be_read_twice_is_refused(config, tmp_path):
    config.trainer, config.numerics.every_steps = "tests.trainers.DatasetTrainer", 5
    with pytest.raises(InputError, match="numerics.every_steps"):
        mptrain.run(config, tmp_path / "run")
