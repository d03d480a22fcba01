"""MNIST as one trains it without a framework: a script with its own pipeline, step, loop in the graph and evaluation.

    python -m benchmarks.by_hand FOLDER [EPOCHS]

What `benchmarks.start` compares the main job with: the same network, batch size, optimizer, schedule and data in float32. It
writes `metrics.jsonl` with the time of the first step and of each evaluation, and one checkpoint at the end.
"""

# ruff: noqa: E402
import gzip
import json
import math
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

MNIST = pathlib.Path(__file__).parent.parent / "mptrain" / "data" / "mnist"
BATCH_SIZE, EVAL_BATCH_SIZE = 128, 500


def read(split: str) -> tuple[np.ndarray, np.ndarray]:
    images = np.frombuffer(gzip.decompress((MNIST / f"{split}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((MNIST / f"{split}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return images.reshape(-1, 28, 28, 1), labels.astype(np.int32)


def build_model() -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(128, activation="relu"),
            layers.Dropout(0.3),
            layers.Dense(10),
        ]
    )


def augmented(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Moves each image by up to one pixel."""
    offsets = tf.random.uniform([tf.shape(images)[0], 2], 0, 3, tf.int32)
    images = tf.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]])
    images = tf.gather(images, offsets[:, :1] + tf.range(28), axis=1, batch_dims=1)
    return tf.gather(images, offsets[:, 1:] + tf.range(28), axis=2, batch_dims=1), labels


def main(folder: pathlib.Path, epochs: int) -> None:
    folder.mkdir(parents=True)
    train, test = read("train"), read("t10k")
    per_epoch = math.ceil(len(train[0]) / BATCH_SIZE)
    images, labels = (tf.constant(array) for array in train)
    numbers = tf.data.Dataset.range(len(train[0])).shuffle(len(train[0])).repeat().batch(BATCH_SIZE)
    dataset = numbers.map(lambda rows: augmented(tf.gather(images, rows), tf.gather(labels, rows)), num_parallel_calls=2)
    batches = iter(dataset.prefetch(2))
    model = build_model()
    rate = keras.optimizers.schedules.CosineDecay(0.0, epochs * per_epoch, warmup_target=2e-3, warmup_steps=200)
    optimizer = keras.optimizers.Adam(rate)
    optimizer.build(model.trainable_variables)
    mean_loss, accuracy = keras.metrics.Mean(), keras.metrics.SparseCategoricalAccuracy()

    def losses_of(images, labels, training):
        logits = model(tf.cast(images, tf.float32) / 255.0, training=training)
        accuracy.update_state(labels, logits)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)

    @tf.function
    def train_loop(steps):
        for _ in tf.range(steps):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(losses_of(*next(batches), training=True))
            optimizer.apply_gradients(
                zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
            )
            mean_loss.update_state(loss)

    @tf.function
    def evaluate(batches):
        for images, labels in batches:
            mean_loss.update_state(losses_of(images, labels, training=False))

    with open(folder / "metrics.jsonl", "w", buffering=1) as log:

        def row(step, split):
            values = {"loss": float(mean_loss.result()), "accuracy": float(accuracy.result())}
            log.write(json.dumps({"step": step, "split": split, "time": time.time(), **values}) + "\n")
            mean_loss.reset_state()
            accuracy.reset_state()

        train_loop(tf.constant(1))
        row(1, "train")
        step = 1
        for epoch in range(1, epochs + 1):
            while step < epoch * per_epoch:
                steps = min(100, epoch * per_epoch - step)
                train_loop(tf.constant(steps))
                step += steps
                row(step, "train")
            evaluate(tf.data.Dataset.from_tensor_slices(test).batch(EVAL_BATCH_SIZE))
            row(step, "eval")
    model.save_weights(folder / "model.weights.h5")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int((sys.argv[2:] or [1])[0]))
