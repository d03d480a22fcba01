"""Looks at one train step: computes it with every tensor of interest counted, and brings the counts to the host."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf

from mptrain import data, keras_compat, precision
from mptrain.numerics.recorder import Recorder, Site


@dataclasses.dataclass(frozen=True)
class Sight:
    """What one step showed, over all replicas.

    Attributes:
        sites: what was looked at: outputs in forward order, gradients in the order in which the step asked for them.
        counts: int64 [sites, n], as `tally.count` returns them.
        largest: the largest finite magnitudes, as they were in the step, float32 [sites].
        scales: what the true values had been multiplied by, float32 [sites].
        gradients: of each trained variable, by path, what the optimizer was given, summed over the replicas: unscaled, dense,
            float32; where the probe was asked for them.
    """

    sites: Sequence[Site]
    counts: np.ndarray
    largest: np.ndarray
    scales: np.ndarray
    gradients: Mapping[str, np.ndarray]


class Probe:
    """A trainer's train step, looked at.

    Args:
        trainer: any `Trainer`.
        applied: whether the step trains, as the trainer's own does; else nothing that it changes stays changed.
        reference: whether all layers compute in float32, whatever their precision is.
        float32_layers: or only those whose paths are given.
        gradients: whether to bring the gradients' values too; of a step that is not applied.
    """

    def __init__(
        self,
        trainer,
        *,
        applied: bool = False,
        reference: bool = False,
        float32_layers: Iterable[str] = (),
        gradients: bool = False,
    ):
        self._trainer = trainer
        self._applied = applied
        self._reference = reference
        self._float32_layers = tuple(float32_layers)
        self._gradients = gradients
        self._recorder = Recorder(trainer, dry=not applied)
        self._step = tf.function(self._traced)

    def __call__(self, batch, *, step: int | None = None, loss_scale: float | Mapping[str, float] | None = None) -> Sight:
        """Computes one step.

        Args:
            batch: a worker's share of a global batch.
            step: its number, from which its randomness follows; default: the trainer's. Of a step that is not applied.
            loss_scale: of all optimizers, or name -> loss scale; default: their own. Of a step that is not applied.
        """
        with contextlib.ExitStack() as stack:
            for context in (self._precision(), self._kernels().scope()):
                stack.enter_context(context)
            function = self._step.get_concrete_function(batch)
            if not self._applied:
                stack.enter_context(preserved(self._trainer, function.graph.variables))
            if step is not None:
                self._trainer.global_step.assign(step)
            if loss_scale is not None:
                self._set_loss_scale(loss_scale)
            counts, largest, scales, gradients = function(batch)
        largest = self._trainer.workers.gather(*largest.numpy()).max(axis=0).astype(np.float32)
        gradients = {path: gradient.numpy() for path, gradient in gradients.items()}
        return Sight(self._recorder.sites, counts.numpy(), largest, scales.numpy(), gradients)

    def _set_loss_scale(self, scale: float | Mapping[str, float]) -> None:
        scales = scale if isinstance(scale, Mapping) else dict.fromkeys(self._trainer.optimizers, scale)
        for name, value in scales.items():
            self._trainer.optimizers[name].state["loss_scale/loss_scale"].assign(value)

    def _traced(self, batch) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, dict[str, tf.Tensor]]:
        strategy = self._trainer.strategy
        with self._recorder.recording():
            counts, largest, scales, gradients = strategy.run(self._in_replica, args=(batch,))
        if self._applied:
            self._trainer.global_step.assign_add(1)
        largest = tf.reduce_max(tf.stack(strategy.experimental_local_results(largest)), 0)
        scales = strategy.experimental_local_results(scales)[0]
        gradients = {path: strategy.reduce("SUM", gradient, axis=None) for path, gradient in gradients.items()}
        return strategy.reduce("SUM", counts, axis=None), largest, scales, gradients

    def _in_replica(self, batch) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, dict[str, tf.Tensor]]:
        self._recorder.begin()
        self._trainer.guarded_step(data.replica_share(batch, self._trainer.strategy))
        return *self._recorder.counts(), self._recorder.gradients() if self._gradients else {}

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        """Layers compute in float32 where that is asked for; read by Keras and by the trainer while the step is traced."""
        trainer, own = self._trainer, self._trainer.precision
        layers = list(keras_compat.all_layers_by_path(trainer))
        if not self._reference:
            named = dict(keras_compat.all_layers_by_path(trainer.model))
            layers = [(path, named[path]) for path in self._float32_layers]
        with contextlib.ExitStack() as stack:
            for _, layer in layers:
                stack.enter_context(keras_compat.policy(layer, "float32"))
            if self._reference:
                trainer.precision = precision.get("float32")
            try:
                yield
            finally:
                trainer.precision = own

    def _kernels(self) -> precision.Kernels:
        float16 = self._trainer.uses_float16 and not self._reference
        return precision.kernels(float16, "auto", self._trainer.strategy)


def variables(trainer) -> list[tf.Variable]:
    """Returns every variable that a step of the trainer may change."""
    found = [*trainer.state.values(), *trainer.optimizer.window.values(), *keras_compat.variables(trainer)]
    found += [variable for metric in trainer.metrics.values() for variable in metric.variables]
    return list({id(raw): raw for raw in map(keras_compat.raw, found)}.values())


@contextlib.contextmanager
def preserved(trainer, read: Iterable[tf.Variable] = ()) -> Iterator[None]:
    """Puts everything that a step of the trainer changes back, in each replica, to the bits that it has now.

    Args:
        trainer: the trainer.
        read: more variables, which the step's graph reads or writes: the user's own may lie anywhere.
    """
    parts = [part for variable in variables(trainer) for part in trainer.strategy.experimental_local_results(variable)]
    known = {id(part) for part in parts}
    parts += [part for part in read if id(part) not in known]
    before = [tf.identity(part) for part in parts]
    try:
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.assign(value)
