"""Parity reports for tests, made in this process: one that starts TensorFlow anew for each precision would take minutes."""

from mptrain import runner
from mptrain.numerics.parity import mode, run
from mptrain.numerics.parity.child import finite
from tests.runs import tiny_config


def parity_config(trainer, steps=40, **fields):
    """A short parity run of one of the sick trainers, or of another one by its full name."""
    config = tiny_config()
    config.trainer = trainer if "." in trainer else f"tests.sick_trainers.{trainer}"
    config.optimizer.learning_rate = 1e-2
    config.parity.steps = steps
    config.parity.precisions = ("mixed_float16", "mixed_bfloat16")
    config.update_from_flattened_dict(fields)
    return config


def report_of(config, folder):
    """Returns the report that --mode=parity writes for this config; `folder` must not hold another one's start."""
    trainer = runner.build_trainer(config)
    run.write_start(trainer, folder)
    return mode.compare(
        trainer, lambda name, to_do: finite(run.train(runner.build_trainer, config, folder, name, lambda count: None))
    )


def row(report, precision):
    (found,) = [row for row in report["runs"] if row["precision"] == precision]
    return found
