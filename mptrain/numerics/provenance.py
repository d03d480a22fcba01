"""Where an overflow came from: the skipped step is computed again, on the same weights and batch, with all layers watched."""

import dataclasses
import math
import time
from collections.abc import Sequence

from mptrain.console import Console
from mptrain.errors import InputError, one_line
from mptrain.metrics_log import MetricsLog
from mptrain.numerics.faults import NO_CURE, Fault, fault, where
from mptrain.numerics.places import OUTPUT, WEIGHT, Site
from mptrain.numerics.probe import Probe, Sight
from mptrain.numerics.tally import FORMATS
from mptrain.skip_log import Skip

_AT_ONCE = 3  # overflows that are looked into before they are rationed
_PAUSE = 300.0  # seconds between two of the later ones
_LOWER = 2.0**-12  # of the loss scale: at so much less a gradient shows how large it is


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the first value that is not finite comes from.

    Attributes:
        step: the step whose batch overflows.
        fault: where, and whether float32 has it too.
        loss_scale: the scale of that step.
        largest: how large the values are that overflowed: an output in float32, a gradient multiplied by the loss scale; None
            where that is not known.
        variables: the paths of those whose gradients are not finite.
        loss_finite: whether the loss was.
    """

    step: int
    fault: Fault
    loss_scale: float
    largest: float | None
    variables: tuple[str, ...]
    loss_finite: bool

    @property
    def site(self) -> Site:
        return self.fault.site

    @property
    def forward(self) -> bool:
        """Whether the forward pass or the loss overflowed, which no loss scale cures."""
        return self.site.kind == OUTPUT or not self.loss_finite

    def __str__(self) -> str:
        start = f"step {self.step}: {where(self.site)}"
        all_finite = ", as the loss, though all outputs are" if self.site.kind != OUTPUT and not self.loss_finite else ""
        if self.fault.in_float32:
            return f"{start} is not finite in float32 either{all_finite}: {NO_CURE}"
        if self.forward:
            return f"{start} {self._reaches}{all_finite}: no loss scale cures that; see --mode=numerics"
        if not self.largest:
            return f"{start} is not finite at any loss scale, though the loss is; see --mode=numerics"
        return (
            f"{start} {self._reaches} at loss scale {self.loss_scale:,.0f}, which loss scaling cures; gradients of"
            f" {len(self.variables)} variables are not finite"
        )

    @property
    def _reaches(self) -> str:
        """What the values at the site come to, in words."""
        if not self.largest or self.site.kind != OUTPUT and not self.loss_finite:
            return "is not finite"
        if self.site.kind == OUTPUT and self.largest <= FORMATS["float16"].largest:
            return f"is not finite, though in float32 it stays below {self.largest:.3g}"
        return f"reaches {self.largest:,.0f}"


class Provenance:
    """Looks into skipped steps, and tells: the first few, then one every five minutes.

    Args:
        trainer: the run's.
        console: gets a line for each.
        log: gets an event for each.
    """

    def __init__(self, trainer, console: Console, log: MetricsLog):
        self._trainer = trainer
        self._console = console
        self._log = log
        self._own = Probe(trainer)
        self._reference = Probe(trainer, reference=True)
        self._obstacle = None  # what keeps the step from being computed in float32; None: not asked yet
        self._done, self._last = 0, -math.inf

    def wanted(self) -> bool:
        """Whether the next skipped step is to be looked into; in all workers alike."""
        rested = self._done < _AT_ONCE or time.monotonic() - self._last > _PAUSE
        return self._trainer.training_batches.by_number and bool(self._trainer.workers.largest(rested))

    def __call__(self) -> None:
        """Looks into the update that was skipped last; called before another one is applied."""
        name = next(name for name, each in self._trainer.optimizers.items() if int(each.consecutive_skips))
        count = int(self._trainer.optimizers[name].skipped_steps)
        [skip] = self._trainer.optimizers[name].skips(count - 1, count)
        self._done, self._last = self._done + 1, time.monotonic()
        try:
            origin = self.origin(skip, name)
        except Exception as error:  # of the user's step, traced once more: a look at a run must never end it
            self._done, self._last = _AT_ONCE, math.inf
            reason = (one_line(error).splitlines() or [type(error).__name__])[-1]
            self._console.warn(f"skipped steps cannot be looked into ({reason}); config.numerics.provenance=False is silent")
            return
        if origin is None:
            return
        self._console.warn(str(origin))
        self._log.event(
            origin.step,
            "provenance",
            layer=origin.site.path,
            tensor=origin.site.kind,
            forward=origin.forward,
            in_float32=origin.fault.in_float32,
            loss_scale=origin.loss_scale,
            largest=origin.largest,
            variables=list(origin.variables),
        )

    def origin(self, skip: Skip, optimizer: str = "") -> Origin | None:
        """Computes the steps of the update that was skipped just now again; None where nothing in them is seen to overflow.

        Args:
            skip: what is known of it.
            optimizer: the name of the one that skipped it. What others have applied in that step meanwhile stays.
        """
        trainer = self._trainer
        end, window = int(trainer.global_step.numpy()), trainer.optimizer.accumulation_steps
        draws = self._own.draws(next(trainer.training_batches.read(end - window)))
        batches = trainer.training_batches.read(trainer.first_batch(end - window, draws))
        for step in range(end - window, end):
            drawn = [next(batches) for _ in range(draws)]
            self._check_repeatable(drawn)
            at = {"step": step, "loss_scale": {optimizer: skip.loss_scale}}
            own = self._own(*drawn, **at)
            if own.overflowed():
                reference = None if self._obstacle else self._reference(*drawn, **at)
                if (found := fault(own, reference)).site is None:
                    return None
                bad = tuple(site.path for site in own.nonfinite() if site.kind == WEIGHT)
                largest = self._largest(found, drawn, reference, at)
                return Origin(step, found, skip.loss_scale, largest, bad, skip.loss_finite)
        return None

    def _check_repeatable(self, drawn: Sequence) -> None:
        """Finds out, once, whether the step can be looked at, and in float32 too."""
        if self._obstacle is None:
            if obstacle := self._own.obstacle(*drawn):
                raise InputError(obstacle)
            self._obstacle = self._reference.obstacle(*drawn)

    def _largest(self, found: Fault, drawn: Sequence, reference: Sight | None, at: dict) -> float | None:
        """Returns how large the values of a site are where they do not overflow."""
        if found.in_float32:
            return None
        if found.site.kind == OUTPUT:
            return reference and reference.largest_of(found.site)
        scales = {name: scale * _LOWER for name, scale in at["loss_scale"].items()}
        lower = self._own(*drawn, step=at["step"], loss_scale=scales).largest_of(found.site)
        return lower and lower / _LOWER
