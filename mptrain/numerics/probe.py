"""Looks at one train step: computes it with every tensor of interest counted, and brings the counts to the host."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf

from mptrain import forward_graph, keras_compat, precision
from mptrain.errors import InputError, one_line
from mptrain.numerics import in_float32, tally
from mptrain.numerics.places import WEIGHT, Site
from mptrain.numerics.ranges import Range
from mptrain.numerics.recorder import Recorder

_OWN_CASTS = "the model casts to 16 bits by itself"


@dataclasses.dataclass(frozen=True)
class Sight:
    """What one step showed, over all replicas.

    Attributes:
        sites: what was looked at: gradients in the order in which the step asked for them, then outputs in forward order.
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

    def nonfinite(self) -> list[Site]:
        """Returns the sites with values that are not finite."""
        return [site for site, row in zip(self.sites, self.counts, strict=True) if row[1]]

    def empty(self) -> "Sight":
        """Returns the same sites with nothing seen there."""
        return dataclasses.replace(self, counts=np.zeros_like(self.counts), largest=np.zeros_like(self.largest))

    def range(self, *sites: Site) -> Range:
        """Returns the range of the values at some sites, all together."""
        whole = Range()
        for site, row, largest, scale in zip(self.sites, self.counts, self.largest, self.scales, strict=True):
            if site in sites:
                whole.add(row, largest, scale)
        return whole

    def overflowed(self) -> bool:
        """Whether a weight's gradient is not finite, so that the step is skipped."""
        return any(site.kind == WEIGHT for site in self.nonfinite())

    def largest_of(self, site: Site) -> float | None:
        """Returns the largest magnitude at a site; None where that is not seen, or zero, or something is not finite there."""
        places = [place for place, other in enumerate(self.sites) if other == site]
        if not places or self.counts[places, 1].any():
            return None
        return float(self.largest[places].max()) or None


class Probe:
    """A trainer's train step, looked at.

    Args:
        trainer: any `Trainer`.
        applied: whether the step trains, as the trainer's own does; else nothing that it changes stays changed.
        reference: whether all of it computes in float32, whatever its precision is.
        float32_layers: or only the layers whose paths are given.
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
        self._recorder = Recorder(trainer, dry=not applied, gradients=gradients)
        self._step = tf.function(self._traced)
        self._shown = {}  # number of batches given -> (sites, number of batches drawn)

    def __call__(self, *batches, step: int | None = None, loss_scale: float | Mapping[str, float] | None = None) -> Sight:
        """Computes one step.

        Args:
            batches: those that the trainer's `train_step` draws, as its iterator would yield them; see `draws`.
            step: its number, from which its randomness follows; default: the trainer's. Of a step that is not applied.
            loss_scale: of all optimizers, or name -> loss scale; default: their own. Of a step that is not applied.

        Raises:
            InputError: if `train_step` draws more batches than these, or cannot be followed.
        """
        with contextlib.ExitStack() as stack:
            function = stack.enter_context(self._function(batches))
            sites, drawn = self._shown[len(batches)]
            if drawn > len(batches):
                raise InputError(f"train_step() draws {drawn} batches a step, and {len(batches)} can be looked at")
            if not self._applied:
                scales = self._loss_scales(loss_scale)
                stack.enter_context(preserved(self._trainer, function.graph.variables))
                for name, optimizer in self._trainer.optimizers.items():
                    optimizer.state["loss_scale/loss_scale"].assign(scales[name])
            if step is not None:
                self._trainer.global_step.assign(step)
            counts, largest, scales, gradients = function(batches)
        largest = self._trainer.workers.gather(*largest.numpy()).max(axis=0).astype(np.float32)
        gradients = {path: gradient.numpy() for path, gradient in gradients.items()}
        return Sight(sites, counts.numpy(), largest, scales.numpy(), gradients)

    def _loss_scales(self, wanted: float | Mapping[str, float] | None) -> dict[str, float]:
        if wanted is not None and not isinstance(wanted, Mapping):
            return dict.fromkeys(self._trainer.optimizers, wanted)
        return {name: float(each.loss_scale) for name, each in self._trainer.optimizers.items()} | dict(wanted or {})

    def sites(self, *batches) -> list[Site]:
        """Returns what a step shows, without computing it."""
        with self._function(batches):
            return self._shown[len(batches)][0]

    def draws(self, batch) -> int:
        """Returns how many batches a step draws from the iterator that its `train_step` is given; `batch`: any of them.

        Raises:
            InputError: if that is decided in the graph.
        """
        with self._function((batch,)):
            return self._shown[1][1]

    def obstacle(self, *batches) -> str:
        """Returns what keeps the step from being computed beside the trainer's own, or in float32; "" where nothing does."""
        try:
            with self._function(batches) as function:
                graph = function.graph
        except (TypeError, ValueError, tf.errors.InvalidArgumentError) as error:
            if self._reference:
                return f"{_OWN_CASTS}, and cannot be traced in float32 ({one_line(error).splitlines()[-1]})"
            raise
        if any(node.op.startswith("IteratorGetNext") for node in forward_graph.all_nodes(graph)):
            return "the step draws from an iterator of its own, which cannot be read twice"
        return (
            "" if not self._reference or in_float32.holds(graph) else f"{_OWN_CASTS}, in another way than by tf.cast(x, dtype)"
        )

    @contextlib.contextmanager
    def _function(self, batches: Sequence):
        """Yields the traced step, in the contexts in which it may be traced or called."""
        with self._precision(), self._kernels().scope():
            yield self._step.get_concrete_function(batches)

    def _traced(self, batches: Sequence) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, dict[str, tf.Tensor]]:
        strategy = self._trainer.strategy
        with self._recorder.recording() as found:
            drawn = _Drawn(batches)
            self._trainer.train_step(drawn)
        self._shown[len(batches)] = [site for counted in found for site in counted.sites], drawn.count
        sums, gradients = [tally.nothing()], {}
        for counted in found:
            largest = tf.reduce_max(tf.stack(strategy.experimental_local_results(counted.largest)), 0)
            scales = strategy.experimental_local_results(counted.scales)[0]
            sums.append((strategy.reduce("SUM", counted.counts, axis=None), largest, scales))
            for path, gradient in counted.gradients.items():
                gradients[path] = gradients.get(path, 0.0) + strategy.reduce("SUM", gradient, axis=None)
        return *(tf.concat(parts, 0) for parts in zip(*sums, strict=True)), gradients

    def _precision(self) -> contextlib.AbstractContextManager:
        if self._reference:
            return in_float32.everything(self._trainer)
        named = dict(keras_compat.all_layers_by_path(self._trainer.model))
        return in_float32.layers(named[path] for path in self._float32_layers)

    def _kernels(self) -> precision.Kernels:
        dtypes = () if self._reference else self._trainer.sixteen_bits
        return precision.kernels(dtypes, "auto", self._trainer.strategy)


class _Drawn:
    """Stands for the iterator of a `train_step`, while that is traced: yields the batches that were drawn beforehand.

    Attributes:
        count: how many were asked for.
    """

    def __init__(self, batches: Sequence):
        self._batches = batches
        self._graph = tf.compat.v1.get_default_graph()
        self.count = 0

    def __iter__(self) -> "_Drawn":
        return self

    def __next__(self):
        if tf.compat.v1.get_default_graph() is not self._graph:
            raise InputError("train_step() draws batches inside a loop or a branch of the graph: how many is not known before")
        self.count += 1
        return self._batches[min(self.count, len(self._batches)) - 1]

    get_next = __next__


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
