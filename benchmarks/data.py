"""Times one batch of MNIST from mptrain's pipeline and from `from_tensor_slices().shuffle(n).batch()`, by turns in one run.

    python benchmarks/data.py [ROUNDS]

Both are read by a loop in the graph, as a train step would; a batch has 128 examples. Also shows that the time to open the
pipeline and draw the first batch does not depend on the step, nor on the number of examples.
"""

import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
BATCH_SIZE = 128
BATCHES = 2000


def main() -> None:
    import tensorflow as tf

    from mptrain import data, default_config

    config = default_config().data
    source = data.load(config, "train")
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")

    @tf.function
    def draw(iterator, count):
        total = tf.constant(0, tf.int64)
        for _ in tf.range(count):
            total += tf.cast(next(iterator)["targets"][0], tf.int64)
        return total

    def ours():
        return data.TrainingBatches(source, batch_size=BATCH_SIZE, seed=0, strategy=strategy).open(0)

    def theirs():
        dataset = tf.data.Dataset.from_tensor_slices(source.arrays).shuffle(len(source)).batch(BATCH_SIZE, drop_remainder=True)
        return iter(dataset.repeat().prefetch(4))

    iterators = {"mptrain": ours(), "shuffle(60000).batch(128)": theirs()}
    times = {name: [] for name in iterators}
    for _ in range(1 + int((sys.argv[1:] or [7])[0])):
        for name, iterator in iterators.items():
            start = time.perf_counter()
            draw(iterator, BATCHES)
            times[name].append((time.perf_counter() - start) / BATCHES * 1e3)
    print("| pipeline | ms a batch (median) | least | most |\n|---|---|---|---|")
    for name, values in times.items():
        values = values[1:]  # the first round traces and fills the shuffle buffer
        print(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    first, second = (statistics.median(values[1:]) for values in times.values())
    print(f"\nratio {second / first:.1f}\n")

    print("| examples | step | ms to open and draw one batch |\n|---|---|---|")
    for examples, step in ((60_000, 0), (60_000, 10**9), (10**3, 0), (10**8, 0), (10**8, 10**9)):
        config.update(name="synthetic", examples=examples)
        numbered = data.load(config, "train")
        opened = []
        for _ in range(5):
            start = time.perf_counter()
            next(data.TrainingBatches(numbered, batch_size=BATCH_SIZE, seed=0, strategy=strategy).open(step))
            opened.append((time.perf_counter() - start) * 1e3)
        print(f"| {examples:,} | {step:,} | {statistics.median(opened):.0f} |")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
