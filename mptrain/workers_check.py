"""What all workers must have in common before they train together, or they wait for each other, or train on other data."""

import hashlib
import inspect
import pathlib

from mptrain import config as config_lib
from mptrain import data

_OWN = ("data.dir", "devices.")  # where a host keeps its data and how it is reached is its own affair


def check_config(trainer) -> None:
    """Checks the config, the precision, and the trainer's code.

    Raises:
        InputError: if a worker has another one than the chief.
    """
    config, workers = trainer.config, trainer.workers
    fields = {f"config.{path}": value for path, value in config_lib.fields(config) if not path.startswith(_OWN)}
    fields["config.devices.sync_batch_norm"] = config.devices.sync_batch_norm
    fields[f"the file of {config.trainer}"] = _checksum(type(trainer))
    workers.check_same({**fields, "the precision": trainer.precision.name, "replicas": workers.local_replicas})


def check_examples(trainer) -> None:
    """Checks how many examples there are, and their shapes; one worker may have an older copy of the data.

    Raises:
        InputError: if a worker has others than the chief.
    """
    if trainer.workers.count == 1:
        return
    for split, source in (("training", trainer.train_source), ("evaluation", trainer.eval_source)):
        shapes = {name: [spec.dtype.name, spec.shape.as_list()] for name, spec in source.spec.items()}
        is_dataset = isinstance(source, data.DatasetSource)
        size = f"{int(source.dataset.cardinality())} batches" if is_dataset else len(source)
        trainer.workers.check_same({f"the number of {split} examples": size, f"the {split} examples' shape": shapes})


def _checksum(code: type) -> str | None:
    """Returns the checksum of the file in which a class was written; None where there is none, as in a notebook."""
    try:
        return hashlib.sha256(pathlib.Path(inspect.getfile(code)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None
