"""Writes a trained model for others to serve: a folder that is complete or not there, one for each step.

`export/` is what TensorFlow Serving takes as a model's base path, and `export/STEP/` a SavedModel that loads with TensorFlow
alone. Beside it lie `model.keras`, where the model is Keras's own, `model.onnx`, where it was asked for, and `metadata.json`.
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping

import tensorflow as tf

from mptrain import config as config_lib
from mptrain import keras_compat, serving
from mptrain.checkpoints import Checkpoints
from mptrain.console import Console
from mptrain.errors import InputError, RunError
from mptrain.metrics_log import evaluation_at
from mptrain.run_folder import RunFolder, provenance

_TEMPORARY = ".temporary-"


def export(
    trainer,
    folder: str | os.PathLike,
    *,
    precision: str = "float32",
    onnx: bool = False,
    metrics: Mapping[str, float | None] | None = None,
) -> pathlib.Path:
    """Writes a trainer's model, as it is now, to `folder`/STEP, whole or not at all.

    Args:
        trainer: a `Trainer`; where it has averages of its weights, they are what is exported.
        folder: holds one folder for each exported step; made if it is not there.
        precision: "float32", or "as_trained": layers of 16 bits compute as they do in this process's evaluation.
        onnx: whether to write model.onnx too, by tf2onnx; of a float32 export.
        metrics: of this step, for metadata.json.

    Returns:
        The folder that was written.

    Raises:
        InputError: if this step was exported already, `Trainer.serve` cannot be exported, or tf2onnx is missing.
        RunError: if the folder cannot be written to, or tf2onnx fails.
    """
    step = int(trainer.global_step.numpy())
    final = pathlib.Path(folder) / str(step)
    if precision not in config_lib.EXPORTED:
        raise InputError(f"precision {precision!r} does not exist: write one of {', '.join(config_lib.EXPORTED)}")
    _check_is_new(final)
    if onnx:
        check_onnx()
    as_trained = precision == "as_trained"
    served = serving.Serving(trainer, as_trained=as_trained)
    with _complete(final) as temporary:
        tf.saved_model.save(served, str(temporary), signatures={serving.SIGNATURE: served.serve})
        about_keras = _save_keras(trainer, temporary / "model.keras", as_trained)
        if onnx:
            _save_onnx(temporary)
        metadata = {
            "step": step,
            "trainer": f"{type(trainer).__module__}.{type(trainer).__qualname__}",
            "precision": {"trained": trainer.precision.name, "exported": precision},
            "weights": "averaged" if trainer.optimizer.has_average else "as trained",
            "signature": {
                "name": serving.SIGNATURE,
                "inputs": _described(served.inputs),
                "outputs": _described(served.outputs),
            },
            "keras": about_keras,
            "metrics": metrics,
            "config": dict(config_lib.fields(trainer.config)),
            **provenance(),
        }
        (temporary / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    return final


def summary(folder: pathlib.Path) -> list[str]:
    """Returns the lines that tell a user what was exported to `folder`."""
    metadata = json.loads((folder / "metadata.json").read_text())
    signature, about_keras = metadata["signature"], metadata["keras"]
    given, answered = ("  ".join(f"{key} {spec}" for key, spec in signature[kind].items()) for kind in ("inputs", "outputs"))
    lines = [
        f"exported step {metadata['step']} to {folder}: {metadata['precision']['exported']}, weights {metadata['weights']}",
        f"  {signature['name']}: {given} -> {answered}",
    ]
    if (folder / "model.onnx").exists():
        lines.append("  model.onnx: for ONNX runtimes")
    if about_keras["file"] is None:
        return [*lines, f"  no model.keras: {about_keras['reason']}"]
    needs = f", which needs {', '.join(about_keras['needs'])}" if about_keras["needs"] else ""
    return [*lines, f"  {about_keras['file']}: for {about_keras['loads_with']}{needs}"]


def of_run(trainer, folder: RunFolder, console: Console) -> dict[str, float | None]:
    """Exports the model of a run, as its config says, and returns the metrics that the run logged at that step."""
    metrics, wanted = evaluation_at(folder.metrics_file, int(trainer.global_step.numpy())), trainer.config.export
    path = export(trainer, folder.exports, precision=wanted.precision, onnx=wanted.onnx, metrics=metrics)
    for line in summary(path):
        console.line(line)
    return metrics or {}


def at_end(trainer, folder: RunFolder, checkpoints: Checkpoints, console: Console) -> None:
    """Exports the last step, or the checkpoint that `export.checkpoint` names; what an earlier process exported stays."""
    step = checkpoints.chosen("config.export.checkpoint", trainer.config.export.checkpoint)
    if step is not None and step != int(trainer.global_step.numpy()):
        with trainer.strategy.scope():
            checkpoints.restore(step)
    path = folder.exports / str(int(trainer.global_step.numpy()))
    if path.exists():
        console.line(f"exported before: {path}")
    elif trainer.workers.is_chief:
        of_run(trainer, folder, console)


def check_onnx() -> None:
    """Checks that a model can be converted, before hours of training.

    Raises:
        InputError: if tf2onnx is not there.
    """
    if importlib.util.find_spec("tf2onnx") is None:
        raise InputError("config.export.onnx is True and tf2onnx is not there: pip install 'mptrain[onnx]'")


def _check_is_new(final: pathlib.Path) -> None:
    if final.exists():
        raise InputError(f"{final} is there already: an export never overwrites one; move it away, or export another step")


@contextlib.contextmanager
def _complete(final: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder that becomes `final` at the end, or is removed; one process at a time."""
    temporary = final.with_name(f"{_TEMPORARY}{final.name}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(final.parent / ".lock", "a") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            for remains in final.parent.glob(f"{_TEMPORARY}*"):  # of exports that were killed
                shutil.rmtree(remains)
            _check_is_new(final)
            temporary.mkdir()
            try:
                yield temporary
                temporary.rename(final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(f"the export cannot be written to {final}: {reason}") from error


def _save_keras(trainer, file: pathlib.Path, as_trained: bool) -> dict[str, object]:
    """Saves a Keras model in Keras's own format; returns what is to be known about that, or why it is not there."""
    model = trainer.model
    generation = keras_compat.generation(model)
    if generation is None:
        return {"file": None, "reason": "the model is not a keras.Model"}
    with trainer.optimizer.averaged_weights(), contextlib.nullcontext() if as_trained else serving.in_float32(trainer):
        try:
            model.save(file)
        except (NotImplementedError, TypeError, ValueError) as error:  # a model that Keras cannot describe
            file.unlink(missing_ok=True)
            return {"file": None, "reason": f"Keras cannot save this model: {str(error).strip().splitlines()[0]}"}
    return {
        "file": file.name,
        "loads_with": {"keras": "keras.saving.load_model", "tf_keras": "tf_keras.models.load_model"}[generation],
        "takes": "what Trainer.inputs() returns",
        "needs": keras_compat.own_classes(model),
    }


def _save_onnx(folder: pathlib.Path) -> None:
    """Converts a SavedModel in a process of its own: tf2onnx changes TensorFlow's settings, and prints."""
    flags = ["--saved-model", folder, "--signature_def", serving.SIGNATURE, "--output", folder / "model.onnx", "--opset", "18"]
    finished = subprocess.run([sys.executable, "-m", "tf2onnx.convert", *map(str, flags)], capture_output=True, text=True)
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"tf2onnx cannot convert this model: {reason}; write export.onnx=False")


def _described(specs: Mapping[str, tf.TensorSpec]) -> dict[str, str]:
    return {
        key: f"{spec.dtype.name} [{', '.join(['batch', *('?' if size is None else str(size) for size in spec.shape[1:])])}]"
        if spec.shape.rank
        else spec.dtype.name
        for key, spec in specs.items()
    }
