"""`MixedPrecision`: one Keras layer in another precision than the model around it, with explicit casts at its edges."""

import inspect

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

    Floating inputs are cast to the precision's compute dtype, floating outputs to float32. Variables stay float32. The first
    input is positional, further ones are named, as in `MixedPrecision(attention)(query, value=value)`.

    Args:
        layer: the layer, built or not; None: the first call, with a layer, returns the wrapper of that layer.
        precision: "mixed_float16", "mixed_bfloat16" or "float32".
        **kwargs: of `keras.Layer`, such as name.

    Raises:
        InputError: if the precision does not exist or has no compute dtype.
        TypeError: if `layer` is no Keras 3 layer.
    """

    def __init__(self, layer: keras.Layer | None = None, precision: str = "mixed_float16", **kwargs):
        self._precision = precision_lib.get(precision)
        if self._precision.compute_dtype is None:
            raise InputError(f"MixedPrecision needs a precision with a compute dtype: {precision!r} has none")
        if layer is not None and not isinstance(layer, keras.Layer):
            raise TypeError(f"MixedPrecision wraps a Keras 3 layer; this is {layer!r}")
        self._options = kwargs
        # Its edges are its own: no policy of the model around it casts what goes in or comes out.
        super().__init__(**{"dtype": "float32", "autocast": False, **kwargs})
        self.layer = layer
        if layer is not None:
            keras_compat.set_policy(layer, self._precision.name)

    def __call__(self, *args, **kwargs):
        if self.layer is None:
            (layer,) = args
            return MixedPrecision(layer, self._precision.name, **self._options)
        return super().__call__(*args, **kwargs)

    def build(self, input_shape) -> None:
        """Builds the layer, if one shape is all it needs; a layer of several inputs builds itself when it is called."""
        if not self.layer.built and len(inspect.signature(self.layer.build).parameters) == 1:
            self.layer.build(input_shape)

    def call(self, inputs, **kwargs):
        tensors = {name: value for name, value in kwargs.items() if tf.is_tensor(value)}
        inputs, tensors = self._precision.cast_to_compute((inputs, tensors))
        return self._precision.cast_to_output(self.layer(inputs, **{**kwargs, **tensors}))

    def get_config(self) -> dict:
        layer = keras.saving.serialize_keras_object(self.layer)
        return {**super().get_config(), "layer": layer, "precision": self._precision.name}

    @classmethod
    def from_config(cls, config: dict) -> "MixedPrecision":
        layer = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**{**config, "layer": layer, "dtype": "float32"})
