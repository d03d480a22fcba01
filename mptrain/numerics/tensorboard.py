"""Ranges in TensorBoard: at an interval, the exponents of the chosen layers' tensors as histograms, and what float16 loses."""

import difflib
import re
from collections.abc import Collection, Mapping

import numpy as np
import tensorflow as tf
from tensorboard.plugins.histogram import metadata

from mptrain.errors import InputError
from mptrain.numerics.places import OUTPUT
from mptrain.numerics.probe import Probe
from mptrain.numerics.ranges import Range

_NEAREST = 3  # paths that are named where a regex is found in none


class Histograms:
    """An Orbit action: looks at the step that comes next, at absolute multiples of `every_steps`, and writes what it sees.

    Args:
        trainer: the run's.
        folder: TensorBoard's; None: nothing is written, as by the workers that are not the chief.
        every_steps: the interval.
        layers: regexes; what belongs to a layer in whose path one is found is written.

    Raises:
        InputError: if the data cannot be read twice, or a regex is none or is found in no path.
    """

    def __init__(self, trainer, folder: str | None, every_steps: int, layers: tuple[str, ...]):
        if not trainer.training_batches.by_number:
            raise InputError(
                "config.numerics.every_steps looks at batches twice, which a tf.data.Dataset does not allow: set it to 0, or"
                " return arrays from build_source()"
            )
        self._trainer = trainer
        self._every_steps = every_steps
        self._probe = Probe(trainer)
        self._writer = tf.summary.create_file_writer(folder) if folder else tf.summary.create_noop_writer()
        batch = next(trainer.training_batches.read(int(trainer.global_step.numpy())))
        self._draws = self._probe.draws(batch)
        drawn = [batch] * self._draws
        if obstacle := self._probe.obstacle(*drawn):
            raise InputError(f"config.numerics.every_steps looks at a step twice, and {obstacle}: set it to 0")
        paths = {site.layer for site in self._probe.sites(*drawn)}
        self._chosen = {path for pattern in layers for path in _found(pattern, paths)}

    def __call__(self, outputs: Mapping[str, float]) -> None:
        step = int(self._trainer.global_step.numpy())
        if step % self._every_steps:
            return
        batches = self._trainer.training_batches.read(self._trainer.first_batch(step, self._draws))
        sight = self._probe(*(next(batches) for _ in range(self._draws)))
        with self._writer.as_default(step=step):
            for site, row, largest, scale in zip(sight.sites, sight.counts, sight.largest, sight.scales, strict=True):
                if site.layer in self._chosen:
                    seen = Range()
                    seen.add(row, largest, scale)
                    call = f"/call_{site.call}" if site.call > 1 else ""
                    _write(f"numerics/{site.kind}/{site.path}{call}", seen, scaled=site.kind != OUTPUT)
        self._writer.flush()


def _found(pattern: str, paths: Collection[str]) -> list[str]:
    """Returns the paths in which a regex is found.

    Raises:
        InputError: if it is none, or is found in none.
    """
    try:
        found = [path for path in paths if re.search(pattern, path)]
    except re.error as error:
        raise InputError(f"config.numerics.layers: {pattern!r} is no regular expression: {error}") from error
    if not found:
        near = difflib.get_close_matches(pattern, sorted(paths), _NEAREST, 0.0)
        raise InputError(f"config.numerics.layers: {pattern!r} is found in no layer's path; the nearest are {', '.join(near)}")
    return found


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
