"""`fit` of Keras 3 and of tf_keras: compiled as their guides do it, or with steps_per_execution tuned."""

import importlib

import tensorflow as tf

from benchmarks import models, works
from benchmarks.contestants import common
from benchmarks.frame import Case


def run(case: Case, gate, library: str, tuned: str = "") -> None:
    """Runs one `fit` of as many epochs as there are turns; an epoch waits for its turn.

    Tuned, all steps of a turn (up to 100) are one execution, and XLA, which makes convolutions slower on a CPU, is off.
    """
    library = importlib.import_module(library)
    steps, epochs = case.turns[0], len(case.turns)
    if set(case.turns) != {steps}:
        raise ValueError(f"fit takes turns of one length, and these are {case.turns}")
    common.set_policy(case.precision)

    class Turns(library.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            gate.enter()

        def on_epoch_end(self, epoch, logs=None):
            gate.done(logs["loss"])

    options = {}
    if tuned:
        fitting = max(count for count in range(1, min(steps, 100) + 1) if steps % count == 0)
        options = {"steps_per_execution": fitting, "jit_compile": not common.on_cpu()}
    model = models.build(library, case.work)
    model.compile(
        library.optimizers.Adam(works.LEARNING_RATE),
        library.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[library.metrics.SparseCategoricalAccuracy()],
        **options,
    )
    batches = common.batches(case, lambda inputs, targets: (inputs, tf.cast(targets, tf.int32)))
    model.fit(batches, epochs=epochs, steps_per_epoch=steps, verbose=0, shuffle=False, callbacks=[Turns()])
