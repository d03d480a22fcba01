"""RESULTS.md: what was measured on one machine, in sections that can be measured anew without the others."""

import datetime
import pathlib
import subprocess
import sys

from benchmarks import frame, machine

TARGETS, RATIOS, WHY, TIMES, OTHERS = (
    "Targets",
    "Over the loop by hand",
    "Why targets were missed",
    "Times",
    "Other benchmarks",
)
# part -> (heading, command, further flags of a quick run)
COMMANDS = {
    "start": ("Start and memory", ["benchmarks.start"], ["--rounds=1"]),
    "growth": ("Cost as work grows", ["benchmarks.growth"], ["--rounds=3", "variables"]),
    "leak": ("Memory in a long run", ["benchmarks.leak"], ["10000"]),
    "fidelity": ("Whether fast float16 is float16", ["benchmarks.fidelity"], ["--works", "cnn"]),
}
PARTS = ("peers", *COMMANDS)
ORDER = (TARGETS, RATIOS, WHY, TIMES, *(heading for heading, _, _ in COMMANDS.values()), OTHERS)
_ELSEWHERE = {
    "python benchmarks/mnist.py": "whole runs of the MNIST config, from start to exit, with their accuracy",
    "python -m benchmarks.experiments": "whole runs of the other experiments",
    "python -m benchmarks.scaling": "step time under tf.distribute",
    "python benchmarks/data.py": "seeking in the data",
    "python benchmarks/checkpoints.py": "saving and restoring",
    "python -m benchmarks.numerics": "looking at a run's numbers",
    "python -m benchmarks.kills": "exact resume after a hundred kills",
    "python -m benchmarks.gpu": "the same table on a GPU, with a ResNet-50 and a transformer of 100 million parameters",
}


class Document:
    """The file, as it is and as it will be.

    Args:
        path: of the file; stays readable as an attribute. What it holds of other parts is kept, if it is of this machine and
            software.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._machine = "\n".join(machine.description())
        self._sections = {OTHERS: "\n".join(f"- `{command}`: {what}" for command, what in _ELSEWHERE.items())}
        before, *sections = path.read_text().split("\n## ") if path.exists() else [""]
        if self._machine in before:
            for section in sections:
                heading, _, body = section.partition("\n")
                if heading in ORDER:
                    self._sections.setdefault(heading, body.strip())

    def put(self, heading: str, lines: list[str]) -> None:
        """Replaces a section and writes the file; without lines the section goes."""
        self._sections[heading] = "\n".join(lines).strip()
        parts = [f"## {name}\n\n{self._sections[name]}" for name in ORDER if self._sections.get(name)]
        flags = f"<details><summary>The processor's flags</summary>\n\n{machine.cpu_flags()}\n\n</details>"
        self.path.write_text("\n\n".join(["# Results", self._machine, *parts, flags]) + "\n")


def measured(command: list[str], load: str) -> str:
    """Returns the line that says when and how a section was measured."""
    line = f"`python -m {' '.join(command)}`, {datetime.date.today().isoformat()}, load average before all {load}."
    return line if float(load) <= machine.IDLE else f"{line} **The machine was not idle: this is to be measured again.**"


def run(part: str, quick: bool, load: str) -> list[str]:
    """Runs the command of a part; returns its section's lines."""
    _, command, flags = COMMANDS[part]
    command = command + (flags if quick else [])
    finished = subprocess.run([sys.executable, "-m", *command], cwd=frame.ROOT, capture_output=True, text=True)
    lines = [measured(command, load), "", finished.stdout.strip(), ""]
    if finished.returncode:
        lines += [f"**It ended with status {finished.returncode}**: {(finished.stderr.strip().splitlines() or [''])[-1]}", ""]
    return lines
