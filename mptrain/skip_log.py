"""What is known of skipped updates: how many, which variables, and whether the loss itself had overflowed.

Written in the graph, only when an update is skipped, into a ring of the last ones; read by the host at the loop's end.
"""

import dataclasses

import tensorflow as tf

from mptrain.errors import RunError

RING = 64  # skipped updates that are remembered between two looks
_NEVER_WRITTEN = -1  # of a restored run: its count of skipped updates is in the checkpoint, this log is not


@dataclasses.dataclass(frozen=True)
class Skip:
    """One skipped update.

    Attributes:
        update: its number, counting applied and skipped ones from 0.
        loss_scale: the scale it was computed with.
        loss_finite: whether the loss was finite on every replica. If not, the forward pass overflowed and no scale can help.
        variables: the paths of the variables whose gradients were not finite, or so large that the sum of their squares
            overflows float32; in forward order.
    """

    update: int
    loss_scale: float
    loss_finite: bool
    variables: tuple[str, ...]

    @property
    def layer(self) -> str:
        """The path of the first layer in forward order that holds one of the variables."""
        return self.variables[0].rpartition("/")[0] or self.variables[0]

    @property
    def cause(self) -> str:
        """What overflowed, in words."""
        if self.loss_finite:
            return "the loss is finite, the backward pass overflows"
        return "the loss itself is not finite: the forward pass overflows, and no loss scale can help"


class SkipLog(tf.Module):
    """Counts applied and skipped updates and remembers the last skipped ones.

    Args:
        names: the paths of the trained variables.
    """

    def __init__(self, names: list[str]):
        super().__init__(name="skip_log")
        self._names = names
        self._updates = self._ring(tf.fill([RING], tf.constant(_NEVER_WRITTEN, tf.int64)), "skip_updates")
        self._scales = self._ring(tf.zeros([RING]), "skip_scales")
        self._losses_finite = self._ring(tf.zeros([RING], tf.bool), "skip_losses_finite")
        self._nonfinite = self._ring(tf.zeros([RING, len(names)], tf.bool), "skip_nonfinite")

    @staticmethod
    def _ring(values: tf.Tensor, name: str) -> tf.Variable:
        return tf.Variable(values, trainable=False, name=name, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)

    def write(self, skipped: tf.Tensor, applied: tf.Tensor, scale: tf.Tensor, finite: tf.Tensor, nonfinite: tf.Tensor) -> None:
        """Remembers a skipped update; called in the branch that skips.

        Args:
            skipped: updates skipped before this one, int64 scalar.
            applied: updates applied before this one, int64 scalar.
            scale: the loss scale, float32 scalar.
            finite: whether the loss was finite, bool scalar.
            nonfinite: for each trained variable whether its gradient was not finite, bool [variables].
        """
        place = [[skipped % RING]]
        rows = (
            (self._updates, skipped + applied),
            (self._scales, scale),
            (self._losses_finite, finite),
            (self._nonfinite, nonfinite),
        )
        for ring, row in rows:
            ring.assign(tf.tensor_scatter_nd_update(tf.convert_to_tensor(ring), place, row[tf.newaxis]))

    def read(self, first: int, end: int) -> list[Skip]:
        """Returns the skipped updates from number `first` up to `end`, as far as they are remembered; on the host."""
        rings = [ring.numpy() for ring in (self._updates, self._scales, self._losses_finite, self._nonfinite)]
        skips = []
        for number in range(max(first, end - RING), end):
            update, scale, finite, nonfinite = (ring[number % RING] for ring in rings)
            if update == _NEVER_WRITTEN:
                continue
            names = tuple(name for name, bad in zip(self._names, nonfinite, strict=True) if bad)
            skips.append(Skip(int(update), float(scale), bool(finite), names or tuple(self._names)))
        return skips


def raise_stuck(count: int, loss_scale: float, last: Skip | None = None) -> None:
    """Raises the error that ends a run whose last `count` updates were all skipped.

    Args:
        count: how many.
        loss_scale: the scale now.
        last: what is known of the last of them; None after a restore.

    Raises:
        RunError: always.
    """
    if last is None:
        raise RunError(
            f"{count} updates in a row were skipped, up to the checkpoint that was restored, so their cause is not known; the"
            f" loss scale is {loss_scale:g}. Start from an earlier checkpoint, or with a higher max_consecutive_skips to see it"
        )
    more = f" and {len(last.variables) - 5} more" if len(last.variables) > 5 else ""
    raise RunError(
        f"{count} updates in a row were skipped, the last at loss scale {last.loss_scale:g}: {last.cause}. First layer:"
        f" {last.layer}; gradients that are not finite, or above 1e19: {', '.join(last.variables[:5])}{more}"
    )
