"""What to write into the config: the fewest layers to hold in float32, and the loss scale; tried before it is advised."""

import dataclasses
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from mptrain import keras_compat
from mptrain.numerics.collection import first_nonfinite
from mptrain.numerics.probe import Probe
from mptrain.numerics.verdicts import Layer, Scales

_FRAGMENT = '''"""What --mode=numerics advises{for_what}: call it in get_config(), or paste its lines there."""


def hold_in_float32(config):
{lines}
'''


@dataclasses.dataclass(frozen=True)
class Advice:
    """Settings that mend a run.

    Attributes:
        float32_layers: regexes for `config.precision.float32_layers`; those that are there already among them.
        initial_scale: for `config.loss_scale`; None: as it is.
        outside: paths of what no config field reaches, such as a scope of a `tf.Module`.
    """

    float32_layers: tuple[str, ...]
    initial_scale: float | None
    outside: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether a config can follow it."""
        return bool(self.float32_layers) or self.initial_scale is not None

    def apply(self, config) -> None:
        """Writes the settings into a config."""
        config.precision.float32_layers = self.float32_layers
        if self.initial_scale is not None:
            config.loss_scale.initial_scale = self.initial_scale

    def text(self, what: str) -> str:
        """Returns the Python file that does the same."""
        lines = []
        if self.float32_layers:
            lines.append(f"config.precision.float32_layers = {self.float32_layers!r}")
        if self.initial_scale is not None:
            lines.append(f"config.loss_scale.initial_scale = {self.initial_scale!r}")
        lines += [f"# In your own code, compute {path!r} in float32: tf.cast(x, tf.float32)." for path in self.outside]
        if not self:
            lines.append("pass")
        return _FRAGMENT.format(for_what=f" for {what}", lines="\n".join(f"    {line}" for line in lines))


def advise(trainer, judged: Sequence[Layer], fitting: Scales | None, batches: Sequence) -> Advice | None:
    """Returns what mends the layers at risk; None where there are none.

    Layers that are judged to need float32 are held in it. Then the step is tried on `batches`, with the advised scale, and as
    long as something is not finite, the first such layer is held too, as one that is given values beyond float16. Of those
    that were added so, each is left out again if that does no harm.

    Args:
        trainer: the run's, or one of the same model that computes in float16.
        judged: its layers, in forward order.
        fitting: the loss scales that fit them.
        batches: some of a worker's training batches.
    """
    if not any(layer.at_risk for layer in judged):
        return None
    reached = dict(keras_compat.all_layers_by_path(trainer.model))
    order = [layer.path for layer in judged if layer.path in reached]
    scale = fitting and _scale(trainer.config.loss_scale, fitting)
    needed = [layer.path for layer in judged if layer.held and layer.path in reached]
    held = list(needed)
    while (bad := _first_bad(trainer, held, scale, batches)) is not None:
        behind = order[order.index(bad) :] if bad in order else []
        free = [path for path in (bad, *behind) if path in reached and path not in held]
        if not free:
            break
        held.append(free[0])
    for path in [path for path in held if path not in needed]:
        fewer = [other for other in held if other != path]
        if _first_bad(trainer, fewer, scale, batches) is None:
            held = fewer
    regexes = [f"^{re.escape(path)}$" for path in reached if path in held]
    before = [pattern for pattern in trainer.precision.float32_layers if pattern not in regexes]
    outside = tuple(layer.path for layer in judged if layer.held and layer.path not in reached)
    return Advice((*before, *regexes), scale, outside)


def _scale(settings: ConfigDict, fitting: Scales) -> float | None:
    """Returns the fitting scale nearest to the configured one; None if that fits."""
    now = settings.initial_scale
    lowest, highest = (
        min(max(2.0**each, settings.min_scale), settings.max_scale) for each in (fitting.lowest, fitting.highest)
    )
    nearest = min(max(now, lowest), highest)
    return None if nearest == now else nearest


def _first_bad(trainer, held: Sequence[str], scale: float | None, batches: Sequence) -> str | None:
    """Returns the layer of the first site that is not finite in any of the batches; None if all are."""
    probe = Probe(trainer, float32_layers=held)
    for batch in batches:
        site = first_nonfinite(probe(batch, loss_scale=scale))
        if site is not None:
            return site.layer
    return None
