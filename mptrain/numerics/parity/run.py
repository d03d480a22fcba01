"""One precision of a parity run: trains it from the common start, and notes what the comparison needs.

float32 comes first and leaves its weights and gradients on disk; the others compare theirs with them as they go, so that no
process holds two models, and only numbers leave it.
"""

import dataclasses
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from mptrain import config as config_lib
from mptrain import data, keras_compat, tensor_file
from mptrain.errors import RunError
from mptrain.numerics.parity.memory import peak_gpu_memory, peak_memory
from mptrain.numerics.parity.reference import MODEL, Reference, by_layer
from mptrain.numerics.parity.same_noise import same_noise
from mptrain.numerics.probe import Probe, Sight
from mptrain.numerics.recorder import OUTPUT, WEIGHT

REFERENCE = "float32"
_NOISE = 1e-7  # of the whole gradient's norm: what float32 computes in a layer below that are its rounding errors
_NOT_FINITE = 1  # its place in what `tally.count` counts
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

    @property
    def compared_count(self) -> int:
        """How many these are; they need not fit into memory for that."""
        return len(range(self.first, self.last, self.every)) + 1


def write_start(trainer, folder: pathlib.Path) -> None:
    """Writes the state from which every precision starts to `folder`/start."""
    (folder / "start").mkdir(parents=True)
    state = {path: v.numpy() for path, v in trainer.state.items() if trainer.uses_float16 or not path.endswith(_SCALING)}
    tensor_file.write(folder / "start", state)


def bytes_on_disk(trainer, compared: int) -> int:
    """Returns what the start, and float32's weights and gradients of so many steps, take on disk."""
    size = {path: variable.dtype.size * math.prod(variable.shape) for path, variable in trainer.state.items()}
    model = sum(size[path] for path in size if path.startswith(MODEL))
    trained = sum(4 * math.prod(variable.shape) for variable in trainer.trainable_variables)
    return sum(size.values()) + compared * (model + trained)


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
    config = config_lib.copied(config)
    config.precision.policy = precision
    start = tensor_file.read(folder / "start")
    schedule = Schedule.of(config, int(start["step"]))
    cost = _cost(_started(build, config, start), schedule)
    trainer = _started(build, config, start)
    against = Reference(folder, trainer, writes=precision == REFERENCE)
    with same_noise():
        found = _train(trainer, schedule, against, done)
        final = trainer.evaluate(tf.constant(trainer.eval_steps))
        seen = _look(trainer, schedule, against, found["scales"], done)
    layers = seen["layers"]
    return {
        "precision": trainer.precision.name,
        "window": schedule.window,
        "dynamic": bool(trainer.uses_float16 and config.loss_scale.dynamic),
        "curves": found["curves"],
        "skipped": found["skipped"],
        "final": {name: float(value) for name, value in final.items()},
        "layers": [layer["path"] for layer in layers],
        "weights": [by_layer(pairs, layers) for pairs in found["weights"]],
        "gradients": [by_layer(pairs, layers, _NOISE) for pairs in seen["gradients"]],
        "nonfinite": seen["nonfinite"],
        "in_16_bits": seen["in_16_bits"],
        **cost,
    }


def _started(build: Callable, config: ConfigDict, start: Mapping[str, np.ndarray]):
    trainer = build(config)
    missing = [path for path in trainer.state if path.startswith(MODEL) and path not in start]
    if missing:
        raise RunError(
            f"the model has a variable {missing[0]!r} that the run's own precision does not have: give both the same"
        )
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


def _train(trainer, schedule: Schedule, against: "Reference", done: Callable[[int], None]) -> dict:
    """Trains update by update, so that each has its loss, and notes the weights of the compared steps."""
    curves, skipped, weights, scales = {name: [] for name in trainer.metrics}, [], [], []
    compared = set(schedule.compared)

    def compare(step: int) -> None:
        weights.append(against.of_weights(step))
        scales.append(float(trainer.optimizer.loss_scale))

    for step in schedule.updates:
        if step in compared:
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


def _look(trainer, schedule: Schedule, against: Reference, scales: list[float], done: Callable[[int], None]) -> dict:
    """Computes the step of each compared batch at float32's weights, at the loss scale that the run itself had come to.

    At float32's weights and not at the run's own, because these drift apart in every run, and the gradients with them: what is
    left is what the precision does to one step.

    Returns:
        Of each compared step "gradients", {path of a variable: `squares` of its gradient}, and "nonfinite", the paths of the
        outputs that are not finite, in forward order. Of all "layers" and "in_16_bits", where the model computes in 16 bits.
    """
    probe, gradients, nonfinite = Probe(trainer, gradients=True), [], []
    batches = compared_batches(trainer, schedule)
    for number, (step, scale, batch) in enumerate(zip(schedule.compared, scales, batches, strict=True), start=1):
        against.restore(step)
        sight = probe(batch, step=step, loss_scale=scale)
        gradients.append(against.of_gradients(step, sight))
        nonfinite.append(_nonfinite(sight))
        done(schedule.steps + number)
    layers, in_16_bits = _layers(trainer, sight), _in_16_bits(trainer, sight)
    return {"gradients": gradients, "nonfinite": nonfinite, "layers": layers, "in_16_bits": in_16_bits}


def compared_batches(trainer, schedule: Schedule) -> Iterator[dict]:
    """Yields the batch of each compared step, as the run was trained on it.

    From a source that is built anew: a second iterator of a user's own dataset shuffles on from where its first one is.
    """
    config, compared = trainer.config, set(schedule.compared)
    keras_compat.seed_everything(config.seed)
    source = data.as_source(trainer.build_source("train"))
    batches = data.TrainingBatches(source, batch_size=config.data.batch_size, seed=config.seed, strategy=trainer.strategy)
    for step, batch in zip(range(schedule.first, schedule.last + 1), batches.open(schedule.first), strict=False):
        if step in compared:
            yield batch


def _nonfinite(sight: Sight) -> list[str]:
    """Returns the paths of the outputs that are not finite, in forward order."""
    rows = zip(sight.sites, sight.counts, strict=True)
    return [site.path for site, counts in rows if site.kind == OUTPUT and counts[_NOT_FINITE]]


def _layers(trainer, sight: Sight) -> list[dict]:
    """Returns the layers that have trained variables, in forward order as far as that was seen, with the paths of these."""
    trained = keras_compat.variables_by_path(trainer.trainable_variables)
    owners = {path: path.rpartition("/")[0] or path for path in trained}
    owners |= {site.path: site.layer for site in sight.sites if site.kind == WEIGHT}
    variables = {}
    for path, layer in owners.items():
        variables.setdefault(layer, []).append(path)
    outputs = [site.path for site in sight.sites if site.kind == OUTPUT]
    order = {path: place for place, path in reversed(list(enumerate(outputs)))}
    paths = sorted(variables, key=lambda path: order.get(path, len(order)))
    return [{"path": path, "variables": variables[path]} for path in paths]


def _in_16_bits(trainer, sight: Sight) -> str | None:
    """Returns the path of the first output in 16 bits, or "the model" where a cast to float16 is hidden in it, or None."""
    outputs = (site.path for site in sight.sites if site.kind == OUTPUT and site.dtype in ("float16", "bfloat16"))
    return next(outputs, "the model" if trainer.uses_float16 else None)
