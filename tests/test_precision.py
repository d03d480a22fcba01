import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from ml_collections import ConfigDict

from mptrain import InputError, precision
from mptrain.forward_graph import SIXTEEN_BITS
from mptrain.hardware import Gpu, Hardware
from tests import trainers

layers = keras.layers


@pytest.mark.parametrize(
    ("hardware", "name", "word"),
    [
        (Hardware(2, (), tpus=8), "mixed_bfloat16", "TPU"),
        (Hardware(2, (), (Gpu("H100", (9, 0)),)), "mixed_bfloat16", "9.0"),
        (Hardware(2, (), (Gpu("A100", (8, 0)),)), "mixed_bfloat16", "8.0"),
        (Hardware(2, (), (Gpu("T4", (7, 5)),)), "mixed_float16", "7.5"),
        (Hardware(2, (), (Gpu("A100", (8, 0)), Gpu("V100", (7, 0)))), "mixed_float16", "7.0"),
        (Hardware(2, ("amx_bf16",), (Gpu("P100", (6, 0)),)), "float32", "6.0"),
        (Hardware(2, ("avx2", "avx512_bf16")), "mixed_bfloat16", "avx512_bf16"),
        (Hardware(2, ("amx_bf16",)), "mixed_bfloat16", "amx_bf16"),
        (Hardware(2, ("avx2", "avx512_fp16")), "float32", "neither"),
    ],
)
def test_auto_chooses_from_the_hardware_and_says_why(hardware, name, word):
    chosen = precision.get("auto", on=hardware)
    assert chosen.name == name
    assert word in chosen.reason
    assert precision.get("mixed_float16").name == "mixed_float16"


def test_casts_touch_floating_tensors_only():
    tree = {"x": tf.ones([2]), "n": tf.ones([2], tf.int32), "h": tf.ones([2], tf.float16)}
    cast = precision.get("mixed_float16").cast_to_compute(tree)
    assert [cast[k].dtype for k in "xnh"] == [tf.float16, tf.int32, tf.float16]
    back = precision.get("mixed_float16").cast_to_output(cast)
    assert [back[k].dtype for k in "xnh"] == [tf.float32, tf.int32, tf.float32]


@pytest.mark.parametrize("leaf", [None, "text", True, object()])
def test_casts_leave_alone_what_is_no_tensor(leaf):
    assert precision.get("mixed_float16").cast_to_compute([tf.ones([2]), leaf])[1] is leaf


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (tf.ragged.constant([[1.0], [2.0, 3.0]]), lambda x: (x.flat_values, x.row_splits)),
        (tf.sparse.from_dense([[1.0, 0.0]]), lambda x: (x.values, x.indices)),
        (tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0])), lambda x: (x.values, x.indices)),
    ],
)
def test_casts_reach_the_values_of_ragged_and_sparse_tensors(value, parts):
    cast = precision.get("mixed_float16").cast_to_compute({"x": value, "none": None})["x"]
    assert type(cast) is type(value)
    assert parts(cast)[0].dtype == tf.float16
    assert parts(cast)[1].dtype == parts(value)[1].dtype


@pytest.mark.parametrize("value", [np.ones(2), np.float64(1), tf.Variable([1.0]), keras.Variable([1.0])])
def test_casts_take_arrays_and_variables(value):
    assert precision.get("mixed_float16").cast_to_compute(value).dtype == tf.float16


def test_native_casts_nothing():
    x = tf.ones([2], tf.float16)
    native = precision.get("native")
    assert native.cast_to_compute(x) is native.cast_to_output(x) is native.cast_to_param(x) is x


def test_unknown_name_is_refused():
    with pytest.raises(InputError, match="precision 'fp16' does not exist"):
        precision.get("fp16")


@pytest.mark.parametrize("generation", [keras, tf_keras])
def test_layers_built_in_the_scope_take_the_policy_and_later_ones_do_not(generation):
    with precision.get("mixed_float16").scope():
        inside = generation.layers.Dense(1)
    assert inside.compute_dtype == "float16"
    assert inside.variable_dtype == "float32"
    assert generation.layers.Dense(1).compute_dtype == "float32"


def model(generation=keras):
    with precision.get("mixed_float16").scope():
        dense = generation.layers.Dense
        block = generation.Sequential([dense(4, name="in"), dense(4, name="out")], name="block")
        return generation.Sequential([generation.layers.InputLayer((3,)), block, dense(2, name="logits")], name="net")


@pytest.mark.parametrize("generation", [keras, tf_keras])
@pytest.mark.parametrize(
    ("patterns", "held"),
    [((), set()), (("logits",), {"logits"}), (("block/in$", "logits"), {"in", "logits"}), (("block$",), {"in", "out"})],
)
def test_layers_named_by_a_regex_compute_in_float32(generation, patterns, held):
    net = model(generation)
    precision.get("mixed_float16", patterns).hold_float32_layers(net)
    rows = {row.layer.rsplit("/", 1)[-1]: row.compute_dtype for row in precision.plan(net)}
    assert {name for name, dtype in rows.items() if dtype == "float32"} == held
    outputs = net(tf.ones([1, 3]))
    assert outputs.dtype == (tf.float32 if "logits" in held else tf.float16)


@pytest.mark.parametrize(
    ("pattern", "message"), [("conv", "is found in no layer's path; there are net/block"), ("(", "no regular")]
)
def test_regex_that_finds_nothing_is_refused(pattern, message):
    with pytest.raises(InputError, match=message):
        precision.get("mixed_float16", [pattern]).hold_float32_layers(model())


def test_one_regex_may_stand_alone():
    assert precision.get("mixed_float16", "block/in$").float32_layers == ("block/in$",)


def test_plan_names_layers_dtypes_and_parameters():
    rows = [(row.layer, row.compute_dtype, row.variable_dtype, row.parameters) for row in precision.plan(model())]
    assert rows == [
        ("net/block/in", "float16", "float32", 16),
        ("net/block/out", "float16", "float32", 20),
        ("net/logits", "float16", "float32", 10),
    ]


class Bad(trainers.TinyTrainer):
    """Takes what `config.model.fault` names."""

    def build_model(self):
        fault = self.config.model.fault
        last = layers.Dense(3, dtype="float16" if fault == "float16 variable" else None)
        middle = layers.Dense(4, name="middle", dtype="float32" if fault == "silent cast" else None)
        return keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), layers.Dense(4), middle, last])

    def compute_loss(self, batch, outputs):
        losses = super().compute_loss(batch, outputs)
        return tf.cast(losses, tf.float16) if self.config.model.fault == "float16 loss" else losses


@pytest.mark.parametrize(
    ("fault", "policy", "message"),
    [
        ("float16 variable", "mixed_float16", "is float16: keep trainable variables in float32"),
        ("float16 loss", "mixed_float16", r"what Bad.compute_loss\(\) returns is float16"),
    ],
)
def test_model_is_verified_when_it_is_built(config, fault, policy, message):
    config.precision.policy = policy
    config.model = ConfigDict({"fault": fault})
    with pytest.raises(InputError, match=message):
        Bad(config)


def test_native_float16_logits_are_refused_before_the_first_step(config):
    class Native(Bad):
        def build_model(self):
            with precision.get("mixed_float16").scope():
                return super().build_model()

    config.precision.policy = "native"
    config.model = ConfigDict({"fault": "logits"})
    with pytest.raises(InputError, match="model returns is float16: give its last layer dtype='float32'"):
        Native(config)


def test_layer_that_casts_back_silently_is_named_until_it_is_asked_for(config):
    config.model = ConfigDict({"fault": "silent cast"})
    assert "sequential/middle compute in float32 and cast their inputs back" in Bad(config).precision_warnings[0]
    config.precision.float32_layers = ("middle",)
    (logits,) = Bad(config).precision_warnings
    assert "middle" not in logits


FP16 = ("avx512_fp16", "avx512f")


def test_no_float16_run_on_a_cpu_takes_the_slow_kernels(mirrored):
    for replicas in (1, 2):
        chosen = precision.kernels({tf.float16}, "auto", mirrored(replicas))
        assert chosen.widen
        assert not chosen.jit_compile
        assert precision.kernels({tf.float16}, False, mirrored(replicas)).widen
    assert precision.kernels((), "auto", mirrored(1)).widen  # for what bfloat16 adds up; float32 graphs stay as they are


@pytest.mark.parametrize(
    ("features", "widened"),
    [(("avx2",), True), (("avx2", "f16c"), True), ((), True), (("avx2", "avx512f"), False), (("avx512f", "amx_bf16"), False)],
)
def test_products_of_bfloat16_keep_their_kernels_only_where_the_cpu_has_fast_ones(features, widened):
    for jit_compile in ("auto", False):
        chosen = precision.kernels({tf.bfloat16}, jit_compile, tf.distribute.get_strategy(), on=Hardware(2, features))
        assert chosen.widen
        assert (tf.bfloat16 in chosen.widen_products) == widened
        assert ("bfloat16 products are computed in float32 and rounded" in chosen.reason) == widened
        with chosen.scope():
            graph = tf.function(lambda x: tf.matmul(x, x)).get_concrete_function(tf.ones([2, 2], tf.bfloat16)).graph
        assert (graph.outputs[0].op.inputs[0].op.type == "Cast") == widened


@pytest.mark.parametrize(("features", "one_dnn", "own"), [((), "", 0), (FP16[1:], "", 0), (FP16, "", 1), (FP16, "0", 0)])
def test_matrix_products_of_float16_keep_their_kernels_only_where_the_cpu_has_fast_ones(features, one_dnn, own, monkeypatch):
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", one_dnn)
    chosen = precision.kernels({tf.float16}, "auto", tf.distribute.get_strategy(), on=Hardware(2, features))
    assert ("except matrix products" in chosen.reason) == own
    with chosen.scope():
        graph = tf.function(lambda x: tf.nn.relu(x @ x)).get_concrete_function(tf.ones([2, 2], tf.float16)).graph
    dtypes = {op.type: op.outputs[0].dtype for op in graph.get_operations() if op.outputs and op.outputs[0].consumers()}
    assert dtypes["MatMul"] == (tf.float16 if own else tf.float32)
    assert dtypes["Relu"] == tf.float32


@pytest.mark.parametrize(
    ("jit_compile", "dtypes", "line"),
    [
        ("auto", {tf.float16}, "False (auto): float16 operations are computed in float32 and rounded"),
        ("auto", SIXTEEN_BITS, "False (auto): float16 operations are computed in float32 and rounded"),
        ("auto", {tf.bfloat16}, "False (auto): XLA's convolutions are slower"),
        ("auto", (), "False (auto): XLA's convolutions are slower"),
        (False, (), "False (as configured): TensorFlow's kernels"),
        (True, {tf.float16}, "True (as configured): XLA compiles the step; its float16 convolutions are slow on a CPU"),
    ],
)
def test_choice_of_kernels_says_who_chose_and_why(jit_compile, dtypes, line):
    chosen = precision.kernels(dtypes, jit_compile, tf.distribute.get_strategy(), on=Hardware(2, ("avx512f",)))
    assert str(chosen).startswith(line)
