"""Where an overflow came from: the skipped step is computed again, on the same weights and batch, with all layers watched."""

import dataclasses
import math
import time

from mptrain.console import Console
from mptrain.errors import one_line
from mptrain.metrics_log import MetricsLog
from mptrain.numerics.collection import first_nonfinite
from mptrain.numerics.probe import Probe, Sight
from mptrain.numerics.recorder import GRADIENT, OUTPUT, WEIGHT, Site
from mptrain.numerics.tally import FORMATS
from mptrain.skip_log import Skip

_AT_ONCE = 3  # overflows that are looked into before they are rationed
_PAUSE = 300.0  # seconds between two of the later ones
_NAMES = {OUTPUT: "the output of", GRADIENT: "the gradient at the output of", WEIGHT: "the gradient of"}
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
        loss_finite: whether the loss was.
    """

    step: int
    site: Site
    loss_scale: float
    largest: float | None
    variables: tuple[str, ...]
    loss_finite: bool

    @property
    def forward(self) -> bool:
        """Whether the forward pass or the loss overflowed, which no loss scale cures."""
        return self.site.kind == OUTPUT or not self.loss_finite

    def __str__(self) -> str:
        where = f"step {self.step}: {_NAMES[self.site.kind]} {self.site.path}"
        reaches = f"reaches {self.largest:,.0f}" if self.largest else "is not finite in float32 either"
        if self.site.kind == OUTPUT:
            if self.largest and self.largest <= FORMATS["float16"].largest:
                reaches = f"is not finite, though in float32 it stays below {self.largest:.3g}"
            return f"{where} {reaches}: no loss scale cures that; see --mode=numerics"
        if not self.loss_finite:
            return f"{where} is not finite, as the loss, though all outputs are: no loss scale cures that; see --mode=numerics"
        if not self.largest:
            return f"{where} is not finite at any loss scale, though the loss is; see --mode=numerics"
        return (
            f"{where} {reaches} at loss scale {self.loss_scale:,.0f}, which loss scaling cures; gradients of"
            f" {len(self.variables)} variables are not finite"
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
        end, window = int(self._trainer.global_step.numpy()), self._trainer.optimizer.accumulation_steps
        batches = self._trainer.training_batches.read(end - window)
        for step in range(end - window, end):
            batch = next(batches)
            sight = self._own(batch, step=step, loss_scale={optimizer: skip.loss_scale})
            if (site := first_nonfinite(sight)) is not None:
                rows = zip(sight.sites, sight.counts, strict=True)
                bad = tuple(other.path for other, row in rows if other.kind == WEIGHT and row[1])
                largest = self._largest(site, batch, step, optimizer, skip.loss_scale)
                return Origin(step, site, skip.loss_scale, largest, bad, skip.loss_finite)
        return None

    def _largest(self, site: Site, batch, step: int, optimizer: str, scale: float) -> float | None:
        """Returns how large the values of a site are where they do not overflow."""
        if site.kind == OUTPUT:
            return _largest(site, self._reference(batch, step=step, loss_scale={optimizer: scale}))
        lower = _largest(site, self._own(batch, step=step, loss_scale={optimizer: scale * _LOWER}))
        return lower and lower / _LOWER


def _largest(site: Site, sight: Sight) -> float | None:
    place = list(sight.sites).index(site)
    return None if sight.counts[place][1] else float(sight.largest[place]) or None
