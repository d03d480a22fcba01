"""The experiments that change the algorithm: a GAN, distillation, sharpness-aware minimisation, a variational autoencoder.

Each is run small: eight digits, float16, two replicas.
"""

import importlib
import io

import keras
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mptrain
from experiments.distillation import divergence
from experiments.sam import SamTrainer
from experiments.vae import VaeTrainer
from mptrain import tensor_file
from mptrain.data import idx
from mptrain.runner import build_trainer
from tests.runs import rows
from tests.trainers import TinyTrainer

pytestmark = pytest.mark.slow  # left out by `make test-fast`

TRACED = []  # each pass of an OverflowingSamTrainer that was traced
TOO_HIGH = 1e30  # a loss scale at which every float16 gradient overflows
SMALL = {
    "gan": {"model.width": 2, "model.noise": 4},
    "distillation": {"model.units": 4},
    "sam": {},
    "vae": {"model.hidden": 8, "model.latent": 3},
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A file with eight digits to train on and eighty to evaluate."""
    arrays = {}
    for split, name, count in (("train", "train", 8), ("eval", "test", 80)):
        examples = idx.embedded_mnist(split).arrays
        arrays |= {f"x_{name}": examples["inputs"][:count], f"y_{name}": examples["targets"][:count]}
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def small(digits):
    """Returns the config of an experiment, made small."""

    def config(name, **fields):
        config = importlib.import_module(f"configs.{name}").get_config()
        config.train.epochs = None
        config.update_from_flattened_dict(
            {
                "data.name": "npz",
                "data.dir": str(digits),
                "data.batch_size": 8,
                "data.eval_batch_size": 40,
                "devices.strategy": "mirrored",
                "devices.virtual_cpus": 2,
                "loss_scale.initial_scale": 2.0**10,
                "train.steps": 4,
                "train.steps_per_loop": 1,
                "checkpoint.every_steps": 2,
                "optimizer.ema_momentum": 0.5,
                **SMALL.get(name, {}),
                **fields,
            }
        )
        return config

    return config


@pytest.fixture(scope="module")
def teacher(small, tmp_path_factory):
    """The folder of a run of configs/mnist.py in float32, with averaged weights."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    mptrain.run(small("mnist", **{"precision.policy": "float32", "train.steps": 2, "devices.virtual_cpus": 1}), folder, "train")
    return folder


def values(trainer):
    return {path: variable.numpy() for path, variable in trainer.state.items()}


def changed(trainer, before):
    return {path for path, value in values(trainer).items() if not np.array_equal(value, before[path])}


def overflow(trainer, name=""):
    """Trains a step that overflows in the optimizer `name`; returns what it changed, but for the loss scale's own counters."""
    before = values(trainer)
    scale = trainer.optimizers[name].state["loss_scale/loss_scale"]
    own = scale.numpy()
    scale.assign(TOO_HIGH)
    outputs = trainer.train(tf.constant(1))
    assert outputs[f"{name}/skipped_steps".lstrip("/")] == 1
    scale.assign(own)
    return {path for path in changed(trainer, before) if "/loss_scale/" not in path} - {"step"}


@pytest.mark.parametrize("name", ["gan", "sam", "vae"])
def test_overflow_changes_only_what_it_may(name, small):
    trainer = build_trainer(small(name))
    trainer.train(tf.constant(1))
    if name != "gan":
        assert overflow(trainer) == set()
        return
    for skipping, other in (("discriminator", "generator"), ("generator", "discriminator")):
        found = overflow(trainer, skipping)
        assert found
        assert all(path.split("/")[1] == other for path in found)
        learned = {path for path in values(trainer) if path.startswith(f"model/{other}/") and "seed_generator" not in path}
        assert learned <= found


@pytest.fixture(scope="module")
def events(small, tmp_path_factory):
    """Runs GAN and VAE by their config; returns {name: (folder, pictures by name)}."""
    found = {}
    for name in ("gan", "vae"):
        folder = tmp_path_factory.mktemp("runs") / name
        mptrain.run(small(name, **{"train.steps": 2, "eval.every_steps": 2}), folder)
        written = EventAccumulator(str(folder / "eval"), size_guidance={"tensors": 0}).Reload()
        images = {}
        for tag in written.Tags()["tensors"]:
            (event,) = written.Tensors(tag)
            value = tf.make_ndarray(event.tensor_proto)
            if value.dtype == object:
                assert event.step == 2
                images[tag] = PIL.Image.open(io.BytesIO(value[2]))
        found[name] = folder, images
    return found


def test_pictures_are_written_with_the_evaluation(events, digits):
    assert {tag: image.size for tag, image in events["gan"][1].items()} == {"digits": (224, 224)}
    pictures = events["vae"][1]
    assert {tag: image.size for tag, image in pictures.items()} == {"reconstructions": (280, 224), "samples": (280, 224)}
    shown = np.asarray(pictures["reconstructions"]).reshape(8, 28, 10, 28).transpose(0, 2, 1, 3).reshape(80, 28, 28)
    np.testing.assert_array_equal(shown[::2], np.load(digits)["x_test"][:40].reshape(40, 28, 28))
    assert np.ptp(shown[1]) > 0


def test_both_loss_scales_of_the_gan_are_logged(events):
    for row in rows(events["gan"][0], split="train"):
        assert row["generator/loss_scale"] == row["discriminator/loss_scale"] == row["loss_scale"] == 2.0**10


def test_picture_of_a_wrong_shape_is_refused(config):
    class WrongPictures(TinyTrainer):
        def pictures(self):
            return {"digits": tf.zeros([4, 6, 6, 1])}

    action = mptrain.pictures.WritePictures(WrongPictures(config), None)
    with pytest.raises(mptrain.InputError, match=r"WrongPictures.pictures\(\) returns 'digits'.*mptrain.grid"):
        action({})


def test_rows_of_a_grid_must_be_full():
    with pytest.raises(mptrain.InputError, match="10 images for rows of 4"):
        mptrain.grid(tf.zeros([10, 2, 2, 1]), columns=4)


class TestDistillation:
    @pytest.fixture(scope="class")
    def student(self, small, teacher):
        return build_trainer(small("distillation", **{"model.teacher": str(teacher)}))

    def test_teacher_is_what_its_run_evaluated_in_its_own_precision_and_in_no_checkpoint_of_the_student(self, student, teacher):
        saved = tensor_file.read(teacher / "checkpoints" / "ckpt-2")
        averages = {path.split("/average/")[1]: value for path, value in saved.items() if "/average/" in path}
        assert len(averages) == 8
        for variable in student.teacher.variables:
            if variable.path in averages:
                np.testing.assert_array_equal(variable.numpy(), averages[variable.path])
        assert {layer.compute_dtype for layer in student.teacher.layers} == {"float32"}
        assert {layer.compute_dtype for layer in student.model.layers} == {"float16", "float32"}
        assert not any("cnn" in path for path in student.state)

    def test_training_leaves_the_teacher_as_it_is(self, student):
        before = student.teacher.get_weights()
        student.train(tf.constant(1))
        for was, now in zip(before, student.teacher.get_weights(), strict=True):
            np.testing.assert_array_equal(was, now)

    @pytest.mark.parametrize("missing", ["nowhere", "empty"])
    def test_folder_that_is_no_run_is_refused(self, small, tmp_path, missing):
        (tmp_path / "empty").mkdir()
        with pytest.raises(mptrain.InputError, match=f"{missing} is not the folder of a run"):
            build_trainer(small("distillation", **{"model.teacher": str(tmp_path / missing)}))

    def test_run_of_another_model_is_refused(self, small, events):
        with pytest.raises(mptrain.InputError, match=r"config.model.teacher=.*name the run of a model that takes"):
            build_trainer(small("distillation", **{"model.teacher": str(events["vae"][0])}))

    def test_divergence_is_zero_for_equal_logits_and_follows_its_definition(self):
        teacher, student = tf.constant([[1.0, 2.0, 4.0]]), tf.constant([[0.0, 3.0, 1.0]])
        assert divergence(teacher, teacher, 3.0).numpy() == 0.0
        p, q = (np.exp(x / 2) / np.exp(x / 2).sum() for x in (teacher.numpy()[0], student.numpy()[0]))
        assert divergence(teacher, student, 2.0).numpy()[0] == pytest.approx(4 * (p * np.log(p / q)).sum(), rel=1e-6)


class TinySamTrainer(SamTrainer):
    """On the model of TinyTrainer, which has BatchNorm and dropout."""

    dropout = TinyTrainer.dropout
    build_source, build_model = TinyTrainer.build_source, TinyTrainer.build_model
    inputs, augment = mptrain.Trainer.inputs, mptrain.Trainer.augment


class OverflowingSamTrainer(TinySamTrainer):
    """The loss of one of the two passes is scaled beyond float32, on the last replica."""

    def forward(self, batch):
        outputs, loss, scaled_loss = super().forward(batch)
        TRACED.append("pass")
        in_second = len(TRACED) % 2 == 0
        replica = tf.distribute.get_replica_context()
        last = tf.equal(replica.replica_id_in_sync_group, replica.num_replicas_in_sync - 1)
        here = tf.logical_and(last, in_second == (self.config.model.overflowing_pass == 2))
        return outputs, loss, scaled_loss * tf.where(here, 3e38, 1.0)


class HidingSamTrainer(TinySamTrainer):
    """Pools over what the convolution gives, and so over every NaN; the inputs make the convolution's gradient overflow."""

    def inputs(self, batch):
        return 1000.0 * batch["inputs"]

    def build_model(self):
        layers = keras.layers
        inside = [layers.Conv2D(4, 3), layers.MaxPooling2D(4), layers.ReLU(), layers.Flatten()]
        return keras.Sequential([keras.Input((6, 6, 1)), *inside, layers.Dense(3, dtype="float32")])


def sam_config(config, rho):
    config.model.rho = rho
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    return config


class TestSam:
    @pytest.mark.parametrize("overflowing_pass", [1, 2])
    def test_overflow_of_either_pass_on_one_replica_changes_nothing(self, config, mirrored, overflowing_pass):
        config.model.overflowing_pass = overflowing_pass
        trainer = OverflowingSamTrainer(sam_config(config, 0.1), mirrored(2))
        before = values(trainer)
        outputs = trainer.train(tf.constant(1))
        assert outputs["skipped_steps"] == 1
        assert {path for path in changed(trainer, before) if "/loss_scale/" not in path} == {"step"}

    def test_overflow_of_the_first_pass_counts_where_the_second_hides_it(self, config):
        config.loss_scale.initial_scale = 2.0**15
        trainer = HidingSamTrainer(sam_config(config, 0.1))
        before = values(trainer)
        assert trainer.train(tf.constant(1))["skipped_steps"] == 1
        assert {path for path in changed(trainer, before) if "/loss_scale/" not in path} == {"step"}

    def test_ball_of_radius_zero_is_plain_training_to_the_bit(self, config, mirrored):
        sam, plain = (make(sam_config(config, 0.0), mirrored(2)) for make in (TinySamTrainer, TinyTrainer))
        for trainer in (sam, plain):
            trainer.train(tf.constant(3))
        assert not changed(sam, values(plain))

    def test_statistics_are_those_of_the_first_pass_alone(self, config, mirrored):
        sam, plain = (make(sam_config(config, 0.5), mirrored(2)) for make in (TinySamTrainer, TinyTrainer))
        for trainer in (sam, plain):
            trainer.train(tf.constant(1))
        differing = changed(sam, values(plain))
        assert "model/sequential/dense/kernel" in differing
        assert not any("moving" in path for path in differing)

    def test_update_is_the_gradient_at_the_highest_point_of_the_ball(self, config):
        config.precision.policy = "float32"
        config.model.rho = 0.5
        trainer = TinySamTrainer(sam_config(config, 0.5))
        for layer in trainer.model.layers:
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0.0
        weights, batch = trainer.model.trainable_variables, next(trainer.training_batches.read(0))

        def gradients():
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(trainer.compute_loss(batch, trainer.model(batch["inputs"], training=True)))
            return [gradient.numpy() for gradient in tape.gradient(loss, weights)]

        start = trainer.model.get_weights()
        begin = [variable.numpy() for variable in weights]
        first = gradients()
        norm = np.sqrt(sum((gradient**2).sum() for gradient in first))
        for variable, value, gradient in zip(weights, begin, first, strict=True):
            variable.assign(value + 0.5 * gradient / norm)
        second = gradients()
        trainer.model.set_weights(start)
        trainer.train(tf.constant(1))
        for variable, value, gradient in zip(weights, begin, second, strict=True):
            np.testing.assert_allclose(variable.numpy(), value - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_noise_of_the_vae_is_a_function_of_seed_step_and_example(small, mirrored):
    config = small("vae", **{"precision.policy": "float32", "optimizer.name": "sgd", "optimizer.learning_rate": 1e-4})
    one, two = (VaeTrainer(config, mirrored(replicas)) for replicas in (1, 2))
    for _ in range(2):
        left, right = one.train(tf.constant(1)), two.train(tf.constant(1))
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["kl"] == pytest.approx(right["kl"], rel=1e-4)


def test_normal_numbers_differ_between_examples_steps_and_calls(config):
    trainer = TinyTrainer(config)

    def draw():
        trainer.randomness.begin_step()
        return [trainer.strategy.run(lambda: trainer.randomness.normal_per_example(500)).numpy() for _ in range(2)]

    first, second = draw()
    assert first.shape == (12, 500)
    assert abs(first.mean()) < 0.05
    assert first.std() == pytest.approx(1.0, abs=0.05)
    assert len({first[0, 0], first[1, 0], second[0, 0]}) == 3
    np.testing.assert_array_equal(draw()[0], first)
    trainer.global_step.assign_add(1)
    assert not np.array_equal(draw()[0], first)
