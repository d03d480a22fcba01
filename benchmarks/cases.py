"""What was measured of each case, with every turn, in RESULTS.json, so that one can be measured anew without the others."""

import dataclasses
import json
import pathlib

from benchmarks import frame, targets, works


@dataclasses.dataclass(frozen=True)
class Measured:
    """A case that was measured.

    Attributes:
        work: its name.
        precision: "float32", "mixed_bfloat16" or "mixed_float16".
        title: what is compared, behind work and precision; "" for the peers.
        reference: the contestant that all are compared with.
        about: when and how it was measured, in a line.
        found: contestant -> turns, or why there are none.
    """

    work: str
    precision: str
    title: str
    reference: str
    about: str
    found: dict[str, list[frame.Turn] | str]

    @property
    def heading(self) -> str:
        return f"{self.work}, {self.precision}{self.title}"


class Cases:
    """All cases that were measured on this machine with this software, in the order of works and precisions.

    Args:
        file: that they are read from, if there is one and it is of this machine, and written to; None: neither.
        machine: what the machine and the software are.
    """

    def __init__(self, file: pathlib.Path | None, machine: str):
        self._file = file
        self._machine = machine
        self._cases: dict[str, Measured] = {}
        before = json.loads(file.read_text()) if file and file.exists() else {}
        if before.get("machine") == machine:
            for fields in before["cases"]:
                found = {name: each if isinstance(each, str) else _turns(each) for name, each in fields.pop("found").items()}
                case = Measured(**fields, found=found)
                self._cases[case.heading] = case

    def __iter__(self):
        order = {name: number for number, name in enumerate((*works.WORKS, *works.PRECISIONS))}
        return iter(sorted(self._cases.values(), key=lambda case: (order[case.work], bool(case.title), order[case.precision])))

    def put(self, case: Measured) -> None:
        """Adds a case, or replaces what was known of it; the file is the old one or the new one at any time."""
        self._cases[case.heading] = case
        if self._file:
            contents = {"machine": self._machine, "cases": [dataclasses.asdict(each) for each in self]}
            beside = self._file.with_suffix(".json.new")
            beside.write_text(json.dumps(contents))
            beside.replace(self._file)

    def results(self) -> targets.Results:
        """Returns (work, precision, contestant) -> turns, without those that have none."""
        found = {}
        for case in self:
            turns = {name: each for name, each in case.found.items() if not isinstance(each, str)}
            found |= {(case.work, case.precision, name): each for name, each in turns.items()}
        return found


def _turns(fields: list[dict]) -> list[frame.Turn]:
    return [frame.Turn(**each) for each in fields]
