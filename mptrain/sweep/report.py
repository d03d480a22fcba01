"""What a sweep leaves behind in `report/`: `sweep.json`, which it goes on from, page and picture; and the table it prints."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.table
import rich.text

from mptrain import pages
from mptrain.errors import InputError
from mptrain.pages import numbers
from mptrain.sweep import axes, picture


def read(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the record of the sweep in a folder, None where there is none.

    Raises:
        InputError: if it is damaged.
    """
    path = folder / "report" / "sweep.json"
    try:
        record = json.loads(path.read_text())
        return {name: record[name] for name in ("config", "metric", "mode", "search", "trials")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r}): name another folder, or restore the file") from error


def write(record: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes `report/sweep.json`, `sweep.html` and `sweep.png`, each whole or not at all."""
    home = folder / "report"
    home.mkdir(exist_ok=True)
    temporary = home / f".sweep.json.{os.getpid()}"
    temporary.write_text(json.dumps(record, indent=1))
    temporary.replace(home / "sweep.json")
    trials = ranked(record)
    drawn = axes.drawn(record, trials)
    over = [trial for trial in trials if trial["status"] == "finished"]
    pages.write(
        home / "sweep.html",
        "sweep/page.html",
        record=record,
        trials=trials,
        heads=heads(record),
        rows=[(trial, cells(record, trial), _values(record, trial)) for trial in trials],
        reports={
            trial["number"]: url for trial in trials if (home / (url := f"../{trial['folder']}/report/index.html")).exists()
        },
        best=over[0] if over else None,
        counts={status: sum(trial["status"] == status for trial in trials) for status in ("finished", "failed")},
        lines=[f"config.{path} = {value!r}" for path, value in (over[0]["parameters"] if over else {}).items()],
        data=drawn,
    )
    picture.write_picture(drawn, home / "sweep.png")


def ranked(record: Mapping[str, Any]) -> list[dict]:
    """Returns the trials, the best first, those without a value last and in their order."""
    sign = 1 if record["mode"] == "min" else -1
    over = sorted((t for t in record["trials"] if t["value"] is not None), key=lambda trial: sign * trial["value"])
    return over + [trial for trial in record["trials"] if trial["value"] is None]


def table(record: Mapping[str, Any]) -> rich.table.Table:
    """Returns the ranked trials for the terminal."""
    kind, metric = record["search"]["kind"], record["metric"]
    made = rich.table.Table(title=f"Sweep: {kind}, ranked by {metric} ({record['mode']})", box=rich.box.SIMPLE_HEAD)
    for head in heads(record):
        made.add_column(head, justify="left" if head == "status" else "right")
    for trial in ranked(record):
        made.add_row(*map(rich.text.Text, cells(record, trial)))
    return made


def heads(record: Mapping[str, Any]) -> list[str]:
    """The heads of the table's columns."""
    return ["trial", *axes.short_names(list(record["search"]["space"])), *_metrics(record), "steps", "seconds", "status"]


def cells(record: Mapping[str, Any], trial: Mapping[str, Any]) -> list[str]:
    """What stands below these heads for a trial; why one failed has been told, and is on the page."""
    return [
        str(trial["number"]),
        *(short(value) for value in trial["parameters"].values()),
        *(numbers.magnitude(trial["metrics"].get(name)) for name in _metrics(record)),
        f"{trial['step']:,}",
        f"{trial['seconds']:.0f}",
        trial["status"],
    ]


def _values(record: Mapping[str, Any], trial: Mapping[str, Any]) -> list:
    """What the page sorts a trial's cells by; "" where there is nothing."""
    metrics = [trial["metrics"].get(name) for name in _metrics(record)]
    values = [trial["number"], *trial["parameters"].values(), *metrics, trial["step"], trial["seconds"], trial["status"]]
    return ["" if value is None else value for value in values]


def _metrics(record: Mapping[str, Any]) -> Sequence[str]:
    """The metric that trials are ranked by, then the others of their evaluations."""
    found = dict.fromkeys(name for trial in record["trials"] for name in trial["metrics"])
    return [record["metric"], *(name for name in found if name != record["metric"])]


def short(value: object) -> str:
    """A parameter's value in few letters."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
