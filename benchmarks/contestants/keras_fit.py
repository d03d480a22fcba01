"""`fit` of Keras 3 and of tf_keras: compiled as their guides do it, or with steps_per_execution tuned."""

import importlib
import math

import tensorflow as tf

from benchmarks import models, works
from benchmarks.contestants import common
from benchmarks.frame import Case


def run(case: Case, gate, library: str, tuned: str = "") -> None:
    """Runs one `fit`, whose epochs make the turns: one each, where all turns are of one length; the first waits for the turn.

    Tuned, all steps of a turn (up to 100) are one execution, and XLA compiles it where that is faster.
    """
    library = importlib.import_module(library)
    steps = math.gcd(*case.turns)
    common.set_policy(case.precision)

    class Turns(library.callbacks.Callback):
        left = 0

        def on_epoch_begin(self, epoch, logs=None):
            if not self.left:
                self.turn = self.left = gate.enter()
                self.losses = 0.0

        def on_epoch_end(self, epoch, logs=None):
            self.losses += steps * logs["loss"]
            self.left -= steps
            if not self.left:
                gate.done(self.losses / self.turn)

    options = {}
    if tuned:
        fitting = max(count for count in range(1, min(steps, 100) + 1) if steps % count == 0)
        options = {"steps_per_execution": fitting, "jit_compile": not common.on_cpu() or common.faster_with_xla(case)}
    model = models.build(library, case.work)
    model.compile(
        library.optimizers.Adam(works.LEARNING_RATE),
        library.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[library.metrics.SparseCategoricalAccuracy()],
        **options,
    )
    batches = common.batches(case, lambda inputs, targets: (inputs, tf.cast(targets, tf.int32)))
    epochs = sum(case.turns) // steps
    model.fit(batches, epochs=epochs, steps_per_epoch=steps, verbose=0, shuffle=False, callbacks=[Turns()])
