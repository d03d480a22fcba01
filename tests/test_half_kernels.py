"""The float32 kernels must be unseen: same dtypes, same range, results within float16's own rounding."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager.polymorphic_function import transform

from mptrain.half_kernels import float32_kernels


def operations(function, *args):
    """Returns the (type, dtype) of every operation of the traced function, and of the functions inside it."""
    graph = function.get_concrete_function(*args).graph
    return [(op.type, op.outputs[0].dtype) for op in graph.get_operations() if op.outputs]


def layer_and_gradients(x, kernel, bias):
    with tf.GradientTape() as tape:
        tape.watch([x, kernel, bias])
        y = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, kernel, 1, "VALID"), bias))
        y = tf.nn.max_pool2d(y, 2, 2, "VALID")
        loss = tf.reduce_sum(y * y)
    return y, tape.gradient(loss, [x, kernel, bias])


@pytest.fixture
def layer_inputs():
    rng = np.random.default_rng(0)
    shapes = ((4, 9, 9, 2), (2, 2, 2, 3), (3,))
    return [tf.constant(rng.normal(size=shape) * 0.3, tf.float16) for shape in shapes]


def test_results_and_gradients_equal_those_of_float16_kernels_within_its_rounding(layer_inputs):
    with float32_kernels():
        wide = tf.function(layer_and_gradients)(*layer_inputs)
    plain = tf.function(layer_and_gradients)(*layer_inputs)
    for ours, theirs in zip(tf.nest.flatten(wide), tf.nest.flatten(plain), strict=True):
        assert ours.dtype == theirs.dtype == tf.float16
        difference = np.abs(ours.numpy().astype(float) - theirs.numpy().astype(float)).max()
        assert difference <= 4e-3 * np.abs(theirs.numpy()).max()


def live(graph) -> set[tf.Operation]:
    """Returns the operations that the outputs need."""
    found, todo = set(), [tensor.op for tensor in graph.outputs]
    while todo:
        op = todo.pop()
        if op not in found:
            found.add(op)
            todo += [tensor.op for tensor in op.inputs]
    return found


def live_operations(concrete) -> tuple[set[str], set[str]]:
    """Returns the types of the operations that the outputs need, and of those among them that touch float16."""
    found = live(concrete.graph)
    half = {op.type for op in found if any(tensor.dtype == tf.float16 for tensor in (*op.inputs, *op.outputs))}
    return {op.type for op in found}, half


def test_no_float16_arithmetic_is_left_in_the_pruned_graph(layer_inputs):
    with float32_kernels():
        concrete = tf.function(layer_and_gradients).get_concrete_function(*layer_inputs)
    live, half = live_operations(concrete)
    assert half <= {"Cast", "Placeholder", "Const", "ShapeN"}
    assert {"Conv2D", "Conv2DBackpropFilter", "Conv2DBackpropInput", "MaxPoolGrad"} <= live


def many_layers(x, kernel):
    """What residual networks and transformers are made of beside convolutions: here nothing, only many kinds of operations."""
    y = tf.nn.convolution(x, kernel, padding="SAME", dilations=2)
    y = tf.nn.gelu(y) + tf.nn.gelu(y, approximate=True) + tf.nn.softsign(y) + tf.nn.silu(y) + tf.nn.softplus(y)
    y = tf.image.resize(tf.image.resize(y, [12, 12]), [6, 6], "nearest")
    y = tf.where(tf.cast(y, tf.float16) > 0.1, y, tf.math.sin(y))
    y = tf.cast(tf.nn.space_to_depth(tf.cast(y, tf.float16), 2), tf.float16)
    scores = tf.einsum("bhwc,bhvc->bhwv", y, y)[:, :, :2]
    return tf.reduce_sum(tf.linalg.band_part(tf.nn.softmax(scores), -1, 0) * tf.cumsum(scores, axis=-1))


def test_the_operations_of_common_layers_are_all_known(layer_inputs):
    x, kernel = layer_inputs[0][:, :8, :8], layer_inputs[1]

    def gradients(x, kernel):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            loss = many_layers(x, kernel)
        return loss, *tape.gradient(loss, [x, kernel])

    with float32_kernels():
        wide = tf.function(gradients)
        _, half = live_operations(wide.get_concrete_function(x, kernel))
    assert half <= {"Cast", "Placeholder", "Const", "IdentityN", "ShapeN"}
    for ours, theirs in zip(wide(x, kernel), tf.function(gradients)(x, kernel), strict=True):
        difference = np.abs(ours.numpy().astype(float) - theirs.numpy().astype(float)).max()
        assert difference <= 1e-2 * np.abs(theirs.numpy()).max()


@pytest.mark.parametrize("value", [65504.0, 65519.0, 65520.0, 1e5, -1e5])
def test_overflow_begins_where_float16_overflows(value):
    x = tf.constant([[value / 4]], tf.float32)

    def product(x):
        return tf.matmul(tf.cast(x, tf.float16), tf.constant([[4.0]], tf.float16))

    with float32_kernels():
        ours = tf.function(product)(x)
    with np.errstate(over="ignore"):
        expected = (np.float16(value / 4).astype(np.float32) * 4).astype(np.float16)
    assert ours.numpy()[0, 0] == expected


def half(value):
    return tf.constant(value, tf.float16)


def test_product_before_a_residual_overflows_on_its_own():
    args = [half([[300.0]]), half([[240.0]]), half([[-20000.0]])]
    with float32_kernels():
        ours = tf.function(lambda x, w, y: tf.matmul(x, w) + y)(*args)
    assert ours.numpy() == tf.function(lambda x, w, y: tf.matmul(x, w) + y)(*args).numpy() == np.inf


@pytest.mark.parametrize("reshaped", [False, True])
def test_product_and_bias_are_rounded_once_as_in_a_fused_kernel(reshaped):
    def layer(x, w, bias):
        return tf.matmul(x, w) + (tf.reshape(bias, [1, 1]) if reshaped else bias)

    with float32_kernels():
        ours = tf.function(layer)(half([[2048.0, 0.75]]), half([[1.0], [1.0]]), half([0.5]))
    assert float(ours) == 2050.0  # 2048.75 alone would round to 2048, and 2048.5 to 2048 again


@pytest.mark.parametrize("exponent", range(-26, -13))
def test_underflow_begins_where_float16_underflows(exponent):
    with float32_kernels():
        ours = tf.function(lambda x: x * tf.constant(2.0**-13, tf.float16))(tf.constant(2.0 ** (exponent + 13), tf.float16))
    assert float(ours) == float(np.float16(2.0**exponent))


@pytest.mark.parametrize("products", [True, False])
def test_elementwise_result_is_rounded_before_its_next_use(products):
    def cancel(x):
        half = tf.cast(x, tf.float16)
        return (half + tf.constant(2048.0, tf.float16)) - tf.constant(2048.0, tf.float16)

    with float32_kernels(float16_products=products):
        ours = tf.function(cancel)(tf.constant(0.6))
    assert float(ours) == 0.0  # 2048.6 rounds to 2048 in float16


@pytest.mark.parametrize("products", [True, False])
def test_convolution_and_a_vector_added_to_it_are_rounded_once(products):
    def layer(x, kernel, bias):
        return tf.nn.conv2d(x, kernel, 1, "VALID") + bias

    x, kernel, bias = half([[[[300.0]]]]), half([[[[300.0]]]]), half([-60000.0])
    with float32_kernels(float16_products=products):
        assert tf.function(layer)(x, kernel, bias).numpy().ravel().tolist() == [30000.0]  # 90,000 alone is inf in float16


@pytest.mark.parametrize("products", [True, False])
def test_constants_are_not_put_together_in_float16(products):
    def scaled(x):
        large, small = (tf.sqrt(tf.constant(value, tf.float16)) ** 2 for value in (1024.0, 1e-5))  # which Grappler finds out
        return (x * large) * large, x / small

    with float32_kernels(float16_products=products):
        twice, quotient = tf.function(scaled)(half([2.0**-10] * 2))
    assert twice.numpy().tolist() == [1024.0] * 2  # 1024 times 1024 is inf in float16
    np.testing.assert_allclose(quotient.numpy(), 2.0**-10 / np.float16(1e-5), rtol=1e-3)  # as is one over 1e-5


def test_loops_and_branches_are_rewritten_inside(layer_inputs):
    x, kernel, bias = layer_inputs

    @tf.function
    def loop(n):
        total = tf.zeros([], tf.float16)
        for i in tf.range(n):
            if i % 2 == 0:
                total += tf.reduce_sum(layer_and_gradients(x, kernel, bias)[0])
        return total

    with float32_kernels():
        ours = loop(tf.constant(3))
    assert ours.dtype == tf.float16
    assert float(ours) == pytest.approx(2 * float(tf.reduce_sum(layer_and_gradients(x, kernel, bias)[0])), rel=5e-3)


def test_nested_functions_keep_their_gradients(layer_inputs):
    @tf.function
    def inner(x, kernel, bias):
        return tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, kernel, 1, "VALID"), bias))

    @tf.function
    def outer(x, kernel, bias):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            loss = tf.reduce_sum(inner(x, kernel, bias))
        return tape.gradient(loss, kernel)

    with float32_kernels():
        ours = outer(*layer_inputs)
    theirs = outer.python_function(*layer_inputs)
    np.testing.assert_allclose(ours.numpy().astype(float), theirs.numpy().astype(float), rtol=5e-3)


@pytest.mark.parametrize("products", [True, False])
def test_gradient_of_a_nested_function_adds_up_in_float32(products):
    scale = tf.function(lambda x, factor: x * factor)

    @tf.function
    def gradient(x, factor):
        return tf.gradients(scale(x, factor), factor)[0]

    with float32_kernels(float16_products=products):
        assert gradient(tf.ones([5000, 3], tf.float16), half([1, 1, 1])).numpy().tolist() == [5000.0] * 3


def test_float32_and_bfloat16_graphs_are_left_as_they_are():
    def product(x):
        return tf.matmul(x, x)

    for dtype in (tf.float32, tf.bfloat16):
        x = tf.ones([2, 2], dtype)
        with float32_kernels():
            assert operations(tf.function(product), x) == operations(tf.function(product), x)


@pytest.mark.parametrize("layer", ["convolution", "product"])
def test_bias_gradients_of_bfloat16_are_added_up_in_float32(layer):
    rng = np.random.default_rng(0)
    shapes = {"convolution": ((16, 24, 24, 4), (3, 3, 4, 12)), "product": ((32, 128, 4), (4, 12))}[layer]
    x, kernel = (tf.constant(rng.normal(size=shape), tf.bfloat16) for shape in shapes)
    wanted = rng.normal(size=12) + 0.3

    def bias_gradient(dtype):
        bias, weights = tf.zeros([12]), tf.cast(wanted, tf.float32)
        with tf.GradientTape() as tape:
            tape.watch(bias)
            wide, narrow = tf.cast(x, dtype), tf.cast(kernel, dtype)
            y = tf.nn.conv2d(wide, narrow, 1, "SAME") if layer == "convolution" else wide @ narrow
            loss = tf.reduce_sum(tf.cast(tf.nn.bias_add(y, tf.cast(bias, dtype)), tf.float32) * weights)
        return tape.gradient(loss, bias)

    with float32_kernels():
        ours = tf.function(bias_gradient)(tf.bfloat16)
    np.testing.assert_allclose(ours, bias_gradient(tf.float32), rtol=2.0**-7)


@pytest.mark.parametrize("format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("shape", [(40, 8, 9, 3), (40, None, None, None), None])
def test_bias_gradient_of_bfloat16_is_exact_in_every_layout_and_shape(format, shape):
    gradient = np.ones([40, 8, 9, 3])
    gradient = tf.constant(gradient if format == "NHWC" else gradient.transpose(0, 3, 1, 2), tf.bfloat16)
    if shape and format == "NCHW":
        shape = (shape[0], shape[3], *shape[1:3])

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.bfloat16)])
    def bias_gradient(dy):
        return tf.raw_ops.BiasAddGrad(out_backprop=dy, data_format=format)

    with float32_kernels():
        ours = bias_gradient(gradient)
    assert ours.dtype == tf.bfloat16
    assert ours.numpy().tolist() == [2880] * 3


COUNT = 5000
FIRST = tf.zeros([COUNT], tf.int32)
ADDING_UP = {  # each adds COUNT ones up
    "cumsum": lambda x: tf.cumsum(x)[-1],
    "unsorted segments": lambda x: tf.math.unsorted_segment_sum(x, FIRST, 1)[0],
    "segments": lambda x: tf.math.segment_sum(x, FIRST)[0],
    "mean of segments": lambda x: COUNT * tf.cast(tf.math.segment_mean(x, FIRST)[0], tf.float32),
    "gradient of gather_nd": lambda x: tf.gradients(tf.gather_nd(x[:1], FIRST[:, tf.newaxis]), x, x)[0][0],
    "scattered addition": lambda x: tf.tensor_scatter_nd_add(tf.zeros_like(x[:1]), FIRST[:, tf.newaxis], x)[0],
    "scattered subtraction": lambda x: -tf.tensor_scatter_nd_sub(tf.zeros_like(x[:1]), FIRST[:, tf.newaxis], x)[0],
    "gradient of resizing": lambda x: tf.raw_ops.ResizeNearestNeighborGrad(
        grads=tf.reshape(x, [1, 50, 100, 2]), size=[1, 1], align_corners=False, half_pixel_centers=False
    )[0, 0, 0],
}


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16])
@pytest.mark.parametrize("name", ADDING_UP)
def test_sums_of_16_bits_are_added_up_in_float32(name, dtype):
    with float32_kernels():
        ours = tf.function(ADDING_UP[name], autograph=False)(tf.ones([COUNT, 2], dtype))
    assert ours.dtype in (dtype, tf.float32)
    np.testing.assert_allclose(tf.cast(ours, tf.float32), COUNT, rtol=2**-8)


@pytest.mark.parametrize("pool", [tf.nn.avg_pool2d, tf.nn.max_pool2d])
def test_pools_of_bfloat16_are_added_up_in_float32_where_many_windows_overlap(pool):
    x = tf.constant(np.random.default_rng(0).permutation(40 * 40).reshape(1, 40, 40, 1), tf.bfloat16)

    def gradient(x, size, stride):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = pool(x, size, stride, "VALID")
        return tape.gradient(y, x, tf.ones_like(y))

    wanted = gradient(tf.cast(x, tf.float32), 16, 1)
    with float32_kernels():
        ours = tf.function(gradient)(x, 16, 1)
        few = operations(tf.function(gradient), x, 3, 2)
    np.testing.assert_allclose(tf.cast(ours, tf.float32), wanted, rtol=2**-7)
    assert not any(dtype == tf.float32 and "PoolGrad" in kind for kind, dtype in few)  # four at most: the fast kernel's


def positive(*shape):
    """Numbers as behind a ReLU: of one sign, so that a sum grows with the count."""
    return tf.constant(np.abs(np.random.default_rng(0).normal(size=shape)), tf.bfloat16)


def largest_error(function, *args, **options):
    """Returns the largest error in bfloat16 under the float32 kernels, as a fraction of the largest value."""
    wanted = function(*(tf.cast(x, tf.float32) for x in args))
    with float32_kernels(**options):
        ours = tf.function(function, autograph=False)(*args)
    assert ours.dtype == tf.bfloat16
    return np.abs(tf.cast(ours, tf.float32) - wanted).max() / np.abs(wanted).max()


ONES = {4: [1] * 4, 5: [1] * 5}
IMAGES, VOLUMES = positive(16, 16, 16, 8), positive(4, 8, 8, 8, 4)
LARGE_SUMS = {  # in which Eigen's kernels lose bits, or all but 256
    "average pool": (lambda x: tf.nn.avg_pool2d(x, 32, 32, "VALID"), positive(2, 32, 32, 4)),
    "average pool of few": (lambda x: tf.nn.avg_pool2d(x, 3, 1, "SAME"), IMAGES),
    "average pool in 3-D": (lambda x: tf.nn.avg_pool3d(x, 16, 16, "VALID"), positive(2, 16, 16, 16, 2)),
    "depthwise filter": (
        lambda x: tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
            input=x, filter_sizes=[3, 3, 8, 1], out_backprop=x, strides=ONES[4], padding="SAME"
        ),
        IMAGES,
    ),
}
PRODUCTS = {
    "depthwise": (lambda x, k: tf.nn.depthwise_conv2d(x, k, ONES[4], "SAME"), IMAGES, positive(7, 7, 8, 1)),
    "depthwise input": (
        lambda x, k: tf.raw_ops.DepthwiseConv2dNativeBackpropInput(
            input_sizes=x.shape, filter=k, out_backprop=x, strides=ONES[4], padding="SAME"
        ),
        IMAGES,
        positive(7, 7, 8, 1),
    ),
    "convolution": (lambda x, k: tf.nn.conv2d(x, k, 1, "SAME"), IMAGES, positive(3, 3, 8, 8)),
    "convolution's input": (
        lambda x, k: tf.raw_ops.Conv2DBackpropInput(
            input_sizes=x.shape, filter=k, out_backprop=x, strides=ONES[4], padding="SAME"
        ),
        IMAGES,
        positive(3, 3, 8, 8),
    ),
    "convolution's filter": (
        lambda x: tf.raw_ops.Conv2DBackpropFilter(
            input=x, filter_sizes=[3, 3, 8, 8], out_backprop=x, strides=ONES[4], padding="SAME"
        ),
        IMAGES,
    ),
    "convolution in 3-D": (lambda x, k: tf.nn.conv3d(x, k, ONES[5], "SAME"), VOLUMES, positive(3, 3, 3, 4, 4)),
    "its input in 3-D": (
        lambda x, k: tf.raw_ops.Conv3DBackpropInputV2(
            input_sizes=x.shape, filter=k, out_backprop=x, strides=ONES[5], padding="SAME"
        ),
        VOLUMES,
        positive(3, 3, 3, 4, 4),
    ),
    "its filter in 3-D": (
        lambda x: tf.raw_ops.Conv3DBackpropFilterV2(
            input=x, filter_sizes=[3, 3, 3, 4, 4], out_backprop=x, strides=ONES[5], padding="SAME"
        ),
        VOLUMES,
    ),
    "product": (lambda x: tf.matmul(x, x, transpose_a=True), positive(4096, 8)),
    "products": (lambda x: tf.matmul(x, x, transpose_a=True), positive(2, 4096, 8)),
    "einsum": (lambda x: tf.einsum("abc,abd->acd", x, x), positive(2, 4096, 8)),
}
HALF_A_STEP = 2.0**-8  # bfloat16's rounding


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("name", LARGE_SUMS)
def test_large_sums_of_bfloat16_are_rounded_once(name, products):
    assert largest_error(*LARGE_SUMS[name], bfloat16_products=products) <= HALF_A_STEP


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_bfloat16_are_rounded_once_where_that_is_asked_for(name):
    assert largest_error(*PRODUCTS[name], bfloat16_products=True) <= HALF_A_STEP


def test_products_of_bfloat16_keep_their_kernels_where_nothing_is_asked_for():
    function, *args = PRODUCTS["convolution's filter"]
    with float32_kernels():
        assert ("Conv2DBackpropFilter", tf.float32) not in operations(tf.function(function), *args)


def test_sums_and_products_by_element_give_the_same_bits_where_they_keep_the_kernels_of_float16():
    a, b = (tf.constant(np.random.default_rng(seed).normal(size=(3000, 3)), tf.float16) for seed in (0, 1))

    def function(a, b):
        y = tf.nn.relu(tf.transpose(a * b + a - b / a) * tf.transpose(b))
        return tf.nn.softmax(tf.reshape(y, [-1, 9])) * tf.cast(2**-14, tf.float16)  # some of which are subnormal

    kept, replaced = tf.function(function), tf.function(function)
    with float32_kernels(float16_products=False):
        ours = kept(a, b)
        half_types = live_operations(kept.get_concrete_function(a, b))[1]
    with float32_kernels():
        theirs = replaced(a, b)
    assert ours.numpy().tobytes() == theirs.numpy().tobytes()
    assert half_types >= {"AddV2", "Mul", "RealDiv", "Sub", "Transpose"}
    assert not half_types & {"Relu", "Softmax"}


def test_what_only_moves_values_costs_no_cast_between_neighbours_of_either_kind():
    a = tf.ones([4, 4], tf.float16)

    def casts(function) -> int:
        with float32_kernels(float16_products=False):
            graph = tf.function(function).get_concrete_function(a).graph
        return sum(op.type == "Cast" for op in live(graph))

    assert casts(lambda a: tf.transpose(a * a) @ a) == 0
    assert casts(lambda a: tf.nn.softmax(tf.transpose(tf.nn.relu(a)))) == 2  # one in, one out
    assert casts(lambda a: tf.transpose(tf.nn.softmax(a))) == 2


def test_small_pools_and_operations_by_element_keep_the_kernels_of_bfloat16():
    def layer(x):
        return tf.nn.relu(tf.nn.avg_pool2d(x, 2, 2, "VALID") * 2)

    plain = operations(tf.function(layer), IMAGES)
    with float32_kernels(bfloat16_products=True):
        assert operations(tf.function(layer), IMAGES) == plain


@pytest.mark.parametrize("layer", [keras.layers.MaxPooling3D, keras.layers.AveragePooling3D])
def test_pools_in_3d_that_have_no_float16_kernel_are_computed(layer):
    numbers = np.random.default_rng(0).permutation(2 * 9**3)  # no ties: what becomes of them differs between CPUs
    x = tf.constant(numbers.reshape(2, 9, 9, 9, 1) / 256 - 1, tf.float16)

    def layer_and_gradient(x, policy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(3, strides=3, dtype=policy)(tf.nn.relu(x))
            y = tf.nn.relu(layer(2, strides=1, dtype=policy)(y))
        return y, tape.gradient(y, x)

    wanted = layer_and_gradient(tf.cast(x, tf.float32), "float32")
    with float32_kernels():
        ours = tf.function(layer_and_gradient)(x, "mixed_float16")
    for half, full in zip(ours, wanted, strict=True):
        assert half.dtype == tf.float16
        np.testing.assert_allclose(tf.cast(half, tf.float32), full, rtol=4e-3, atol=1e-4)


def test_rounding_to_integers_that_has_no_float16_kernel_is_computed():
    with float32_kernels():
        ours = tf.function(lambda x: tf.math.rint(x * 2) * 2)(half([0.7, -1.3]))
    assert ours.dtype == tf.float16
    assert ours.numpy().tolist() == [2, -6]


def test_conditions_on_a_replaced_operation_hold_for_its_replacement(layer_inputs):
    x, kernel, _ = layer_inputs

    @tf.function
    def later(x, kernel):
        y = tf.nn.conv2d(x, kernel, 1, "VALID")
        with tf.control_dependencies([y]):
            return tf.range(3), tf.constant(1.0)

    with float32_kernels():
        graph = later.get_concrete_function(x, kernel).graph
    conditions = [before.outputs[0].dtype for op in graph.get_operations() for before in op.control_inputs if before.outputs]
    assert set(conditions) == {tf.float32}  # so the other is pruned


def test_largest_of_no_value_stays_the_lowest_float16():
    def largest(x):
        return tf.math.unsorted_segment_max(x, tf.constant([0]), 2)

    x = tf.constant([1.0], tf.float16)
    with float32_kernels():
        ours = tf.function(largest)(x)
    assert ours.numpy().tolist() == [1.0, -65504.0]  # float32's lowest would be rounded to -inf


def test_nothing_is_rewritten_outside_the_context():
    with float32_kernels():
        pass
    assert transform.FUNC_GRAPH_TRANSFORMS == []
    assert ("MatMul", tf.float16) in operations(tf.function(lambda x: tf.matmul(x, x)), tf.ones([2, 2], tf.float16))


def test_filter_gradient_is_at_least_five_times_as_fast_as_the_float16_kernel():
    def filter_gradient(x, dy):
        return tf.raw_ops.Conv2DBackpropFilter(
            input=x, filter_sizes=[3, 3, 16, 32], out_backprop=dy, strides=[1, 1, 1, 1], padding="VALID"
        )

    args = (tf.ones([32, 13, 13, 16], tf.float16), tf.ones([32, 11, 11, 32], tf.float16))
    plain, wide = tf.function(filter_gradient), tf.function(filter_gradient)
    plain(*args)
    with float32_kernels():
        wide(*args)

    def seconds(function):
        start = time.perf_counter()
        function(*args)
        return time.perf_counter() - start

    assert np.median([seconds(wide) for _ in range(5)]) * 5 < np.median([seconds(plain) for _ in range(5)])
