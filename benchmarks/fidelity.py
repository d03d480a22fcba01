"""Whether fast float16 on a CPU is float16: gradients and overflows beside those of TensorFlow's float16 kernels.

    python -m benchmarks.fidelity [--works cnn resnet transformer]

For each work the gradients of one batch are computed by the float16 kernels, and by those that mptrain puts under the same
graph (`precision.kernels`). The first column is the difference of the two, the second that of true float16 to float32, each
the norm of the difference of all gradients over the norm of all gradients. The target is 1e-3 at most. The loss scale is then
raised by factors of two, and the first at which a gradient is not finite must be the same. Exits with 1 where the scales
differ or the first column is above both 1e-3 and half of the second: through a deep network float16's own rounding grows, and
the order of two sums may differ by as much. Nearly all of its minutes go into the float16 kernels.
"""

import argparse
import dataclasses
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from benchmarks import models, works
from mptrain import keras_compat, precision

TARGET = 1e-3  # the difference of gradients at most
SHARE = 0.5  # of true float16's own difference to float32: what is above both is a fault
BATCH = 4  # examples: the float16 kernels take seconds for a whole batch


def gradient_function(work: works.Work, policy: str):
    """Returns the graph function from (inputs, targets, loss scale) to the unscaled gradients, in one float32 vector."""
    with keras_compat.dtype_policy(policy):
        model = models.build(keras, work)

    @tf.function
    def gradients(inputs, targets, scale):
        with tf.GradientTape() as tape:
            logits = model(inputs, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=logits)
            scaled = tf.reduce_mean(losses) * scale
        found = [tf.convert_to_tensor(each) for each in tape.gradient(scaled, model.trainable_variables)]
        return tf.concat([tf.reshape(each, [-1]) for each in found], 0) / scale

    return gradients


def compare(work: works.Work) -> tuple[float, float, float, float]:
    """Returns (fast against true float16, true float16 against float32, first scale of overflow: fast, true)."""
    inputs, targets = (tf.constant(array[:BATCH]) for array in works.data(work))
    true, full = gradient_function(work, "mixed_float16"), gradient_function(work, "float32")
    fast = gradient_function(work, "mixed_float16")
    scale = tf.constant(2.0**10)
    with precision.kernels({tf.float16}, "auto", tf.distribute.get_strategy()).scope():
        ours = fast(inputs, targets, scale).numpy()
    theirs, reference = true(inputs, targets, scale).numpy(), full(inputs, targets, scale).numpy()

    def overflow(function) -> float:
        for exponent in range(10, 40):
            if not np.isfinite(function(inputs, targets, tf.constant(2.0**exponent)).numpy()).all():
                return 2.0**exponent
        return np.inf

    return _difference(ours, theirs), _difference(theirs, reference), overflow(fast), overflow(true)


def _difference(values: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", default=["cnn", "resnet", "transformer"], choices=works.WORKS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    header = "| work | fast against true float16 | true float16 against float32 | overflows at loss scale, fast | true |"
    print(f"{header} at most {TARGET:g}, same scale |\n|---|---|---|---|---|---|", flush=True)
    right = True
    for name in options.works:
        work = works.WORKS[name].tiny() if options.tiny else works.WORKS[name]
        difference, rounding, fast, true = compare(dataclasses.replace(work, batch_size=BATCH))
        right &= difference <= max(TARGET, SHARE * rounding) and fast == true
        verdict = "met" if difference <= TARGET and fast == true else "**missed**"
        scales = f"2^{np.log2(fast):.0f} | 2^{np.log2(true):.0f}"
        print(f"| {name} | {difference:.1e} | {rounding:.1e} | {scales} | {verdict} |", flush=True)
    sys.exit(0 if right else "gradients differ by more than they may, or overflow begins elsewhere")


if __name__ == "__main__":
    main()
