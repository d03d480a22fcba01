"""The report page in a real browser, the picture for papers, the table in the terminal."""

import copy
import json
import math

import numpy as np
import pytest
import rich.console
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from mptrain import pages
from mptrain.numerics import shown
from mptrain.numerics.page import write_page
from mptrain.numerics.picture import write_picture
from mptrain.numerics.table import table
from mptrain.pages import numbers
from tests import numerics_reports
from tests.browser import Browser

KINDS = ("mnist", "sick", "deep", "bare")


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def reports():
    return {name: getattr(numerics_reports, name)() for name in KINDS}


@pytest.fixture
def opened(browser, reports, tmp_path):
    """Writes a report's page and opens it; afterwards nothing may have been complained of or asked for."""
    browser.complaints(), browser.requests()
    written = tmp_path / "numerics.html"

    def open_page(report, **look):
        write_page(reports[report] if isinstance(report, str) else report, tmp_path)
        browser.open(written, **look)
        return browser

    yield open_page
    assert browser.complaints() == []
    assert [url for url in browser.requests() if url != written.as_uri() and not url.startswith("data:")] == []


def press(browser, selector, *keys):
    browser.driver.find_element(By.CSS_SELECTOR, selector).send_keys(*keys)


def by_hand(row, k):
    """Shares that round to zero and that overflow when 2^k multiplies a row's values, from the histogram alone."""
    first, counts = row.true["histogram"]["first"], row.true["histogram"]["counts"]
    lost = sum(count for i, count in enumerate(counts) if first + i + k < -25)
    over = sum(count for i, count in enumerate(counts) if first + i + k >= 16)
    return [numbers.percent(lost / row.true["count"]), numbers.percent(over / row.true["count"])]


def shares_shown(browser, kind):
    cells = browser.texts(f'.panel[data-kind="{kind}"] .row [role=cell]')
    return [cells[i : i + 2] for i in range(0, len(cells), 2)]


def cells_left(browser, kind):
    """Where the histograms' left end is drawn, in columns."""
    return browser.run(
        """const svg = document.querySelector(`.panel[data-kind="${arguments[0]}"] svg`);
        const zone = svg.querySelector(".moving use").getBoundingClientRect(), box = svg.getBoundingClientRect();
        return (zone.left - box.left) / box.width * svg.viewBox.baseVal.width;""",
        kind,
    )


@pytest.mark.parametrize("report", ["mnist", "sick"])
def test_slider_moves_gradients_and_shows_the_shares_at_its_scale(opened, tmp_path, reports, report):
    browser = opened(report)
    browser.run("document.head.append(html('style', {}, '.moving { transition: none !important }'))")
    layers = reports[report]["layers"]
    start = int(math.log2(reports[report]["loss_scale"]["now"]))
    before = {kind: cells_left(browser, kind) for kind in shown.KINDS}
    for key, k in ((None, start), (Keys.ARROW_RIGHT, start + 1), (Keys.HOME, 0), (Keys.END, 24), (Keys.ARROW_LEFT, 23)):
        if key:
            press(browser, "#loss-scale", key)
        assert browser.text("#scale-value") == f"{numbers.power(2.0**k)} = {2**k:,}"
        for kind in shown.KINDS:
            shift = 0 if kind == "output" else k
            rows = [row for layer in layers for row in shown.rows(layer, kind)]
            assert shares_shown(browser, kind) == [by_hand(row, shift) for row in rows]
            moved = 0 if kind == "output" else k - start
            assert cells_left(browser, kind) - before[kind] == pytest.approx(moved, abs=1e-2)
        browser.screenshot(tmp_path / f"numerics-{report}-scale-{k}.png")


def test_sentence_counts_what_overflows_and_what_is_lost(opened, reports):
    browser = opened("sick")
    layers = [layer for layer in reports["sick"]["layers"] if layer["compute_dtype"] != "float32"]
    rows = [row for layer in layers for kind in ("gradient", "weights") for row in shown.rows(layer, kind)]
    over = sum(by_hand(row, 11)[1] != "0" for row in rows)
    assert 0 < over < len(rows)
    assert browser.text("#scale-says").startswith(f"{over} of {len(rows)} gradients overflow")
    press(browser, "#loss-scale", Keys.HOME)
    assert browser.text("#scale-says").startswith("No gradient overflows.")


def test_buttons_set_the_runs_scale_and_the_middle_of_the_recommended_range(opened):
    browser = opened("deep")
    for name, k in (("recommended", 16), ("run", 10)):
        press(browser, f'[data-scale="{name}"]', Keys.ENTER)
        assert browser.run("return document.getElementById('loss-scale').value") == str(k)


def test_table_is_sorted_by_risk_and_by_any_column_both_ways(opened, reports):
    browser = opened("sick")
    layers = reports["sick"]["layers"]
    names = dict(zip((layer["path"] for layer in layers), shown.short_paths([layer["path"] for layer in layers]), strict=True))

    def paths():
        return [text.replace("\u200b", "") for text in browser.texts("#layers tbody th")]

    def expected(value, reverse):
        return [names[layer["path"]] for layer in sorted(layers, key=value, reverse=reverse)]

    assert paths() == [names[layer["path"]] for layer in shown.by_risk(layers)]
    for column, value, first in (
        (5, lambda layer: shown.worst(layer)["headroom"].value, "ascending"),
        (4, lambda layer: shown.worst(layer)["largest"].value, "descending"),
        (1, lambda layer: layer["path"], "ascending"),
    ):
        head = f"#layers thead th:nth-child({column})"
        press(browser, f"{head} button", Keys.ENTER)
        assert browser.run("return document.querySelector(arguments[0]).getAttribute('aria-sort')", head) == first
        assert paths() == expected(value, first == "descending")
        press(browser, f"{head} button", Keys.ENTER)
        assert paths() == expected(value, first != "descending")
        assert len(browser.driver.find_elements(By.CSS_SELECTOR, "#layers [aria-sort]")) == 1


def test_what_is_not_known_stays_last_in_both_orders(opened):
    browser = opened("bare")
    for _ in range(2):
        press(browser, "#layers thead th:nth-child(4) button", Keys.ENTER)
        assert browser.texts("#layers tbody th")[-1] == "identity"


@pytest.mark.slow
@pytest.mark.parametrize("report", KINDS)
@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(opened, tmp_path, report, width, colours):
    browser = opened(report, width=width, colours=colours)
    browser.screenshot(tmp_path / f"numerics-{report}-{width}-{colours}.png")
    assert browser.run("return document.documentElement.scrollWidth") == width
    beyond = """return [...document.querySelectorAll("main *:not(svg *)")].filter((one) => !one.closest("pre")
        && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 200))"""
    assert browser.run(beyond) == []
    dark = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((part) => part < 128)"
    assert browser.run(dark) == (colours == "dark")


def test_narrow_map_shows_the_chosen_kind_and_follows_a_turn_of_the_phone(opened):
    browser = opened("mnist", width=400)
    visible = "return [...document.querySelectorAll('.panel')].filter(one => one.offsetWidth).map(one => one.dataset.kind)"
    assert browser.run(visible) == ["gradient"]
    press(browser, "#choose input[value=gradient]", Keys.ARROW_RIGHT)
    assert browser.run(visible) == ["weights"]
    before = shares_shown(browser, "weights")
    browser.look(1280, "light")
    browser.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert browser.run(visible) == list(shown.KINDS)
    assert shares_shown(browser, "weights") == before


def test_advice_is_copied_or_selected(opened, reports):
    browser = opened("sick")
    press(browser, "[data-copy]", Keys.ENTER)
    wait = "const done = arguments[0]; setTimeout(() => done(document.querySelector('[data-copy]').textContent), 300)"
    said = browser.driver.execute_async_script(wait)
    assert said in ("Copied", "Selected: press Ctrl+C")
    browser.run(
        "navigator.clipboard.writeText = () => Promise.reject(new Error('refused')); document.execCommand = () => false"
    )
    press(browser, "[data-copy]", Keys.ENTER)
    assert browser.driver.execute_async_script(wait) == "Selected: press Ctrl+C"
    assert browser.run("return getSelection().toString().trim()") == reports["sick"]["advice"]["text"].strip()


def test_two_hundred_layers_are_listed_on_demand(opened):
    browser = opened("deep")
    listed = "return [...document.querySelectorAll('#layers tbody tr')].filter((row) => row.offsetHeight).length"
    assert browser.run(listed) == 24
    press(browser, "[data-all-of]", Keys.ENTER)
    assert browser.run(listed) == 200


def test_history_draws_each_change_and_each_skipped_step(opened, reports):
    browser = opened("sick")
    line = browser.run("return document.querySelector('#history .line').getAttribute('d')")
    assert line.count("V") == len(reports["sick"]["loss_scale"]["history"]) - 1
    assert len(browser.driver.find_elements(By.CSS_SELECTOR, "#history .mark")) == 5


def test_hostile_names_are_text(opened, reports):
    report = copy.deepcopy(reports["mnist"])
    name = "</script><!--<script><img src=x onerror=alert(1)>[bold]"
    report["layers"][0].update(path=f"cnn/{name}", verdict=name, risk=1.0)
    browser = opened(report)
    assert browser.texts("#layers .words")[0] == name
    assert browser.texts(".map .label")[1] == name
    assert name in printed(report, 240)


def test_page_is_whole_or_not_there(tmp_path, reports):
    write_page(reports["mnist"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["numerics.html"]
    before = (tmp_path / "numerics.html").read_text()
    with pytest.raises(ValueError, match="JSON"):
        pages.write(tmp_path / "numerics.html", "pages/base.html", data={"not finite": math.nan})
    assert (tmp_path / "numerics.html").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["numerics.html"]


@pytest.mark.parametrize("report", KINDS)
def test_made_up_reports_are_json(reports, report):
    assert json.loads(json.dumps(reports[report], allow_nan=False)) == reports[report]


@pytest.mark.slow
@pytest.mark.parametrize("report", KINDS)
def test_picture_fits_two_columns_of_a_paper_and_shows_something(tmp_path, reports, report):
    write_picture(reports[report], tmp_path / "numerics.png")
    picture = Image.open(tmp_path / "numerics.png")
    assert picture.width == 2148
    assert picture.height <= 2700
    red, blue = (np.asarray(picture.convert("RGB"), int)[..., channel] for channel in (0, 2))
    assert np.mean(blue > red + 60) > 0.02


def printed(report, width):
    console = rich.console.Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(table(report))
    return capture.get()


def test_table_in_the_terminal_is_short_and_begins_with_the_riskiest(reports):
    lines = printed(reports["sick"], 160).splitlines()
    assert "2 of 8 layers at risk" in lines[0]
    assert lines[4].split()[:4] == ["dense", "float16", "1.00", "−7.2"]
    deep = printed(reports["deep"], 160)
    assert "and 188 more" in deep
    assert len(deep.splitlines()) < 20


@pytest.mark.parametrize("length", range(1, 40, 3))
def test_table_in_a_terminal_of_80_columns_cuts_no_word_off(reports, length):
    report = copy.deepcopy(reports["mnist"])
    words = "fits, with 15 powers of two above its largest output"
    for number, layer in enumerate(report["layers"]):
        layer.update(path=f"{number}{'x' * length}", verdict=words)
    text = printed(report, 80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert set(words.split()) <= set(text.split())


def test_only_a_run_in_16_bits_is_told_that_none_of_its_steps_was_computed_in_float32(tmp_path, reports):
    for precision in ("mixed_float16", "float32"):
        write_page({**reports["deep"], "precision": precision}, tmp_path)
        assert ("No step was computed again" in (tmp_path / "numerics.html").read_text()) == (precision == "mixed_float16")


@pytest.mark.parametrize(
    ("share", "words"),
    [(None, "–"), (0, "0"), (1e-9, "<0.1"), (0.001, "0.1"), (0.25, "25.0"), (0.99999, ">99.9"), (1, "100")],
)
def test_percent_never_rounds_to_nothing_or_all(share, words):
    assert numbers.percent(share) == words
