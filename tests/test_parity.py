"""The parity run on cases with a known answer: who follows float32, who parts from it, where first, and who shows nothing."""

import json

import numpy as np
import pytest
import tensorflow as tf

import mptrain
from mptrain import InputError, config_check, runner
from mptrain.numerics.parity.run import relative_error
from mptrain.numerics.parity.same_noise import same_noise
from mptrain.numerics.parity.verdicts import Evidence, judge
from mptrain.numerics.probe import Probe
from tests.parity_reports import parity_config, report_of, row

HALF, BRAIN = {"parity.precisions": ("mixed_float16",)}, {"parity.precisions": ("mixed_bfloat16",)}


def errors(report, kind):
    return [error for rows in report[kind].values() for layer in rows for error in layer]


def test_healthy_network_follows_in_both_precisions(tmp_path):
    report = report_of(parity_config("VectorTrainer"), tmp_path)
    assert report["evidence"]["moved"]
    assert [each["status"] for each in report["runs"]] == ["reference", "follows", "follows"]
    assert row(report, "mixed_float16")["verdict"].startswith("follows float32: loss 0.00")
    assert "weights within" in row(report, "mixed_float16")["verdict"]
    assert report["layers"] == ["sequential/first", "sequential/second", "sequential/logits"]
    assert report["compared_steps"] == [0, 10, 20, 30, 40]
    assert max(errors(report, "gradients")) < report["bound"]
    assert all(rows[0] == 0 for rows in report["weights"]["mixed_bfloat16"])  # the same start


@pytest.mark.parametrize(
    ("trainer", "layer"),
    [("LoudTrainer", "sequential/loud"), ("OldKerasTrainer", "sequential/loud"), ("ScopedTrainer", "loud")],
    ids=["keras 3", "tf_keras", "tf.Module"],
)
def test_overflow_in_float16_is_named_first(tmp_path, trainer, layer):
    report = report_of(parity_config(trainer, steps=20, **HALF), tmp_path)
    half = row(report, "mixed_float16")
    assert half["status"] == "parts"
    assert half["parting"] == {"step": 0, "kind": "output", "layer": layer, "error": None}
    assert f"parts from float32 at step 0, first in {layer} (output, not finite)" in half["verdict"]
    assert "skipped 20 of 20 steps" in half["verdict"]
    assert half["skipped_steps"] == list(range(20))


def test_what_overflows_float16_follows_in_bfloat16(tmp_path):
    report = report_of(parity_config("LoudTrainer", steps=20, **BRAIN), tmp_path)
    assert row(report, "mixed_bfloat16")["status"] == "follows"


def test_gradients_that_vanish_part_float16_and_not_bfloat16(tmp_path):
    config = parity_config("FaintTrainer", steps=20, **{"loss_scale.dynamic": False, "loss_scale.initial_scale": 1.0})
    report = report_of(config, tmp_path)
    parting = row(report, "mixed_float16")["parting"]
    assert (parting["step"], parting["kind"], parting["layer"]) == (0, "gradient", "sequential/second")
    assert parting["error"] > 0.5
    assert row(report, "mixed_bfloat16")["status"] == "follows"


def test_float32_that_does_not_learn_is_no_evidence_whatever_the_others_do(tmp_path):
    report = report_of(parity_config("LoudTrainer", steps=20, **HALF, **{"optimizer.learning_rate": 1e-12}), tmp_path)
    half = row(report, "mixed_float16")
    assert half["status"] == "no evidence"
    assert half["verdict"].startswith("no evidence: the float32 loss did not move in 20 steps (from ")


def test_loss_of_the_first_step_is_that_of_a_count_by_hand_in_float64(tmp_path):
    config = parity_config("VectorTrainer", steps=5, **BRAIN)
    trainer = runner.build_trainer(config)
    examples = next(trainer.training_batches.open(0))
    values = examples["inputs"].numpy().astype(np.float64)
    for layer in trainer.model.layers:
        values = values @ layer.kernel.numpy() + layer.bias.numpy()
        values = values if layer.name == "logits" else np.maximum(values, 0)
    right = values[np.arange(len(values)), examples["targets"].numpy()]
    by_hand = np.mean(np.log(np.exp(values).sum(-1)) - right)
    losses = report_of(config, tmp_path)["curves"]["loss"]
    assert losses["float32"][0] == pytest.approx(by_hand, rel=1e-5)
    assert losses["mixed_bfloat16"][0] == pytest.approx(by_hand, rel=1e-2)


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_same_arithmetic_shows_no_error_at_all(tmp_path, replicas):
    """So start, batches, augmentation and dropout are the same; "native" Keras layers are float32."""
    fields = {"parity.precisions": ("native",), "devices.virtual_cpus": replicas, "optimizer.accumulation_steps": 2}
    report = report_of(parity_config("tests.trainers.TinyTrainer", steps=15, **fields), tmp_path)
    assert report["last_step"] == 16  # whole windows
    assert report["steps"] == list(range(0, 16, 2))
    assert set(errors(report, "gradients") + errors(report, "weights")) == {0.0}
    assert report["curves"]["loss"]["native"] == report["curves"]["loss"]["float32"]


def test_dropout_drops_the_same_in_float16_on_two_replicas(tmp_path):
    fields = {"devices.virtual_cpus": 2, "parity.every_steps": 5}
    report = report_of(parity_config("tests.trainers.TinyTrainer", steps=10, **HALF, **fields), tmp_path)
    assert max(errors(report, "gradients")) < 0.05


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_noise_is_that_of_float32_in_every_dtype(dtype):
    def drawn(dtype):
        mask = tf.nn.experimental.stateless_dropout(tf.ones([10_000], dtype), rate=0.3, seed=[1, 2]) > 0
        draws = [draw([100], [3, 4], dtype=dtype) for draw in (tf.random.stateless_uniform, tf.random.stateless_normal)]
        return mask.numpy(), np.stack([tf.cast(draw, tf.float32) for draw in draws])

    with same_noise():
        (mask, draws), (wanted_mask, wanted) = drawn(dtype), drawn(tf.float32)
    np.testing.assert_array_equal(mask, wanted_mask)
    np.testing.assert_allclose(draws, wanted, atol=0.02)
    assert (drawn(dtype)[0] != wanted_mask).mean() > 0.3  # which is why


@pytest.mark.parametrize("replicas", [1, 2])
def test_gradients_brought_are_those_of_the_global_batch_unscaled(replicas):
    config = parity_config("VectorTrainer", **{"devices.virtual_cpus": replicas, "precision.policy": "float32"})
    trainer = runner.build_trainer(config)
    batch = next(trainer.training_batches.open(0))
    brought = Probe(trainer, gradients=True)(batch).gradients
    with tf.GradientTape() as tape:
        losses = trainer.compute_loss(batch, trainer.model(batch["inputs"], training=True))
        loss = tf.reduce_sum(losses) / config.data.batch_size
    variables = [variable.value for variable in trainer.model.trainable_variables]
    assert len(brought) == len(variables) == 6
    for variable, by_hand in zip(trainer.model.trainable_variables, tape.gradient(loss, variables), strict=True):
        np.testing.assert_allclose(brought[variable.path], by_hand, atol=1e-6)


def test_relative_error_of_nothing_is_nothing_or_all():
    assert relative_error(0.0, 0.0) == 0
    assert relative_error(4.0, 0.0) == 1
    assert relative_error(4.0, 16.0) == 0.5
    assert np.isnan(relative_error(np.inf, 1.0))


@pytest.mark.parametrize(
    ("losses", "moved"),
    [
        (np.linspace(1.0, 0.5, 100), True),
        (np.linspace(0.5, 1.0, 100), True),
        (np.ones(100), False),
        (np.linspace(1.0, 0.995, 100), False),  # by less than 1 %
        (1 + 0.5 * np.random.default_rng(0).normal(size=100), False),  # by less than its noise
        ([1.0], False),
    ],
)
def test_evidence_is_a_loss_that_moved_by_more_than_its_noise(losses, moved):
    assert Evidence.of(list(losses), range(len(losses)), len(losses)).moved is moved


def test_float32_that_is_not_finite_is_no_evidence():
    found = Evidence.of([1.0, None, 0.5], [0, 1, 2], 3)
    assert not found.moved
    assert found.words == "no evidence: the float32 loss is not finite at step 1"


def made_up(losses, gradients=0.0, weights=0.0, **more):
    found = {"curves": {"loss": losses}, "layers": ["a", "b"], "skipped": [], "dynamic": True, "window": 1}
    found["gradients"] = [dict.fromkeys("ab", gradients)] * 3
    found["weights"] = [dict.fromkeys("ab", weights)] * 3
    return found | {"nonfinite": [None] * 3} | more


def judged(run, losses):
    steps = range(len(losses))
    evidence = Evidence.of(losses, steps, len(losses))
    return judge(run, made_up(losses), evidence, steps, [0, len(losses) // 2, len(losses)], 0.25)


FALLING = list(np.linspace(1.0, 0.1, 100))


def test_weights_alone_drift_and_do_not_part():
    verdict = judged(made_up(FALLING, weights=0.3), FALLING)
    assert verdict.status == "follows"
    assert verdict.words.endswith("weights drift past 0.25 at step 0, first in a")


def test_overflow_that_the_loss_scale_cures_is_a_skipped_step_and_no_parting():
    skipping = [None, None, *FALLING[2:]]
    assert judged(made_up(skipping, gradients=None, skipped=[0, 1]), FALLING).words.endswith("; skipped 2 of 100 steps")
    static = judged(made_up(skipping, gradients=None, dynamic=False), FALLING)
    assert (static.status, static.parting.layer) == ("parts", "b")  # the first in backward order


def test_loss_that_parts_or_is_gone_for_a_tenth_of_the_run_is_named_with_its_step():
    apart = judged(made_up([*FALLING[:50], *[1.0] * 50]), FALLING)
    assert (apart.status, apart.parting.kind) == ("parts", "loss")
    assert 50 < apart.parting.step < 60
    gone = judged(made_up([*FALLING[:80], *[None] * 20]), FALLING)
    assert (gone.parting.step, gone.parting.error) == (89, None)
    assert "first in the loss (loss, not finite)" not in gone.words
    assert "at step 89, first in the loss, not finite" in gone.words


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("parity.precisions", ("mixed_flot16",), "config.parity.precisions names 'mixed_flot16': write some of native"),
        ("parity.precisions", ("float32",), "write some of native, mixed_float16, mixed_bfloat16"),
        ("parity.bound", 0.0, "config.parity.bound is 0.0: write a number above 0"),
        ("parity.every_steps", 0, "config.parity.every_steps is 0"),
    ],
)
def test_wrong_field_is_refused_with_what_to_write(field, value, message):
    with pytest.raises(InputError, match=message):
        config_check.validate(parity_config("VectorTrainer", **{field: value}))


def test_several_hosts_are_refused_in_one_line(tmp_path):
    config = parity_config("VectorTrainer", **{"devices.strategy": "multi_worker"})
    with pytest.raises(InputError, match="--mode=parity trains in processes of this host"):
        mptrain.run(config, tmp_path / "run", "parity")


@pytest.mark.slow
def test_run_from_a_checkpoint_tells_a_failed_precision_and_leaves_the_run_as_it_was(tmp_path, capsys):
    config = parity_config("PickyTrainer", steps=20, **{"train.steps": 40})
    mptrain.run(config, tmp_path / "run", "train")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert mptrain.run(config, tmp_path / "run", "parity") == {"precisions": 2, "follow": 1, "part": 0, "failed": 1}
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    written = {path.name for path in after.keys() - before.keys()}
    assert written == {"parity.json", "parity.html"}
    assert {path: after[path] for path in before} == before

    report = json.loads((tmp_path / "run" / "report" / "parity.json").read_text())
    assert (report["first_step"], report["last_step"]) == (40, 60)
    assert row(report, "mixed_bfloat16")["verdict"] == "failed: PickyTrainer has no kernel for bfloat16: write mixed_float16"
    half = row(report, "mixed_float16")
    assert half["ms_per_step"] > 0
    assert half["peak_memory"] > 100 * 2**20
    assert half["ratio"] == pytest.approx(half["ms_per_step"] / row(report, "float32")["ms_per_step"])
    printed = capsys.readouterr().out
    assert "mixed_float16: follows float32" in printed or "mixed_float16: no evidence" in printed
    assert "the report is" in printed
