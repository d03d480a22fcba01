"""What the user sees: tables, a progress bar, one line an evaluation. Results go to stdout, progress to stderr."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import rich.box
import rich.console
import rich.progress
import rich.table

from mptrain.precision import PlanRow

_PLAIN_INTERVAL = 5.0  # seconds between two progress lines where stderr is no terminal
_HIDDEN = ("learning_rate", "gradient_norm", "applied_steps", "skipped_steps", "steps_per_second")
_INTEGERS = ("examples_per_second", "loss_scale")


class Console:
    """The terminal of one run.

    Args:
        worker: name of a worker that is not the chief: it prints warnings only, each with its name.
        quiet: whether only warnings are printed, each once.
    """

    def __init__(self, worker: str = "", quiet: bool = False):
        self._prefix = f"mptrain: {worker}: " if worker else "mptrain: "
        self._quiet = quiet or bool(worker)
        self._told = set() if quiet else None
        self._err = rich.console.Console(stderr=True, highlight=False)
        # Where both are the same terminal, lines go through the console that owns the bar, which keeps it below them.
        both = self._err.is_terminal and sys.stdout.isatty() and not self._quiet
        self._out = self._err if both else rich.console.Console(highlight=False, quiet=self._quiet)
        self._bar = None
        self._task = None
        self._total = 0
        self._plain_since = None

    def line(self, text: str) -> None:
        """Prints one line of result."""
        self._out.print(text, markup=False, soft_wrap=True)

    def table(self, table: rich.table.Table) -> None:
        """Prints a table of results."""
        self._out.print(table)

    def warn(self, text: str) -> None:
        """Prints one line that the user should act on."""
        if self._told is not None:
            if text in self._told:
                return
            self._told.add(text)
        self._err.print(f"{self._prefix}{text}", markup=False, soft_wrap=True, style="yellow")

    def plan(self, rows: Sequence[PlanRow], notes: Sequence[str]) -> str:
        """Prints the precision plan and returns it as plain text."""
        table = rich.table.Table("layer", "compute", "variables", title="Precision plan", box=rich.box.SIMPLE_HEAD)
        table.add_column("parameters", justify="right")
        for row in rows:
            table.add_row(row.layer, row.compute_dtype, row.variable_dtype, f"{row.parameters:,}" if row.parameters else "")
        table.add_section()
        table.add_row("total", "", "", f"{sum(row.parameters for row in rows):,}")
        self._out.print(table)
        for note in notes:
            self.line(note)
        plain = rich.console.Console(width=100, no_color=True, force_terminal=False)
        with plain.capture() as capture:
            plain.print(table)
        return capture.get() + "".join(f"{note}\n" for note in notes)

    @contextlib.contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows a bar, or plain lines, named `what`; yields the function that is told how much of `total` is done."""
        self.start_progress(0, total, what)
        try:
            yield lambda done: self.progress(done, {})
        finally:
            self.stop_progress()

    def start_progress(self, step: int, total: int, what: str = "step") -> None:
        """Shows the bar at `step` of `total`, named `what`; where stderr is no terminal, plain lines from now on."""
        self._total = total
        self._what = what
        self._plain_since = (step, time.monotonic())
        self._last_plain = math.inf if self._quiet else time.monotonic()
        if self._quiet or not self._err.is_terminal:
            return
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn(what),
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(bar_width=20),
            rich.progress.TextColumn("{task.fields[metrics]}"),
            rich.progress.TimeRemainingColumn(compact=True),
            rich.progress.TextColumn("left"),
            console=self._err,
            transient=True,
        )
        self._task = self._bar.add_task("train", completed=step, total=total, metrics="tracing the first step ...")
        self._bar.start()

    def progress(self, step: int, outputs: Mapping[str, float]) -> None:
        """Shows that `step` steps are done, and their metrics."""
        if self._bar:
            self._bar.update(self._task, completed=step, metrics=_one_line(outputs))
        elif time.monotonic() - self._last_plain >= _PLAIN_INTERVAL:
            self._last_plain = time.monotonic()
            first, start = self._plain_since
            left = (self._total - step) * (time.monotonic() - start) / (step - first)
            self._err.print(f"{self._what} {step}/{self._total}  {_one_line(outputs)}  {_duration(left)} left", soft_wrap=True)

    def stop_progress(self) -> None:
        """Takes the bar away."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def abandon(self) -> None:
        """Puts the terminal's cursor back when the process is about to end at once, in whatever state the bar is."""
        if self._err.is_terminal:
            sys.stderr.write("\x1b[?25h\n")
            sys.stderr.flush()

    def evaluation(self, step: int, outputs: Mapping[str, float], seconds: float) -> None:
        """Prints the line of one evaluation."""
        self.line(f"eval  step {step}  {_one_line(outputs)}  in {seconds:.1f} s")

    def closing(self, rows: Mapping[str, object]) -> None:
        """Prints the table at the end of a run."""
        table = rich.table.Table(box=rich.box.SIMPLE, show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, _number(name, value) if isinstance(value, (int, float)) else str(value))
        self._out.print(table, soft_wrap=not self._out.is_terminal)


def _one_line(outputs: Mapping[str, float]) -> str:
    shown = {name: value for name, value in outputs.items() if name.rpartition("/")[2] not in _HIDDEN}
    return "  ".join(f"{_short(name)} {_number(name, value)}" for name, value in shown.items())


def _short(name: str) -> str:
    return {"examples_per_second": "ex/s"}.get(name, name.replace("loss_scale", "scale"))


def _number(name: str, value: float) -> str:
    if isinstance(value, int) or name.rpartition("/")[2] in _INTEGERS and value == value:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2e}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
