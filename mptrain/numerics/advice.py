"""What to write into the config: the fewest layers to hold in float32, and the loss scale; tried before it is advised."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from mptrain import keras_compat, precision
from mptrain.numerics.faults import first_nonfinite
from mptrain.numerics.places import OUTPUT, Site
from mptrain.numerics.probe import Probe
from mptrain.numerics.verdicts import STARVED, Layer, Scales

_BEHIND = 2  # layers behind a site that are tried for its sake: each try is traced anew
_FRAGMENT = '''"""What --mode=numerics advises{for_what}: call it in get_config(), or paste its lines there."""


def hold_in_float32(config):
{lines}
'''


@dataclasses.dataclass(frozen=True)
class Advice:
    """Settings that mend a run.

    Attributes:
        float32_layers: regexes for `config.precision.float32_layers`, those that are there already among them; (): as it is.
        initial_scale: for `config.loss_scale`; None: as it is.
        in_code: what no config field reaches, such as a scope of a `tf.Module` or what is computed between layers: a line each.
        policy: for `config.precision`, where no layer with weights is left for 16 bits; None: as it is.
    """

    float32_layers: tuple[str, ...]
    initial_scale: float | None
    in_code: tuple[str, ...] = ()
    policy: str | None = None

    def __bool__(self) -> bool:
        """Whether a config can follow it."""
        return bool(self.float32_layers or self.policy) or self.initial_scale is not None

    def apply(self, config) -> None:
        """Writes the settings into a config."""
        if self.policy:
            config.precision.policy = self.policy
        if self.float32_layers:
            config.precision.float32_layers = self.float32_layers
        if self.initial_scale is not None:
            config.loss_scale.initial_scale = self.initial_scale

    def text(self, what: str) -> str:
        """Returns the Python file that does the same."""
        lines = []
        if self.policy:
            lines.append(f"config.precision.policy = {self.policy!r}")
        if self.float32_layers:
            lines.append(f"config.precision.float32_layers = {self.float32_layers!r}")
        if self.initial_scale is not None:
            lines.append(f"config.loss_scale.initial_scale = {self.initial_scale!r}")
        lines += [f"# {line}" for line in self.in_code]
        if not self:
            lines.append("pass")
        return _FRAGMENT.format(for_what=f" for {what}", lines="\n".join(f"    {line}" for line in lines))


class Advisor:
    """Finds what mends a run, by trying it.

    Args:
        trainer: the run's, or one of the same model that computes in float16.
        judged: its layers, in forward order.
        steps: (number, batches) of the steps on which advice is tried.
    """

    def __init__(self, trainer, judged: Sequence[Layer], steps: Sequence[tuple[int, Sequence]]):
        self._trainer = trainer
        self._judged = judged
        self._steps = steps
        self._reached = dict(keras_compat.all_layers_by_path(trainer.model))

    def advise(self, fitting: Scales | None) -> Advice | None:
        """Returns what mends the layers at risk; None where there are none.

        Layers that are judged to need float32 are held in it. Then the step is tried, with the advised scale, and as long as
        something is not finite, a layer that computes it is held too, or one that hands its values to it, or takes them. Each
        layer that is not certain to need float32 is left out again if that does no harm.

        Args:
            fitting: the loss scales that fit the layers.
        """
        at_risk = [layer for layer in self._judged if layer.at_risk]
        if not at_risk:
            return None
        scale = _nearest(self._trainer.config.loss_scale, fitting) if fitting and self._trainer.uses_float16 else None
        certain = [layer.path for layer in at_risk if layer.certain and layer.path in self._reached]
        needed = [layer.path for layer in at_risk if layer.held and layer.path in self._reached]
        shown = self._first_bad(certain, scale) is not None  # else these steps tell nothing of the layers that are not certain
        held, bad = self._mended(needed, scale)
        if shown:
            held = self._fewest(held, certain, bad, scale)
        held = self._fed(held, fitting.unfit if fitting else (), scale)
        in_code = tuple(self._in_code(at_risk, bad, mended=bad is None and bool(held)))
        if held and not self._weights_left(held):  # which a config with 16 bits may not ask for
            return Advice((), None, in_code, policy="float32")
        regexes = [f"^{re.escape(path)}$" for path in self._reached if path in held]
        before = [pattern for pattern in self._trainer.precision.float32_layers if pattern not in regexes]
        changed = None if scale == self._trainer.config.loss_scale.initial_scale else scale
        all_regexes = (*before, *regexes) if regexes else ()
        return Advice(all_regexes, changed, in_code)

    def _weights_left(self, held: Sequence[str]) -> bool:
        """Whether a layer with weights is still in 16 bits when those in `held` and what is inside them are not."""
        inside = {id(each) for path in held for each in keras_compat.layers_in(self._reached[path])}
        reached = {path for path, layer in self._reached.items() if id(layer) in inside}
        rows = [row for row in precision.plan(self._trainer.model) if row.parameters and row.layer not in reached]
        return any(row.compute_dtype != "float32" for row in rows)

    def _mended(self, needed: Sequence[str], scale: float | None) -> tuple[list[str], Site | None]:
        """Returns layers that keep everything finite, and None; or `needed`, and the first site that is still not finite."""
        first = bad = self._first_bad(needed, scale)
        held = list(needed)
        while bad is not None and (free := next(self._candidates(bad, held), None)):
            held.append(free)
            bad = self._first_bad(held, scale)
        return (held, None) if bad is None else (list(needed), first)

    def _fewest(self, held: list[str], certain: Sequence[str], bad: Site | None, scale: float | None) -> list[str]:
        for path in [path for path in held if path not in certain]:
            fewer = [other for other in held if other != path]
            if self._first_bad(fewer, scale) == bad:
                held = fewer
        return held

    def _fed(self, held: list[str], unfit: Iterable[str], scale: float | None) -> list[str]:
        """Returns `held` and what must be held behind the layers that no loss scale fits, so that gradients get there."""
        for layer in self._judged:
            if layer.path in unfit and layer.path in held and layer.gradients:
                behind = [path for path in self._behind(layer.gradients[-1]) if path in self._reached and path not in held]
                tries = [[*held, *behind[:count]] for count in range(len(behind) + 1)]
                held = next((each for each in tries if not self._starves(layer, each, scale)), held)
        return held

    def _starves(self, layer: Layer, held: Sequence[str], scale: float | None) -> bool:
        """Whether most of a layer's gradient vanishes on its way there, in the first of the steps."""
        reference = Probe(self._trainer, reference=True)
        for step, batches in self._steps[:1]:
            if not reference.obstacle(*batches):
                own = Probe(self._trainer, float32_layers=held)
                ranges = [probe(*batches, step=step, loss_scale=scale).range(*layer.gradients) for probe in (own, reference)]
                return ranges[0].zeroed(ranges[1]) > STARVED
        return False

    def _behind(self, site: Site) -> list[str]:
        behind = [layer.path for layer in self._judged if any(each.position > site.position for each in layer.outputs)]
        return behind[:_BEHIND]

    def _candidates(self, bad: Site, held: Sequence[str]) -> Iterable[str]:
        """Yields the layers that may mend a site, the likeliest first."""
        for path in (bad.layer, bad.computed_by, bad.after, *self._behind(bad)):
            if path in self._reached and path not in held:
                yield path

    def _in_code(self, at_risk: Sequence[Layer], bad: Site | None, mended: bool) -> Iterable[str]:
        """Yields what only the user's code can mend, and why."""
        paths = [layer.path for layer in at_risk if layer.held and layer.path not in self._reached and not mended]
        if bad is not None and bad.kind == OUTPUT and bad.path not in paths and bad.path not in self._reached:
            paths.append(bad.path)
        sites = {site.path: site for layer in self._judged for site in layer.outputs}
        if bad is not None:
            sites[bad.path] = bad
        for path in paths:
            site = sites.get(path)
            if site is not None and site.after is not None and not site.computed_by:
                yield f"In your own code, {path!r} leaves float16 before it reaches a layer: scale it, or wrap it in a layer"
            elif site is not None and site.after is not None:
                yield f"{path!r} is computed by {site.computed_by} itself, outside of any layer that can be held in float32."
                yield "In its code, compute that in float32: x = tf.cast(x, tf.float32) before it, and cast back behind it."
            else:
                yield f"In your own code, compute {path!r} in float32: tf.cast(x, tf.float32)."
        if bad is not None and not paths:
            yield f"With all of this {bad.path!r} is still not finite: it needs a change of the model or of the loss."

    def _first_bad(self, held: Sequence[str], scale: float | None) -> Site | None:
        """Returns the first site that is not finite in any of the steps; None if all are."""
        probe = Probe(self._trainer, float32_layers=held)
        for step, batches in self._steps:
            sight = probe(*batches, step=step, loss_scale=scale)
            if sight.overflowed():
                return first_nonfinite(sight)
        return None


def _nearest(settings: ConfigDict, fitting: Scales) -> float:
    """Returns the fitting scale nearest to the configured one."""
    lowest, highest = (
        min(max(2.0**each, settings.min_scale), settings.max_scale) for each in (fitting.lowest, fitting.highest)
    )
    return min(max(settings.initial_scale, lowest), highest)
