"""The page of the parity run in a real browser, and its table in the terminal."""

import copy

import pytest
import rich.console

from mptrain.numerics.parity.page import write_page
from mptrain.numerics.parity.table import table
from mptrain.pages import numbers
from tests.browser import Browser

NAMES = ("float32", "mixed_float16", "mixed_bfloat16")


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture
def opened(browser, tmp_path):
    """Writes a report's page and opens it; afterwards nothing may have been complained of or asked for."""
    browser.complaints(), browser.requests()
    written = tmp_path / "parity.html"

    def open_page(report, **look):
        write_page(report, tmp_path)
        browser.open(written, **look)
        return browser

    yield open_page
    assert browser.complaints() == []
    assert [url for url in browser.requests() if url != written.as_uri() and not url.startswith("data:")] == []


def run_row(precision, status, verdict, **more):
    costs = {"ms_per_step": 20.0, "ratio": 1.0, "peak_memory": 2**30, "peak_gpu_memory": None}
    row = {"precision": precision, "status": status, "verdict": verdict, "parting": None, "drift": None}
    return row | {"final": {"loss": 0.05, "accuracy": 0.99}, "skipped_steps": []} | costs | more


def parted():
    """float16 overflows in "net/b" from step 20 on and skips the rest; bfloat16 follows."""
    steps, compared = list(range(100)), list(range(0, 101, 10))
    loss = [2.0 * 0.95**step for step in steps]
    half = [value if step < 20 else None for step, value in enumerate(loss)]
    gone = [[0.001] * 2 + [None] * 9, [0.02] * 2 + [None] * 9]
    parting = {"step": 20, "kind": "output", "layer": "net/b", "error": None}
    return {
        "version": 1,
        "trainer": "some.module.SomeTrainer",
        "first_step": 0,
        "last_step": 100,
        "accumulation_steps": 1,
        "bound": 0.25,
        "evidence": {"moved": True, "first": 1.9, "last": 0.01, "words": ""},
        "runs": [
            run_row("float32", "reference", "what the others are compared with"),
            run_row(
                "mixed_float16", "parts", "parts from float32 at step 20", parting=parting, skipped_steps=steps[20:], ratio=0.5
            ),
            run_row("mixed_bfloat16", "follows", "follows float32: loss 0.01 against 0.01, weights within 3 %"),
        ],
        "steps": steps,
        "curves": {
            "loss": {"float32": loss, "mixed_float16": half, "mixed_bfloat16": [1.01 * value for value in loss]},
            "accuracy": dict.fromkeys(NAMES, [step / 100 for step in steps]),
        },
        "layers": ["net/a", "net/b"],
        "compared_steps": compared,
        "gradients": {"mixed_float16": gone, "mixed_bfloat16": [[0.01] * 11, [0.3] * 11]},
        "weights": {"mixed_float16": [[0.0] * 11, [0.1] * 11], "mixed_bfloat16": [[0.0] * 11, [0.03] * 11]},
    }


def failed():
    """The only other precision failed, and float32's loss is the same throughout."""
    report = parted()
    nothing = dict.fromkeys(("final", "skipped_steps", "ms_per_step", "ratio", "peak_memory", "peak_gpu_memory"))
    report["runs"] = [report["runs"][0], run_row("mixed_float16", "failed", "failed: out of memory") | nothing]
    report["curves"] = {name: {"float32": [1.0] * 100} for name in report["curves"]}
    return report | {"gradients": {}, "weights": {}}


def deep():
    """Two hundred layers with long paths, and two hundred compared steps of a resumed run."""
    report = parted()
    layers = [f"transformer/encoder/block_{i}/multi_head_attention/query_projection" for i in range(200)]
    compared = list(range(120_000, 122_001, 10))
    rows = [[0.001 * (i + 1) * (1 + j / 100) for j in range(201)] for i in range(200)]
    maps = {"mixed_float16": rows, "mixed_bfloat16": rows}
    report["runs"][1]["parting"] = {"step": 120_010, "kind": "gradient", "layer": layers[180], "error": 0.3}
    return report | {"layers": layers, "compared_steps": compared, "gradients": maps, "weights": maps}


KINDS = {"parted": parted, "failed": failed, "deep": deep}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(opened, tmp_path, kind, width, colours):
    browser = opened(KINDS[kind](), width=width, colours=colours)
    browser.screenshot(tmp_path / f"parity-{kind}-{width}-{colours}.png")
    assert browser.run("return document.documentElement.scrollWidth") == width
    beyond = """return [...document.querySelectorAll("main *:not(svg *)")].filter((one) =>
        one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 200))"""
    assert browser.run(beyond) == []


@pytest.mark.parametrize("width", [1280, 400])
def test_each_curve_has_its_name_beside_it_and_no_name_covers_another(opened, width):
    browser = opened(parted(), width=width)
    boxes = browser.run(
        """return [...document.querySelectorAll(".plot")].map(plot => [...plot.querySelectorAll(".name")].map(name => {
        const {left, top, right, bottom} = name.getBoundingClientRect(); return [left, top, right, bottom]; }))"""
    )
    assert [len(plot) for plot in boxes] == [3, 3]
    for plot in boxes:
        tops = sorted(top for _, top, _, _ in plot)
        assert all(after - before >= 14 for before, after in zip(tops, tops[1:], strict=False))
    assert set(browser.texts(".plot .name")) == set(NAMES)


def test_curve_stops_where_its_values_do_and_the_axis_is_logarithmic(opened):
    browser = opened(parted())
    ends = "return document.querySelector(arguments[0]).getAttribute('d').match(/[\\d.]+ [\\d.]+/g).pop().split(' ')"
    x, _ = map(float, browser.run(ends, ".plot .line.series-1:not(.raw)"))
    assert x == pytest.approx(100 * 19 / 99, abs=0.1)
    path = browser.run("return document.querySelector('.plot .line.raw.reference').getAttribute('d')")
    heights = [float(point.split(" ")[1]) for point in path.replace("h0", "")[1:].split("L")]
    falls = [after - before for before, after in zip(heights, heights[1:], strict=False)]
    assert max(falls) - min(falls) < 0.05  # an exponential is a straight line


def test_map_shows_each_error_by_the_bound_and_frames_where_a_run_parts(opened):
    browser = opened(parted())
    maps = browser.run("return [...document.querySelectorAll('.errors')].map(one => one.dataset.kind)")
    assert maps == ["gradients", "weights"] * 2
    fills = browser.run(
        """return [...document.querySelectorAll(".errors .row svg")].map(svg =>
        [...svg.querySelectorAll("path:not([class])")].map(path => path.style.fill))"""
    )
    assert fills[:2] == [["var(--n1)", "var(--d8)"], ["var(--n3)", "var(--d8)"]]
    assert fills[5] == ["var(--d4)"]  # bfloat16's gradient of net/b: 0.3
    assert browser.texts(".errors [role=cell]") == ["∞", "∞", "0 %", "10 %", "1 %", "30 %", "0 %", "3 %"]
    assert browser.run("return [...document.querySelectorAll('.errors path.frame')].map(one => one.getAttribute('d'))") == [
        "M2 0h1v1h-1z"
    ]


def test_layer_whose_gradients_were_not_seen_says_so(opened):
    report = parted()
    report["gradients"]["mixed_float16"] = [None, [0.02] * 11]
    browser = opened(report)
    assert browser.texts(".errors [role=cell]")[:2] == ["not seen", "2 %"]


def test_map_of_many_layers_is_scrolled_to_where_the_run_parts(opened):
    browser = opened(deep())
    inside = """const map = document.querySelector(".errors").getBoundingClientRect();
        const frame = document.querySelector("path.frame").getBoundingClientRect();
        return frame.top > map.top && frame.bottom < map.bottom"""
    assert browser.run(inside)


def test_pointer_on_a_map_or_a_curve_tells_step_and_value(opened):
    browser = opened(parted())
    over = """const box = document.querySelectorAll(arguments[0])[arguments[1]], at = box.getBoundingClientRect();
        box.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: at.left + arguments[2] * at.width,
        clientY: at.top + 1})); const tip = document.querySelector(".tip"); return tip.hidden ? null : tip.innerText"""
    assert browser.run(over, ".errors .row svg", 1, 0.14) == "b\nstep 10: 0.02 relative"
    assert browser.run(over, ".errors .row svg", 1, 0.5) == "b\nstep 50: not finite"
    assert browser.run(over, ".plot svg", 0, 0.0).splitlines()[:2] == ["step 0", "float32 2, 2 in this step"]
    browser.run("document.querySelector('.plot').dispatchEvent(new PointerEvent('pointerleave'))")
    assert browser.run("return document.querySelector('.tip').hidden")


def test_hostile_names_are_text(opened):
    report, name = copy.deepcopy(parted()), "</script><!--<script><img src=x onerror=alert(1)>[bold]"
    report["layers"][1] = f"net/{name}"
    report["runs"][1]["verdict"] = name
    report["curves"][name] = report["curves"].pop("accuracy")
    browser = opened(report)
    assert browser.texts(".errors .layer")[1] == name
    assert name in browser.text(".verdicts").replace("\u200b", "")
    assert name in browser.texts("h3")


@pytest.mark.parametrize("value", [0.0, 0.00012, 0.5, 12.345, 1234.6, 2.5e7, -3.25])
def test_script_and_python_write_numbers_alike(opened, value):
    assert opened(parted()).run("return magnitude(arguments[0])", value) == numbers.magnitude(value)


def test_table_in_the_terminal_has_a_row_for_each_precision():
    console = rich.console.Console(width=120, no_color=True)
    more = parted()
    more["runs"][0]["final"] = {**more["runs"][0]["final"], "distance": 2.5}
    with console.capture() as capture:
        console.print(table(parted()))
        console.print(table(more))
        console.print(table(failed()))
    lines = [line.split() for line in capture.get().splitlines()]
    assert ["mixed_float16", "0.05", "0.99", "20", "0.50", "1,024", "80"] in lines
    assert ["float32", "0.05", "0.99", "2.5", "20", "1.00", "1,024", "0"] in lines
    assert ["mixed_float16", *"––––––"] in lines


def test_table_in_a_terminal_of_80_columns_cuts_no_name_or_number_off():
    console = rich.console.Console(width=80, no_color=True)
    report = parted()
    for row in report["runs"]:
        row["final"] = {"loss": 0.05, "generator_loss": 12345.0, "categorical_accuracy": 0.99, "perplexity": 1.234e-5}
    with console.capture() as capture:
        console.print(table(report))
    assert "…" not in capture.get()
