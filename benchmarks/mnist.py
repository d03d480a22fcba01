"""Runs the main job in each precision, one after another, and prints accuracy and times as a table.

    python benchmarks/mnist.py [PRECISION ...]

Times are those of whole commands, from start to exit; "first step" is that of a run of one step until its row is written.
"""

import json
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
PRECISIONS = ("mixed_float16", "mixed_bfloat16", "float32")


def run(workdir: pathlib.Path, precision: str, *flags: str) -> tuple[float, list[dict]]:
    """Runs the main job; returns the seconds it took and the rows of its metrics.jsonl."""
    command = [sys.executable, "-m", "mptrain.main", "--config=configs/mnist.py", f"--workdir={workdir}"]
    command += [f"--config.precision.policy={precision}", *flags]
    start = time.time()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    seconds = time.time() - start
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return seconds, [{**row, "since_start": row["time"] - start} for row in rows]


def main() -> None:
    from mptrain.devices import hardware

    print(f"{hardware()}; Python {platform.python_version()}\n")
    print("| precision | test accuracy | whole run | ms a step (median of loops) | first step after |")
    print("|---|---|---|---|---|")
    for precision in sys.argv[1:] or PRECISIONS:
        with tempfile.TemporaryDirectory() as folder:
            _, first = run(pathlib.Path(folder) / "first", precision, "--config.train.steps=1", "--mode=train")
            seconds, rows = run(pathlib.Path(folder) / "whole", precision)
        accuracy = [row["accuracy"] for row in rows if row.get("split") == "eval"][-1]
        rates = sorted(row["examples_per_second"] for row in rows if row.get("split") == "train")
        milliseconds = 1000 * 128 / rates[len(rates) // 2]
        print(
            f"| {precision} | {accuracy:.2%} | {seconds:.0f} s | {milliseconds:.1f} | {first[0]['since_start']:.1f} s |",
            flush=True,
        )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
