"""Folders of runs as their logs leave them, for tests of the report: written by hand, because training would take minutes."""

import json
import math

from mptrain import config as config_lib

PLAN = """                  Precision plan

  layer          compute   variables   parameters
 ─────────────────────────────────────────────────
  cnn/conv1      float16   float32            832
  cnn/logits     float32   float32          1,290

precision    mixed_float16 (as configured)
jit_compile  False (auto): float16 operations are computed in float32 and rounded: a CPU's own and XLA's are slow
"""


def loop(step, time=None, **values):
    """The row of a training loop that ended at `step`; a second passes in a step."""
    course = {"learning_rate": 1e-3, "loss_scale": 1024.0, "gradient_norm": 1.5, "examples_per_second": 6000.0}
    counts = {"applied_steps": step, "skipped_steps": 0}
    loss = 2 * math.exp(-step / 100) + 0.01
    row = {"step": step, "split": "train", "time": step if time is None else time, "loss": loss, "accuracy": 1 - loss / 3}
    return {**row, **course, **counts, **values}


def evaluation(step, **values):
    return {"step": step, "split": "eval", "time": step + 0.5, "loss": 1.9 * math.exp(-step / 100), "accuracy": 0.9, **values}


def event(step, name, **details):
    return {"step": step, "event": name, "time": step, **details}


def skip(step, scale, **details):
    """The events of a skipped step that was looked into."""
    origin = {"layer": "cnn/conv1", "tensor": "gradient", "forward": False, "largest": 81234.0, "variables": ["a", "b"]}
    return [
        event(step, "provenance", loss_scale=scale, **{**origin, **details}),
        event(step, "overflow", loss_scale=scale, loss_finite=True, layer="cnn/logits", variables=["a"]),
    ]


def healthy():
    """Ten loops, two evaluations, an interruption and a skipped step."""
    rows = [loop(step, loss_scale=2048.0) for step in (10, 20)]
    rows += [*skip(25, 2048.0), *(loop(step, skipped_steps=1, applied_steps=step - 1) for step in (30, 40, 50))]
    rows += [evaluation(50), event(50, "preemption", signal="SIGTERM")]
    rows += [event(50, "resume", data="60,000 examples", changes={"train.steps": [50, 100]}) | {"time": 5000}]
    late = [loop(step, 4960 + step, skipped_steps=1, applied_steps=step - 1) for step in (60, 70, 80, 90, 100)]
    return [*rows, *late, event(100, "finished") | {"time": 5060}, evaluation(100, accuracy=0.95) | {"time": 5061}]


def failed():
    """Four hundred loops; values that are not finite, overflows in the forward pass, and a long reason to end for."""
    rows = [loop(10 * i, skipped_steps=i // 100, learning_rate=1e-3 * (1 - i / 500)) for i in range(1, 401)]
    for row in rows[200:204]:
        row.update(loss=None, accuracy=None, nonfinite=["loss", "accuracy"])
    path = "transformer/encoder/block_11/multi_head_attention/query_projection"
    rows[300:300] = skip(2999, 1024.0, layer=path, tensor="output", forward=True)
    reason = f"50 steps in a row were skipped at loss scale 1, first in layer {path}: the forward pass overflows"
    return [*rows, event(4000, "failed", reason=reason)]


def write(folder, rows, config=True, text=""):
    """Writes a run's folder; `text` is put at the end of its log."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + text)
    if config:
        made = config_lib.default_config()
        made.trainer, made.precision.policy, made.train.steps = "experiments.mnist.MnistTrainer", "mixed_float16", 100
        content = {
            "config": dict(config_lib.fields(made)),
            "precision": "mixed_float16",
            "devices": "2 CPU cores (avx512_bf16), no GPU; OneDeviceStrategy, 1 replica",
            "versions": {"mptrain": None, "tensorflow": "2.20.0", "keras": "3.12.0", "python": "3.11.2"},
            "git_revision": "1e0d1abf6c4bba7a5f5e2a0d5c0f3e5bd5d1e7f0+",
            "written": "2026-11-25T02:00:00+0000",
        }
        (folder / "config.json").write_text(json.dumps(content))
        (folder / "precision_plan.txt").write_text(PLAN)
    return folder
