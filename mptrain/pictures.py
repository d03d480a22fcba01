"""Pictures in TensorBoard with each evaluation: what `Trainer.pictures` returns."""

from collections.abc import Mapping

import tensorflow as tf

from mptrain.errors import InputError
from mptrain.trainer import Trainer


class WritePictures:
    """An Orbit action: writes a trainer's pictures when an evaluation has ended.

    Args:
        trainer: the run's.
        folder: TensorBoard's; None: nothing is written, as by the workers that are not the chief.
    """

    def __init__(self, trainer: Trainer, folder: str | None):
        self._trainer = trainer
        self._folder = folder
        self._draw = tf.function(trainer.pictures)
        self._writer = None

    def __call__(self, outputs: Mapping[str, float]) -> None:
        """Writes the pictures.

        Raises:
            InputError: if one is none.
        """
        if type(self._trainer).pictures is Trainer.pictures:
            return
        with self._trainer.kernels.scope(), self._trainer.optimizer.averaged_weights():
            pictures = self._draw()
        for name, picture in pictures.items():
            if picture.shape.rank != 3:
                raise InputError(
                    f"{type(self._trainer).__name__}.pictures() returns {name!r} with the shape {picture.shape}: return one"
                    " picture, [height, width, channels]; mptrain.grid(images, columns) makes one of many"
                )
        if pictures and self._folder:
            self._writer = self._writer or tf.summary.create_file_writer(self._folder)
            with self._writer.as_default(step=int(self._trainer.global_step.numpy())):
                for name, picture in pictures.items():
                    tf.summary.image(name, picture[tf.newaxis])
            self._writer.flush()


def grid(images: tf.Tensor, columns: int) -> tf.Tensor:
    """Returns images side by side, in rows of `columns`, as one picture [rows * height, columns * width, channels].

    Args:
        images: [count, height, width, channels]; `count` is a multiple of `columns`.
        columns: how many in a row.

    Raises:
        InputError: if the last row would not be full.
    """
    count, height, width, channels = images.shape
    if count % columns:
        raise InputError(f"mptrain.grid() is given {count} images for rows of {columns}: give a multiple of {columns}")
    rows = tf.reshape(images, [count // columns, columns, height, width, channels])
    return tf.reshape(tf.transpose(rows, [0, 2, 1, 3, 4]), [count // columns * height, columns * width, channels])
