"""The report of a training run: what it reads from a run's folder, however that looks, and that no run is the worse for it."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

import mptrain
from mptrain import InputError, RunError
from mptrain.report import thinning
from mptrain.report.__main__ import main
from mptrain.report.history import History
from mptrain.report.page import write_page
from tests.conftest import ROOT
from tests.run_folders import evaluation, event, failed, healthy, loop, skip, write


def history(tmp_path, rows, text=""):
    return History(write(tmp_path / "run", rows, text=text) / "metrics.jsonl")


def page_of(folder):
    text = write_page(folder).read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text.split("<main>")[1].split("</main>")[0]).replace("\u200b", ""))
    return words, data


def test_page_tells_how_a_run_went(tmp_path):
    words, data = page_of(write(tmp_path / "run", healthy()))
    assert "Finished at step 100." in words
    assert "eval accuracy 0.95 after 100 steps (99 applied, 1 skipped)" in words
    assert "One step was skipped" in words
    assert "cnn/conv1 25 gradient at the output 81,234 2¹¹ 2 a lower loss scale cures it" in words
    assert "config.train.steps was 50 and is 100" in words
    assert "precision.policy &#34;mixed_float16&#34; &#34;auto&#34;" in words
    assert [plot["name"] for plot in data["metrics"]] == ["loss", "accuracy"]
    assert [one["name"] for one in data["metrics"][0]["series"]] == ["train", "eval"]
    assert data["metrics"][1]["series"][1] | {"raw": None} == {
        "name": "eval", "kind": "series-2", "steps": [50, 100], "values": [0.9, 0.95], "raw": None, "dots": True
    }  # fmt: skip
    assert [plot["name"] for plot in data["course"]] == ["learning rate", "gradient norm", "examples a second"]
    assert data["scales"] == [{"name": "", "scales": [[10, 2048.0], [26, 1024.0]], "skipped": [[25, 25, 1]]}]


def test_each_of_several_optimizers_has_its_own_course_and_loss_scale(tmp_path):
    def row(step, scale, skipped):
        fields = {"learning_rate": 0.1, "loss_scale": 1024.0, "gradient_norm": 1.0, "applied_steps": step, "skipped_steps": 0}
        second = {**fields, "loss_scale": scale, "applied_steps": step - skipped, "skipped_steps": skipped}
        each = {f"{name}/{field}": value for name, its in (("g", fields), ("d", second)) for field, value in its.items()}
        return loop(step, loss_scale=min(1024.0, scale), skipped_steps=skipped, **each)

    skipped = [event(11, "overflow", optimizer="d", loss_scale=4096.0, loss_finite=True, layer="d/x", variables=["a"])]
    words, data = page_of(write(tmp_path / "run", [row(10, 4096.0, 0), *skipped, row(20, 2048.0, 1)]))
    assert [plot["name"] for plot in data["metrics"]] == ["loss", "accuracy"]
    assert [plot["name"] for plot in data["course"]] == [
        "learning rate, g", "learning rate, d", "gradient norm, g", "gradient norm, d", "examples a second"
    ]  # fmt: skip
    assert data["scales"] == [
        {"name": "g", "scales": [[10, 1024.0]], "skipped": []},
        {"name": "d", "scales": [[10, 4096.0], [12, 2048.0]], "skipped": [[11, 11, 1]]},
    ]
    assert "The loss scale of g ended at 2¹⁰. The loss scale of d ended at 2¹¹. One update was skipped" in words


def test_page_is_a_function_of_the_folder(tmp_path):
    first = write_page(write(tmp_path / "run", healthy())).read_bytes()
    assert write_page(tmp_path / "run").read_bytes() == first


def test_time_without_a_process_does_not_count(tmp_path):
    assert history(tmp_path, healthy()).seconds == pytest.approx((50.5 - 10) + (5061 - 5000), abs=1)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([loop(10), event(10, "finished")], "Finished at step 10."),
        ([loop(10), event(10, "preemption", signal="SIGINT")], "Stopped by SIGINT at step 10, and saved."),
        ([loop(10), event(10, "finished", reason="early stop: loss")], "Finished at step 10: early stop: loss."),
        ([loop(10), event(10, "time_limit", limit="2h")], "Its time limit of 2h was reached at step 10; it was saved."),
        ([loop(10), event(10, "failed", reason="RunError: <no>")], "Failed at step 10: RunError: &lt;no&gt;"),
        ([loop(10)], "The log ends at step 10 and does not say why: the run goes on, or was killed."),
        ([loop(10), event(10, "finished"), event(10, "resume"), loop(20)], "The log ends at step 20 and does not say why"),
        ([loop(10), event(10, "finished"), event(10, "resume"), evaluation(10)], "Finished at step 10."),  # evaluated once more
    ],
)
def test_why_a_run_ended_is_the_first_thing_said(tmp_path, rows, words):
    assert words in page_of(write(tmp_path / "run", rows))[0]


@pytest.mark.parametrize(
    "rows",
    [[], [loop(1)], [loop(1), loop(2)], [evaluation(5)], [event(0, "failed", reason="at once")], [loop(10, loss=None)]],
    ids=["nothing", "one loop", "two loops", "one evaluation", "one event", "not finite"],
)
@pytest.mark.parametrize("config", [True, False])
def test_short_log_and_missing_files_make_a_page_too(tmp_path, rows, config):
    words, data = page_of(write(tmp_path / "run", rows, config))
    assert ("Config" in words) == config
    assert data["steps"][0] == 0


def test_damaged_lines_are_counted_and_passed_over(tmp_path):
    lines = ["\x00\xff", "3", "null", "[]", '{"step": true, "split": "train"}', '{"step": -1, "split": "train"}', '{"step": 3}']
    lines += ['{"step": 4, "split": "train", "loss": NaN, "huge": 1' + 400 * "0" + ', "word": "x", "time": "never"}']
    lines += ['{"step": 5, "split": "train", "loss": -Infinity', '{"step": 5, "event": {"a": 1}}', '{"step": 5, "split": [1]}']
    found = history(tmp_path, healthy(), "\n".join(lines))
    assert found.damaged == 8
    assert list(found.train.nonfinite["loss"]) == [4]
    words, _ = page_of(tmp_path / "run")
    assert "8 lines of metrics.jsonl could not be read and are left out." in words


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"config": [], "versions": 3, "devices": {}}', '{"config": {"train.steps": "x", "trainer": 3}}']
)
def test_damaged_config_leaves_the_curves(tmp_path, content):
    folder = write(tmp_path / "run", [loop(5, loss_scale=0.0), *healthy()])
    (folder / "config.json").write_text(content)
    words, data = page_of(folder)
    assert "Finished at step 100." in words
    assert data["metrics"]


def test_values_that_are_not_finite_are_gaps_and_marks(tmp_path):
    _, data = page_of(write(tmp_path / "run", failed()))
    loss = data["metrics"][0]
    assert loss["nonfinite"] == [[step, step, 1] for step in (2010, 2020, 2030, 2040)]
    gap = [loss["series"][0]["steps"][i] for i, value in enumerate(loss["series"][0]["values"]) if value is None]
    assert gap == [2010, 2020, 2030, 2040]


def test_skipped_steps_without_events_are_told_from_the_counts(tmp_path):
    rows = [loop(10, skipped_steps=3), *skip(12, 8.0), event(14, "overflows_forgotten", count=2), loop(20, skipped_steps=6)]
    assert history(tmp_path, rows).skips() == [(0, 9, 3), (10, 19, 2), (12, 12, 1)]


def test_skipped_step_that_was_not_looked_into_has_a_row_too(tmp_path):
    origin, overflow = skip(25, 8.0)
    later = [event(step, "overflow", loss_scale=4.0, loss_finite=step != 37, layer="net/b", variables=[]) for step in (37, 38)]
    folder = write(tmp_path / "run", [loop(10), origin, overflow | {"step": 26}, *later, loop(50, skipped_steps=5)])
    content = json.loads((folder / "config.json").read_text())
    content["config"]["optimizer.accumulation_steps"] = 2
    (folder / "config.json").write_text(json.dumps(content))
    words, _ = page_of(folder)
    assert words.count("cnn/conv1 2") == 1
    assert "net/b 37 gradient – 2² 0 the loss is not finite: no loss scale cures that" in words
    assert "net/b 38 gradient – 2² 0 not looked into" in words
    assert "2 more are in metrics.jsonl." in words


def test_rows_of_one_step_are_one_point_and_the_last_counts(tmp_path):
    found = history(tmp_path, [loop(10), loop(20, loss=3.0), loop(20, loss=4.0), loop(15, loss=2.0)])
    assert list(found.train.steps) == [10, 15, 20]
    assert list(found.train.values["loss"][1:]) == [2.0, 4.0]


def test_metric_that_begins_late_has_no_value_before(tmp_path):
    found = history(tmp_path, [loop(10), loop(20, late=1.0), loop(30)])
    np.testing.assert_array_equal(found.train.values["late"], [np.nan, 1.0, np.nan])


@pytest.mark.parametrize("count", [1, 2, 1999, 2000, 2001, 300_000])
def test_thinned_curve_keeps_its_ends_and_extremes(count):
    values = np.random.default_rng(count).normal(size=count)
    values[count // 3 :: 7] = np.nan
    places = thinning.thinned(values)
    assert len(places) <= 2002
    assert list(places) == sorted(set(places))
    assert {0, count - 1} <= set(places)
    if not np.isnan(values).all():
        assert {np.nanargmin(values), np.nanargmax(values)} <= set(places)


def test_gap_of_a_whole_stretch_is_still_a_gap():
    values = np.ones(100_000)
    values[40_000:60_000] = np.nan
    assert np.isnan(values[thinning.thinned(values)]).sum() >= 90


def test_mean_is_that_of_the_values_before_also_behind_an_enormous_one():
    values = np.full(1000, 0.5)
    values[100] = 1e30
    means = thinning.smoothed(values, np.arange(1000))
    assert means[99] == 0.5
    assert means[100] == pytest.approx(1e30 / 20)
    assert means[120] == 0.5


def test_joined_spans_lose_none():
    spans = [(step, step, 1) for step in range(0, 500_000, 7)]
    joined = thinning.bucketed(spans)
    assert len(joined) <= 1000
    assert sum(count for *_, count in joined) == len(spans)
    assert (joined[0][0], joined[-1][1]) == (spans[0][0], spans[-1][1])


@pytest.mark.slow
def test_log_of_several_hundred_thousand_rows_makes_a_small_page_with_every_skip(tmp_path):
    rows = [loop(step, skipped_steps=step // 100_000, loss=1e6 if step == 123_456 else 1.0) for step in range(1, 300_001)]
    folder = write(tmp_path / "run", rows)
    _, data = page_of(folder)
    assert (folder / "report" / "index.html").stat().st_size < 1_500_000
    assert max(data["metrics"][0]["series"][0]["raw"]) == 1e6
    assert data["scales"][0]["skipped"] == [[99_999, 99_999, 1], [199_999, 199_999, 1], [299_999, 299_999, 1]]


def test_links_to_the_reports_beside_it_and_to_no_other(tmp_path):
    folder = write(tmp_path / "run", healthy())
    assert "href" not in write_page(folder).read_text().split("<main>")[1]
    (folder / "report" / "parity.html").write_text("")
    assert re.findall('href="(.*?)"', write_page(folder).read_text().split("<main>")[1]) == ["parity.html"]


def test_command_writes_the_report_of_an_old_folder(tmp_path, capsys):
    folder = write(tmp_path / "run", healthy())
    main([str(folder)])
    assert capsys.readouterr().out == f"the report is {folder / 'report' / 'index.html'}\n"
    assert (folder / "report" / "index.html").exists()


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--help"], ["nowhere"]])
def test_command_refuses_what_is_no_run_in_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("mptrain.report: ")


def test_folder_that_is_no_run_is_left_as_it_is(tmp_path):
    with pytest.raises(InputError, match="holds neither metrics.jsonl nor config.json"):
        write_page(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_command_does_not_wait_for_tensorflow():
    check = "import sys, mptrain.report.__main__; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


def test_run_that_cannot_write_its_report_says_so_and_ends_well(config, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "report").write_text("mine")
    assert "loss" in mptrain.run(config, run)
    assert f"{run / 'report'} gets no report of this run: " in capsys.readouterr().err
    (run / "report").unlink()
    mptrain.run(config, run, "eval")
    assert not (run / "report").exists()
    mptrain.run(config, run)  # which is finished
    words, data = page_of(run)
    assert "Finished at step 12." in words
    assert [one["steps"] for one in data["metrics"][0]["series"]] == [[3, 4, 6, 8, 9, 12], [4, 8, 12]]


def test_failed_run_has_a_report_that_says_why(config, tmp_path):
    config.trainer, config.loss_scale.max_consecutive_skips = "tests.trainers.PoisonedTrainer", 4
    config.model.poisoned_steps, config.model.poisoned_replica = list(range(100)), 0
    with pytest.raises(RunError) as caught:
        mptrain.run(config, tmp_path / "run")
    text = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "Failed at step" in text
    assert str(caught.value)[:40] in text.replace("\u200b", "")
