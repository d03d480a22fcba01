"""Benchmarks run as their docstrings say, here at the smallest size."""

import re
import subprocess
import sys

import keras
import numpy as np
import pytest

from benchmarks import cases, frame, models, operations, report, targets, works
from benchmarks.contestants import by_hand, common
from mptrain.hardware import Gpu, Hardware
from tests.conftest import ROOT

PLAIN_CPU = Hardware(cpu_cores=2, cpu_features=("avx2",))


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
        r"^\| mptrain against the loop by hand \| mlp \| float32 \| ≤ 1.03 \| [\d.]+ \| [\d.]+-[\d.]+ \| \**(met|missed)",
        report,
        re.M,
    )
    assert "load average before" in report
    assert out.with_suffix(".json").exists()


def test_a_contestant_whose_library_is_missing_says_so(monkeypatch):
    monkeypatch.setattr(frame, "TORCH_PYTHON", ROOT / "no-such-python")  # so it starts where only TensorFlow is
    with frame.Contestant("lightning") as contestant:
        found = frame.compete(frame.Case(works.WORKS["mlp"].tiny(), "float32", (3,), ""), {"lightning": contestant}, {})
    assert found == {"lightning": "not installed: torch, lightning"}


def test_ratios_are_those_of_neighbouring_turns():
    slowly, fast = turns(9, 9, 10, 40, 10), turns(9, 9, 5, 20, 5)  # a disturbance that hits both is none
    quartiles, processor = frame.ratio(slowly, fast)
    assert quartiles.tolist() == [2, 2, 2]
    assert processor == 2


def test_losses_are_compared_where_turns_of_both_end():
    whole, parts = [frame.Turn(10, 1, 1, 2.0)], [frame.Turn(1, 1, 1, 2.9), frame.Turn(9, 1, 1, 1.9)]
    assert frame.differences_of_losses(parts, whole) == pytest.approx((0.0, 0.0))
    then = frame.Turn(10, 1, 1, 1.0)
    assert frame.differences_of_losses([*parts, then], [*whole, then, then]) == pytest.approx((0.0, 0.0))
    assert frame.differences_of_losses(turns(1, loss=1.1), turns(1, loss=1.0)) == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize("later", [1.0, float("nan")])
def test_who_stops_learning_after_the_first_turn_did_not_do_the_same(later):
    learns = [frame.Turn(10, 1, 1, loss) for loss in (1.0, 0.5, 0.2)]
    stops = [frame.Turn(10, 1, 1, loss) for loss in (1.0, later, later)]
    results = {"hand": learns, "mptrain": learns, "keras": stops}
    assert report.differing(results, "hand", "float32") == ["keras"]
    table = "\n".join(report.case_table("a case", results, "hand", "float32"))
    assert re.search(r"^\| mptrain .* same \|$", table, re.M)
    assert re.search(r"^\| Keras 3 fit .* \*\*differs by .* in the end\*\* \|$", table, re.M)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "turns"), [("mlp", (1000,) * 7), ("transformer", (2,) * 7)])
def test_who_stops_learning_after_the_warm_up_is_found_out_by_the_losses_of_the_end(monkeypatch, tmp_path, name, turns):
    made, numbers = [], tmp_path / "numbers.npy"
    adam = keras.optimizers.Adam
    monkeypatch.setattr(keras.optimizers, "Adam", lambda rate: made.append(adam(rate)) or made[-1])
    work = works.WORKS[name]
    np.save(numbers, works.numbers(work, sum(turns)))

    def trained(*, until: int) -> list[frame.Turn]:
        common.set_policy("float32")
        batches = common.batches(frame.Case(work, "float32", turns, str(numbers)))
        train = by_hand.loop(models.build(keras, work), batches, scaled=False, compiled=False)
        found = []
        for number, steps in enumerate(turns):
            if number == until:
                made[-1].learning_rate.assign(0.0)
            found.append(frame.Turn(steps, 1.0, 1.0, train(steps)))
        return found

    learns, stops = (trained(until=until) for until in (len(turns), frame.WARM_UP))
    assert report.differing({"hand": learns, "keras": stops}, "hand", "float32") == ["keras"]


def test_a_contestant_that_hangs_has_failed(monkeypatch):
    monkeypatch.setattr(frame, "TURN_LIMIT", 0.1)
    with frame.Contestants() as contestants:
        hand = contestants.ready(["hand"])  # which imports TensorFlow for longer than that
        found = frame.compete(frame.Case(works.WORKS["mlp"].tiny(), "float32", (3,), ""), hand, {})
        assert found == {"hand": "no answer in time"}
        assert contestants.ready(["hand"])["hand"].free  # for the next case a new one


def test_a_case_measured_anew_replaces_its_own_numbers_and_no_others(tmp_path):
    file = tmp_path / "results.json"
    before = cases.Cases(file, "this machine")
    for precision, milliseconds in (("mixed_float16", 2), ("float32", 3)):
        found = {"hand": turns(1, 1, milliseconds), "torch": "not installed: torch"}
        before.put(cases.Measured("cnn", precision, "", "hand", "yesterday", found))
    after = cases.Cases(file, "this machine")
    assert [case.heading for case in after] == ["cnn, float32", "cnn, mixed_float16"]
    after.put(cases.Measured("cnn", "float32", "", "hand", "today", {"hand": turns(1, 1, 4)}))
    first, second = cases.Cases(file, "this machine")
    assert (first.about, second.about) == ("today", "yesterday")
    assert second.found == {"hand": turns(1, 1, 2), "torch": "not installed: torch"}
    assert after.results() == {("cnn", "float32", "hand"): turns(1, 1, 4), ("cnn", "mixed_float16", "hand"): turns(1, 1, 2)}
    assert not list(cases.Cases(file, "another machine"))
    damaged = file.read_text().replace('"title"', '"unknown"')
    file.write_text(damaged)
    with pytest.raises(TypeError, match="unknown"):
        cases.Cases(file, "this machine")
    assert file.read_text() == damaged  # what cannot be read is left as it is


def verdicts(results, here=PLAIN_CPU):
    return {(t.what, t.work, t.precision): verdict for t, _, verdict in targets.rows(results, here)}


def test_targets_are_met_missed_or_not_measured():
    results = {("cnn", "float32", name): turns(1, 1, 10) for name in ("mptrain", "hand", "scaled", "scaled_keras")}
    results["cnn", "float32", "keras"] = turns(1, 1, 12)
    found = verdicts(results)
    assert found["mptrain against the loop by hand", "cnn", "float32"] == "met"
    assert found["mptrain against Keras 3 fit", "cnn", "float32"] == "missed"
    assert found["mptrain against Lightning", "cnn", "float32"] == "not measured"
    assert found["LossScaleOptimizer against Keras 3's", "cnn", "float32"] == "missed"  # as fast is not faster


def test_targets_are_judged_only_on_the_hardware_that_they_are_for():
    name = ("mptrain in mixed_bfloat16 against float32", "cnn", "mixed_bfloat16")
    results = {("cnn", "mixed_bfloat16", "mptrain"): turns(1, 1, 6), ("cnn", "float32", "mptrain"): turns(1, 1, 10)}
    assert verdicts(results)[name] == "not judged: this CPU has no bf16"
    assert verdicts(results, Hardware(2, ("avx512_bf16",)))[name] == "met"
    gpu = Hardware(2, ("avx512_bf16",), gpus=(Gpu("a card", (9, 0)),))
    assert verdicts(results, gpu)[name] == "a CPU's target"
    assert "on a CPU" in report.notes(PLAIN_CPU)
    assert "CPU" not in report.notes(gpu)


def test_nothing_counts_as_the_same_where_the_reference_failed():
    (line,) = report.differing({"hand": "ended without a word", "mptrain": turns(1, 1, 1)}, "hand", "float32")
    assert "hand, with which all others are compared, failed: ended without a word" in line


def test_a_profile_shows_the_operations_of_both_and_says_what_it_does_not_open():
    names = ("mptrain", "hand", "torch")
    lines = operations.table({name: operations.profile(name, works.WORKS["cnn"].tiny(), "float32", 4) for name in names})
    assert re.fullmatch(r"- a step of mptrain: [\d.]+ ms by the clock, [\d.]+ ms in operations", lines[0])
    assert lines[2] == "- a step of torch: not TensorFlow's, not opened"
    assert any("Conv2DBackpropFilter" in line for line in lines)
    for line in lines[6:]:
        assert re.fullmatch(r"\| \w+ (\| [\d.]+ \| \d+% \| \d+ ){2}\|", line)


def test_works_are_the_same_every_time_they_are_drawn():
    for work in works.WORKS.values():
        inputs, targets_ = works.data(work.tiny())
        assert inputs.shape == (32, *work.tiny().shape)
        assert len(inputs) == len(targets_)
        np.testing.assert_array_equal(inputs, works.data(work.tiny())[0])


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
def test_a_leak_of_a_kilobyte_a_step_is_noticed_within_8_000():
    leaking = """
from benchmarks import leak

kept, watched = [], leak.WatchedTrainer.build_actions
leak.WatchedTrainer.build_actions = lambda self: [*watched(self), lambda step, outputs: kept.append(bytes(16 * 1024))]
leak.main(8_000)  # 500 loops of 16 steps
"""
    finished = subprocess.run([sys.executable, "-c", leaking], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    growth = float(re.search(r"took (-?\d+\.\d\d) MiB more", finished.stdout)[1])
    assert growth == pytest.approx(8_000 / 2 * 1024 / 2**20, abs=1.5)


@pytest.mark.slow
def test_growth_prints_what_replicas_and_examples_cost():
    finished = run("growth", "--rounds=1", "replicas", "examples")
    assert finished.returncode == 0, finished.stderr
    assert len(re.findall(r"^\| [\d,]+ (\| [\d.]+ ){1,3}\|$", finished.stdout, re.M)) == 3 + 6
