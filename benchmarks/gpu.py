"""Measures on one GPU what `python -m benchmarks` does on a CPU, and models that fill the card against its matrix units.

    python -m benchmarks.gpu [--minutes=4.5] [--contestants hand mptrain]

First a ResNet-50 on images of ImageNet's shape and a transformer of 100 million parameters, in mixed_float16, mixed_bfloat16
and float32 with TF32 on and off: step time, achieved FLOP/s against those of a large matrix product in the same dtype on the
same card, peak memory, and the share of the step that is loss scaling. Then the table of the CPU's comparison: mptrain and its
peers by turns on the same works and batches, losses compared, here with a float32 that is not TF32.

Takes the first card that it sees. Runs unattended and ends before `--minutes` are over: who is still busy then is ended, and
the rows and cases that are left say so; more minutes give more of them. What fails says why in its row, in one line. The exit
status is 1 where something failed for another reason than time or memory, or two contestants did not compute the same, and 2
where there is no GPU.
"""

# ruff: noqa: E402
import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
import time

START = time.monotonic()  # before TensorFlow's import, which takes some of the time
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from benchmarks import frame, machine, report, works
from benchmarks.children import NO_ANSWER, OUT_OF_MEMORY, Child, Failed
from benchmarks.contestants import ALL, PEERS
from benchmarks.gpu_models import MODELS, MODES
from mptrain.hardware import hardware

LARGE_SHARE = 0.65  # of the time, at most, for the large models
ROW_SECONDS, LEAST_SECONDS = 75.0, 15.0  # the most for a row; the least to begin a row or a case with
TINY_FACTOR = 4  # more of them for a CPU with other work
STEPS = {"mlp": 300, "cnn": 150, "resnet": 60, "transformer": 60}  # in a turn
ROUNDS = 4  # after the warm-up
TIME_OVER = "not run: the time was over"
EXPECTED = (TIME_OVER, NO_ANSWER, OUT_OF_MEMORY, "not installed")
COLUMNS = ("model", "precision", "ms a step", "TFLOP/s", "matrix peak", "of the peak", "GiB", "loss scaling")
NOTE = """
Medians, with quartiles in brackets. FLOP/s are the model's (Chowdhery et al., "PaLM", 2022, appendix B): a multiplication and
an addition in each matrix product and convolution, the backward pass twice the forward one, causal attention without discount,
and nothing for all else. The peak is the best of a few chains of products of square matrices. GiB are the most that
TensorFlow's allocator held. The share of loss scaling is that of a step of mptrain against a step, by turns with it, that
has neither scale nor check of the gradients nor a way back.
"""


def quartiles(values: list[float], form: str) -> str:
    low, middle, high = (format(value, form) for value in values)
    return f"{middle} ({low} to {high})"


def row(found: dict) -> list[str]:
    """Returns the cells of what a row's process measured, behind those of model and mode."""
    rate = found["flops"] / found["seconds"][1]
    return [
        quartiles([1e3 * seconds for seconds in found["seconds"]], ".1f"),
        f"{rate / 1e12:.3g}",
        f"{found['peak'] / 1e12:.3g}",
        f"{rate / found['peak']:.0%}",
        "not counted" if found["memory"] is None else f"{found['memory'] / 2**30:.1f}",
        found["scaling"] if isinstance(found["scaling"], str) else quartiles(found["scaling"], ".1%"),
    ]


def large_table(rows: list[tuple[str, str]], end: float, command: list[str], tiny: bool) -> list[str]:
    """Prints the table of the large models row by row; returns what failed that should not.

    Args:
        rows: of model and mode.
        end: of `time.monotonic`, when a row that is not done is ended.
        command: of a row's process; it is started a row ahead, so that it has imported TensorFlow when its turn comes.
        tiny: whether models are at their smallest.
    """
    failed = []
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    with contextlib.ExitStack() as stack:
        ahead = stack.enter_context(Child(command))
        for number, (model, mode) in enumerate(rows):
            seconds, name = min(ROW_SECONDS * (TINY_FACTOR if tiny else 1), end - time.monotonic()), model
            try:
                if seconds < LEAST_SECONDS:
                    raise Failed(TIME_OVER)
                child = ahead
                if number + 1 < len(rows):
                    ahead = stack.enter_context(Child(command))
                with child:  # whose memory is free for the next one when it has ended
                    child.tell(json.dumps({"model": model, "mode": mode, "tiny": tiny, "seconds": 0.8 * seconds}))
                    found = child.answer(seconds)
                cells, name = row(found), f"{model}, {found['parameters'] / 1e6:.1f} M"
            except Failed as reason:
                cells = [str(reason), *[""] * (len(COLUMNS) - 3)]
                failed += unexpected(f"{model} {mode}", str(reason))
            print(f"| {' | '.join([name, mode, *cells])} |", flush=True)
    return failed


def peers(cases: list[tuple[works.Work, str]], names: tuple[str, ...], end: float, tiny: bool) -> list[str]:
    """Prints the tables of the contestants case by case; returns what failed that should not."""
    failed = []
    with tempfile.TemporaryDirectory() as folder, frame.Contestants() as contestants:
        for work, precision in cases:
            title = f"{work.name}, {precision}"
            if end - time.monotonic() < LEAST_SECONDS:
                print(f"### {title}\n\n{TIME_OVER}\n", flush=True)
                continue
            here = [name for name in names if precision in (ALL[name].precisions or works.PRECISIONS)]
            present = contestants.ready(here)
            turns = (work.quick_steps if tiny else STEPS[work.name],) * (frame.WARM_UP + ROUNDS)
            file = os.path.join(folder, f"{work.name}-{precision}.npy")
            np.save(file, works.numbers(work, sum(turns)))
            found = frame.compete(frame.Case(work, precision, turns, file), present, {}, together=1, end=end)
            reference = "hand" if "hand" in names else names[0]
            print("\n".join(report.case_table(title, found, reference, precision)), flush=True)
            for name, result in found.items():
                failed += unexpected(f"{title}, {ALL[name].label}", result) if isinstance(result, str) else []
            if not isinstance(found[reference], str):
                differing = report.differing(found, reference, precision)
                failed += [f"{title}, {ALL[name].label}: other losses" for name in differing]
    return failed


def unexpected(what: str, reason: str) -> list[str]:
    return [] if reason.startswith(EXPECTED) else [f"{what}: {reason}"]


def cases() -> list[tuple[works.Work, str]]:
    """Returns all works in all precisions, so that the first four show each work and each precision."""
    cycles = zip(itertools.cycle(works.WORKS.values()), itertools.cycle(works.PRECISIONS), strict=True)
    return list(itertools.islice(cycles, len(works.WORKS) * len(works.PRECISIONS)))  # four and three have no common divisor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.5, help="after which everything has ended")
    parser.add_argument("--contestants", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--tiny-on-cpu", action="store_true", help=argparse.SUPPRESS)  # for the test of this file
    options = parser.parse_args()
    tiny = options.tiny_on_cpu
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]  # the one card
    os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"  # for all children, who share it
    os.environ.setdefault("CUDA_CACHE_MAXSIZE", str(2**32))  # kernels that the driver compiles for one child are there for all
    if not tf.config.list_physical_devices("GPU") and not tiny:
        print("there is no GPU here: benchmarks.gpu needs one (python -m benchmarks compares on a CPU)", file=sys.stderr)
        sys.exit(2)
    seconds = 60 * options.minutes
    print("\n".join([*machine.description(), ""]))
    tf.config.set_visible_devices([], "GPU")  # the card is the children's
    rows = [("transformer", "mixed_float16"), ("resnet50", "float32")]
    if not tiny:
        rows = [(model, mode) for mode in MODES for model in MODELS]
    command = [sys.executable, "-m", "benchmarks.gpu_models"]
    failed = large_table(rows, START + LARGE_SHARE * seconds, command, tiny)
    print(NOTE)
    print(f"{report.notes(hardware())}\n")
    chosen = [(works.WORKS["mlp"].tiny(), "mixed_float16")] if tiny else cases()
    failed += peers(chosen, tuple(options.contestants), START + seconds, tiny)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
