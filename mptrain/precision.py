"""Which tensors are 16 bits wide: the casts, the Keras dtype policy, the choice by hardware, and the plan that shows it.

A train step stays the same in every precision: it casts the inputs to the compute dtype, the outputs to the output dtype,
and the gradients arrive in the parameters' dtype. Master weights in float32, after Micikevicius et al., "Mixed Precision
Training" (2018).
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Collection, Iterable

import numpy as np
import tensorflow as tf

from mptrain import half_kernels, keras_compat
from mptrain.autograph import as_written
from mptrain.config import PRECISIONS
from mptrain.errors import InputError
from mptrain.hardware import Hardware, hardware
from mptrain.workers import local_devices

_COMPUTE_DTYPES = {
    "native": None,
    "float32": tf.float32,
    "mixed_float16": tf.float16,
    "mixed_bfloat16": tf.bfloat16,
}
_ONE_DNN_NEEDS = {tf.bfloat16: "avx512f", tf.float16: "avx512_fp16"}  # of the CPU, so that TensorFlow lets it multiply


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

    @as_written
    def cast_to_compute(self, tree):
        """Casts the floating tensors of a nested structure to the compute dtype; others pass as they are."""
        return _cast_floating(tree, self.compute_dtype)

    @as_written
    def cast_to_param(self, tree):
        """Casts the floating tensors of a nested structure to the parameters' dtype, float32."""
        return _cast_floating(tree, self.compute_dtype and tf.float32)

    @as_written
    def cast_to_output(self, tree):
        """Casts the floating tensors of a nested structure to float32, in which loss and metrics are computed."""
        return _cast_floating(tree, self.compute_dtype and tf.float32)

    def scope(self) -> contextlib.AbstractContextManager:
        """Returns the context in which a model is built: its Keras layers take this precision as their dtype policy."""
        return contextlib.nullcontext() if self.name == "native" else keras_compat.dtype_policy(self.name)

    def hold_float32_layers(self, model) -> list:
        """Gives the layers that `float32_layers` names the policy float32; they cast what reaches them.

        Returns:
            These layers and those inside them.

        Raises:
            InputError: if a regex is none, or is found in no layer's path.
        """
        layers = list(keras_compat.all_layers_by_path(model))
        held = []
        for pattern in self.float32_layers:
            try:
                found = [layer for path, layer in layers if re.search(pattern, path)]
            except re.error as error:
                raise InputError(f"config.precision.float32_layers: {pattern!r} is no regular expression: {error}") from error
            if not found:
                paths = ", ".join(path for path, _ in layers) or "none: the model has no Keras layers"
                raise InputError(f"config.precision.float32_layers: {pattern!r} is found in no layer's path; there are {paths}")
            for layer in found:
                keras_compat.set_policy(layer, "float32")
                held += keras_compat.layers_in(layer)
        return held


def _cast_floating(tree, dtype: tf.DType | None):
    def cast(value):
        value = keras_compat.raw(value)
        if isinstance(value, (np.ndarray, np.generic)):
            value = tf.convert_to_tensor(value)
        if not tf.is_tensor(value) or not getattr(value.dtype, "is_floating", False):
            return value
        return tf.cast(value, dtype)  # of a ragged or sparse tensor and of `tf.IndexedSlices`, the values

    return tree if dtype is None else tf.nest.map_structure(cast, tree)


def get(name: str, float32_layers: str | Iterable[str] = (), on: Hardware | None = None) -> Precision:
    """Returns the precision called `name`: auto, native, float32, mixed_float16 or mixed_bfloat16.

    Args:
        name: "auto" chooses from the hardware.
        float32_layers: see `Precision`; one regex may stand alone.
        on: what "auto" chooses from; default: this host's.

    Raises:
        InputError: if there is no such precision.
    """
    if isinstance(float32_layers, str):
        float32_layers = (float32_layers,)
    reason = "as configured"
    if name == "auto":
        name, why = _choose(on or hardware())
        reason = f"auto: {why}"
    if name not in _COMPUTE_DTYPES:
        raise InputError(f"precision {name!r} does not exist: write one of {', '.join(PRECISIONS)}")
    return Precision(name, _COMPUTE_DTYPES[name], reason, tuple(float32_layers))


def _choose(hardware: Hardware) -> tuple[str, str]:
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
        widen: whether 16-bit operations that are slow or inexact are computed in float32 and rounded (see `half_kernels`).
        reason: why, in one line.
        asked: whether the config says so; else it says "auto".
        widen_products: the 16-bit dtypes whose products are among them (see `half_kernels.float32_kernels`).
    """

    jit_compile: bool
    widen: bool
    reason: str
    asked: bool
    widen_products: frozenset[tf.DType] = frozenset()

    def __str__(self) -> str:
        return f"{self.jit_compile} ({'as configured' if self.asked else 'auto'}): {self.reason}"

    def scope(self) -> contextlib.AbstractContextManager:
        """Returns the context in which train and evaluation steps are traced."""
        if not self.widen:
            return contextlib.nullcontext()
        return half_kernels.float32_kernels(
            bfloat16_products=tf.bfloat16 in self.widen_products, float16_products=tf.float16 in self.widen_products
        )


def kernels(
    dtypes: Collection[tf.DType], jit_compile: str | bool, strategy: tf.distribute.Strategy, on: Hardware | None = None
) -> Kernels:
    """Chooses the kernels from dtypes and hardware, so that no 16-bit run on a CPU takes a slow path unasked.

    Args:
        dtypes: what is computed in; only 16-bit dtypes matter.
        jit_compile: "auto", True or False.
        strategy: the run's strategy.
        on: the hardware; default: this host's.

    Raises:
        InputError: if XLA was asked for where it cannot compile the step.
    """
    on_cpu = not any(kind in device for device in local_devices(strategy) for kind in ("GPU", "TPU"))
    asked = jit_compile != "auto"
    if jit_compile is True:
        if on_cpu and isinstance(strategy, tf.distribute.MirroredStrategy | tf.distribute.MultiWorkerMirroredStrategy):
            raise InputError(
                f"config.train.jit_compile is True with {type(strategy).__name__} on CPUs: XLA cannot compile its all-reduce,"
                " not even of one replica; write 'auto'"
            )
        slow = on_cpu and tf.float16 in dtypes
        return Kernels(True, False, "XLA compiles the step" + "; its float16 convolutions are slow on a CPU" * slow, asked)
    widened = _widened_products(on or hardware()) if on_cpu else frozenset()
    if on_cpu and tf.float16 in dtypes:
        but = "" if tf.float16 in widened else ", except matrix products (avx512_fp16)"
        reason = f"float16 operations are computed in float32 and rounded: a CPU's own and XLA's are slow{but}"
    elif tf.bfloat16 in widened and tf.bfloat16 in dtypes:
        reason = (
            "bfloat16 products are computed in float32 and rounded: without avx512f and oneDNN a CPU's own are slow and inexact"
        )
    elif asked:
        reason = "TensorFlow's kernels"
    elif on_cpu:
        reason = "XLA's convolutions are slower than TensorFlow's on a CPU"
    else:
        reason = "XLA only compiles where it is asked to"
    return Kernels(False, on_cpu, reason, asked, widened)


def _widened_products(on: Hardware) -> frozenset[tf.DType]:
    """Returns the dtypes whose products TensorFlow does not give to oneDNN, or would not if the CPU's features are unknown."""
    if os.environ.get("TF_ENABLE_ONEDNN_OPTS", "").lower() in ("0", "false"):
        return frozenset(_ONE_DNN_NEEDS)
    return frozenset(dtype for dtype, feature in _ONE_DNN_NEEDS.items() if feature not in on.cpu_features)


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One line of the precision plan: a layer, the dtypes of its computation and variables, its number of parameters."""

    layer: str
    compute_dtype: str
    variable_dtype: str
    parameters: int


def plan(model) -> list[PlanRow]:
    """Returns the rows of the precision plan: layers in the order of creation; a `tf.Module`'s own variables after them."""
    layers = list(keras_compat.layers_by_path(model))
    rows = [PlanRow(path, layer.compute_dtype, layer.variable_dtype, _count(layer)) for path, layer in layers]
    if keras_compat.is_keras_layer(model):
        return rows
    in_layers = {id(keras_compat.raw(variable)) for _, layer in layers for variable in layer.variables}
    variables = keras_compat.variables_by_path(keras_compat.variables(model))
    return rows + [
        PlanRow(path, "as written", variable.dtype.name, variable.shape.num_elements())
        for path, variable in variables.items()
        if id(variable) not in in_layers
    ]


def _count(layer) -> int:
    """Returns the number of a layer's parameters, without those of the layers inside it."""
    _, *inner = keras_compat.layers_in(layer)
    theirs = {id(variable) for each in inner for variable in each.weights}
    return sum(keras_compat.raw(variable).shape.num_elements() for variable in layer.weights if id(variable) not in theirs)
