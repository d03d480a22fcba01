"""The parity run on cases with a known answer: who follows float32, who parts from it, where first, and who shows nothing."""

import json
import os
import pathlib
import signal
import time

import numpy as np
import pytest
import tensorflow as tf

import mptrain
from mptrain import InputError, config_check, runner
from mptrain.errors import reason
from mptrain.numerics.parity import mode
from mptrain.numerics.parity.reference import by_layer, relative_error
from mptrain.numerics.parity.run import Schedule, compared_batches
from mptrain.numerics.parity.same_noise import same_noise
from mptrain.numerics.parity.verdicts import Evidence, judge
from mptrain.numerics.probe import Probe
from tests.parity_reports import parity_config, report_of, row
from tests.runs import launch

pytestmark = pytest.mark.slow  # left out by `make test-fast`

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


@pytest.mark.parametrize(("trainer", "precision"), [("MaskTrainer", "mixed_float16"), ("InfiniteMaskTrainer", "native")])
def test_infinite_output_that_spoils_nothing_or_is_in_float32_too_is_no_parting(tmp_path, trainer, precision):
    report = report_of(parity_config(trainer, steps=10, **{"parity.precisions": (precision,)}), tmp_path)
    assert (row(report, precision)["status"], row(report, precision)["parting"]) == ("follows", None)


def test_overflow_on_the_way_back_that_no_loss_scale_cures_is_named_by_its_layer(tmp_path):
    report = report_of(parity_config("SteepTrainer", steps=20, **HALF), tmp_path)
    half = row(report, "mixed_float16")
    assert half["parting"] == {"step": 0, "kind": "gradient", "layer": "sequential/second", "error": None}
    assert "skipped 20 of 20 steps" in half["verdict"]


def test_following_a_float32_run_that_casts_to_float16_itself_is_no_evidence(tmp_path):
    report = report_of(parity_config("CastingTrainer", **{"parity.precisions": ("native",)}), tmp_path)
    assert report["layers"] == ["hidden", "last"]
    native = row(report, "native")
    words = "no evidence: float32's own run computes hidden in 16 bits, as the model asks"
    assert (native["status"], native["verdict"]) == ("no evidence", words)


def test_gradient_that_is_rounding_errors_in_float32_too_is_measured_by_the_whole(tmp_path):
    report = report_of(parity_config("CentredTrainer", steps=10), tmp_path)
    assert [each["status"] for each in report["runs"][1:]] == ["follows", "follows"]


def test_layer_whose_gradient_passes_by_is_told_and_an_evaluations_own_metric_shown(tmp_path):
    report = report_of(parity_config("TwoOptimizersTrainer", steps=10, **HALF), tmp_path)
    half = row(report, "mixed_float16")
    assert half["verdict"].endswith("; the gradients of sequential/first could not be seen")
    first, *others = report["gradients"]["mixed_float16"]
    assert first is None
    assert np.max(others) < report["bound"]
    assert len(report["weights"]["mixed_float16"]) == 3
    assert half["final"]["distance"] == 2.5


def test_batches_looked_at_are_those_trained_on_also_of_a_dataset_that_shuffles(tmp_path):
    trainer = runner.build_trainer(parity_config("tests.trainers.DatasetTrainer"))
    trained = [batch["inputs"] for _, batch in zip(range(15), trainer.training_batches.open(0), strict=False)]
    schedule = Schedule(first=0, steps=14, every=7, window=1)
    looked_at = [batch["inputs"] for batch in compared_batches(trainer, schedule)]
    np.testing.assert_array_equal(looked_at, [trained[0], trained[7], trained[14]])


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


def test_error_of_a_layer_below_the_noise_is_measured_by_the_whole():
    layers = [{"path": "a", "variables": ["a"]}, {"path": "b", "variables": ["b"]}, {"path": "c", "variables": ["c"]}]
    pairs = {"a": (1.0, 100.0), "b": (1.0, 1e-20)}
    assert by_layer(pairs, layers, noise=1e-6) == {"a": 0.1, "b": 0.1}
    assert by_layer(pairs, layers)["b"] == pytest.approx(1e10)


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
    return found | {"nonfinite": [[]] * 3, "in_16_bits": None} | more


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


def test_parting_from_a_float32_run_that_is_not_all_float32_is_evidence():
    apart, reference = made_up(FALLING, gradients=0.5), made_up(FALLING, in_16_bits="embedding")
    evidence = Evidence.of(FALLING, range(100), 100)
    assert judge(apart, reference, evidence, range(100), [0, 50, 100], 0.25).status == "parts"
    assert judge(made_up(FALLING), reference, evidence, range(100), [0, 50, 100], 0.25).status == "no evidence"


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


def test_disk_that_is_too_small_is_told_before_anything_is_trained(tmp_path):
    config = parity_config("VectorTrainer", steps=10**12, **{"parity.every_steps": 1})
    with pytest.raises(InputError, match=r"--mode=parity needs [\d,]+\.\d GB in .* write a larger config.parity.every_steps"):
        mode.parity(runner.build_trainer(config), tmp_path / "report", None)
    assert list((tmp_path / "report").iterdir()) == []


def test_error_of_tensorflow_is_told_by_the_line_that_says_it():
    @tf.function(input_signature=[tf.TensorSpec([None, None]), tf.TensorSpec([None, None])], autograph=False)
    def multiply(a, b):
        return a @ b

    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        multiply(tf.ones([2, 3]), tf.ones([2, 3]))
    assert reason(caught.value).startswith("InvalidArgumentError: Matrix size-incompatible")
    assert reason(InputError("write another")) == "write another"
    assert reason(MemoryError()) == "MemoryError"


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


def precisions_of(process):
    """The ids of the processes in which a parity run trains now."""
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in children if b"parity.child" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_leaves_no_process_and_no_file(tmp_path, number, status):
    config = tmp_path / "tiny.py"
    config.write_text(
        "from tests.parity_reports import parity_config\n\ndef get_config():\n    return parity_config('VectorTrainer')\n"
    )
    process = launch(config, tmp_path / "run", "--mode=parity")
    while process.poll() is None and not (found := precisions_of(process)):
        time.sleep(0.5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (status, False)
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in found)
    assert os.listdir(tmp_path / "run" / "report") == []


@pytest.mark.slow
def test_precision_whose_process_is_killed_is_told_and_the_others_go_on(tmp_path):
    config = parity_config("CrashingTrainer", steps=5, **{"precision.policy": "float32"})
    mptrain.run(config, tmp_path / "run", "parity")
    report = json.loads((tmp_path / "run" / "report" / "parity.json").read_text())
    assert row(report, "mixed_float16")["verdict"] == ("failed: its process was ended by SIGKILL, as where the memory runs out")
    assert row(report, "mixed_bfloat16")["verdict"].startswith("failed: InvalidArgumentError: Matrix size-incompatible")
