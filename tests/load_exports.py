"""A process without mptrain: python -I load_exports.py FOLDER answers each export in the folder, into answers.npz there.

FOLDER/NAME/ holds the export and inputs.npz; what wrong inputs are told is printed as JSON.
"""

import importlib.util
import json
import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf
import tf_keras

root = pathlib.Path(sys.argv[1])
assert importlib.util.find_spec("mptrain") is None


def refused(signature, **inputs):
    try:
        signature(**{name: tf.constant(value) for name, value in inputs.items()})
    except Exception as error:
        return str(error)
    return None


answers = {}
for inputs in root.glob("*/inputs.npz"):
    (export,) = inputs.parent.glob("[0-9]*")
    name, arrays = inputs.parent.name, dict(np.load(inputs))
    serve = tf.saved_model.load(str(export)).signatures["serving_default"]
    for key, value in serve(**{key: tf.constant(value) for key, value in arrays.items()}).items():
        answers[f"{name}/{key}"] = value.numpy()
    metadata = json.loads((export / "metadata.json").read_text())
    if metadata["keras"]["file"] and not metadata["keras"]["needs"] and "inputs" in arrays:
        load = {"keras.saving.load_model": keras.saving, "tf_keras.models.load_model": tf_keras.models}
        model = load[metadata["keras"]["loads_with"]].load_model(export / "model.keras")
        answers[f"{name}/model.keras"] = model(arrays["inputs"], training=False).numpy()
    if name == "keras":
        first = arrays["inputs"]
        cases = {"shape": first[:, 1:], "rank": first[..., 0], "dtype": first.astype("int32")}
        told = {case: refused(serve, inputs=value) for case, value in cases.items()}
        told["name"] = refused(serve, images=first)
        print(json.dumps(told))
np.savez(root / "answers.npz", **answers)
