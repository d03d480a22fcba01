"""What the ranges of a run mean: which layers float16 does not hold, why, and which loss scales fit the others.

A gradient that float16 loses matters by its share of the sum of magnitudes: the many tiny ones of a healthy network add up to
nothing. An output that it loses matters by number: behind a softmax each may be the argument of a logarithm.
"""

import dataclasses
import math

from mptrain.numerics.collection import Collection
from mptrain.numerics.places import GRADIENT, OUTPUT, Site
from mptrain.numerics.ranges import Range
from mptrain.numerics.tally import FORMATS

_LARGEST = FORMATS["float16"].largest
_LOST_GRADIENT = 0.01  # of the sum of magnitudes
_LOST_OUTPUT = 0.05  # of the values that are not zero
STARVED = 0.5  # of a gradient's values: are zero where float32 is held, though they are not if all is float32
_NEXT_TO_NOTHING = 2.0**-20  # as the gradient of a bias before a normalization, which is zero but for rounding
_SCALES = range(25)  # powers of two


@dataclasses.dataclass
class Layer:
    """One layer, scope or watched tensor of a report, or what is computed between two of them.

    Attributes:
        path: its path.
        dtype: of its output.
        outputs, gradients: sites, one for each call.
        weights: sites of its variables' gradients.
        risk: from 0 to 1.
        at_risk: whether float16 does not hold it as it is.
        held: whether float32 would mend it, where a loss scale cannot.
        certain: whether that is plain from the size of its values alone, or from its gradients.
        verdict: in words.
    """

    path: str
    dtype: str
    outputs: list[Site] = dataclasses.field(default_factory=list)
    gradients: list[Site] = dataclasses.field(default_factory=list)
    weights: list[Site] = dataclasses.field(default_factory=list)
    risk: float = 0.0
    at_risk: bool = False
    held: bool = False
    certain: bool = False
    verdict: str = ""

    @property
    def between(self) -> bool:
        """Whether it is no layer, but what is computed between two, or comes before the first."""
        return any(site.after is not None for site in self.outputs)


@dataclasses.dataclass(frozen=True)
class Scales:
    """Loss scales, as powers of two, and the layers that no single one of them fits."""

    lowest: int
    highest: int
    unfit: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the layers are judged for.

    Attributes:
        loss_scale: at the end of the run.
        lowered: whether it goes down by itself when gradients overflow.
        float16: what the same network did in float16; the run itself, where that computes in 16 bits.
    """

    loss_scale: float
    lowered: bool
    float16: Collection


def layers(found: Collection, compute_dtype: str) -> list[Layer]:
    """Returns the layers of a collection in forward order, not judged yet.

    Args:
        found: what was collected.
        compute_dtype: of what has weights and shows no output.
    """
    by_path = {}
    for site in sorted((site for site in found.observed if site.kind == OUTPUT), key=lambda site: site.position):
        by_path.setdefault(site.path, Layer(site.path, site.dtype)).outputs.append(site)
    for site in found.observed:
        if site.kind != OUTPUT:
            layer = by_path.setdefault(site.layer, Layer(site.layer, compute_dtype))
            (layer.gradients if site.kind == GRADIENT else layer.weights).append(site)
    return list(by_path.values())


def scales(found: Collection, judged: list[Layer]) -> Scales | None:
    """Returns the loss scales at which float16 holds the gradients of most layers; None where none has gradients."""
    bounds = {}
    for layer in judged:
        ranges = [] if _is_held(found, layer) else _gradients(found, layer)
        if ranges:
            bounds[layer.path] = max(map(_lowest, ranges)), min(map(_highest, ranges))
    if not bounds:
        return None
    unfit = {k: [path for path, (low, high) in bounds.items() if not low <= k <= high] for k in _SCALES}
    best = min(_SCALES, key=lambda k: len(unfit[k]))
    fit = [bounds[path] for path in bounds if path not in unfit[best]] or [(best, best)]
    return Scales(max(low for low, _ in fit), min(max(_SCALES), *(high for _, high in fit)), tuple(unfit[best]))


def _is_held(found: Collection, layer: Layer) -> bool:
    """Whether a layer computes in float32 in a run that computes in 16 bits."""
    return layer.dtype == "float32" and bool(found.reference)


def _gradients(found: Collection, layer: Layer) -> list[Range]:
    """Returns the ranges of a layer's gradients, but those that are next to nothing beside the others."""
    ranges = [found.true(*layer.gradients), *(found.true(site) for site in layer.weights)]
    top = max((each.largest() for each in ranges), default=0.0)
    return [each for each in ranges if each.largest() > top * _NEXT_TO_NOTHING]


def _lowest(values: Range) -> int:
    """The lowest power of two at which float16 loses next to nothing of the gradient."""
    return next((k for k in _SCALES if values.lost_at(k) <= _LOST_GRADIENT / 10), max(_SCALES) + 1)


def _highest(values: Range) -> int:
    """The highest at which twice its largest magnitude does not overflow."""
    return math.floor(math.log2(_LARGEST / 2 / values.largest()))


def judge(found: Collection, judged: list[Layer], fitting: Scales | None, setting: Setting) -> None:
    """Gives each layer its risk and verdict."""
    last = max((site.position for layer in judged for site in layer.outputs), default=0) + 1
    for layer in judged:
        cause = _cause(found, layer, fitting, setting) or Cause(0.0, _fits(found.true(*layer.outputs).largest()))
        layer.verdict = cause.words
        layer.at_risk = cause.tier >= 0.5
        layer.held = cause.tier > 0.75
        layer.certain = cause.tier in (_TOO_LARGE, _UNFIT)
        place = _place(layer, cause) / last
        later = place if cause.tier > 0.85 else 1 - place  # the first in forward, or in backward order, stands above the others
        layer.risk = max(cause.tier - 0.04 * later, 0.0) if cause.tier else 0.0


def _place(layer: Layer, cause: "Cause") -> int:
    sites = [cause.site] if cause.site else layer.outputs or layer.weights
    return max(sites[0].position, 0)


def _fits(largest: float) -> str:
    if not largest:
        return "fits"
    return f"fits, with {math.log2(_LARGEST / largest):.0f} powers of two above its largest output"


_TOO_LARGE, _UNFIT, _MOSTLY_LOST = 1.0, 0.8, 0.75


@dataclasses.dataclass(frozen=True)
class Cause:
    """A tier of risk, what there is to say, and the call that it is said of, where it is one of several."""

    tier: float
    words: str
    site: Site | None = None


def _cause(found: Collection, layer: Layer, fitting: Scales | None, setting: Setting) -> Cause | None:
    """Returns the gravest thing that there is to say of a layer; None where all is well."""
    if _is_held(found, layer):
        return _starved(found, layer, setting) or Cause(0.0, "computes in float32")
    if layer.dtype == "bfloat16":
        return _not_finite(found, layer, setting) or Cause(0.0, "computes in bfloat16, whose range is float32's")
    return (
        _too_large(found, layer)
        or _not_finite(found, layer, setting)
        or _loss_not_finite(found, layer, setting)
        or _bad_scale(found, layer, fitting, setting)
        or _next_to_end(found, layer)
    )


def _starved(found: Collection, layer: Layer, setting: Setting) -> Cause | None:
    """Whether what float32 would hold has vanished before it gets there."""
    exponent = round(math.log2(setting.loss_scale))
    for site in layer.gradients:
        if site not in found.reference or found.reference[site].lost_at(exponent) <= _LOST_GRADIENT:
            continue
        if (zeroed := found.observed[site].zeroed(found.reference[site])) > STARVED:
            words = f"computes in float32, but {zeroed:.0%} of its gradient vanishes on its way: hold what takes its output too"
            return Cause(_MOSTLY_LOST, words, site)
    return None


def _too_large(found: Collection, layer: Layer) -> Cause | None:
    largest = {site: found.true(site).largest() for site in layer.outputs if _overflows(found.true(site))}
    if not largest:
        return None
    site = min(largest, key=lambda site: site.position)
    words = f"{_subject(layer, site)} reaches {largest[site]:,.0f}, and float16 ends at 65,504: {_remedy(layer)}"
    return Cause(_TOO_LARGE, words, site)


def _overflows(values: Range) -> bool:
    return bool(values.overflowing()) or values.largest() > _LARGEST


def _not_finite(found: Collection, layer: Layer, setting: Setting) -> Cause | None:
    blamed = setting.float16.blamed(layer.outputs)
    if not blamed:
        return None
    site = min(blamed, key=lambda site: site.position)
    dtype = layer.dtype if layer.dtype == "bfloat16" else "float16"
    beside = f"and in float32 it stays below {found.true(site).largest():.3g}"
    if setting.float16.no_reference:
        beside = "and there is no float32 to compare it with"
    words = (
        f"{_subject(layer, site)} is not finite in {dtype}, though all that it is computed from is, {beside}: something inside"
        f" overflows, or divides by what vanished: {_remedy(layer)}"
    )
    return Cause(0.95, words, site)


def _loss_not_finite(found: Collection, layer: Layer, setting: Setting) -> Cause | None:
    if not setting.float16.loss_overflowed() or layer.between:
        return None
    if found.true(*layer.outputs).vanishing() > _LOST_OUTPUT:
        return Cause(0.9, f"{_vanished(found, layer)}, and the loss was not finite: hold it in float32")
    if setting.float16.blamed(layer.gradients):
        return Cause(
            0.88, "the loss was not finite though its output was: the loss divides by what vanished, or takes its logarithm"
        )
    return None


def _vanished(found: Collection, layer: Layer) -> str:
    return f"{found.true(*layer.outputs).vanishing():.0%} of its output that is not zero vanishes in float16"


def _bad_scale(found: Collection, layer: Layer, fitting: Scales | None, setting: Setting) -> Cause | None:
    if fitting and layer.path in fitting.unfit:
        return Cause(_UNFIT, "no loss scale holds both its gradients and those of the other layers: hold it in float32")
    gradients, scale = _gradients(found, layer), setting.loss_scale
    lost = max((each.lost_at(round(math.log2(scale))) for each in gradients), default=0.0)
    if lost > _LOST_GRADIENT:
        tier = _MOSTLY_LOST if lost > 0.5 else 0.7
        return Cause(
            tier, f"{lost:.0%} of its gradient vanishes at loss scale {scale:,.0f}: use at least {2**fitting.lowest:,.0f}"
        )
    largest = max((each.largest() for each in gradients), default=0.0) * scale
    if largest > _LARGEST and not setting.lowered:
        return Cause(
            0.72,
            f"its gradient reaches {largest:,.0f} at loss scale {scale:,.0f}, and float16 ends at 65,504: use at most"
            f" {2.0**fitting.highest:,.4g}",
        )
    return None


def _next_to_end(found: Collection, layer: Layer) -> Cause | None:
    output = found.true(*layer.outputs)
    if output.vanishing() > _LOST_OUTPUT:
        return Cause(0.2, f"{_vanished(found, layer)}, which harms only what takes its logarithm or divides by it")
    if output.largest() > _LARGEST / 2:
        return Cause(0.3, f"fits, but its output reaches {output.largest():,.0f}, within a factor of two of float16's end")
    return None


def _subject(layer: Layer, site: Site) -> str:
    calls = f" in call {site.call} of {len(layer.outputs)}" if len(layer.outputs) > 1 else ""
    if layer.between:
        return f"what {site.computed_by or 'the train step'} computes there itself, outside of any layer,{calls}"
    return f"its output{calls}"


def _remedy(layer: Layer) -> str:
    return "compute it in float32" if layer.between else "hold it in float32"
