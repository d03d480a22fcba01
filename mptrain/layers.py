"""`MixedPrecision`: one Keras layer in another precision than the model around it, with explicit casts at its edges."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf

from mptrain import keras_compat
from mptrain import precision as precision_lib
from mptrain.errors import InputError


@keras.saving.register_keras_serializable("mptrain")
class MixedPrecision(keras.Layer):
    """Computes one Keras 3 layer in the given precision, whatever the dtype policy of the model around it.

        x = mptrain.MixedPrecision(keras.layers.Dense(512, activation="relu"))(x)
        x = mptrain.MixedPrecision()(keras.layers.Dense(512))(x)

    It is called as the layer is. Floating tensors in its arguments, nested or not, are cast to the layer's compute dtype,
    floating outputs to float32; integers, None and Keras masks pass as they are. Variables stay float32.

    Layers inside the layer take the precision too, even one written with dtype="float32", for Keras does not tell that from
    the default: write `MixedPrecision(inner, "float32")` there, which is left as it is.

    A saved model with this layer loads after `from mptrain import MixedPrecision`, which registers it with Keras.

    Args:
        layer: the layer, built or not; without one, a function comes back that takes the layer and wraps it.
        precision: "mixed_float16", "mixed_bfloat16" or "float32".
        **kwargs: of `keras.Layer`, such as name; the wrapper's own dtype is always float32.

    Raises:
        InputError: if the precision does not exist or has no compute dtype, or the layer has floating variables not float32.
        TypeError: if `layer` is no Keras 3 layer, or is wrapped already.
    """

    def __new__(cls, layer: keras.Layer | None = None, precision: str = "mixed_float16", **kwargs):
        def wrap(*layers) -> "MixedPrecision":
            if len(layers) != 1 or layers[0] is None:
                raise TypeError("MixedPrecision() takes one layer and nothing else: write MixedPrecision()(layer)(inputs)")
            return cls(*layers, precision, **kwargs)

        return wrap if layer is None else super().__new__(cls, layer, precision, **kwargs)

    def __init__(self, layer: keras.Layer, precision: str = "mixed_float16", **kwargs):
        chosen = precision_lib.get(precision)
        if chosen.compute_dtype is None:
            raise InputError(f"MixedPrecision needs a precision with a compute dtype: {precision!r} has none")
        _check_layer(layer)
        self.layer = layer  # before Keras reads the signature of `call`
        # Its edges are its own: no policy of the model around it casts what goes in or comes out.
        super().__init__(**{**kwargs, "dtype": "float32", "autocast": False})
        _set_policy(layer, chosen.name)
        if type(layer).build is not keras.Layer.build:
            self.build.__signature__ = inspect.signature(layer.build)  # Keras reads from it which shapes to give

    def build(self, *shapes, **named_shapes) -> None:
        """Builds the layer from the shapes that its own `build` takes; given none, it builds itself when it is called."""
        if (shapes or named_shapes) and not self.layer.built:
            with _policy_scope(self.layer):
                self.layer.build(*shapes, **named_shapes)

    @property
    def call(self) -> Callable:
        """The layer between its casts, with the signature of the layer's `call`: Keras reads tensors and masks from that."""

        @functools.wraps(self.layer.call)
        def call(*args, **kwargs):
            args, kwargs = _cast((args, kwargs), self.layer.compute_dtype)
            with _policy_scope(self.layer):
                outputs = self.layer(*args, **kwargs)
            return _cast(outputs, tf.float32)

        return call

    # Traces `call`: the layer builds itself and shows the dtype of each output. Keras's own takes all for floating.
    compute_output_spec = keras.Operation.compute_output_spec

    def compute_output_shape(self, *args, **kwargs):
        return self.layer.compute_output_shape(*args, **kwargs)

    @property
    def supports_masking(self) -> bool:
        return self.layer.supports_masking

    def compute_mask(self, *args, **kwargs):
        return self.layer.compute_mask(*args, **kwargs)

    def get_config(self) -> dict:
        layer = keras.saving.serialize_keras_object(self.layer)
        # The layer's precision now: `Precision.hold_float32_layers` may have changed it.
        return {**super().get_config(), "layer": layer, "precision": self.layer.dtype_policy.name}

    def get_build_config(self) -> None:
        """Returns None: the layer in the config has its own."""

    @classmethod
    def from_config(cls, config: dict) -> "MixedPrecision":
        return cls(**{**config, "layer": keras.saving.deserialize_keras_object(config["layer"])})


def _check_layer(layer) -> None:
    if not isinstance(layer, keras.Layer):
        raise TypeError(f"MixedPrecision wraps a Keras 3 layer; this is {layer!r}")
    if isinstance(layer, MixedPrecision):
        raise TypeError(f"{layer.name!r} is a MixedPrecision already, of {layer.layer!r}: wrap a layer once")
    for variable in layer.variables:
        if tf.as_dtype(variable.dtype).is_floating and variable.dtype != "float32":
            raise InputError(
                f"MixedPrecision keeps variables in float32, and {variable.path!r} is {variable.dtype} already:"
                " build the layer with dtype='float32', or wrap it before it is built"
            )


def _set_policy(layer: keras.Layer, name: str) -> None:
    """Gives a layer and those inside it a dtype policy; a MixedPrecision inside it, and what that wraps, keep their own."""
    layer.dtype_policy = name
    for child in keras_compat.children(layer):
        if not isinstance(child, MixedPrecision):
            _set_policy(child, name)


@contextlib.contextmanager
def _policy_scope(layer: keras.Layer) -> Iterator[None]:
    """Keras 3 layers that are created inside take the layer's policy.

    Only in this thread, so that replicas, whose threads interleave, cannot leave it set; tf_keras's policy is global.
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(layer.dtype_policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _cast(tree, dtype):
    """Casts the floating tensors of a nested structure, dense, ragged or sparse, and leaves all else as it is."""

    def cast(value):
        if not tf.is_tensor(value) or not tf.as_dtype(value.dtype).is_floating:
            return value
        return keras_compat.with_mask_of(value, keras.ops.cast(value, dtype))

    return keras.tree.map_structure(cast, tree)
