"""The short table in the terminal: the precisions side by side."""

from collections.abc import Mapping
from typing import Any

import rich.box
import rich.table
import rich.text

from mptrain.pages import numbers


def table(report: Mapping[str, Any]) -> rich.table.Table:
    """Final metrics, step time, memory and skipped updates of each precision of a report."""
    steps = report["last_step"] - report["first_step"]
    title = f"Parity: {steps:,} steps from step {report['first_step']:,}"
    made = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
    made.add_column("precision", no_wrap=True)
    for head in heads(report):
        made.add_column(head, justify="right", overflow="fold")
    for row in report["runs"]:
        # As Text, because names of metrics may hold what rich would take for markup.
        made.add_row(*map(rich.text.Text, [row["precision"], *cells(report, row)]))
    return made


def heads(report: Mapping[str, Any]) -> list[str]:
    """The heads of the columns behind the precision; memory of GPUs only where there are any."""
    memory = ["GPU MiB", "host MiB"] if _on_gpu(report) else ["MiB"]
    return [*(f"eval {metric}" for metric in _metrics(report)), "ms a step", "× float32", *memory, "skipped"]


def cells(report: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """What stands below these heads in a row."""
    if row["final"] is None:
        return [numbers.NOTHING] * len(heads(report))
    memory = [row["peak_gpu_memory"], row["peak_memory"]] if _on_gpu(report) else [row["peak_memory"]]
    return [
        *(numbers.magnitude(row["final"].get(metric)) for metric in _metrics(report)),
        numbers.magnitude(row["ms_per_step"]),
        f"{row['ratio']:.2f}",
        *(numbers.NOTHING if value is None else f"{value / 2**20:,.0f}" for value in memory),
        f"{len(row['skipped_steps']):,}",
    ]


def _metrics(report: Mapping[str, Any]) -> list[str]:
    """The metrics of the training and those that an evaluation has besides."""
    return list(dict.fromkeys([*report["curves"], *(name for row in report["runs"] for name in row["final"] or ())]))


def _on_gpu(report: Mapping[str, Any]) -> bool:
    return any(row["peak_gpu_memory"] is not None for row in report["runs"])
