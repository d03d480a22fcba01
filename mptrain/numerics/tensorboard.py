"""Ranges in TensorBoard: at an interval, the exponents of the chosen layers' tensors as histograms, and what float16 loses."""

import re
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from tensorboard.plugins.histogram import metadata

from mptrain.errors import InputError
from mptrain.numerics.probe import Probe
from mptrain.numerics.ranges import Range
from mptrain.numerics.recorder import OUTPUT


class Histograms:
    """An Orbit action: looks at the step that comes next, at absolute multiples of `every_steps`, and writes what it sees.

    Args:
        trainer: the run's.
        folder: TensorBoard's; None: nothing is written, as by the workers that are not the chief.
        every_steps: the interval.
        layers: regexes; what belongs to a layer in whose path one is found is written.

    Raises:
        InputError: if the data cannot be read twice, or a regex is none.
    """

    def __init__(self, trainer, folder: str | None, every_steps: int, layers: tuple[str, ...]):
        if not trainer.training_batches.by_number:
            raise InputError(
                "config.numerics.every_steps looks at batches twice, which a tf.data.Dataset does not allow: set it to 0, or"
                " return arrays from build_source()"
            )
        try:
            self._chosen = [re.compile(pattern) for pattern in layers]
        except re.error as error:
            raise InputError(f"config.numerics.layers: {layers!r} holds no regular expression: {error}") from error
        self._trainer = trainer
        self._every_steps = every_steps
        self._probe = Probe(trainer)
        self._writer = tf.summary.create_file_writer(folder) if folder else tf.summary.create_noop_writer()

    def __call__(self, outputs: Mapping[str, float]) -> None:
        step = int(self._trainer.global_step.numpy())
        if step % self._every_steps:
            return
        sight = self._probe(next(self._trainer.training_batches.read(step)))
        with self._writer.as_default(step=step):
            for site, row, largest, scale in zip(sight.sites, sight.counts, sight.largest, sight.scales, strict=True):
                if any(pattern.search(site.layer) for pattern in self._chosen):
                    seen = Range()
                    seen.add(row, largest, scale)
                    _write(f"numerics/{site.kind}/{site.path}", seen, scaled=site.kind != OUTPUT)
        self._writer.flush()


def _write(tag: str, seen: Range, scaled: bool) -> None:
    """Writes one tensor as it was in the step: gradients multiplied by the loss scale."""
    whole = seen.as_json(scaled)
    shown = whole["scaled"] if scaled else whole
    first, counts = shown["histogram"]["first"], np.array(shown["histogram"]["counts"], np.float64)
    edges = first + np.arange(len(counts) + 1, dtype=np.float64)
    # Not tf.summary.histogram: it takes values and divides their range evenly, where these are counts of exponents already.
    tf.summary.write(
        tag,
        np.stack([edges[:-1], edges[1:], counts], axis=1),
        metadata=metadata.create_summary_metadata(display_name=None, description="floor(log2|x|)"),
    )
    tf.summary.scalar(f"{tag}/largest", shown["largest"])
    tf.summary.scalar(f"{tag}/nonfinite", whole["nonfinite"])
    for name in ("underflow", "subnormal", "overflow"):
        tf.summary.scalar(f"{tag}/float16_{name}", shown["float16"][name])
