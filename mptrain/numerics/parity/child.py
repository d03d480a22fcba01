"""`python -m mptrain.numerics.parity.child FOLDER PRECISION`: the process of one precision of a parity run.

A process of its own, so that its memory is its own and its end is not the others'. A command like `mptrain.main`, on the top
floor: it may import the runner.
"""

import json
import math
import pathlib
import pickle
import sys

from absl import logging

from mptrain import config as config_lib
from mptrain import devices, runner
from mptrain.errors import reason
from mptrain.numerics.parity.mode import CONFIG, FAILED, PROGRESS
from mptrain.numerics.parity.run import train


def main(folder: pathlib.Path, precision: str) -> None:
    """Trains and writes `<precision>.json`; prints how far it is."""
    config = config_lib.from_fields(pickle.loads((folder / CONFIG).read_bytes()))
    strategy = devices.strategy(config.devices)

    def build(config):
        return runner.build_trainer(config, strategy)

    found = train(build, config, folder, precision, lambda count: print(f"{PROGRESS}{count}", flush=True))
    (folder / f"{precision}.json").write_text(json.dumps(finite(found), allow_nan=False))


def finite(tree):
    """Returns the structure with None for every number that is not finite, which JSON has no word for."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    try:
        main(pathlib.Path(sys.argv[1]), sys.argv[2])
    except Exception as error:
        sys.exit(f"\n{FAILED}{reason(error)}")
