"""The benchmark for GPUs: what of it a CPU can prove."""

import re
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import children, frame, gpu, gpu_models, works
from tests.conftest import ROOT


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "benchmarks.gpu", *flags], cwd=ROOT, capture_output=True, text=True)


def operations(graph: tf.Graph) -> list[tf.Operation]:
    """Returns the operations of a graph and of all functions that it calls."""
    found = list(graph.get_operations())
    for name in graph._functions:
        found += graph._get_function(name).graph.get_operations()
    return found


def test_without_a_gpu_it_says_so_in_one_line():
    finished = run()
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.splitlines()[-1].startswith("there is no GPU here: ")


@pytest.mark.slow
def test_it_runs_at_the_smallest_size_on_a_cpu():
    finished = run("--tiny-on-cpu", "--minutes=8", "--contestants", "hand", "mptrain")
    assert finished.returncode == 0, finished.stderr
    times, rates, share = r"[\d.]+ \([\d.]+ to [\d.]+\)", r"[\d.e+-]+ \| [\d.e+-]+ \| \d+%", r"-?[\d.]+%"
    for row in (
        rf"transformer, [\d.]+ M \| mixed_float16 \| {times} \| {rates} \| not counted \| {share} \({share} to {share}\)",
        rf"resnet50, 23.6 M \| float32 \| {times} \| {rates} \| not counted \| no scaling",
        r"by hand (\| [\d.e+-]+ ){6}\| same",
        r"mptrain (\| [\d.e+-]+ ){6}\| same",
    ):
        assert re.search(rf"^\| {row} \|$", finished.stdout, re.M), finished.stdout


@pytest.mark.parametrize("name", ["resnet50", "transformer"])
def test_flops_are_those_of_the_graphs_products_and_convolutions(name):
    model = gpu_models.MODELS[name](tiny=name == "transformer").build()
    spec = tf.TensorSpec((1, *model.input_shape[1:]), model.inputs[0].dtype)
    graph = tf.function(lambda inputs: model(inputs, training=True)).get_concrete_function(spec).graph
    total = 0
    for each in operations(graph):
        if each.type == "Conv2D":
            total += each.outputs[0].shape.num_elements() * each.inputs[1].shape[:3].num_elements()
        elif each.type in ("MatMul", "BatchMatMulV2"):
            transposed = each.get_attr("transpose_a" if each.type == "MatMul" else "adj_x")
            total += each.outputs[0].shape.num_elements() * each.inputs[0].shape[-2 if transposed else -1]
    assert gpu_models.multiplications(model) == total
    if name == "resnet50":
        assert total == pytest.approx(3.86e9, rel=1e-3)  # He et al., 2016: 3.8e9, rounded down


@pytest.mark.parametrize("dtype", gpu_models.DTYPES.values(), ids=gpu_models.DTYPES)
def test_a_long_chain_of_products_neither_grows_nor_vanishes(dtype):
    x, y = tf.cast(tf.random.normal([64, 64], seed=0), dtype), gpu_models.orthogonal(64, dtype)
    there_and_back = tf.cast(gpu_models.products(x, y, tf.constant(200)), tf.float32)
    assert 0.5 < float(tf.math.reduce_std(there_and_back)) < 2
    if dtype == tf.float32:
        np.testing.assert_allclose(there_and_back, x, atol=1e-3)
        assert np.abs(gpu_models.products(x, y, tf.constant(3)) - x).max() > 1  # so an even number of them was computed


@pytest.mark.slow
def test_loss_scaling_is_compared_with_the_same_step_that_has_none():
    large = gpu_models.transformer(tiny=True)
    losses, kinds = [], []
    for kind in (gpu_models.LargeTrainer, gpu_models.UnscaledTrainer):
        trainer = gpu_models.trainer(kind, large, "mixed_float16")
        trainer.train(tf.constant(3))
        losses.append(float(trainer.metrics["loss"].result()))
        graph = tf.function(trainer.train_step).get_concrete_function(trainer.training_batches.open(0)).graph
        kinds.append({each.type for each in operations(graph)})
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert {"IsFinite", "If"} <= kinds[0]
    assert not {"IsFinite", "If", "StatelessIf", "L2Loss"} & kinds[1]


CHILD = """
import json, sys, time
mode = json.loads(input())["mode"]
if mode == "hangs":
    time.sleep(60)
if mode == "breaks":
    raise ValueError("no such kernel\\nand more")
found = {"parameters": 1e6, "flops": 5e9, "seconds": [0.1, 0.1, 0.2], "peak": 1e11, "memory": 2**31, "scaling": "no scaling"}
print(json.dumps({"failed": "out of memory"} if mode == "large" else found))
"""


def test_a_row_that_fails_says_why_and_the_next_ones_are_measured(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "ROW_SECONDS", 2.0)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.0)
    rows = [("m", mode) for mode in ("large", "hangs", "breaks", "fits")]
    failed = gpu.large_table(rows, time.monotonic() + 60, [sys.executable, "-c", CHILD], tiny=True)
    assert failed == ["m breaks: ValueError: no such kernel"]
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| m | large | out of memory |  |  |  |  |  |",
        "| m | hangs | no answer in time |  |  |  |  |  |",
        "| m | breaks | ValueError: no such kernel |  |  |  |  |  |",
        "| m, 1.0 M | fits | 100.0 (100.0 to 200.0) | 0.05 | 0.1 | 50% | 2.0 | no scaling |",
    ]
    gpu.large_table(rows[-1:], time.monotonic() - 1, [sys.executable, "-c", CHILD], tiny=True)
    assert "| m | fits | not run: the time was over |  |  |  |  |  |" in capsys.readouterr().out


class Sleeper(frame.Contestant):
    """A contestant whose turns take so many seconds; from the fifth on a minute, if it is one that gets stuck."""

    def __init__(self, seconds: float, *, sticks: bool = False):
        reply = '{"steps": 1, "wall": 1.0, "processor": 1.0, "loss": 1.0}'
        loop = f"""
import itertools, time
input()
for turn in itertools.count():
    input()
    time.sleep(60 if {sticks} and turn == 4 else {seconds})
    print({reply!r}, flush=True)
"""
        children.Child.__init__(self, [sys.executable, "-c", loop])


def test_a_comparison_whose_time_is_over_keeps_its_turns_and_ends_who_is_busy():
    case = frame.Case(works.WORKS["mlp"], "float32", (1,) * 100, "")
    with Sleeper(0.1) as quick, Sleeper(60) as stuck:
        found = frame.compete(case, {"quick": quick}, {}, end=time.monotonic() + 2)
        assert frame.WARM_UP < len(found["quick"]) < 25
        assert not quick.free  # its next turn would be one of this case
        found = frame.compete(case, {"stuck": stuck}, {}, together=1, end=time.monotonic() + 0.5)
        assert found == {"stuck": "no answer in time"}
        assert stuck.ended
    with Sleeper(0.05, sticks=True) as late:
        found = frame.compete(case, {"late": late}, {}, end=time.monotonic() + 3)
        assert len(found["late"]) == 4
        assert late.ended


def test_contestants_trace_side_by_side_in_the_first_round():
    case = frame.Case(works.WORKS["mlp"], "float32", (1,), "")
    with Sleeper(1) as one, Sleeper(1) as other:
        start = time.monotonic()
        found = frame.compete(case, {"one": one, "other": other}, {}, together=1)
        assert time.monotonic() - start < 1.8
        assert [len(turns) for turns in found.values()] == [1, 1]
        assert one.free


def test_of_tensorflows_long_messages_the_line_that_says_why_is_shown():
    def gather():
        return tf.gather(tf.range(3), tf.random.uniform([], 7, 8, tf.int32))

    for function in (gather, tf.function(gather)):
        with pytest.raises(tf.errors.InvalidArgumentError) as error:
            function()
        assert "indices = 7 is not in [0, 3)" in children.reason(f"{type(error.value).__name__}: {error.value}")


def test_what_an_allocator_says_is_called_out_of_memory():
    for text in (
        "ResourceExhaustedError: Graph execution error:\n\nOOM when allocating tensor with shape[8] on /device:GPU:0",
        "Traceback (most recent call last):\n  File ...\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.",
        "InternalError: Failed to load in-memory CUBIN: CUDA_ERROR_OUT_OF_MEMORY",
    ):
        assert children.reason(text) == "out of memory"
    logged = (
        "Allocator (GPU_0_bfc) ran out of memory: not a failure\nTraceback (most recent call last):\n  File ...\nValueError: a"
    )
    assert children.reason(logged) == "ValueError: a"


def test_the_table_holds_every_work_in_every_precision_and_says_of_each_that_the_time_was_over(capsys):
    cases = gpu.cases()
    assert {(work.name, precision) for work, precision in cases} == {(w, p) for w in works.WORKS for p in works.PRECISIONS}
    assert {work.name for work, _ in cases[:4]} == set(works.WORKS)
    assert {precision for _, precision in cases[:4]} == set(works.PRECISIONS)
    assert gpu.peers(cases, ("hand", "mptrain"), end=time.monotonic(), tiny=False) == []
    assert capsys.readouterr().out.count("\n\nnot run: the time was over\n") == len(cases)
