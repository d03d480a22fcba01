"""Which tensors are 16 bits wide: the casts, the Keras dtype policy, the choice by hardware, and the plan that shows it.

A train step stays the same in every precision: it casts the inputs to the compute dtype, the outputs to the output dtype,
and the gradients arrive in the parameters' dtype. Master weights in float32, after Micikevicius et al., "Mixed Precision
Training" (2018).
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable

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
        float32_layers: regexes; a layer in whose path one is found computes in float32, with all layers inside it.
    """

    name: str
    compute_dtype: tf.DType | None
    reason: str = "as configured"
    float32_layers: tuple[str, ...] = ()

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

    def hold_float32_layers(self, model) -> None:
        """Gives the layers that `float32_layers` names the policy float32; they cast what reaches them.

        Raises:
            InputError: if a regex is none, or is found in no layer's path.
        """
        layers = list(keras_compat.all_layers_by_path(model)) if keras_compat.is_keras_layer(model) else []
        for pattern in self.float32_layers:
            try:
                found = [layer for path, layer in layers if re.search(pattern, path)]
            except re.error as error:
                raise InputError(f"config.precision.float32_layers: {pattern!r} is no regular expression: {error}") from error
            if not found:
                paths = ", ".join(path for path, _ in layers) or "none: the model is no Keras model"
                raise InputError(f"config.precision.float32_layers: {pattern!r} is found in no layer's path; there are {paths}")
            for layer in found:
                keras_compat.set_policy(layer, "float32")


def _cast_floating(tree, dtype: tf.DType | None):
    def cast(value):
        tensor = tf.convert_to_tensor(value)
        return tf.cast(tensor, dtype) if tensor.dtype.is_floating else tensor

    return tree if dtype is None else tf.nest.map_structure(cast, tree)


def get(name: str, float32_layers: Iterable[str] = ()) -> Precision:
    """Returns the precision called `name`: auto, native, float32, mixed_float16 or mixed_bfloat16.

    Args:
        name: "auto" chooses from the hardware.
        float32_layers: see `Precision`.

    Raises:
        InputError: if there is no such precision.
    """
    reason = "as configured"
    if name == "auto":
        name, why = _choose(devices.hardware())
        reason = f"auto: {why}"
    if name not in _COMPUTE_DTYPES:
        raise InputError(f"precision {name!r} does not exist: write one of {', '.join(PRECISIONS)}")
    return Precision(name, _COMPUTE_DTYPES[name], reason, tuple(float32_layers))


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


def uses_float16(precision: Precision, model) -> bool:
    """Whether gradients can underflow, so that the loss must be scaled: the precision, or a layer of the model, is float16."""
    layers = plan(model) if keras_compat.is_keras_layer(model) else []
    return precision.compute_dtype == tf.float16 or any(row.compute_dtype == "float16" for row in layers)


def kernels(float16: bool, jit_compile: str | bool, strategy: tf.distribute.Strategy) -> Kernels:
    """Chooses the kernels from dtype and hardware, so that no float16 run on a CPU takes a slow path unasked.

    Args:
        float16: whether anything is computed in float16.
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
        slow = "; float16 is slow in XLA on a CPU" if on_cpu and float16 else ""
        return Kernels(True, False, f"XLA, as configured{slow}")
    if on_cpu and float16:
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


def check(precision: Precision, model) -> list[str]:
    """Checks a built model against its precision.

    Returns:
        Warnings, one line each: layers that cast what reaches them back to float32 without having been asked to.

    Raises:
        InputError: if 16 bits were asked for and no layer with parameters computes in them, or a trainable variable is not
            float32.
    """
    trainable = keras_compat.variables_by_path(model.trainable_variables)
    wrong = [path for path, variable in trainable.items() if variable.dtype != tf.float32]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(
            f"trainable variable {wrong[0]!r}{more} is {trainable[wrong[0]].dtype.name}: keep trainable variables in float32"
            " and cast them where they are used, as the policy mixed_float16 does"
        )
    if precision.compute_dtype not in (tf.float16, tf.bfloat16) or not keras_compat.is_keras_layer(model):
        return []
    rows = [row for row in plan(model) if row.parameters]
    wanted = precision.compute_dtype.name
    if not any(row.compute_dtype == wanted for row in rows):
        raise InputError(
            f"config.precision.policy is {precision.name!r} but no layer with parameters computes in {wanted}: build the model"
            " inside build_model(), without dtype='float32' on every layer"
        )
    asked = [row.layer for row in rows if any(re.search(pattern, row.layer) for pattern in precision.float32_layers)]
    silent = [row.layer for row in rows[:-1] if row.compute_dtype == "float32" and row.layer not in asked]
    if not silent:
        return []
    return [
        f"{', '.join(silent)} compute in float32 and cast their inputs back to it: if that is meant, name them in"
        " config.precision.float32_layers; if not, build them without dtype='float32'"
    ]


def check_is_float32(what: str, tree, remedy: str) -> None:
    """Checks that a nested structure holds no 16-bit tensor.

    Raises:
        InputError: if it does.
    """
    for tensor in tf.nest.flatten(tree):
        if tensor.dtype in (tf.float16, tf.bfloat16):
            raise InputError(f"{what} is {tensor.dtype.name}: {remedy}")
