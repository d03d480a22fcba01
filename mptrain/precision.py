"""Which tensors are 16 bits wide: the casts, the Keras dtype policy, the choice by hardware, and the plan that shows it.

A train step stays the same in every precision: it casts the inputs to the compute dtype, the outputs to the output dtype,
and the gradients arrive in the parameters' dtype. Master weights in float32, after Micikevicius et al., "Mixed Precision
Training" (2018).
"""

import contextlib
import dataclasses

import tensorflow as tf

from mptrain import devices, half_kernels, keras_compat
from mptrain.config import PRECISIONS
from mptrain.errors import InputError

_COMPUTE_DTYPES = {
    "native": None,
    "float32": tf.float32,
    "mixed_float16": tf.float16,
    "mixed_bfloat16": tf.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtypes of parameters, of computation and of outputs; `get` makes one from a name.

    Attributes:
        name: a Keras dtype policy's name, or "native".
        compute_dtype: dtype of the model's inputs and layers; None (native): as each was written, nothing is cast.
        reason: why this precision, in one line.
    """

    name: str
    compute_dtype: tf.DType | None
    reason: str = "as configured"

    @property
    def is_float16(self) -> bool:
        """Whether gradients can underflow, so that the loss must be scaled."""
        return self.compute_dtype == tf.float16

    def cast_to_compute(self, tree):
        """Casts the floating tensors of a nested structure to the compute dtype; others pass as they are."""
        return _cast_floating(tree, self.compute_dtype)

    def cast_to_param(self, tree):
        """Casts the floating tensors of a nested structure to the parameters' dtype, float32."""
        return _cast_floating(tree, self.compute_dtype and tf.float32)

    def cast_to_output(self, tree):
        """Casts the floating tensors of a nested structure to float32, in which loss and metrics are computed."""
        return _cast_floating(tree, self.compute_dtype and tf.float32)

    def scope(self) -> contextlib.AbstractContextManager:
        """Returns the context in which a model is built: its Keras layers take this precision as their dtype policy."""
        return contextlib.nullcontext() if self.name == "native" else keras_compat.dtype_policy(self.name)


def _cast_floating(tree, dtype: tf.DType | None):
    def cast(value):
        tensor = tf.convert_to_tensor(value)
        return tf.cast(tensor, dtype) if tensor.dtype.is_floating else tensor

    return tree if dtype is None else tf.nest.map_structure(cast, tree)


def get(name: str) -> Precision:
    """Returns the precision called `name`: auto, native, float32, mixed_float16 or mixed_bfloat16.

    Raises:
        InputError: if there is no such precision.
    """
    if name == "auto":
        name, reason = _choose(devices.hardware())
        return Precision(name, _COMPUTE_DTYPES[name], f"auto: {reason}")
    if name not in _COMPUTE_DTYPES:
        raise InputError(f"precision {name!r} does not exist: write one of {', '.join(PRECISIONS)}")
    return Precision(name, _COMPUTE_DTYPES[name])


def _choose(hardware: devices.Hardware) -> tuple[str, str]:
    if hardware.tpus:
        return "mixed_bfloat16", "TPUs multiply in bfloat16"
    if hardware.gpus:
        lowest = min(gpu.compute_capability for gpu in hardware.gpus)
        capability = ".".join(map(str, lowest))
        if lowest >= (8, 0):
            return "mixed_bfloat16", f"the GPU's compute capability {capability} has bfloat16 matrix units"
        if lowest >= (7, 0):
            return "mixed_float16", f"the GPU's compute capability {capability} has float16 matrix units, none for bfloat16"
        return "float32", f"the GPU's compute capability {capability} has no 16-bit matrix units"
    for feature in ("amx_bf16", "avx512_bf16"):
        if feature in hardware.cpu_features:
            return "mixed_bfloat16", f"the CPU has {feature}"
    return "float32", "the CPU has neither avx512_bf16 nor amx_bf16"


@dataclasses.dataclass(frozen=True)
class Kernels:
    """How the train step's operations are computed.

    Attributes:
        jit_compile: whether XLA compiles the train step.
        widen: whether float16 operations are computed in float32 and rounded (see `half_kernels`).
        reason: why, in one line.
    """

    jit_compile: bool
    widen: bool
    reason: str

    def scope(self) -> contextlib.AbstractContextManager:
        """Returns the context in which train and evaluation steps are traced."""
        return half_kernels.float32_kernels() if self.widen else contextlib.nullcontext()


def kernels(precision: Precision, jit_compile: str | bool, strategy: tf.distribute.Strategy) -> Kernels:
    """Chooses the kernels from precision and hardware, so that no float16 run on a CPU takes a slow path unasked.

    Args:
        precision: the run's precision.
        jit_compile: "auto", True or False.
        strategy: the run's strategy.

    Raises:
        InputError: if XLA was asked for where it cannot compile the step.
    """
    on_cpu = "GPU" not in "".join(strategy.extended.worker_devices) and "TPU" not in "".join(strategy.extended.worker_devices)
    if jit_compile is True:
        if on_cpu and strategy.num_replicas_in_sync > 1:
            raise InputError(
                "config.train.jit_compile is True with several CPU replicas: XLA cannot compile their all-reduce; write 'auto'"
            )
        slow = "; float16 is slow in XLA on a CPU" if on_cpu and precision.is_float16 else ""
        return Kernels(True, False, f"XLA, as configured{slow}")
    if on_cpu and precision.is_float16:
        return Kernels(False, True, "float16 operations computed in float32 and rounded: CPUs' float16 kernels are slow")
    if jit_compile is False:
        return Kernels(False, False, "TensorFlow's kernels, as configured")
    return Kernels(False, False, "TensorFlow's kernels" + (": XLA's convolutions are slower on a CPU" if on_cpu else ""))


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One line of the precision plan: a layer, the dtypes of its computation and variables, its number of parameters."""

    layer: str
    compute_dtype: str
    variable_dtype: str
    parameters: int


def plan(model) -> list[PlanRow]:
    """Returns the rows of the precision plan of a Keras model or `tf.Module`, innermost layers in order of creation."""
    if keras_compat.is_keras_layer(model):
        return [
            PlanRow(path, layer.compute_dtype, layer.variable_dtype, _count(layer))
            for path, layer in keras_compat.layers_by_path(model)
        ]
    return [
        PlanRow(path, "as written", variable.dtype.name, variable.shape.num_elements())
        for path, variable in keras_compat.variables_by_path(model.variables).items()
    ]


def _count(layer) -> int:
    return sum(keras_compat.raw(variable).shape.num_elements() for variable in layer.weights)


def check(precision: Precision, model) -> None:
    """Checks a built model against its precision.

    Raises:
        InputError: if 16 bits were asked for and no layer computes in them, or a trainable variable is not float32.
    """
    wrong = [path for path, v in keras_compat.variables_by_path(model.trainable_variables).items() if v.dtype != tf.float32]
    if wrong and precision.compute_dtype is not None:
        raise InputError(
            f"trainable variable {wrong[0]!r} is not float32 (and {len(wrong) - 1} more): keep master weights in float32 and"
            " cast them where they are used"
        )
    rows = plan(model)
    sixteen = precision.compute_dtype in (tf.float16, tf.bfloat16) and keras_compat.is_keras_layer(model)
    if sixteen and not any(row.parameters and row.compute_dtype == precision.compute_dtype.name for row in rows):
        raise InputError(
            f"config.precision.policy is {precision.name!r} but no layer with parameters computes in"
            f" {precision.compute_dtype.name}: build the model inside build_model(), without dtype='float32' on every layer"
        )
