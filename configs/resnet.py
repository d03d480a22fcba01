"""Trains a residual network with BatchNorm on images that are moved and mirrored at random, in mixed float16.

    python -m mptrain.main --config=configs/resnet.py[:IMAGES]

IMAGES is one of
    auto       (the default) cifar10 if TensorFlow Datasets has it on this machine, otherwise mnist; a line says which
    cifar10    ResNet-20, 60 epochs: for a GPU; fetch it once with `tfds build cifar10 --file_format=array_record`
    mnist      ResNet-8 on the embedded MNIST, 300 steps of 64: results in experiments/README.md
    idx        ResNet-20 on a folder of IDX files, named with --config.data.dir=DIR
    synthetic  ResNet-8 on coloured patterns in noise, 100 steps of 64: to try the speed of a machine
"""

import os
import pathlib
import sys

from ml_collections import ConfigDict

from mptrain import InputError, default_config

# images: (data.name, blocks a stage, pixels moved, mirrored, length)
IMAGES = {
    "cifar10": ("tfds:cifar10", 3, 4, True, {"epochs": 60.0}),
    "mnist": ("mnist", 1, 2, False, {"steps": 300}),
    "idx": ("idx", 3, 2, False, {"epochs": 20.0}),
    "synthetic": ("synthetic", 1, 0, False, {"steps": 100}),
}


def get_config(images: str = "auto") -> ConfigDict:
    if images == "auto":
        images = _found()
    if images not in IMAGES:
        raise InputError(f"there are no images {images!r}: write auto, {', '.join(IMAGES)} after the colon")
    name, blocks, pad, flip, length = IMAGES[images]
    config = default_config()
    config.trainer = "experiments.resnet.ResNetTrainer"
    config.model = ConfigDict({"blocks": blocks, "width": 16, "classes": 10, "pad": pad, "flip": flip})
    config.precision.policy = "mixed_float16"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.weight_decay = 0.02
    config.schedule.name = "cosine"
    config.schedule.warmup_steps = 50
    config.data.name = name
    config.data.shape = (32, 32, 3)
    config.data.batch_size = 64
    config.train.update(length)
    return config


def _found() -> str:
    """Chooses the images for "auto", and says so."""
    folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    if any((folder.expanduser() / "cifar10").glob("*/dataset_info.json")):
        print(f"images: CIFAR-10, found in {folder}", file=sys.stderr)
        return "cifar10"
    missing = f"there is no CIFAR-10 in {folder} (`tfds build cifar10 --file_format=array_record`)"
    print(f"images: the embedded MNIST: {missing}", file=sys.stderr)  # --print_config has the other stream for itself
    return "mnist"
