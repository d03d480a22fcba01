"""float32's weights and gradients, which the other precisions of a parity run are compared with as they go."""

import math
import pathlib
from collections.abc import Mapping

import numpy as np

from mptrain import keras_compat
from mptrain.numerics.probe import Sight

MODEL = ("model/", "trainer/")  # begin the paths of the model's variables in a trainer's state
_KEY = ":"  # before each name: `np.savez` has arguments of its own, such as "file"


class Reference:
    """float32's weights and gradients on disk: written by its own run, compared with by the others.

    Args:
        folder: that they lie in.
        trainer: whose weights they are or are compared with.
        writes: whether this is float32's run.
    """

    def __init__(self, folder: pathlib.Path, trainer, writes: bool):
        self._folder = folder
        self._writes = writes
        self._model = {path: v for path, v in trainer.state.items() if path.startswith(MODEL)}
        places = {id(variable): path for path, variable in self._model.items()}
        trained = keras_compat.variables_by_path(trainer.trainable_variables)
        self._trained = {path: places[id(variable)] for path, variable in trained.items()}

    def restore(self, step: int) -> None:
        """Gives the model the weights that float32 had before `step`."""
        with np.load(self._file("weights", step)) as saved:
            for path, variable in self._model.items():
                variable.assign(saved[_KEY + path])

    def of_weights(self, step: int) -> dict[str, tuple]:
        """Returns {path of a trained variable: `squares`}; nothing in float32's own run, which writes them."""
        if self._writes:
            _write(self._file("weights", step), {path: variable.numpy() for path, variable in self._model.items()})
            return {}
        with np.load(self._file("weights", step)) as saved:
            return {path: squares(self._model[place].numpy(), saved[_KEY + place]) for path, place in self._trained.items()}

    def of_gradients(self, step: int, sight: Sight) -> dict[str, tuple]:
        """Returns the same for the gradients that a sight brought."""
        if self._writes:
            _write(self._file("gradients", step), sight.gradients)
            return {}
        with np.load(self._file("gradients", step)) as saved:
            return {
                path: squares(gradient, saved[_KEY + path])
                for path, gradient in sight.gradients.items()
                if _KEY + path in saved
            }

    def _file(self, kind: str, step: int) -> pathlib.Path:
        return self._folder / f"{kind}-{step}.npz"


def squares(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Returns the sums of squares of the difference and of what was wanted, in float64."""
    found, wanted = found.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    with np.errstate(invalid="ignore"):  # inf - inf: the NaN says that the two cannot be compared
        difference = found - wanted
    return float(difference @ difference), float(wanted @ wanted)


def by_layer(pairs: Mapping[str, tuple[float, float]], layers: list[dict], noise: float = 0.0) -> dict[str, float]:
    """Returns {path of a layer: its relative error} of the layers of which there are `squares` of variables.

    Args:
        pairs: `squares` by path of a variable.
        layers: {"path", "variables"} each.
        noise: share of all variables' norm below which float32's own values in a layer are rounding errors, as the gradient
            of a bias before a normalization is: there the error is measured by the norm of all.
    """
    errors, whole = {}, sum(wanted for _, wanted in pairs.values())
    for layer in layers:
        found = [pairs[path] for path in layer["variables"] if path in pairs]
        if found:
            difference, wanted = map(sum, zip(*found, strict=True))
            errors[layer["path"]] = relative_error(difference, whole if wanted < noise**2 * whole else wanted)
    return errors


def relative_error(difference: float, wanted: float) -> float:
    """Returns the ratio of two norms, given as sums of squares. Where nothing was wanted, all that is there is error: 1."""
    if wanted == 0:
        return float(difference > 0) if math.isfinite(difference) else math.nan
    return math.sqrt(difference / wanted) if math.isfinite(difference) else math.nan


def _write(file: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    np.savez(file, **{_KEY + path: array for path, array in arrays.items()})
