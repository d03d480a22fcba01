"""One precision of a parity run: trains it from the common start, and notes what the comparison needs.

float32 comes first and leaves its weights and gradients on disk; the others compare theirs with them as they go, so that no
process holds two models, and only numbers leave it.
"""

import dataclasses
import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from mptrain import keras_compat, tensor_file
from mptrain.numerics.collection import first_nonfinite
from mptrain.numerics.parity.memory import peak_gpu_memory, peak_memory
from mptrain.numerics.parity.same_noise import same_noise
from mptrain.numerics.probe import Probe, Sight
from mptrain.numerics.recorder import OUTPUT, WEIGHT

REFERENCE = "float32"
_TIMED_LOOPS = 3
_TIMED_SHARE = 1 / 8  # of the steps, in each of these loops
# What a run that scales its loss takes from a start that scaled its own, and only then.
_SCALING = tuple(f"/loss_scale/{name}" for name in ("loss_scale", "applied_in_a_row", "hysteresis_left"))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which steps are trained and which are compared.

    Attributes:
        first: the first step.
        steps: how many; a multiple of `window`.
        every: each so many are compared; a multiple of `window`.
        window: steps that make one update. A loss is the mean over one.
    """

    first: int
    steps: int
    every: int
    window: int

    @classmethod
    def of(cls, config: ConfigDict, first: int) -> "Schedule":
        window = config.optimizer.accumulation_steps
        steps, every = (math.ceil(n / window) * window for n in (config.parity.steps, config.parity.every_steps))
        return cls(first, steps, every, window)

    @property
    def last(self) -> int:
        return self.first + self.steps

    @property
    def updates(self) -> range:
        """The first step of each update."""
        return range(self.first, self.last, self.window)

    @property
    def compared(self) -> list[int]:
        """The steps before which weights are compared, and on whose batches gradients are; the run's end among them."""
        return [*range(self.first, self.last, self.every), self.last]


def write_start(trainer, folder: pathlib.Path) -> None:
    """Writes the state from which every precision starts to `folder`/start."""
    (folder / "start").mkdir(parents=True)
    state = {path: v.numpy() for path, v in trainer.state.items() if trainer.uses_float16 or not path.endswith(_SCALING)}
    tensor_file.write(folder / "start", state)


def train(build: Callable, config: ConfigDict, folder: pathlib.Path, precision: str, done: Callable[[int], None]) -> dict:
    """Trains in one precision from the start in `folder`, in which "float32" must have been first.

    Args:
        build: makes a trainer from a config.
        config: the run's.
        folder: holds the start; float32 adds what the others are compared with.
        precision: its name.
        done: called with the number of steps that are trained or looked at.

    Returns:
        What `report.build` takes of each run; numbers may be NaN or infinite.
    """
    config = config.copy_and_resolve_references()
    config.precision.policy = precision
    start = tensor_file.read(folder / "start")
    schedule = Schedule.of(config, int(start["step"]))
    cost = _cost(_started(build, config, start), schedule)
    trainer = _started(build, config, start)
    against = _Reference(folder, trainer, writes=precision == REFERENCE)
    with same_noise():
        found = _train(trainer, schedule, against, done)
        final = trainer.evaluate(tf.constant(trainer.eval_steps))
        gradients, nonfinite, layers = _look(trainer, schedule, against, found["scales"], done)
    return {
        "precision": trainer.precision.name,
        "window": schedule.window,
        "dynamic": bool(trainer.uses_float16 and config.loss_scale.dynamic),
        "curves": found["curves"],
        "skipped": found["skipped"],
        "final": final,
        "layers": [layer["path"] for layer in layers],
        "weights": [_by_layer(pairs, layers) for pairs in found["weights"]],
        "gradients": [_by_layer(pairs, layers) for pairs in gradients],
        "nonfinite": nonfinite,
        **cost,
    }


def _started(build: Callable, config: ConfigDict, start: Mapping[str, np.ndarray]):
    trainer = build(config)
    for path, variable in trainer.state.items():
        if path in start and (trainer.uses_float16 or not path.endswith(_SCALING)):
            variable.assign(start[path])
    return trainer


def _cost(trainer, schedule: Schedule) -> dict:
    """Measures the plain training loop: before anything is looked at, because that takes memory of its own.

    The first update is left out of the time: the loop is traced for it.
    """
    trainer.train(tf.constant(schedule.window))
    count = math.ceil(schedule.steps * _TIMED_SHARE / schedule.window) * schedule.window
    seconds = []
    for _ in range(_TIMED_LOOPS):
        begin = time.perf_counter()
        trainer.train(tf.constant(count))
        seconds.append(time.perf_counter() - begin)
    return {
        "ms_per_step": 1000 * statistics.median(seconds) / count,
        "peak_memory": peak_memory(),
        "peak_gpu_memory": peak_gpu_memory(trainer.strategy),
    }


def _train(trainer, schedule: Schedule, against: "_Reference", done: Callable[[int], None]) -> dict:
    """Trains update by update, so that each has its loss, and notes the weights of the compared steps."""
    curves, skipped, weights, scales = {name: [] for name in trainer.metrics}, [], [], []

    def compare(step: int) -> None:
        weights.append(against.of_weights(step))
        scales.append(float(trainer.optimizer.loss_scale))

    for step in schedule.updates:
        if step in schedule.compared:
            compare(step)
        before = int(trainer.optimizer.skipped_steps)
        outputs = trainer.train(tf.constant(schedule.window))
        for name, curve in curves.items():
            curve.append(outputs[name])
        if int(trainer.optimizer.skipped_steps) > before:
            skipped.append(step)
        done(step + schedule.window - schedule.first)
    compare(schedule.last)
    return {"curves": curves, "skipped": skipped, "weights": weights, "scales": scales}


def _look(trainer, schedule: Schedule, against: "_Reference", scales: list[float], done: Callable) -> tuple[list, list, list]:
    """Computes the step of each compared batch at float32's weights, at the loss scale that the run itself had come to.

    At float32's weights and not at the run's own, because these drift apart in every run, and the gradients with them: what is
    left is what the precision does to one step.

    Returns:
        For each compared step {path of a variable: `squares` of its gradient} and the path of the first output that is not
        finite or None; and the layers.
    """
    probe, batches, at = Probe(trainer, gradients=True), trainer.training_batches.open(schedule.first), schedule.first
    gradients, nonfinite = [], []
    for number, (step, scale) in enumerate(zip(schedule.compared, scales, strict=True), start=1):
        *_, batch = itertools.islice(batches, step - at + 1)
        at = step + 1
        against.restore(step)
        sight = probe(batch, step=step, loss_scale=scale)
        gradients.append(against.of_gradients(step, sight))
        nonfinite.append(_nonfinite(sight))
        done(schedule.steps + number)
    return gradients, nonfinite, _layers(sight)


class _Reference:
    """float32's weights and gradients on disk: written by its own run, compared with by the others.

    Args:
        folder: that they lie in.
        trainer: whose weights they are or are compared with.
        writes: whether this is float32's run.
    """

    def __init__(self, folder: pathlib.Path, trainer, writes: bool):
        self._folder = folder
        self._writes = writes
        self._model = {path: v for path, v in trainer.state.items() if path.startswith(("model/", "trainer/"))}
        places = {id(variable): path for path, variable in self._model.items()}
        trained = keras_compat.variables_by_path(trainer.trainable_variables)
        self._trained = {path: places[id(variable)] for path, variable in trained.items()}

    def restore(self, step: int) -> None:
        """Gives the model the weights that float32 had before `step`."""
        with np.load(self._file("weights", step)) as saved:
            for path, variable in self._model.items():
                variable.assign(saved[path])

    def of_weights(self, step: int) -> dict[str, tuple]:
        """Returns {path of a trained variable: `squares`}; nothing in float32's own run, which writes them."""
        if self._writes:
            np.savez(self._file("weights", step), **{path: variable.numpy() for path, variable in self._model.items()})
            return {}
        with np.load(self._file("weights", step)) as saved:
            return {path: squares(self._model[place].numpy(), saved[place]) for path, place in self._trained.items()}

    def of_gradients(self, step: int, sight: Sight) -> dict[str, tuple]:
        """Returns the same for the gradients that a sight brought."""
        if self._writes:
            np.savez(self._file("gradients", step), **sight.gradients)
            return {}
        with np.load(self._file("gradients", step)) as saved:
            return {path: squares(gradient, saved[path]) for path, gradient in sight.gradients.items() if path in saved}

    def _file(self, kind: str, step: int) -> pathlib.Path:
        return self._folder / f"{kind}-{step}.npz"


def squares(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Returns the sums of squares of the difference and of what was wanted, in float64."""
    found, wanted = found.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    with np.errstate(invalid="ignore"):  # inf - inf: the NaN says that the two cannot be compared
        difference = found - wanted
    return float(difference @ difference), float(wanted @ wanted)


def _by_layer(pairs: Mapping[str, tuple[float, float]], layers: list[dict]) -> dict[str, float]:
    """Returns {path of a layer: its relative error} from the `squares` of its variables; nothing without these."""
    errors = {}
    for layer in layers if pairs else ():
        differences, wanted = zip(*(pairs[path] for path in layer["variables"] if path in pairs), strict=True)
        errors[layer["path"]] = relative_error(sum(differences), sum(wanted))
    return errors


def relative_error(difference: float, wanted: float) -> float:
    """Returns the ratio of two norms, given as sums of squares. Where nothing was wanted, all that is there is error: 1."""
    if wanted == 0:
        return float(difference > 0) if math.isfinite(difference) else math.nan
    return math.sqrt(difference / wanted) if math.isfinite(difference) else math.nan


def _nonfinite(sight: Sight) -> str | None:
    """Returns the path of the first output that is not finite; None where all are."""
    site = first_nonfinite(sight)
    return site.layer if site is not None and site.kind == OUTPUT else None


def _layers(sight: Sight) -> list[dict]:
    """Returns the layers that have trained variables, in forward order, each with the paths of these."""
    variables = {}
    for site in sight.sites:
        if site.kind == WEIGHT:
            variables.setdefault(site.layer, []).append(site.path)
    outputs = [site.path for site in sight.sites if site.kind == OUTPUT]
    order = {path: place for place, path in reversed(list(enumerate(outputs)))}
    paths = sorted(variables, key=lambda path: order.get(path, len(order)))
    return [{"path": path, "variables": variables[path]} for path in paths]
