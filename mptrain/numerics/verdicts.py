"""What the ranges of a run mean: which layers float16 does not hold, why, and which loss scales fit the others.

A gradient that float16 loses matters by its share of the sum of magnitudes: the many tiny ones of a healthy network add up to
nothing. An output that it loses matters by number: behind a softmax each may be the argument of a logarithm.
"""

import dataclasses
import math

from mptrain.numerics.collection import Collection
from mptrain.numerics.ranges import Range
from mptrain.numerics.recorder import GRADIENT, OUTPUT, WEIGHT, Site
from mptrain.numerics.tally import FORMATS

_LARGEST = FORMATS["float16"].largest
_LOST_GRADIENT = 0.01  # of the sum of magnitudes
_LOST_OUTPUT = 0.05  # of the values that are not zero
_NEXT_TO_NOTHING = 2.0**-20  # as the gradient of a bias before a normalization, which is zero but for rounding
_SCALES = range(25)  # powers of two


@dataclasses.dataclass
class Layer:
    """One layer, scope or watched tensor of a report.

    Attributes:
        path: its path.
        dtype: of its output.
        order: its place in forward order.
        output, gradient: sites, or None.
        weights: sites of its variables' gradients.
        risk: from 0 to 1.
        at_risk: whether float16 does not hold it as it is.
        held: whether float32 would mend it, where a loss scale cannot.
        verdict: in words.
    """

    path: str
    dtype: str
    order: int
    output: Site | None = None
    gradient: Site | None = None
    weights: list[Site] = dataclasses.field(default_factory=list)
    risk: float = 0.0
    at_risk: bool = False
    held: bool = False
    verdict: str = ""


@dataclasses.dataclass(frozen=True)
class Scales:
    """Loss scales, as powers of two, and the layers that no single one of them fits."""

    lowest: int
    highest: int
    unfit: tuple[str, ...] = ()


def layers(found: Collection, compute_dtype: str) -> list[Layer]:
    """Returns the layers of a collection in forward order, not judged yet.

    Args:
        found: what was collected.
        compute_dtype: of what has weights and shows no output.
    """
    by_path = {}
    for site in found.observed:
        if site.kind == OUTPUT:
            by_path.setdefault(site.path, Layer(site.path, site.dtype, len(by_path))).output = site
    for site in found.observed:
        layer = by_path.setdefault(site.layer, Layer(site.layer, compute_dtype, len(by_path)))
        if site.kind == GRADIENT:
            layer.gradient = site
        elif site.kind == WEIGHT:
            layer.weights.append(site)
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
    ranges = [found.true(site) for site in (layer.gradient, *layer.weights) if site is not None]
    top = max((each.largest() for each in ranges), default=0.0)
    return [each for each in ranges if each.largest() > top * _NEXT_TO_NOTHING]


def _lowest(values: Range) -> int:
    """The lowest power of two at which float16 loses next to nothing of the gradient."""
    return next((k for k in _SCALES if values.lost_at(k) <= _LOST_GRADIENT / 10), max(_SCALES) + 1)


def _highest(values: Range) -> int:
    """The highest at which twice its largest magnitude does not overflow."""
    return math.floor(math.log2(_LARGEST / 2 / values.largest()))


def judge(found: Collection, judged: list[Layer], fitting: Scales | None, loss_scale: float) -> None:
    """Gives each layer its risk and verdict."""
    overflowed_loss = any(not skip.loss_finite for skip in found.skips)
    for layer in judged:
        tier, layer.verdict = _cause(found, layer, fitting, loss_scale, overflowed_loss)
        ties = layer.order if tier > 0.85 else len(judged) - layer.order  # the first in forward, or in backward order
        layer.at_risk = tier >= 0.5
        layer.held = tier > 0.75
        layer.risk = max(tier - 0.04 * ties / len(judged), 0.0) if tier else 0.0


def _cause(found: Collection, layer: Layer, fitting: Scales | None, scale: float, overflowed_loss: bool) -> tuple[float, str]:
    if layer.dtype == "bfloat16":
        return 0.0, "computes in bfloat16, whose range is float32's"
    output = found.true(layer.output) if layer.output else Range()
    gradients = _gradients(found, layer)
    largest = output.largest()
    if _is_held(found, layer):
        return 0.0, "computes in float32"
    if output.overflowing() or largest > _LARGEST:
        return 1.0, f"its output reaches {largest:,.0f}, and float16 ends at 65,504: hold it in float32"
    if layer.output and found.first_nonfinite[layer.output]:
        return 0.95, (
            f"its output is not finite in float16, though it was given finite values and in float32 stays below {largest:.3g}:"
            " something inside it overflows, or divides by what vanished: hold it in float32"
        )
    if output.vanishing() > _LOST_OUTPUT and overflowed_loss:
        lost = f"{output.vanishing():.0%} of its output that is not zero vanishes in float16"
        return 0.9, f"{lost}, and the loss was not finite: hold it in float32"
    if layer.gradient and found.first_nonfinite[layer.gradient] and overflowed_loss:
        return 0.88, "the loss was not finite though its output was: the loss divides by what vanished, or takes its logarithm"
    if fitting and layer.path in fitting.unfit:
        return 0.8, "no loss scale holds both its gradients and those of the other layers: hold it in float32"
    lost = max((each.lost_at(round(math.log2(scale))) for each in gradients), default=0.0)
    if lost > _LOST_GRADIENT:
        return 0.7, f"{lost:.0%} of its gradient vanishes at loss scale {scale:,.0f}: use at least {2**fitting.lowest:,.0f}"
    if output.vanishing() > _LOST_OUTPUT:
        lost = f"{output.vanishing():.0%} of its output that is not zero vanishes in float16"
        return 0.2, f"{lost}, which harms only what takes its logarithm or divides by it"
    headroom = math.log2(_LARGEST / largest) if largest else math.inf
    if headroom < 1:
        return 0.3, f"fits, but its output reaches {largest:,.0f}, within a factor of two of float16's end"
    return 0.0, "fits" + (f", with {headroom:.0f} powers of two above its largest output" if largest else "")
