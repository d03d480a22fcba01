"""Why a step is skipped: where its first value that is not finite comes from, and whether float32 has it too."""

import dataclasses
from collections.abc import Collection

from mptrain.numerics.places import GRADIENT, OUTPUT, Site
from mptrain.numerics.probe import Sight

NO_CURE = "the data or the model, which neither a loss scale nor a dtype cures"


@dataclasses.dataclass(frozen=True)
class Fault:
    """What a step is skipped for.

    Attributes:
        site: the first output in forward order, or else the first gradient in backward order, that is not finite.
        in_float32: whether the same step is not finite in float32 either, so that neither dtype nor loss scale is to blame;
            None: that is not known.
    """

    site: Site
    in_float32: bool | None


def first_nonfinite(sight: Sight, but: Collection[Site] = ()) -> Site | None:
    """Returns the first output in forward order that is not finite; else the first gradient in backward order; or None.

    Args:
        sight: of a step.
        but: sites that are passed over.
    """

    def order(site: Site) -> tuple[bool, int]:
        return (False, site.position) if site.kind == OUTPUT else (True, -site.position)

    return min((site for site in sight.nonfinite() if site not in but), key=order, default=None)


def fault(own: Sight, reference: Sight | None, usual: Collection[Site] = ()) -> Fault | None:
    """Returns why a step is skipped; None where it is not, or where nothing in it is seen that is not finite.

    What is not finite in a step that is applied is so by design, as scores are that a mask sets to minus infinity. It is known
    from the step in float32, where that is finite otherwise, and from other steps.

    Args:
        own: the step.
        reference: the same in float32; None where there is none.
        usual: sites that are not finite in steps that are applied.
    """
    if not own.overflowed():
        return None
    if reference is not None and reference.overflowed():
        return Fault(first_nonfinite(reference, usual), True)
    by_design = {*usual, *(reference.nonfinite() if reference else ())}
    return Fault(first_nonfinite(own, by_design), None if reference is None else False)


def where(site: Site) -> str:
    """Returns the name of a place whose values are not finite, in words."""
    if site.kind == OUTPUT:
        return f"the output of {site.path}" if site.after is None else f"the tensor {site.path!r}"
    return f"the gradient {'at the output of' if site.kind == GRADIENT else 'of'} {site.path}"
