"""Benchmarks run as their docstrings say, here at the smallest size."""

import re
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import frame, operations, targets, works
from tests import prepared
from tests.conftest import ROOT


def run(module: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"benchmarks.{module}" if module else "benchmarks", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def turns(*milliseconds: float, loss: float = 1.0) -> list[frame.Turn]:
    return [frame.Turn(10, each / 100, each / 100, loss) for each in milliseconds]


@pytest.mark.slow
def test_the_comparison_measures_the_same_work_and_writes_its_report(tmp_path):
    out = tmp_path / "results.md"
    flags = (
        "--tiny",
        "--quick",
        "--parts",
        "peers",
        "--works",
        "mlp",
        "--precisions",
        "float32",
        "--contestants",
        "hand",
        "mptrain",
        "tf_keras",
    )
    finished = run("", *flags, f"--out={out}")
    assert finished.returncode == 0, finished.stderr
    report = out.read_text()
    for label in ("by hand", "mptrain", "tf_keras fit"):
        number = r"[\d.e+-]+"
        assert re.search(rf"^\| {label} (\| {number} ){{6}}\| same \|$", report, re.M), report
    assert re.search(
        r"^\| mptrain against the loop by hand \| mlp \| float32 \| 1.03 \| [\d.]+ \| \**(met|missed)", report, re.M
    )
    assert "load average before" in report
    assert out.with_suffix(".json").exists()


def test_a_contestant_whose_library_is_missing_says_so(monkeypatch):
    monkeypatch.setattr(frame, "TORCH_PYTHON", ROOT / "no-such-python")  # so it starts where only TensorFlow is
    with frame.Contestant("lightning") as contestant:
        contestant.open(frame.Case(works.WORKS["mlp"].tiny(), "float32", (3,), ""))
        with pytest.raises(frame.Failed, match="not installed: torch, lightning"):
            contestant.turn()


def test_ratios_are_those_of_neighbouring_turns():
    slowly, fast = turns(9, 9, 10, 40, 10), turns(9, 9, 5, 20, 5)  # a disturbance that hits both is none
    quartiles, processor = frame.ratio(slowly, fast)
    assert quartiles.tolist() == [2, 2, 2]
    assert processor == 2


def test_losses_are_compared_where_turns_of_both_end():
    whole, parts = [frame.Turn(10, 1, 1, 2.0)], [frame.Turn(1, 1, 1, 2.9), frame.Turn(9, 1, 1, 1.9)]
    assert frame.difference_of_losses(parts, whole) == pytest.approx(0.0)
    assert frame.difference_of_losses(turns(1, loss=1.1), turns(1, loss=1.0)) == pytest.approx(0.1)


def test_targets_are_met_missed_or_not_measured():
    results = {("cnn", "float32", "mptrain"): turns(1, 1, 10), ("cnn", "float32", "keras"): turns(1, 1, 12)}
    results[("cnn", "float32", "hand")] = turns(1, 1, 10)
    verdicts = {(t.what, t.work, t.precision): verdict for t, _, verdict in targets.rows(results)}
    assert verdicts["mptrain against the loop by hand", "cnn", "float32"] == "met"
    assert verdicts["mptrain against Keras 3 fit", "cnn", "float32"] == "missed"
    assert verdicts["mptrain against Lightning", "cnn", "float32"] == "not measured"


def test_a_profile_shows_the_operations_of_both():
    lines = operations.table(works.WORKS["cnn"].tiny(), "float32", steps=4)
    assert any("Conv2DBackpropFilter" in line for line in lines)
    for line in lines[4:]:
        assert re.fullmatch(r"\| \w+ (\| [\d.]+ \| \d+% \| \d+ ){2}\|", line)


def test_works_are_the_same_every_time_they_are_drawn():
    for work in works.WORKS.values():
        inputs, targets_ = works.data(work.tiny())
        assert inputs.shape == (32, *work.tiny().shape)
        assert len(inputs) == len(targets_)
        np.testing.assert_array_equal(inputs, works.data(work.tiny())[0])


def test_without_a_gpu_its_benchmark_says_so_in_one_line():
    finished = prepared.run("benchmarks.gpu")
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.splitlines()[-1].startswith("there is no GPU here: ")


@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_at_the_smallest_size_on_a_cpu():
    finished = run("gpu", "--tiny-on-cpu")
    assert finished.returncode == 0, finished.stderr
    for name in ("float32", "mixed_float16"):
        assert re.search(rf"^\| transformer, [\d.]+ M \| {name} \| [\d.]+ \([\d.-]+\) \|", finished.stdout, re.M)


@pytest.mark.slow
def test_fast_float16_is_float16():
    finished = run("fidelity", "--tiny", "--works", "cnn")
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["2 replicas", pytest.param("2 workers", marks=pytest.mark.slow)])
def test_scaling_prints_times_and_ratios_of_the_three(setting):
    command = [sys.executable, "-m", "benchmarks.scaling", "--steps=2", "--rounds=1", "--settings", setting]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    _, _, header, _, row = finished.stdout.splitlines()
    assert header.startswith("| setting | by hand, ms a step | mptrain | Keras fit | mptrain / by hand |")
    milliseconds, ratio = r"\d+\.\d", r"\d+\.\d\d \(\d+\.\d\d-\d+\.\d\d\) \| \d+\.\d\d"
    assert re.fullmatch(rf"\| {setting} (\| {milliseconds} ){{3}}(\| {ratio} ){{2}}\|", row)


@pytest.mark.slow
def test_memory_does_not_grow_over_100_000_steps():
    finished = run("leak", "100000")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert re.search(r"the second half of 100,000 steps took -?\d+\.\d\d MiB more", finished.stdout)


@pytest.mark.slow
def test_growth_prints_what_variables_and_examples_cost():
    finished = run("growth", "--rounds=1", "replicas", "examples")
    assert finished.returncode == 0, finished.stderr
    assert len(re.findall(r"^\| [\d,]+ (\| [\d.]+ ){1,3}\|$", finished.stdout, re.M)) == 3 + 6
