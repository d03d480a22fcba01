"""Times what saving every 100 steps costs a run of the MNIST config, synchronously and asynchronously.

    python benchmarks/checkpoints.py [ROUNDS]

Loops of 100 steps alternate in one process: without a checkpoint, with one, with one written by a thread. "Held up" is the
time that the training loop waits in save(), as a share of a loop; "whole" compares loop and save with the loop without, and
so contains what a writing thread takes from the computation; with it come the quartiles, since the machine is noisy.
"""

import importlib.util
import os
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
STEPS = 100


def main() -> None:
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    from mptrain import runner
    from mptrain.checkpoints import Checkpoints

    spec = importlib.util.spec_from_file_location("config", ROOT / "configs" / "mnist.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    trainer = runner.build_trainer(module.get_config())
    with tempfile.TemporaryDirectory() as folder:
        kinds = {
            "synchronous": Checkpoints(pathlib.Path(folder) / "sync", trainer.state, keep=3),
            "asynchronous": Checkpoints(pathlib.Path(folder) / "async", trainer.state, keep=3, asynchronous=True),
        }
        held = {name: [] for name in kinds}
        whole = {name: [] for name in kinds}
        for _ in range(2):
            trainer.train(tf.constant(STEPS))
        for _ in range(int((sys.argv[1:] or [10])[0])):
            start = time.perf_counter()
            trainer.train(tf.constant(STEPS))
            bare = time.perf_counter() - start
            for name, checkpoints in kinds.items():
                start = time.perf_counter()
                checkpoints.save(int(trainer.global_step))  # of the loop before; a thread writes during the next
                saved = time.perf_counter()
                trainer.train(tf.constant(STEPS))
                end = time.perf_counter()
                held[name].append((saved - start) / (end - saved))
                whole[name].append((end - start) / bare)
            kinds["asynchronous"].wait()
    print("| saving | held up, median | whole, median | quartiles |\n|---|---|---|---|")
    for name in kinds:
        low, _, high = statistics.quantiles(whole[name], n=4)
        medians = f"{statistics.median(held[name]):.2%} | {statistics.median(whole[name]):.3f}"
        print(f"| {name} | {medians} | {low:.3f}, {high:.3f} |")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
