"""Float32 kernels under 16-bit graphs, for CPUs.

TensorFlow's CPU kernels for float16 are one to two orders of magnitude slower than those for float32 (a convolution's
filter gradient takes 400 times as long), and so are XLA's convolutions. `float32_kernels()` rewrites every graph that is traced
inside it: an operation on float16 tensors becomes the same operation in float32, its inputs widened and its result rounded
back to float16. Every tensor keeps its dtype and its range: what was float16 still overflows at 65,520 and underflows below
2**-25, the gradient of a float16 layer is float16. Only the arithmetic *inside* one operation is more exact than that of a
float16 kernel, as it is on a GPU, whose matrix units multiply float16 and add in float32. A convolution or a product and the
bias that is added to it are one operation in this, as they are in every fused kernel: their sum overflows, not the product.

Where the CPU has avx512_fp16, oneDNN multiplies float16 matrices itself, adds up in float32 and rounds once: the same result
without the passes that widen and round. Matrix products keep their kernels there, and so does arithmetic by element (+ - * /),
which float16's kernels compute in float32 and round too. Alone that takes as long as float32's and a cast; the passes are saved
between neighbours that both stay, so without the products it would not pay. What only moves values is made in both forms, and
each reader takes its own. A product is rounded on its own there, before its bias. What is added to a
convolution is replaced nevertheless, so that it does not overflow before its bias, and so is arithmetic with a constant:
Grappler would put constants together in float16, in which they overflow. So is all of a function that is called inside another,
whose gradient TensorFlow traces without asking for transforms, and float16's sums in it lose bits.

TensorFlow's CPU kernels for bfloat16 are fast, and most add up in float32. Those that add up in bfloat16, in which 256 + 1 is
256, are replaced too: the gradient of a bias in a convolution comes out of them 60 % off, that of a much used row of
`tf.gather_nd` 97 %. The fast kernels for convolutions and products are oneDNN's, which TensorFlow asks for bfloat16 only where
the CPU has avx512f. Elsewhere a convolution takes up to 20 times as long as in float32 and is up to 5 % off, and a product's
last bits are cut off, not rounded, so those can be replaced as well. What is computed element by element is rounded once
in bfloat16's own kernels, and would only become slower.

The rewriting works on the traced graph, below Keras and below `tf.Module`, because nothing above it sees the backward pass.
It needs private doors of TensorFlow, all used in this file alone: the list of graph transforms that `tf.function` calls after
tracing, and the methods of `Operation` that change its inputs. `tests/test_half_kernels.py` fails when they change.
"""

import contextlib
import functools
import math
from collections.abc import Iterator

import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2, types_pb2
from tensorflow.python.eager.polymorphic_function import transform

# The result is one of the inputs' values, or zero, or no float: representable in float16 without rounding.
_EXACT = frozenset(
    "Abs ArgMax ArgMin BatchToSpaceND BroadcastTo Ceil ConcatV2 DepthToSpace Equal ExpandDims Floor GatherNd GatherV2 Greater"
    " GreaterEqual Identity IsFinite Less LessEqual MatrixBandPart Max MaxPool MaxPool3D Maximum Min Minimum MirrorPad Neg"
    " NotEqual Pack Pad PadV2 Relu Relu6 Relu6Grad ReluGrad Reshape ResizeNearestNeighbor ReverseV2 Rint Roll Round Select"
    " SelectV2 Sign Slice SpaceToBatchND SpaceToDepth Split SplitV Squeeze StridedSlice StridedSliceGrad Tile TopKV2 Transpose"
    " Unpack".split()
)
_ROUNDED = frozenset(
    "Add AddN AddV2 Atan AvgPool AvgPool3D AvgPool3DGrad AvgPoolGrad BatchMatMulV2 BatchMatMulV3 BiasAdd BiasAddGrad Conv2D"
    " Conv2DBackpropFilter Conv2DBackpropInput Conv3D Conv3DBackpropFilterV2 Conv3DBackpropInputV2 Cos Cumprod Cumsum"
    " CumulativeLogsumexp DepthwiseConv2dNative DepthwiseConv2dNativeBackpropFilter DepthwiseConv2dNativeBackpropInput"
    " DivNoNan Einsum Elu EluGrad Erf Erfc EuclideanNorm Exp Expm1 FusedBatchNormGradV3 FusedBatchNormV3 L2Loss LeakyRelu"
    " LeakyReluGrad Log Log1p LogSoftmax MatMul MaxPool3DGrad MaxPoolGrad Mean Mul MulNoNan Pow Prod RealDiv Reciprocal"
    " ReciprocalGrad ResizeBilinear ResizeBilinearGrad ResizeNearestNeighborGrad Rsqrt RsqrtGrad ScatterNd SegmentMean"
    " SegmentProd SegmentSum Selu SeluGrad Sigmoid SigmoidGrad Sin Softmax SoftmaxCrossEntropyWithLogits Softplus"
    " SoftplusGrad Softsign SoftsignGrad SparseSoftmaxCrossEntropyWithLogits Sqrt SqrtGrad Square SquaredDifference Sub Sum"
    " Tanh TanhGrad TensorScatterAdd TensorScatterSub UnsortedSegmentProd UnsortedSegmentSum".split()
)
_ADDED_UP_IN_BFLOAT16 = frozenset(  # or multiplied
    "BiasAddGrad Cumprod Cumsum CumulativeLogsumexp DepthwiseConv2dNativeBackpropFilter Prod ResizeNearestNeighborGrad"
    " ScatterNd SegmentMean SegmentProd SegmentSum TensorScatterAdd TensorScatterSub UnsortedSegmentProd"
    " UnsortedSegmentSum".split()
)
# These too, but only the numbers in a window, or as many as windows overlap; bfloat16's kernels stay where those are few.
_ADDED_UP_IN_WINDOWS = frozenset("AvgPool AvgPool3D".split())
_ADDED_UP_WHERE_WINDOWS_OVERLAP = frozenset("AvgPool3DGrad AvgPoolGrad MaxPool3DGrad MaxPoolGrad".split())
_FEW_ADDITIONS = 4  # as in a window of size 2, or where windows of size 3 overlap at stride 2
_PRODUCTS = frozenset(
    "BatchMatMulV2 BatchMatMulV3 Conv2D Conv2DBackpropFilter Conv2DBackpropInput Conv3D Conv3DBackpropFilterV2"
    " Conv3DBackpropInputV2 DepthwiseConv2dNative DepthwiseConv2dNativeBackpropFilter DepthwiseConv2dNativeBackpropInput Einsum"
    " MatMul".split()
)
_MATRIX_PRODUCTS = frozenset("BatchMatMulV2 MatMul".split())
_BY_ELEMENT = frozenset("Add AddV2 Mul RealDiv Sub".split())
_MOVING = frozenset(
    "BatchToSpaceND BroadcastTo ConcatV2 DepthToSpace ExpandDims GatherNd GatherV2 Identity MatrixBandPart MirrorPad Neg Pack"
    " Pad PadV2 Reshape ReverseV2 Roll Slice SpaceToBatchND SpaceToDepth Split SplitV Squeeze StridedSlice StridedSliceGrad"
    " Tile Transpose Unpack".split()
)
_SIXTEEN_BITS = (tf.float16, tf.bfloat16)
# These have no float16 kernel on a CPU, and TensorFlow looks for one before it prunes what nothing needs.
_WITHOUT_KERNEL = frozenset("AvgPool3D AvgPool3DGrad MaxPool3D MaxPool3DGrad Rint".split())
# A convolution or product and the bias added to it are rounded once, as every fused kernel does.
_FUSED_WITH_ADDITION = frozenset("Conv2D Conv3D DepthwiseConv2dNative MatMul BatchMatMulV2 BatchMatMulV3".split())


@contextlib.contextmanager
def float32_kernels(*, bfloat16_products: bool = False, float16_products: bool = True) -> Iterator[None]:
    """Rewrites every graph traced inside this context; a call of a `tf.function` traced before it is left as it was.

    Args:
        bfloat16_products: whether bfloat16's convolutions and products are replaced too.
        float16_products: whether float16's matrix products are, and with them its arithmetic by element; all else always is.
    """
    rewrite = functools.partial(_rewrite, bfloat16_products=bfloat16_products, float16_products=float16_products)
    transform.FUNC_GRAPH_TRANSFORMS.append(rewrite)
    try:
        yield
    finally:
        transform.FUNC_GRAPH_TRANSFORMS.remove(rewrite)


def _rewrite(graph: tf.Graph, *, bfloat16_products: bool, float16_products: bool) -> None:
    """Replaces the 16-bit operations of `graph` in place; the replaced ones lose their consumers and are pruned."""
    keep = not float16_products and not _is_called_by_another(graph)
    kept = _float16_kept(graph) if keep else frozenset()
    old = [op for op in graph.get_operations() if _is_replaced(op, bfloat16_products, kept)]
    if not old:
        return
    rewriting = _Rewriting(graph, both_forms=_MOVING if keep else frozenset())
    for op in old:
        rewriting.replace(op)
    for op in graph.get_operations():
        for index, tensor in enumerate(op.inputs):
            if tensor.ref() in rewriting.half:
                op._update_input(index, rewriting.half[tensor.ref()])
        if op not in rewriting.operations and any(before in rewriting.operations for before in op.control_inputs):
            after = rewriting.control_inputs(op)
            op._remove_all_control_inputs()
            op._add_control_inputs(after)
    graph.outputs = [rewriting.half.get(tensor.ref(), tensor) for tensor in graph.outputs]
    for op, new in rewriting.operations.items():
        if op.type in _WITHOUT_KERNEL:
            _make_float32(op, new)


def _make_float32(op: tf.Operation, new: tf.Operation) -> None:
    """Makes a replaced operation, which nothing reads any more, one that has a kernel: the same as `new`."""
    for name, value in _float32_attributes(op).items():
        op._set_attr(name, value)
    for index, tensor in enumerate(new.inputs):
        op._update_input(index, tensor)


def _is_called_by_another(graph: tf.Graph) -> bool:
    """Whether the graph is that of a `tf.function` which is called while another is traced; a loop's body is not."""
    function = tf.__internal__.FuncGraph
    return type(graph) is function and isinstance(graph.outer_graph, function)


def _is_replaced(op: tf.Operation, bfloat16_products: bool, kept: frozenset[tf.Operation]) -> bool:
    dtypes = {tensor.dtype for tensor in (*op.inputs, *op.outputs)}
    if tf.bfloat16 in dtypes and (_adds_up_in_bfloat16(op) or bfloat16_products and op.type in _PRODUCTS):
        return True
    return tf.float16 in dtypes and (op.type in _EXACT or op.type in _ROUNDED) and op not in kept


def _float16_kept(graph: tf.Graph) -> frozenset[tf.Operation]:
    """Returns the operations that stay as they are, if in float16, where its products are fast."""
    constants = set()  # what Grappler may find out before the graph runs
    kept = set()
    for op in graph.get_operations():
        of_constants = [tensor.op in constants for tensor in op.inputs]
        if op.type in ("Const", "Shape", "ShapeN", "Size", "Rank") or of_constants and all(of_constants):
            constants.add(op)
            continue
        completes = op.type in _BY_ELEMENT and op.inputs[0].op.type in _FUSED_WITH_ADDITION
        if op.type in _MATRIX_PRODUCTS or op.type in _BY_ELEMENT and not any(of_constants) and not completes:
            kept.add(op)
    return frozenset(kept)


def _adds_up_in_bfloat16(op: tf.Operation) -> bool:
    if op.type in _ADDED_UP_IN_WINDOWS:
        return math.prod(op.get_attr("ksize")) > _FEW_ADDITIONS
    if op.type in _ADDED_UP_WHERE_WINDOWS_OVERLAP:
        return _overlapping(op) > _FEW_ADDITIONS
    return op.type in _ADDED_UP_IN_BFLOAT16


def _overlapping(op: tf.Operation) -> int:
    """Returns how many windows of a pool one element is in."""
    sizes, strides = op.get_attr("ksize"), op.get_attr("strides")
    return math.prod(math.ceil(size / stride) for size, stride in zip(sizes, strides, strict=True))


class _Rewriting:
    """The state of one graph's rewriting: for each old tensor, what stands for it now."""

    def __init__(self, graph: tf.Graph, both_forms: frozenset[str]):
        self._graph = graph
        self._both_forms = both_forms  # types of float16 operations that stay beside what replaces them
        self._wide = {}  # 16-bit tensor -> float32 tensor of the same values
        self._unrounded = {}  # 16-bit result that may be added to -> float32 tensor before rounding
        self.half = {}  # output of a replaced operation -> the tensor that replaces it
        self.operations = {}  # replaced operation -> the one that replaces it

    def control_inputs(self, op: tf.Operation) -> list[tf.Operation]:
        return [self.operations.get(before, before) for before in op.control_inputs]

    def replace(self, op: tf.Operation) -> None:
        with (
            self._graph.as_default(),
            tf.device(op.device or None),
            tf.name_scope(""),
            self._graph.control_dependencies(self.control_inputs(op)),
        ):
            if op.type == "BiasAddGrad" and op.inputs[0].dtype == tf.bfloat16:
                sums = _bias_gradient(op, self.half.get(op.inputs[0].ref(), op.inputs[0]))
                self.half[op.outputs[0].ref()], self.operations[op] = sums, sums.op
                return
            inputs = [self._widened(tensor) for tensor in op.inputs]
            if _adds_bias(op):
                inputs[0] = self._unrounded.get(op.inputs[0].ref(), inputs[0])
            dtypes = [tf.float32 if t.dtype in _SIXTEEN_BITS else t.dtype for t in op.outputs]
            new = self._graph.create_op(op.type, inputs, dtypes, attrs=_float32_attributes(op), name=f"{op.name}/float32")
            if op.type in self._both_forms and op.outputs[0].dtype == tf.float16:  # whichever nobody reads is pruned
                self._wide |= {before.ref(): after for before, after in zip(op.outputs, new.outputs, strict=True)}
                return
            self.operations[op] = new
            for before, after in zip(op.outputs, new.outputs, strict=True):
                self._record(op, before, after)

    def _record(self, op: tf.Operation, before: tf.Tensor, after: tf.Tensor) -> None:
        if before.dtype not in _SIXTEEN_BITS:
            self.half[before.ref()] = after
            return
        rounded = tf.cast(after, before.dtype)
        self.half[before.ref()] = rounded
        if _is_exact(op):
            self._wide[before.ref()] = after
            return
        readers = [reader for reader in before.consumers() if reader.type not in ("Shape", "ShapeN")]
        if op.type in _FUSED_WITH_ADDITION and len(readers) == 1:
            self._unrounded[before.ref()] = after
        self._wide[before.ref()] = tf.cast(rounded, tf.float32)

    def _widened(self, tensor: tf.Tensor) -> tf.Tensor:
        if tensor.dtype not in _SIXTEEN_BITS:
            return self.half.get(tensor.ref(), tensor)
        if tensor.ref() not in self._wide:
            with self._graph.control_dependencies(None):  # shared by later users, so free of the first one's conditions
                self._wide[tensor.ref()] = tf.cast(tensor, tf.float32)
        return self._wide[tensor.ref()]


def _bias_gradient(op: tf.Operation, gradient: tf.Tensor) -> tf.Tensor:
    """Returns what `BiasAddGrad` means, by the kernel that adds bfloat16 up in float32; ten times as fast as two casts."""
    rank = gradient.shape.rank or tf.rank(gradient)
    if op.get_attr("data_format") == b"NHWC":
        return tf.reduce_sum(gradient, tf.range(rank - 1))
    return tf.reduce_sum(gradient, tf.concat([[0], tf.range(2, rank)], 0))


def _is_exact(op: tf.Operation) -> bool:
    if op.type == "MaxPoolGrad":  # windows that do not overlap add nothing up
        return _overlapping(op) == 1
    return op.type in _EXACT


def _adds_bias(op: tf.Operation) -> bool:
    """Whether a vector is added, in whatever shape. A residual is not: the product before it must overflow on its own."""
    if op.type != "AddV2":
        return op.type == "BiasAdd"
    bias = op.inputs[1]
    while bias.op.type in ("Reshape", "ExpandDims"):
        bias = bias.op.inputs[0]
    return bias.shape.rank == 1


def _float32_attributes(op: tf.Operation) -> dict[str, attr_value_pb2.AttrValue]:
    attributes = {}
    for name, value in op.node_def.attr.items():
        attributes[name] = attr_value_pb2.AttrValue()
        attributes[name].CopyFrom(value)
        if value.type in (types_pb2.DT_HALF, types_pb2.DT_BFLOAT16):
            attributes[name].type = types_pb2.DT_FLOAT
    return attributes
