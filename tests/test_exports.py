"""What an exported model answers in a process that has only TensorFlow, and what lies in an export's folder."""

import json
import subprocess
import sys

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf

import mptrain
from mptrain import InputError, RunError, config_check, default_config, serving
from tests import trainers
from tests.conftest import ROOT
from tests.test_model_check import ModuleOfLayers, Subclassed

pytestmark = pytest.mark.slow  # left out by `make test-fast`


class RawTrainer(trainers.TinyTrainer):
    """Takes bytes, which its `inputs` scales, beside a feature that is not used; augments what it trains on."""

    def build_source(self, split):
        arrays = super().build_source(split).arrays
        images = np.clip(arrays["inputs"] * 40 + 128, 0, 255).astype(np.uint8)
        return {"inputs": images, "unused": arrays["targets"], "targets": arrays["targets"]}

    def augment(self, batch):
        return {**batch, "inputs": tf.zeros_like(batch["inputs"])}

    def inputs(self, batch):
        return tf.cast(batch["inputs"], tf.float32) / 255.0


class WordTrainer(trainers.TinyTrainer):
    """Looks words up in a table, and answers with two tensors."""

    def build_source(self, split):
        return {"words": np.array([["a", "b"], ["c", "a"]] * 10), "targets": np.zeros(20, np.int32)}

    def build_model(self):
        keys = tf.constant(["a", "b", "c"])
        table = tf.lookup.KeyValueTensorInitializer(keys, tf.constant([1, 2, 3], tf.int64))
        self.table = tf.lookup.StaticHashTable(table, 0)
        layers = [keras.layers.Embedding(4, 5), keras.layers.Flatten(), keras.layers.Dense(3, dtype="float32")]
        return keras.Sequential([keras.Input((2,), dtype="int64"), *layers])

    def inputs(self, batch):
        return self.table.lookup(batch["words"])

    def serve(self, batch):
        logits = super().serve(batch)
        return {"logits": logits, "class": tf.argmax(logits, axis=-1)}


def of(build, base=trainers.TinyTrainer, **methods):
    return type("Built", (base,), {"build_model": lambda self: build(), **methods})


def wrapped():
    inner = mptrain.MixedPrecision(keras.layers.Dense(3))
    return keras.Sequential([keras.Input((6, 6, 1)), keras.layers.Flatten(), inner])


def small(policy="mixed_float16"):
    config = default_config()
    config.trainer = "tests.trainers.TinyTrainer"
    config.precision.policy = policy
    config.optimizer.learning_rate = 0.1
    config.data.batch_size = 12
    config.train.steps = 12
    return config


def averaged(mirrored):
    """Returns RawTrainer on two replicas, in float16, after three steps; its averages differ from its weights."""
    config = small()
    config.optimizer.ema_momentum = 0.5
    trainer = RawTrainer(config, mirrored(2))
    trainer.train(tf.constant(3))
    return trainer


def evaluated(trainer, inputs):
    """Returns what the model answers in an evaluation."""

    @tf.function
    def answer(batch):
        inputs = trainer.precision.cast_to_compute(trainer.inputs(batch))
        return trainer.precision.cast_to_output(trainer.model(inputs, training=False))

    with trainer.kernels.scope(), trainer.optimizer.averaged_weights():
        return answer(inputs).numpy()


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Returns {kind: (trainer, folder, inputs, answers of a process without mptrain)}, and what it told of wrong inputs."""
    root, found = tmp_path_factory.mktemp("exports"), {}

    def export(kind, trainer, **options):
        folder = mptrain.export(trainer, root / kind, **options)
        inputs = {name: trainer.eval_source.arrays[name][:7] for name in trainer.serving_spec() if name != "unused"}
        np.savez(root / kind / "inputs.npz", **inputs)
        found[kind] = (trainer, folder, inputs)

    raw = averaged(mirrored_strategy)
    export("keras", raw, metrics={"loss": 1.5})
    export("keras, as trained", raw, precision="as_trained")
    export("tf_keras", trainers.TfKerasTrainer(small("mixed_bfloat16"), mirrored_strategy(3)), precision="as_trained")
    export("module", trainers.ModuleTrainer(small()))
    export("module, as trained", trainers.ModuleTrainer(small()), precision="as_trained")
    export("module of layers", of(lambda: ModuleOfLayers(keras, False))(small()), precision="as_trained")
    export("subclassed", of(Subclassed)(small()), precision="as_trained")
    export("wrapped", of(wrapped)(small("float32")), precision="as_trained")
    export("words", WordTrainer(small()), precision="as_trained")
    export("onnx", trainers.TinyTrainer(small()), onnx=True)
    command = [sys.executable, "-I", ROOT / "tests" / "load_exports.py", root]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert finished.returncode == 0, finished.stderr
    answers = dict(np.load(root / "answers.npz"))
    of_kind = {kind: {k.partition("/")[2]: v for k, v in answers.items() if k.startswith(f"{kind}/")} for kind in found}
    return {"told": json.loads(finished.stdout.splitlines()[-1]), **{k: (*found[k], of_kind[k]) for k in found}}


def mirrored_strategy(n):
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(n)], tf.distribute.ReductionToOneDevice())


AS_TRAINED = ["keras, as trained", "tf_keras", "module, as trained", "module of layers", "subclassed", "wrapped"]


@pytest.mark.parametrize("kind", AS_TRAINED)
def test_process_without_mptrain_answers_with_the_bits_of_the_evaluation(exports, kind):
    trainer, _, inputs, answers = exports[kind]
    np.testing.assert_array_equal(answers["outputs"], evaluated(trainer, inputs))
    assert answers["outputs"].dtype == np.float32


def test_float32_export_computes_in_float32_with_the_averaged_weights(exports):
    trainer, _, inputs, answers = exports["keras"]
    reference = RawTrainer(small("float32"))
    with trainer.optimizer.averaged_weights():
        for path, variable in trainer.state.items():
            if path.startswith("model/"):
                reference.state[path].assign(variable.numpy())
    expected = evaluated(reference, inputs)
    np.testing.assert_allclose(answers["outputs"], expected, rtol=1e-5, atol=1e-6)
    assert np.abs(evaluated(trainer, inputs) - expected).max() > 1e-4  # so the comparison tells float16 from float32
    assert np.abs(exports["keras, as trained"][3]["outputs"] - expected).max() > 1e-4


def test_float32_export_of_a_module_is_what_numpy_computes(exports):
    trainer, _, inputs, answers = exports["module"]
    expected = inputs["inputs"].reshape(7, 36) @ trainer.model.w.numpy() + trainer.model.b.numpy()
    np.testing.assert_allclose(answers["outputs"], expected, rtol=1e-5, atol=1e-6)


def test_inputs_of_a_sequential_that_was_built_by_them_are_not_rounded_in_float32():
    def build():
        layers = keras.layers
        return keras.Sequential([keras.Sequential([layers.Flatten(), layers.Dense(4), layers.Dense(3, dtype="float32")])])

    trainer = of(build)(small())
    inputs = trainer.eval_source.arrays["inputs"][:7]
    before = evaluated(trainer, {"inputs": inputs})
    served = serving.Serving(trainer, as_trained=False).serve(inputs=tf.constant(inputs))["outputs"]
    kernel, bias, last_kernel, last_bias = (variable.numpy() for variable in trainer.model.trainable_variables)
    expected = (inputs.reshape(7, -1) @ kernel + bias) @ last_kernel + last_bias
    np.testing.assert_allclose(served, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(evaluated(trainer, {"inputs": inputs}), before)
    assert not np.array_equal(before, expected)


def test_keras_file_computes_the_same_from_the_scaled_inputs(exports):
    trainer, folder, inputs, _ = exports["keras"]
    model = keras.saving.load_model(folder / "model.keras")
    scaled = inputs["inputs"].astype(np.float32) / 255
    np.testing.assert_allclose(model(scaled, training=False), exports["keras"][3]["outputs"], rtol=1e-5, atol=1e-6)
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}
    assert (model.layers[-1].bias.numpy() != trainer.model.layers[-1].bias.numpy()).all()  # it is the average


def test_keras_files_load_without_mptrain_or_say_what_they_need(exports):
    for kind in ("tf_keras", "onnx"):
        np.testing.assert_allclose(exports[kind][3]["model.keras"], exports[kind][3]["outputs"], rtol=1e-5, atol=1e-6)
    needs = {kind: json.loads((exports[kind][1] / "metadata.json").read_text())["keras"] for kind in exports if kind != "told"}
    assert needs["wrapped"]["needs"] == ["mptrain.layers.MixedPrecision"]
    assert needs["subclassed"]["needs"] == ["tests.test_model_check.Subclassed"]
    assert needs["module"] == {"file": None, "reason": "the model is not a keras.Model"}
    _, folder, inputs, answers = exports["wrapped"]
    model = keras.saving.load_model(folder / "model.keras")  # mptrain.layers is imported here
    np.testing.assert_array_equal(model.layers[-1].layer.compute_dtype, "float16")
    np.testing.assert_allclose(model(inputs["inputs"]), answers["outputs"], rtol=2e-3)


def test_table_is_saved_and_outputs_have_their_names(exports):
    trainer, _, inputs, answers = exports["words"]
    assert set(answers) == {"logits", "class"}
    np.testing.assert_array_equal(answers["logits"], evaluated(trainer, inputs))
    np.testing.assert_array_equal(answers["class"], answers["logits"].argmax(axis=-1))


def test_onnx_model_answers_alike(exports):
    _, folder, inputs, answers = exports["onnx"]
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (outputs,) = session.run(["outputs"], {"inputs": inputs["inputs"]})
    np.testing.assert_allclose(outputs, answers["outputs"], rtol=1e-5, atol=1e-6)


def test_wrong_inputs_are_told_what_was_expected(exports):
    told = exports["told"]
    assert "Shape of tensor inputs [7,5,6,1] is not compatible with expected shape [?,6,6,1]" in told["shape"]
    assert "Shape of tensor inputs [7,6,6] is not compatible with expected shape [?,6,6,1]" in told["rank"]
    assert "was expected to be a uint8 tensor but is a int32 tensor" in told["dtype"]
    assert "missing a required argument: 'inputs'" in told["name"]


def test_signature_reads_well_in_saved_model_cli(exports):
    command = [
        sys.executable,
        "-c",
        "from tensorflow.python.tools.saved_model_cli import main; main()",
        "show",
        "--all",
        "--dir",
    ]
    printed = subprocess.run([*command, exports["keras"][1]], capture_output=True, text=True).stdout
    (signature,) = [part for part in printed.split("signature_def") if part.startswith("['serving_default']")]
    assert " ".join(signature.split()).startswith(
        "['serving_default']: The given SavedModel SignatureDef contains the following input(s): inputs['inputs'] tensor_info:"
        " dtype: DT_UINT8 shape: (-1, 6, 6, 1) name: serving_default_inputs:0 The given SavedModel SignatureDef contains the"
        " following output(s): outputs['outputs'] tensor_info: dtype: DT_FLOAT shape: (-1, 3)"
    )
    assert "unused" not in signature


def test_metadata_says_what_was_exported(exports):
    metadata = json.loads((exports["keras"][1] / "metadata.json").read_text())
    assert metadata["step"] == 3
    assert metadata["trainer"] == "tests.test_exports.RawTrainer"
    assert metadata["precision"] == {"trained": "mixed_float16", "exported": "float32"}
    assert metadata["weights"] == "averaged"
    assert metadata["signature"]["inputs"] == {"inputs": "uint8 [batch, 6, 6, 1]"}
    assert metadata["signature"]["outputs"] == {"outputs": "float32 [batch, 3]"}
    assert metadata["metrics"] == {"loss": 1.5}
    assert metadata["config"]["optimizer.ema_momentum"] == 0.5
    assert metadata["versions"]["tensorflow"] == tf.__version__


def test_weights_are_named_by_their_paths_and_the_trainer_keeps_its_own(exports):
    trainer, folder, *_ = exports["keras"]
    weights = tf.saved_model.load(str(folder)).weights
    bias = trainer.model.layers[-1].bias
    assert weights[bias.path].name == f"{bias.path}:0"
    with trainer.optimizer.averaged_weights():
        np.testing.assert_array_equal(weights[bias.path].numpy(), bias.numpy())
    assert (weights[bias.path].numpy() != bias.numpy()).any()
    assert trainer.precision.name == "mixed_float16"


def test_second_export_of_a_step_is_refused_and_the_first_stays(exports):
    trainer, folder, *_ = exports["keras"]
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match="is there already: an export never overwrites one"):
        mptrain.export(trainer, folder.parent)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_export_that_fails_leaves_nothing_and_takes_the_remains_of_a_killed_one_away(exports, tmp_path):
    trainer, *_ = exports["module"]
    (tmp_path / ".temporary-7" / "variables").mkdir(parents=True)

    def broken(self, path):
        path.write_text("half")
        raise RuntimeError("broken")

    keras_trainer, *_ = exports["onnx"]
    trainer_class = type("Broken", (type(keras_trainer.model),), {"save": broken})
    model, keras_trainer.model.__class__ = keras_trainer.model.__class__, trainer_class
    try:
        with pytest.raises(RuntimeError, match="broken"):
            mptrain.export(keras_trainer, tmp_path)
    finally:
        keras_trainer.model.__class__ = model
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written to .*file/0: "):
        mptrain.export(trainer, tmp_path / "file")


def test_serve_that_cannot_be_exported_is_told_so(exports, tmp_path):
    trainer, *_ = exports["module"]

    def refusal(serve, as_trained=True, model=None):
        own = type(trainer)
        trainer.__class__ = type("Own", (own,), {"serve": serve})
        try:
            with pytest.raises(InputError) as caught:
                mptrain.export(trainer, tmp_path, precision="as_trained" if as_trained else "float32")
        finally:
            trainer.__class__ = own
        return str(caught.value)

    assert refusal(lambda self, batch: batch["targets"]).startswith(
        "Own.serve() reads batch['targets'], which is not in a served batch: override serving_spec()"
    )
    assert refusal(lambda self, batch: tf.zeros([batch["inputs"].shape[0], 2])).startswith(
        "Own.serve() cannot be traced for a batch of any size: "
    )
    assert refusal(lambda self, batch: {"a": 3}) == "Own.serve() returns 3 as 'a': return dense tensors"

    def halve(x):
        return tf.cast(tf.cast(x, tf.float16) / 2, tf.float32)

    for function in (halve, tf.function(halve)):
        told = refusal(lambda self, batch, function=function: function(batch["inputs"]), as_trained=False)
        assert told.endswith("in float16 by a cast of its own: write config.export.precision='as_trained'")
    assert list(tmp_path.iterdir()) == []


def test_mode_export_takes_the_checkpoint_that_is_asked_for(config, tmp_path, capsys):
    config.export.at_end = True
    metrics = mptrain.run(config, tmp_path)
    newest = json.loads((tmp_path / "export" / "12" / "metadata.json").read_text())
    assert newest["metrics"] == metrics
    assert f"exported step 12 to {tmp_path / 'export' / '12'}: float32, weights as trained" in capsys.readouterr().out
    mptrain.run(config, tmp_path)  # finished, and exported
    assert f"exported before: {tmp_path / 'export' / '12'}" in capsys.readouterr().out
    refusals = {
        "newest": "is there already: an export never overwrites one",
        5: f"config.export.checkpoint is 5, which is not in {tmp_path / 'checkpoints'}: write newest, best, or one of 6, 12",
        "best": f"config.export.checkpoint is 'best', and no checkpoint in {tmp_path / 'checkpoints'} is rated: train with",
    }
    config.export.at_end = False
    for config.export.checkpoint, message in refusals.items():
        with pytest.raises(InputError, match=message):
            mptrain.run(config, tmp_path, "export")
    config.export.checkpoint, config.export.precision = 6, "as_trained"
    assert mptrain.run(config, tmp_path, "export") == {}  # no evaluation at that step
    exported = json.loads((tmp_path / "export" / "6" / "metadata.json").read_text())
    assert (exported["step"], exported["precision"]["exported"], exported["metrics"]) == (6, "as_trained", None)


def test_best_checkpoint_at_the_end_is_refused_where_none_will_be_rated(config):
    config.export.at_end, config.export.checkpoint = True, "best"
    assert config_check.faults(config) == [
        "config.export.checkpoint is 'best' and checkpoint.keep_best is 0, so none is rated: set that, or write newest"
    ]


def test_best_checkpoint_is_exported_at_the_end(config, tmp_path):
    config.checkpoint.keep_best = 1
    config.checkpoint.best_metric, config.checkpoint.best_mode = "accuracy", "max"
    config.export.at_end, config.export.checkpoint = True, "best"
    config.optimizer.learning_rate = 10.0  # so that the first evaluation is seldom the worst
    mptrain.run(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    accuracies = {row["step"]: row["accuracy"] for row in rows if row.get("split") == "eval"}
    best = max(accuracies, key=lambda step: (accuracies[step], -step))
    assert [path.name for path in (tmp_path / "export").glob("[0-9]*")] == [str(best)]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("checkpoint", "oldest", "config.export.checkpoint is 'oldest': write newest, best, or the step of a checkpoint"),
        ("checkpoint", True, "config.export.checkpoint is True"),
        ("precision", "float16", "config.export.precision is 'float16'"),
    ],
)
def test_faults_of_the_group_export_are_told(config, field, value, message):
    config.export[field] = value
    with pytest.raises(InputError, match=message):
        config_check.validate(config)


def test_onnx_is_refused_with_roundings(config):
    config.export.onnx, config.export.precision = True, "as_trained"
    with pytest.raises(InputError, match="ONNX runtimes leave roundings out, so write 'float32'"):
        config_check.validate(config)
