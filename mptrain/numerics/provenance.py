"""Where an overflow came from: the skipped step is computed again, on the same weights and batch, with all layers watched."""

import dataclasses
import math
import time

from mptrain.console import Console
from mptrain.metrics_log import MetricsLog
from mptrain.numerics.collection import first_nonfinite
from mptrain.numerics.probe import Probe, Sight
from mptrain.numerics.recorder import OUTPUT, WEIGHT, Site
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
        site: the first output in forward order, or else the first gradient in backward order, that is not finite.
        loss_scale: the scale of that step.
        largest: how large the values are that overflowed: an output in float32, a gradient multiplied by the loss scale; None
            where they are not finite there either.
        variables: the paths of those whose gradients are not finite.
    """

    step: int
    site: Site
    loss_scale: float
    largest: float | None
    variables: tuple[str, ...]

    @property
    def forward(self) -> bool:
        """Whether the forward pass overflowed, which no loss scale cures."""
        return self.site.kind == OUTPUT

    def __str__(self) -> str:
        reaches = f"reaches {self.largest:,.0f}" if self.largest else "is not finite in float32 either"
        if self.forward:
            if self.largest and self.largest <= FORMATS["float16"].largest:
                reaches = f"is not finite, though in float32 it stays below {self.largest:.3g}"
            return f"step {self.step}: the output of {self.site.path} {reaches}: no loss scale cures that; see --mode=numerics"
        what = "the gradient of" if self.site.kind == WEIGHT else "the gradient at the output of"
        return (
            f"step {self.step}: {what} {self.site.path} {reaches} at loss scale {self.loss_scale:,.0f}, which loss scaling"
            f" cures; gradients of {len(self.variables)} variables are not finite"
        )


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
        self._done, self._last = 0, -math.inf

    def wanted(self) -> bool:
        """Whether the next skipped step is to be looked into; in all workers alike."""
        rested = self._done < _AT_ONCE or time.monotonic() - self._last > _PAUSE
        return self._trainer.training_batches.by_number and bool(self._trainer.workers.largest(rested))

    def __call__(self) -> None:
        """Looks into the update that was skipped last; called before another one is applied."""
        optimizer = self._trainer.optimizer
        count = int(optimizer.skipped_steps)
        [skip] = optimizer.skips(count - 1, count)
        origin = self.origin(skip)
        self._done, self._last = self._done + 1, time.monotonic()
        if origin is None:
            return
        self._console.warn(str(origin))
        self._log.event(
            origin.step,
            "provenance",
            layer=origin.site.path,
            tensor=origin.site.kind,
            forward=origin.forward,
            loss_scale=origin.loss_scale,
            largest=origin.largest,
            variables=list(origin.variables),
        )

    def origin(self, skip: Skip) -> Origin | None:
        """Computes the steps of a skipped update again; None where all of them are finite now, as their sum was not."""
        window = self._trainer.optimizer.accumulation_steps
        batches = self._trainer.training_batches.read(skip.update * window)
        for step in range(skip.update * window, (skip.update + 1) * window):
            batch = next(batches)
            sight = self._own(batch, step=step, loss_scale=skip.loss_scale)
            site = first_nonfinite(sight)
            if site is not None:
                bad = tuple(
                    site.path for site, row in zip(sight.sites, sight.counts, strict=True) if site.kind == WEIGHT and row[1]
                )
                return Origin(step, site, skip.loss_scale, self._largest(site, batch, step, skip.loss_scale), bad)
        return None

    def _largest(self, site: Site, batch, step: int, scale: float) -> float | None:
        """Returns how large the values of a site are where they do not overflow."""
        if site.kind == OUTPUT:
            return _largest(site, self._reference(batch, step=step, loss_scale=scale))
        lower = _largest(site, self._own(batch, step=step, loss_scale=scale * _LOWER))
        return lower and lower / _LOWER


def _largest(site: Site, sight: Sight) -> float | None:
    place = list(sight.sites).index(site)
    return None if sight.counts[place][1] else float(sight.largest[place]) or None
