"""Results as Markdown: the tables of times and ratios, and what became of the targets."""

from collections.abc import Mapping

import numpy as np

from benchmarks import frame, targets
from benchmarks.contestants import ALL, PEERS
from mptrain.hardware import Hardware

# On a CPU Lightning takes bfloat16 where it is asked for float16, and says so in a warning: no ratio to show.
OTHER_DTYPE_ON_CPUS = {(name, "mixed_float16"): "takes bfloat16" for name in ("lightning", "lightning_tuned")}
LIGHTNING = "Lightning takes bfloat16 where it is asked for float16 on a CPU, so its rows there are not float16's."
OTHERS = (
    "Orbit's example does not scale losses. Of Keras 3's layers are the models of mptrain, of the loop by hand and of Keras 3"
    " fit. They write BatchNorm in a dozen operations; mptrain puts TensorFlow's fused one there, and tf_keras has that itself."
    " Keras 3 fit updates a transformer's embeddings otherwise than all others: where a byte stands several times in a batch,"
    " Keras 3's Adam squares its gradients one by one and not their sum."
)
SAME_TO_THE_END = 0.1  # where learning multiplies the differences; who trains less or not at all is further away
# Relative difference of losses that rounding explains, or Keras 3's Adam in `OTHERS`, which makes 0.2 % of a first turn.
SAME = {"float32": 5e-3, "mixed_bfloat16": 3e-2, "mixed_float16": 1e-2}


def case_table(name: str, results: Mapping[str, list[frame.Turn] | str], reference: str, precision: str) -> list[str]:
    """Returns the table of one case: milliseconds a step, ratio to the reference, and whether the losses agree.

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
            cells += [f"{middle:.3g}", f"{low:.3g}-{high:.3g}", f"{processor:.3g}", _agreement(turns, base, precision)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def _agreement(turns: list[frame.Turn], base: list[frame.Turn], precision: str) -> str:
    first, last = frame.differences_of_losses(turns, base)
    if not first <= SAME[precision]:  # NaN is not
        return f"**differs by {first:.1%}**"
    return "same" if last <= SAME_TO_THE_END else f"**differs by {last:.1%} in the end**"


def notes(here: Hardware) -> str:
    """Returns what a reader of the tables must know of the contestants."""
    return OTHERS if here.gpus else f"{LIGHTNING} {OTHERS}"


def differing(results: Mapping[str, list[frame.Turn] | str], reference: str, precision: str) -> list[str]:
    """Returns the contestants that did not compute what the reference did; all of them if it failed."""
    base = results[reference]
    if isinstance(base, str):
        return [f"{reference}, with which all others are compared, failed: {base}"]
    measured = {name: turns for name, turns in results.items() if not isinstance(turns, str)}
    return [name for name, turns in measured.items() if _agreement(turns, base, precision) != "same"]


def target_table(results: targets.Results, here: Hardware) -> list[str]:
    """Returns the table of all targets."""
    lines = ["| target | work | precision | bound | median | quartiles | |", "|---|---|---|---|---|---|---|"]
    for target, ratio, verdict in targets.rows(results, here):
        low, middle, high = ("", "", "") if ratio is None else (f"{each:.3g}" for each in ratio)
        bound = f"{'<' if target.faster else '≤'} {target.bound:g}"
        verdict = f"**{verdict}**" if verdict == "missed" else verdict
        spread = f"{low}-{high}" if ratio is not None else ""
        lines.append(f"| {target.what} | {target.work} | {target.precision} | {bound} | {middle} | {spread} | {verdict} |")
    return [*lines, ""]


def ratio_table(results: targets.Results, here: Hardware) -> list[str]:
    """Returns the table of everybody's step times over those of the loop by hand, medians; one row a work and precision.

    The fastest is bold.
    """
    names = [name for name in PEERS if name != "hand" and any(key[2] == name for key in results)]
    lines = [f"| work | precision | {' | '.join(ALL[name].label for name in names)} |", f"|---|---|{'---|' * len(names)}"]
    other_dtype = {} if here.gpus else OTHER_DTYPE_ON_CPUS
    for work, precision in dict.fromkeys(key[:2] for key in results):
        if (base := results.get((work, precision, "hand"))) is None:
            continue
        ratios = {}
        for name in names:
            turns = results.get((work, precision, name))
            if turns is not None and (name, precision) not in other_dtype:
                ratios[name] = frame.ratio(turns, base)[0][1]
        fastest = min(ratios.values(), default=1.0)
        shown = {name: f"{ratio:.2f}" if ratio > 0.1 else f"{ratio:.2g}" for name, ratio in ratios.items()}
        shown = {name: f"**{text}**" if ratios[name] == fastest < 1 else text for name, text in shown.items()}
        cells = [shown.get(name, other_dtype.get((name, precision), "")) for name in names]
        lines.append(f"| {work} | {precision} | {' | '.join(cells)} |")
    return [*lines, ""]
