"""Runs the experiments, each in several precisions, one after another, and prints the table of experiments/README.md.

    python -m benchmarks.experiments [--folder=DIR] [NAME ...]

Seconds are those of whole commands, from start to exit; milliseconds a step are the median of the run's loops. They mean
something on a machine that does nothing else. The runs' folders lie in DIR, by default in a temporary one; a run that is
finished there is not repeated, and has no seconds.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A row of the table.

    Attributes:
        title: what the row is called; the first column.
        config: the config file, with its argument.
        metric: the metric of the last evaluation that is printed.
        precision: the field that chooses the precision, for `values`.
        values: of that field, for float32, bfloat16 and float16.
        after: the name of an experiment whose run in float32 it starts from: the folder of that is its config's argument.
    """

    title: str
    config: str
    metric: str
    precision: str = "precision.policy"
    values: tuple[str, str, str] = ("float32", "mixed_bfloat16", "mixed_float16")
    after: str = ""

    @property
    def name(self) -> str:
        return pathlib.Path(self.config.split(":")[0]).stem


EXPERIMENTS = (
    Experiment("convolutional network on MNIST", "configs/mnist.py", "accuracy"),
    Experiment("residual network on MNIST", "configs/resnet.py:mnist", "accuracy"),
    Experiment("transformer on Python's library", "configs/transformer.py:small", "bits_per_byte"),
    Experiment(
        "the same as a `tf.Module`",
        "configs/transformer_module.py:small",
        "bits_per_byte",
        "model.compute_dtype",
        ("float32", "bfloat16", "float16"),
    ),
    Experiment("generative adversarial network on MNIST", "configs/gan.py", "accuracy"),
    Experiment("distillation on MNIST", "configs/distillation.py", "accuracy", after="mnist"),
    Experiment("sharpness-aware minimisation on MNIST", "configs/sam.py", "accuracy"),
    Experiment("variational autoencoder on MNIST", "configs/vae.py", "loss"),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """What one run came to; seconds is None where it had been finished before."""

    metric: float
    steps: int
    seconds: float | None
    milliseconds: float


def run(experiment: Experiment, value: str, folder: pathlib.Path) -> Result:
    """Runs an experiment in one precision, or goes on with it; in a folder of its own inside `folder`."""
    workdir = folder / f"{experiment.name}-{value}"
    argument = f":{folder / experiment.after}-float32" if experiment.after else ""
    command = [sys.executable, "-m", "mptrain.main", f"--config={experiment.config}{argument}", f"--workdir={workdir}"]
    log, start = workdir / "metrics.jsonl", time.monotonic()
    finished = log.exists() and any(row.get("event") == "finished" for row in _rows(log))
    if not finished:
        subprocess.run([*command, f"--config.{experiment.precision}={value}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds = None if finished else time.monotonic() - start
    evaluation = [row for row in _rows(log) if row.get("split") == "eval"][-1]
    rates = [row["examples_per_second"] for row in _rows(log) if row.get("split") == "train"]
    batch = json.loads((workdir / "config.json").read_text())["config"]["data.batch_size"]
    return Result(evaluation[experiment.metric], evaluation["step"], seconds, 1000 * batch / statistics.median(rates))


def _rows(log: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def row(experiment: Experiment, results: list[Result]) -> str:
    """Returns the experiment's row, in Markdown; three numbers in a cell are for float32, bfloat16 and float16."""
    shown = "{:.2%}" if experiment.metric == "accuracy" else "{:.4g}"
    metrics = [shown.format(result.metric) for result in results]
    seconds = " / ".join("-" if result.seconds is None else f"{result.seconds:.0f}" for result in results)
    milliseconds = " / ".join(f"{result.milliseconds:.1f}" for result in results)
    metric = experiment.metric.replace("_", " ")
    cells = [experiment.title, f"`{experiment.config}`", f"{results[0].steps:,}", metric, *metrics, seconds, milliseconds]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a config's name, such as mnist; default: all")
    parser.add_argument("--folder", type=pathlib.Path, help="where the runs' folders lie; default: a temporary one")
    options = parser.parse_args()
    known = [experiment.name for experiment in EXPERIMENTS]
    if unknown := set(options.names) - set(known):
        parser.error(f"no experiment {', '.join(unknown)}: write some of {', '.join(known)}")
    print("| experiment | config | steps | metric | float32 | bfloat16 | float16 | whole run, s | ms a step |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    wanted = set(options.names or known)
    wanted |= {experiment.after for experiment in EXPERIMENTS if experiment.after and experiment.name in wanted}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or pathlib.Path(temporary)).absolute()
        for experiment in EXPERIMENTS:
            if experiment.name in wanted:
                results = [run(experiment, value, folder) for value in experiment.values]
                print(row(experiment, results), flush=True)


if __name__ == "__main__":
    main()
