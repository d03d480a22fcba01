"""The experiments as the tests run them: each config file of configs/, made so small that a run takes seconds.

An experiment is added with one line in `EXPERIMENTS`.
"""

import dataclasses
import importlib
import pathlib

import numpy as np
from ml_collections import ConfigDict

from mptrain.data import idx

BATCH = 8  # the training set is one batch, so that each step sees the same examples


@dataclasses.dataclass(frozen=True)
class Case:
    """An experiment to be run for four steps, in float16 and on two replicas.

    Attributes:
        name: of its file in configs/.
        data: "images" or "text": what it is trained on.
        fields: what is changed in its config, for size and speed.
        argument: what its config file is given after the colon.
        falls: the training metric that is lower after four steps than after the first.
    """

    name: str
    data: str
    fields: dict = dataclasses.field(default_factory=dict)
    argument: tuple[str, ...] = ()
    falls: str = "loss"


SMALL_TRANSFORMER = {"model.layers": 1, "model.width": 16, "model.heads": 2, "data.context": 12}

EXPERIMENTS = (
    Case("mnist", "images"),
    Case("resnet", "images", {"model.blocks": 1, "model.width": 4}, argument=("mnist",)),
    Case("transformer", "text", SMALL_TRANSFORMER),
    Case("transformer_module", "text", SMALL_TRANSFORMER),
    Case("gan", "images", {"model.width": 2, "model.noise": 4}),
    Case("distillation", "images", {"model.units": 4}),
    Case("sam", "images"),
    Case("vae", "images", {"model.hidden": 8, "model.latent": 3}),
)


def tiny_config(case: Case, folder: pathlib.Path) -> ConfigDict:
    """Returns the config of a case, four steps long; its data are written to `folder`."""
    config = importlib.import_module(f"configs.{case.name}").get_config(*case.argument)
    config.train.epochs = None
    fields = {
        "data.batch_size": BATCH,
        "data.eval_batch_size": 6,  # the last batch of the evaluation is padded
        "data.exclude": (),
        "devices.strategy": "mirrored",
        "devices.virtual_cpus": 2,
        "loss_scale.initial_scale": 2.0**10,
        "optimizer.learning_rate": 1e-2,
        "schedule.name": "constant",
        "schedule.warmup_steps": 0,
        "train.steps": 4,
        "train.steps_per_loop": 1,
        "eval.every_steps": 4,
        "checkpoint.every_steps": 2,
        **_DATA[case.data](folder),
        **case.fields,
    }
    config.update_from_flattened_dict(fields)
    return config


def _images(folder: pathlib.Path) -> dict[str, object]:
    arrays = {}
    for split, name in (("train", "train"), ("eval", "test")):
        examples = idx.embedded_mnist(split).arrays
        arrays |= {f"x_{name}": examples["inputs"][:BATCH], f"y_{name}": examples["targets"][:BATCH]}
    np.savez(folder / "images.npz", **arrays)
    return {"data.name": "npz", "data.dir": str(folder / "images.npz")}


def _text(folder: pathlib.Path) -> dict[str, object]:
    (folder / "text.py").write_text("def f(x):\n    return x + 1\n" * 8)  # 8 windows of 12 bytes, and as many to evaluate
    return {"data.name": "bytes", "data.dir": str(folder), "data.eval_fraction": 0.5}


_DATA = {"images": _images, "text": _text}
