"""The report of a training run as one page: prepares what page.html writes out and what its scripts draw."""

import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mptrain import config as config_lib
from mptrain import pages
from mptrain.errors import InputError
from mptrain.pages import numbers
from mptrain.report import thinning
from mptrain.report.history import COURSE, Columns, History, finite_or_none, of_optimizer

_LOG = 10  # a curve of positive values that spans so much is drawn on a logarithmic axis
_LINEAR = ("learning_rate", "examples_per_second")  # but these
_MOST_DOTS = 150  # evaluations of a curve that are marked
_MOST_ROWS = 200  # of events
_MOST_TOLD = 100  # skipped steps that have a row of their own
_FOLDED = 30  # lines of the precision plan from which on it is folded
_OTHERS = ("numerics", "parity")  # reports that may lie beside this one
_OF_AN_EVENT = ("step", "event", "time")


def write_page(folder: pathlib.Path) -> pathlib.Path:
    """Writes `report/index.html` of a run's folder, made from what lies in it, and returns its path.

    Raises:
        InputError: if the folder holds no run.
        OSError: if the page cannot be written.
    """
    if not (folder / "metrics.jsonl").exists() and not (folder / "config.json").exists():
        raise InputError(f"{folder} holds neither metrics.jsonl nor config.json")
    page = folder / "report" / "index.html"
    history, run = History(folder / "metrics.jsonl"), _run(folder)
    page.parent.mkdir(exist_ok=True)
    skips, skipped = history.skips(), history.train.last("skipped_steps")
    names, drawn = _optimizers(history), _drawn(history)
    told = _told(history, run["config"].get("optimizer.accumulation_steps"))
    module, _, trainer = str(run["config"].get("trainer") or folder.resolve().name).rpartition(".")
    pages.write(
        page,
        "report/page.html",
        trainer=trainer,
        module=module,
        run=run,
        history=history,
        ending=_ending(history),
        total=finite_or_none(run["config"].get("train.steps")),
        final=_final(history),
        scales=[(name, history.train.last(of_optimizer(name, "loss_scale"))) for name in names],
        scaled=any(len(one["scales"]) > 1 or one["scales"] and one["scales"][0][1] != 1 for one in drawn["scales"]),
        applied=history.train.last("applied_steps"),
        skipped=max(sum(count for *_, count in skips), int(skipped or 0)),
        duration=_duration(history.seconds),
        throughput=_median(history.train.values.get("examples_per_second")),
        told=told[:_MOST_TOLD],
        events=[_event(row) for row in history.events[-_MOST_ROWS:]],
        more_events=history.forgotten_events + max(0, len(history.events) - _MOST_ROWS),
        changed=_changed(run["config"]),
        fields=[(path, _written(value)) for path, value in sorted(run["config"].items())],
        plan=_text(folder / "precision_plan.txt"),
        folded=_FOLDED,
        others=[name for name in _OTHERS if (page.parent / f"{name}.html").exists()],
        smoothed=any(one["raw"] for plot in drawn["metrics"] for one in plot["series"]),
        data=drawn,
    )
    return page


def _run(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what config.json says; empty values where it is not there or damaged."""
    nothing = {"config": {}, "versions": {}, "precision": None, "devices": None, "git_revision": None, "written": None}
    try:
        found = json.loads(_text(folder / "config.json"))
    except ValueError:
        found = None
    found = found if isinstance(found, dict) else {}
    kinds = {name: dict if value == {} else str for name, value in nothing.items()}
    return {name: found[name] if isinstance(found.get(name), kinds[name]) else nothing[name] for name in nothing}


def _text(file: pathlib.Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def _ending(history: History) -> dict[str, str]:
    """Returns how the run ended, in words and as a class of the page's style."""
    end, step = history.end, f"{history.last_step:,}"
    if end is None:
        return {"kind": "quiet", "words": f"The log ends at step {step} and does not say why: the run goes on, or was killed."}
    if end["event"] == "finished":
        why = f": {end['reason']}" if end.get("reason") else ""
        return {"kind": "good", "words": f"Finished at step {end['step']:,}{why}."}
    if end["event"] == "time_limit":
        limit = f" of {end['limit']}" if "limit" in end else ""
        return {"kind": "quiet", "words": f"Its time limit{limit} was reached at step {end['step']:,}; it was saved."}
    if end["event"] == "preemption":
        return {"kind": "quiet", "words": f"Stopped by {end.get('signal', 'a signal')} at step {end['step']:,}, and saved."}
    return {"kind": "bad", "words": f"Failed at step {end['step']:,}: {end.get('reason', 'for a reason that was not logged')}"}


def _final(history: History) -> list[tuple[str, float | None]]:
    """Returns (name, value) of the last evaluation's metrics; of the last loop's where nothing was evaluated."""
    columns, prefix = (history.eval, "eval ") if history.eval.steps.size else (history.train, "train ")
    found = [(prefix + name, columns.values[name][-1]) for name in history.metrics if name in columns.values]
    return [(name, None if np.isnan(value) else float(value)) for name, value in found]


def _median(values: np.ndarray | None) -> float | None:
    return None if values is None or np.isnan(values).all() else float(np.nanmedian(values))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return numbers.NOTHING
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _changed(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns (field, value, default) of what differs from the defaults of this version."""
    defaults = json.loads(json.dumps(dict(config_lib.fields(config_lib.default_config()))))
    pairs = config_lib.differences(defaults, dict(config)) if config else {}
    return [(path, _written(value), _written(default)) for path, (default, value) in pairs.items()]


def _written(value: Any) -> str:
    return value if value == "(absent)" else json.dumps(value, ensure_ascii=False)


def _event(row: Mapping[str, Any]) -> tuple[int, str, str, str]:
    """Returns (step, date and time, event, what is known of it)."""
    details = {name: value for name, value in row.items() if name not in _OF_AN_EVENT and value not in (None, {}, [])}
    changes = details.pop("changes", {})
    words = [value if isinstance(value, str) else f"{name} {_written(value)}" for name, value in details.items()]
    if isinstance(changes, dict):
        words += [
            f"config.{path} was {_written(pair[0])} and is {_written(pair[1])}"
            for path, pair in changes.items()
            if isinstance(pair, list) and len(pair) == 2
        ]
    return row["step"], _when(row.get("time")), row["event"], "; ".join(words)


def _when(seconds: Any) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (TypeError, ValueError, OverflowError, OSError):
        return numbers.NOTHING


def _told(history: History, window: Any) -> list[dict[str, Any]]:
    """Returns the cells of the skipped steps of which more is known than their number, in order.

    Those that were computed again say where the overflow came from; of others the layer is known whose gradient is the first
    that was not finite. Under accumulation, over `window` steps, an event carries the last step of its window.
    """
    window = window if isinstance(window, int) and 0 < window < 1000 else 1
    origins = {row["step"]: row for row in history.origins}
    others = [row for row in history.skip_rows if origins.keys().isdisjoint(range(row["step"] - window + 1, row["step"] + 1))]
    return [_skip(row) for row in sorted([*origins.values(), *others], key=lambda row: row["step"])]


def _skip(row: Mapping[str, Any]) -> dict[str, Any]:
    looked_at, variables = row["event"] == "provenance", row.get("variables")
    kinds = {"output": "output", "gradient": "gradient at the output", "weight": "gradient"}
    largest = finite_or_none(row.get("largest"))
    hopeless = row.get("forward") is True if looked_at else row.get("loss_finite") is False
    if hopeless:
        words = (
            "in the forward pass: no loss scale cures that" if looked_at else "the loss is not finite: no loss scale cures that"
        )
    elif looked_at:
        words = "a lower loss scale cures it" if largest else "not finite at any loss scale, though the loss is"
    else:
        words = "not looked into"
    return {
        "step": row["step"],
        "layer": str(row.get("layer") or numbers.NOTHING),
        "tensor": kinds.get(row.get("tensor"), numbers.NOTHING) if looked_at else "gradient",
        "largest": largest,
        "loss_scale": finite_or_none(row.get("loss_scale")),
        "variables": len(variables) if isinstance(variables, list) else None,
        "hopeless": hopeless,
        "words": words,
    }


def _optimizers(history: History) -> list[str]:
    """Returns the names of the optimizers; an only one is called ""."""
    return history.optimizers or [""]


def _drawn(history: History) -> dict[str, Any]:
    """What the scripts need."""
    return {
        "steps": [0, max(history.last_step, 1)],
        "metrics": [_plot(name, history, {"train": history.train, "eval": history.eval}) for name in history.metrics],
        "course": list(_course(history)),
        "scales": [_scale(history, name) for name in _optimizers(history) if history.scales(name)],
    }


def _course(history: History) -> Iterator[dict[str, Any]]:
    """Yields the plots of what a row tells beside metrics: of each optimizer where there are several, not of all together."""
    for field, title in COURSE.items():
        names = [""] if field == "examples_per_second" else _optimizers(history)
        for name in names:
            column = of_optimizer(name, field)
            if column in history.train.values:
                shown = _plot(column, history, {"": history.train}, field)
                yield shown | {"name": f"{title}, {name}" if name else title}


def _scale(history: History, name: str) -> dict[str, Any]:
    scales = history.scales(name)
    places = thinning.thinned(np.log2([max(scale, 2.0**-149) for _, scale in scales]))
    return {
        "name": name,
        "scales": [scales[place] for place in places],
        "skipped": thinning.bucketed(history.skips(name)),
    }


def _plot(name: str, history: History, splits: Mapping[str, Columns], field: str = "") -> dict[str, Any]:
    series = [_series(split, columns, name, field) for split, columns in splits.items() if name in columns.values]
    shown = np.concatenate([columns.values[name] for columns in splits.values() if name in columns.values])
    known = shown[~np.isnan(shown)]
    lost = sorted({int(step) for columns in splits.values() for step in columns.nonfinite.get(name, ())})
    return {
        "name": name,
        "log": bool(field not in _LINEAR and known.size and known.min() > 0 and known.max() > _LOG * known.min()),
        "zero": field == "examples_per_second",
        "series": series,
        "nonfinite": thinning.bucketed([(step, step, 1) for step in lost]),
    }


def _series(split: str, columns: Columns, name: str, field: str) -> dict[str, Any]:
    values = columns.values[name]
    places = thinning.thinned(values)
    means = None if split == "eval" or field == "learning_rate" else thinning.smoothed(values, places)
    dots = len(values) <= (_MOST_DOTS if split == "eval" else 1)
    return {
        "name": split,
        "kind": "series-2" if split == "eval" else "series-1",
        "steps": [int(step) for step in columns.steps[places]],
        "values": list(_short(values[places] if means is None else means)),
        "raw": None if means is None else list(_short(values[places])),
        "dots": dots,
    }


def _short(values: np.ndarray) -> Iterator[float | None]:
    """Numbers with so many digits as a page can show."""
    return (None if np.isnan(value) else float(f"{value:.6g}") for value in values)
