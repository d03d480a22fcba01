"""Trains some steps with every one looked at, and adds up what they showed."""

import collections
import dataclasses
from collections.abc import Callable

from mptrain.numerics.probe import Probe, Sight
from mptrain.numerics.ranges import Range
from mptrain.numerics.recorder import GRADIENT, OUTPUT, Site


@dataclasses.dataclass
class Collection:
    """What some steps of one run showed.

    Attributes:
        first_step: the first of them.
        steps: how many there were.
        observed: site -> its range, in the run's own precision.
        reference: the same for the steps that were also computed in float32; empty where the run computes in float32 anyway.
        reference_steps: how many there were of those.
        first_nonfinite: site -> in how many steps it was the first that was not finite.
        scales: (step, loss scale) at the start and wherever it changed.
        skips: what is known of the skipped updates.
        losses: of each step that was applied.
    """

    first_step: int
    steps: int = 0
    observed: dict[Site, Range] = dataclasses.field(default_factory=dict)
    reference: dict[Site, Range] = dataclasses.field(default_factory=dict)
    reference_steps: int = 0
    first_nonfinite: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    scales: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    skips: list = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)

    def true(self, site: Site) -> Range:
        """Returns the range of a site's values as float32 has them, as far as that is known."""
        return self.reference.get(site, self.observed[site])


class Collector:
    """Trains a trainer from where it stands, and adds up what its steps show, in `found`.

    Args:
        trainer: any `Trainer`.
        reference_every: each so many steps, the first included, the step is computed in float32 too, before it is applied.
    """

    def __init__(self, trainer, reference_every: int):
        step = int(trainer.global_step.numpy())
        self._trainer = trainer
        self._reference_every = reference_every if trainer.precision.name != "float32" else 0
        self._own, self._reference = Probe(trainer, applied=True), Probe(trainer, reference=True)
        self._skipped = {name: int(optimizer.skipped_steps) for name, optimizer in trainer.optimizers.items()}
        self._batches = trainer.training_batches.open(step)
        self.found = Collection(step)

    def train(self, steps: int, on_step: Callable[[int], None] = lambda step: None) -> Collection:
        """Trains `steps` steps and returns `found`; `on_step` is called after each with the number of all so far."""
        optimizer = self._trainer.optimizer
        for _ in range(steps):
            self._step(next(self._batches), float(optimizer.loss_scale), int(optimizer.applied_steps))
            on_step(self.found.steps)
        for name, each in self._trainer.optimizers.items():
            self.found.skips += each.skips(self._skipped[name], int(each.skipped_steps))
        return self.found

    def _step(self, batch, scale: float, applied: int) -> None:
        found, optimizer = self.found, self._trainer.optimizer
        if not found.scales or found.scales[-1][1] != scale:
            found.scales.append((found.first_step + found.steps, scale))
        if self._reference_every and found.steps % self._reference_every == 0:
            _add(found.reference, self._reference(batch))
            found.reference_steps += 1
        for metric in self._trainer.metrics.values():
            metric.reset_state()
        sight = self._own(batch)
        _add(found.observed, sight)
        if (site := first_nonfinite(sight)) is not None:
            found.first_nonfinite[site] += 1
        if int(optimizer.applied_steps) > applied or optimizer.accumulation_steps > 1:
            found.losses.append(float(self._trainer.metrics["loss"].result()))
        found.steps += 1


def first_nonfinite(sight: Sight) -> Site | None:
    """Returns the first output in forward order that is not finite; else the first gradient in backward order; or None."""
    outputs = [site.path for site in sight.sites if site.kind == OUTPUT]
    places = {path: place for place, path in enumerate(outputs)}

    def order(site: Site) -> tuple:
        if site.kind == OUTPUT:
            return 0, places[site.path]
        return 1, -places.get(site.layer, len(outputs)), site.kind != GRADIENT

    bad = [site for site, row in zip(sight.sites, sight.counts, strict=True) if row[1]]
    return min(bad, key=order, default=None)


def _add(ranges: dict[Site, Range], sight: Sight) -> None:
    for site, row, largest, scale in zip(sight.sites, sight.counts, sight.largest, sight.scales, strict=True):
        ranges.setdefault(site, Range()).add(row, largest, scale)
