"""Results as Markdown: the tables of times and ratios, and what became of the targets."""

from collections.abc import Mapping

import numpy as np

from benchmarks import frame, targets
from benchmarks.contestants import ALL, PEERS

# Lightning takes bfloat16 where it is asked for float16 on a CPU, and says so in a warning: no ratio to show.
OTHER_DTYPE = {("lightning", "mixed_float16"): "takes bfloat16"}
SAME = {"float32": 2e-3, "mixed_bfloat16": 3e-2, "mixed_float16": 1e-2}  # relative difference of losses that rounding explains


def case_table(name: str, results: Mapping[str, list[frame.Turn] | str], reference: str, precision: str) -> list[str]:
    """Returns the table of one case: milliseconds a step, ratio of mptrain, and whether the losses agree.

    Args:
        name: of the case, for the heading.
        results: contestant -> turns, or why there are none.
        reference: the contestant that losses are compared with, and whose time all are divided by.
        precision: decides how far losses may differ.
    """
    lines = [
        f"### {name}",
        "",
        f"| contestant | ms a step | quartiles | processor ms | time / {ALL[reference].label} | quartiles | processor | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = results.get(reference)
    for contestant, turns in results.items():
        label = ALL[contestant].label
        if isinstance(turns, str):
            lines.append(f"| {label} | {turns} | | | | | | |")
            continue
        (low, _), (middle, processor), (high, _) = 1e3 * np.quantile(frame.times(turns), [0.25, 0.5, 0.75], axis=0)
        cells = [f"{middle:.3g}", f"{low:.3g}-{high:.3g}", f"{processor:.3g}"]
        if isinstance(base, str) or base is None:
            cells += ["", "", "", ""]
        else:
            (low, middle, high), processor = frame.ratio(turns, base)
            difference = frame.difference_of_losses(turns, base)
            agrees = "same" if difference <= SAME[precision] else f"**differs by {difference:.1%}**"
            cells += [f"{middle:.3g}", f"{low:.3g}-{high:.3g}", f"{processor:.3g}", agrees]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def differing(results: Mapping[str, list[frame.Turn] | str], reference: str, precision: str) -> list[str]:
    """Returns the contestants that did not compute what the reference did."""
    base = results.get(reference)
    if base is None or isinstance(base, str):
        return []
    measured = {name: turns for name, turns in results.items() if not isinstance(turns, str)}
    far = SAME[precision]
    return [name for name, turns in measured.items() if not frame.difference_of_losses(turns, base) <= far]


def target_table(results: targets.Results) -> list[str]:
    """Returns the table of all targets."""
    lines = ["| target | work | precision | at most | measured | |", "|---|---|---|---|---|---|"]
    for target, value, verdict in targets.rows(results):
        measured = "" if value is None else f"{value:.3g}"
        verdict = f"**{verdict}**" if verdict == "missed" else verdict
        lines.append(f"| {target.what} | {target.work} | {target.precision} | {target.bound:g} | {measured} | {verdict} |")
    return [*lines, ""]


def ratio_table(results: targets.Results) -> list[str]:
    """Returns the table of everybody's step times over those of the loop by hand, medians; one row a work and precision."""
    names = [name for name in PEERS if name != "hand" and any(key[2] == name for key in results)]
    lines = [f"| work | precision | {' | '.join(ALL[name].label for name in names)} |", f"|---|---|{'---|' * len(names)}"]
    for work, precision in dict.fromkeys(key[:2] for key in results):
        if (base := results.get((work, precision, "hand"))) is None:
            continue
        cells = []
        for name in names:
            turns = results.get((work, precision, name))
            measured = "not run" if turns is None else f"{frame.ratio(turns, base)[0][1]:.2f}"
            cells.append(OTHER_DTYPE.get((name, precision), measured))
        lines.append(f"| {work} | {precision} | {' | '.join(cells)} |")
    return [*lines, ""]
