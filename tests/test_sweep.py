"""Sweeps: what is tried, what is refused before the first trial, real trials that fail, stop and go on, and the page."""

import json
import math
import signal
import time

import pytest
from selenium.webdriver import ActionChains

from mptrain import InputError, sweep
from mptrain import config as config_lib
from mptrain.sweep import config_file, mode, report
from mptrain.sweep.search import as_search
from tests.browser import Browser
from tests.runs import assert_refused, launch, rows

RATES = {"optimizer.learning_rate": sweep.log_uniform(1e-4, 1e-1), "seed": sweep.integers(0, 9), "model.width": [16, 32]}


def test_a_mapping_is_a_grid_of_all_combinations():
    grid = as_search({"optimizer.learning_rate": [1e-3, 1e-2], "seed": range(2)})
    assert [tuple(grid.ask(number).values()) for number in range(1, 5)] == [(1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1)]
    assert len(grid) == 4


def test_a_random_trial_is_a_function_of_seed_and_number():
    few, many, other = (sweep.random(trials=n, space=RATES, seed=seed) for n, seed in ((3, 0), (200, 0), (3, 1)))
    assert [few.ask(n) for n in (1, 2, 3)] == [many.ask(n) for n in (1, 2, 3)] != [other.ask(n) for n in (1, 2, 3)]
    drawn = [many.ask(n) for n in range(1, 201)]
    exponents = [math.log10(trial["optimizer.learning_rate"]) for trial in drawn]
    assert -4 <= min(exponents) < -3.8 < -1.2 < max(exponents) <= -1
    assert 60 < sum(exponent < -2.5 for exponent in exponents) < 140
    assert {trial["seed"] for trial in drawn} == set(range(10))
    assert {trial["model.width"] for trial in drawn} == {16, 32}
    assert type(drawn[0]["seed"]) is int


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sweep.log_uniform(0.0, 1.0), "zero and below have no logarithm"),
        (lambda: sweep.uniform(1.0, 1.0), "write two finite numbers, the smaller first"),
        (lambda: sweep.uniform(0.0, math.inf), "write two finite numbers"),
        (lambda: sweep.integers(1.0, 2), "write two whole numbers"),
        (lambda: sweep.grid({}), "the sweep's space is {}"),
        (lambda: sweep.grid({"seed": []}), "no values to choose from"),
        (lambda: sweep.grid({"seed": 3}), "the sweep's seed is 3: write a list of values"),
        (lambda: sweep.grid({"optimizer.name": "adam"}), "is 'adam': write a list of values"),
        (lambda: sweep.grid({"seed": sweep.integers(0, 3)}), "a grid needs a list of values"),
        (lambda: sweep.random(trials=0, space=RATES), "the sweep's trials is 0"),
        (lambda: sweep.random(trials=3, space=RATES, mode="lowest"), "write 'min' or 'max'"),
        (lambda: as_search([1, 2]), "the sweep's space is [1, 2]"),
    ],
)
def test_what_is_no_search_is_refused(make, message):
    with pytest.raises(InputError) as caught:
        make()
    assert message in str(caught.value)


def optuna(folder, trials=12, seed=3):
    search = sweep.optuna(trials=trials, space={"x": sweep.uniform(-4.0, 4.0), "kind": ["a", (1, 2)]}, seed=seed)
    folder.mkdir(exist_ok=True)
    search.open(folder, "min")
    return search


def value(parameters):
    return None if parameters["x"] > 3.9 else parameters["x"] ** 2 + (parameters["kind"] == "a")


def test_optuna_goes_on_where_it_was_stopped_as_if_it_had_not_been(tmp_path):
    straight, ends = optuna(tmp_path / "straight"), []
    for number in range(1, 13):
        ends.append(straight.ask(number))
        straight.tell(number, value(ends[-1]))
    first = optuna(tmp_path / "stopped")
    for number in range(1, 6):
        asked = first.ask(number)
        if number < 5:  # in the middle of the fifth it was stopped
            first.tell(number, value(asked))
    second, again = optuna(tmp_path / "stopped"), []
    for number in range(1, 13):
        again.append(second.ask(number))
        second.tell(number, value(again[-1]))
    assert again == ends
    assert len({trial["x"] for trial in ends}) == 12
    assert {trial["kind"] for trial in ends} == {"a", (1, 2)}


def test_optuna_learns(tmp_path):
    search = optuna(tmp_path / "study", trials=30)
    asked = []
    for number in range(1, 31):
        asked.append(search.ask(number))
        search.tell(number, value(asked[-1]))
    early, late = ([abs(trial["x"]) for trial in part] for part in (asked[:10], asked[20:]))
    assert sum(late) < 0.6 * sum(early)


def test_optuna_is_an_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(InputError, match="needs Optuna: pip install"):
        sweep.optuna(trials=3, space=RATES)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"optimizer.learning_rate": [1e-3, -1.0]},
            "trial 2 (optimizer.learning_rate=-1): config.optimizer.learning_rate is -1",
        ),
        ({"optimizer.learning_rat": [1e-3]}, "unknown config field 'optimizer.learning_rat': did you mean"),
        ({"train.steps": [5, "many"]}, "trial 2 (train.steps=many): config.train.steps is 'many': write a value of type int"),
        ({"optimizer.name": ["adam", "adamm"], "seed": [-1]}, "3 faults"),
        ({"optimizer.name": ["sgd"], "optimizer.options.momentm": [0.5]}, "did you mean 'momentum'?"),
    ],
)
def test_all_trials_are_checked_before_the_first_one_runs(config, tmp_path, space, message):
    with pytest.raises(InputError) as caught:
        mode.sweep(config, as_search(space), tmp_path / "sweep")
    assert message in str(caught.value)
    assert not (tmp_path / "sweep").exists()


def test_trials_vary_fields_of_several_types_and_have_no_time_limit(config, tmp_path):
    for value in ("auto", 7):
        assert mode.config_of(config, {"train.steps_per_loop": value}).train.steps_per_loop == value
    config.train.time_limit = "1h"
    with pytest.raises(InputError, match="time_limit ends a trial without the evaluation that ranks it"):
        mode.sweep(config, as_search({"seed": [1, 2]}), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_optunas_ranges_are_checked_before_the_first_trial(config, tmp_path):
    search = sweep.optuna(trials=2, space={"optimizer.learning_rate": sweep.uniform(-1.0, 1.0)})
    with pytest.raises(InputError, match="optimizer.learning_rate is -1"):
        mode.sweep(config, search, tmp_path / "sweep")


def test_a_trial_may_give_a_duration_in_the_other_unit(config):
    made = mode.config_of(config, {"train.epochs": 2.0, "optimizer.options.beta_1": 0.5})
    assert (made.train.steps, made.train.epochs, made.optimizer.options.beta_1) == (None, 2.0, 0.5)
    assert config.train.steps == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "needs a function sweep() beside get_config()"),
        ("def sweep():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
        ("def sweep():\n    return {'seed': []}\n", "no values to choose from"),
    ],
)
def test_config_file_without_a_search_is_one_line(tmp_path, content, message):
    path = tmp_path / "sweep.py"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        config_file.search(str(path))
    assert message in str(caught.value)


def test_sweep_gets_the_argument_of_the_config_file(tmp_path):
    path = tmp_path / "sweep.py"
    path.write_text("def sweep(size):\n    return {'seed': range(int(size))}\n")
    assert len(config_file.search(f"{path}:4")) == 4


SWEEP = """
from tests.runs import tiny_config

def get_config():
    config = tiny_config()
    config.train.steps, config.eval.every_steps, config.loss_scale.max_consecutive_skips = 60, 30, 5
    config.train.steps_per_loop, config.optimizer.name = 5, "sgd"
    return config

def sweep():
    return {"optimizer.learning_rate": [0.01, 1e38, 0.1]}
"""


@pytest.mark.slow
def test_sweep_survives_a_diverged_trial_and_a_signal_and_runs_nothing_twice(command, tmp_path):
    path, workdir = tmp_path / "swept.py", tmp_path / "sweep"
    path.write_text(SWEEP)
    process = launch(path, workdir, "--mode=sweep")
    while not list(workdir.glob("trial-003*/checkpoints/ckpt-20")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    assert "go on with the same command" in output
    record = json.loads((workdir / "report" / "sweep.json").read_text())
    assert [trial["status"] for trial in record["trials"]] == ["finished", "failed", "interrupted"]
    (first,) = workdir.glob("trial-001-learning_rate=0.01")
    (third,) = workdir.glob("trial-003-*")
    before = (first / "metrics.jsonl").read_bytes()
    assert rows(third, event="preemption")[0]["signal"] == "SIGINT"

    finished = command(f"--config={path}", f"--workdir={workdir}", "--mode=sweep")
    assert finished.returncode == 0, finished.stderr
    record = json.loads((workdir / "report" / "sweep.json").read_text())
    assert [trial["status"] for trial in record["trials"]] == ["finished", "failed", "finished"]
    assert "updates in a row were skipped" in record["trials"][1]["reason"]
    assert (first / "metrics.jsonl").read_bytes() == before
    assert rows(third, event="resume")
    assert [row["step"] for row in rows(third, split="eval")] == [30, 60]
    assert record["trials"][2]["value"] == rows(third, split="eval")[-1]["loss"]
    assert (workdir / "report" / "sweep.png").stat().st_size > 10_000
    assert "Sweep: grid, ranked by loss (min)" in finished.stdout

    other = command(f"--config={path}", f"--workdir={workdir}", "--mode=sweep", "--config.data.batch_size=10")
    assert_refused(other, "holds another sweep: config.data.batch_size was 12 and is 10")
    assert_refused(command(f"--config={path}", f"--workdir={first}", "--mode=sweep"), "holds a run")


def record(config):
    config.model = {"width": 16}
    search, trials = sweep.random(trials=12, space={**RATES, "optimizer.name": ["adam", "sgd"]}), []
    for number in range(1, 13):
        parameters, failed = search.ask(number), number in (4, 9)
        loss = None if failed else parameters["optimizer.learning_rate"] + parameters["seed"] / 10
        trial = mode.Trial(number, parameters, f"trial-{number:03}", "failed" if failed else "finished", loss)
        trial.metrics, trial.reason = ({}, "diverged: its loss is not finite") if failed else ({"loss": loss}, "")
        trials.append(vars(trial))
    described = {"kind": "random", "trials": 12, "space": {path: str(values) for path, values in search.space.items()}}
    fields = dict(config_lib.fields(config))
    return {"metric": "loss", "mode": "min", "search": described, "config": fields, "trials": trials}


def test_page_shows_every_trial_ranked_and_keeps_those_in_a_dragged_range(config, tmp_path):
    whole = record(config)
    best = report.ranked(whole)[0]
    its_own = tmp_path / best["folder"] / "report" / "index.html"
    its_own.parent.mkdir(parents=True)
    its_own.touch()
    report.write(whole, tmp_path)
    browser = Browser()
    try:
        for width, colours in ((1280, "light"), (1280, "dark"), (420, "light")):
            browser.open(tmp_path / "report" / "sweep.html", width, colours)
            assert browser.complaints() == []
            assert browser.run("return document.documentElement.scrollWidth") == width
            browser.screenshot(tmp_path / f"sweep-{width}-{colours}.png")
        browser.open(tmp_path / "report" / "sweep.html")
        assert browser.text(".lead").startswith(f"Trial {best['number']} is the best: loss ")
        assert browser.run("return document.querySelectorAll('#parallel path').length") == 12
        assert browser.run("return document.querySelectorAll('#parallel path.failed').length") == 2
        assert [int(text) for text in browser.texts("#trials tbody th")] == [t["number"] for t in report.ranked(whole)]
        (link,) = browser.driver.find_elements("css selector", "#trials tbody a")
        assert (link.text, link.get_attribute("href")) == (str(best["number"]), its_own.as_uri())
        assert browser.texts("#parallel .name") == ["learning_rate", "seed", "width", "name", "loss"]
        axis = browser.driver.find_elements("css selector", ".axis")[2]  # width: 16 below, 32 above
        drag = ActionChains(browser.driver).move_to_element_with_offset(axis, 0, -50).click_and_hold()
        drag.move_by_offset(0, -125).release().perform()
        wide = sum(trial["parameters"]["model.width"] == 32 for trial in whole["trials"])
        assert browser.text("#kept").startswith(f"{wide} of 12 trials kept")
        assert browser.run("return document.querySelectorAll('#trials .gone').length") == 12 - wide
        row = browser.driver.find_element("css selector", "#trials tbody tr")
        ActionChains(browser.driver).move_to_element(row).perform()
        assert browser.run("return document.querySelectorAll('#parallel path.chosen').length") == 1
    finally:
        browser.driver.quit()


def test_page_and_picture_stand_trials_that_all_failed_or_are_alike(config, tmp_path):
    whole = record(config)
    for trial in whole["trials"]:
        trial.update(status="failed", value=None, metrics={})
    report.write(whole, tmp_path)
    whole["trials"], whole["search"]["space"] = [dict(whole["trials"][0], parameters={"seed": 1}, value=1.0)], {"seed": "1"}
    report.write(whole, tmp_path)
    assert report.read(tmp_path)["trials"][0]["value"] == 1.0
    (tmp_path / "report" / "sweep.json").write_text("{")
    with pytest.raises(InputError, match="sweep.json is damaged"):
        report.read(tmp_path)
