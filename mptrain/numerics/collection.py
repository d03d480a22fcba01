"""Trains some steps with every one looked at, and adds up what they showed."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

from mptrain.numerics.faults import Fault, fault
from mptrain.numerics.places import Site
from mptrain.numerics.probe import Probe, Sight
from mptrain.numerics.ranges import Range


@dataclasses.dataclass
class Collection:
    """What some steps of one run showed.

    Attributes:
        first_step: the first of them.
        window: steps that make one update.
        steps: how many there were.
        observed: site -> its range, in the run's own precision; without the steps that are not finite in float32 either.
        reference: the same for the steps that were also computed in float32; empty where the run computes in float32 anyway.
        reference_steps: how many there were of those.
        no_reference: why none can be; "" where they can, or need not.
        faults: (step, why it was skipped), where that was seen.
        scales: (step, loss scale) at the start and wherever it changed.
        skips: what is known of the skipped updates.
        losses: of each step whose update was not skipped in it.
    """

    first_step: int
    window: int = 1
    steps: int = 0
    observed: dict[Site, Range] = dataclasses.field(default_factory=dict)
    reference: dict[Site, Range] = dataclasses.field(default_factory=dict)
    reference_steps: int = 0
    no_reference: str = ""
    faults: list[tuple[int, Fault]] = dataclasses.field(default_factory=list)
    scales: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    skips: list = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)

    def true(self, *sites: Site) -> Range:
        """Returns the range of the values at some sites, all together, as float32 has them, as far as that is known."""
        return Range.sum(self.reference.get(site, self.observed[site]) for site in sites)

    def blamed(self, sites: Iterable[Site]) -> list[Site]:
        """Returns those of `sites` that a step was skipped for, and that are finite in float32 as far as is known."""
        found = collections.Counter(fault.site for _, fault in self.faults if not fault.in_float32)
        return [site for site in sites if found[site]]

    def broken(self) -> list[tuple[int, Fault]]:
        """Returns the steps that are not finite in float32 either."""
        return [(step, fault) for step, fault in self.faults if fault.in_float32]

    def loss_overflowed(self) -> bool:
        """Whether the loss of a skipped update was not finite, for no reason that float32 has too."""
        broken = {step // self.window for step, _ in self.broken()}
        return any(not skip.loss_finite and skip.update not in broken for skip in self.skips)


class Collector:
    """Trains a trainer from where it stands, and adds up what its steps show, in `found`.

    Args:
        trainer: any `Trainer`.
        reference_every: each so many steps, the first included, the step is computed in float32 too, before it is applied; and
            each step that is skipped.
    """

    def __init__(self, trainer, reference_every: int):
        step = int(trainer.global_step.numpy())
        self._trainer = trainer
        self._reference_every = reference_every
        self._own, self._reference = Probe(trainer, applied=True), Probe(trainer, reference=True)
        self._skipped = {name: int(optimizer.skipped_steps) for name, optimizer in trainer.optimizers.items()}
        self._batches = trainer.training_batches.open(step)
        self._in_float32 = trainer.precision.name == "float32"
        self._usual = set()  # sites that are not finite in steps that are applied
        self._draws = None
        self.found = Collection(step, trainer.optimizer.accumulation_steps)

    def train(self, steps: int, on_step: Callable[[int], None] = lambda step: None) -> Collection:
        """Trains `steps` steps and returns `found`; `on_step` is called after each with the number of all so far."""
        for _ in range(steps):
            self._step(self._next_batches(), float(self._trainer.optimizer.loss_scale))
            on_step(self.found.steps)
        return self.found

    def trial(self, count: int) -> list[tuple[int, Sequence]]:
        """Returns (number, batches) of steps on which a change can be tried, on the weights as they are now.

        Those that were skipped for what float32 holds, where they can be read again, and those that come next; but none that is
        not finite in float32 either.
        """
        found, batches = self.found, self._trainer.training_batches
        skipped = [step for step, fault in found.faults if not fault.in_float32] if batches.by_number else []
        steps = []
        for step in skipped[:count]:
            reader = batches.read(found.first_step + (step - found.first_step) * self._draws)
            steps.append((step, [next(reader) for _ in range(self._draws)]))
        steps += [(found.first_step + found.steps + ahead, self._next_batches()) for ahead in range(count - len(steps) + 1)]
        return [(step, drawn) for step, drawn in steps if self._is_sound(step, drawn)]

    def _is_sound(self, step: int, batches: Sequence) -> bool:
        return self._in_float32 or bool(self.found.no_reference) or not self._reference(*batches, step=step).overflowed()

    def _next_batches(self) -> list:
        """Returns the batches that the next step draws."""
        if self._draws is not None:
            return [next(self._batches) for _ in range(self._draws)]
        first = next(self._batches)
        self._draws = self._own.draws(first)
        batches = [first, *(next(self._batches) for _ in range(self._draws - 1))]
        if not self._in_float32:
            self.found.no_reference = self._reference.obstacle(*batches)
        return batches

    def _step(self, batches: Sequence, scale: float) -> None:
        found = self.found
        step, comparable = found.first_step + found.steps, not self._in_float32 and not found.no_reference
        if not found.scales or found.scales[-1][1] != scale:
            found.scales.append((step, scale))
        reference = None
        if comparable and found.steps % self._reference_every == 0:
            reference = self._reference(*batches)
        for metric in self._trainer.metrics.values():
            metric.reset_state()
        own = self._own(*batches)
        if own.overflowed() and comparable and reference is None:  # a skipped step has changed nothing that this would see
            reference = self._reference(*batches, step=step, loss_scale=scale)
        self._note(step, own, reference)
        skipped = {name: int(each.skipped_steps) for name, each in self._trainer.optimizers.items()}
        if skipped == self._skipped:  # else the metrics are those from before the update
            found.losses.append(float(self._trainer.metrics["loss"].result()))
        for name, each in self._trainer.optimizers.items():
            found.skips += each.skips(self._skipped[name], skipped[name])
        self._skipped = skipped
        found.steps += 1

    def _note(self, step: int, own: Sight, reference: Sight | None) -> None:
        found = self.found
        why = fault(own, own if self._in_float32 else reference, self._usual)
        if why is None:
            self._usual |= set(own.nonfinite())
        else:
            found.faults.append((step, why))
            if why.in_float32:  # its values say nothing of dtypes
                own, reference = own.empty(), reference and reference.empty()
        _add(found.observed, own)
        if reference is not None:
            _add(found.reference, reference)
            found.reference_steps += 1


def _add(ranges: dict[Site, Range], sight: Sight) -> None:
    for site, row, largest, scale in zip(sight.sites, sight.counts, sight.largest, sight.scales, strict=True):
        ranges.setdefault(site, Range()).add(row, largest, scale)
