"""The page of a training run in a real browser."""

import pytest

from mptrain.pages import numbers
from mptrain.report.page import write_page
from tests.browser import Browser
from tests.run_folders import event, failed, healthy, loop, write


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture
def opened(browser, tmp_path):
    """Writes a run's folder and opens its page; afterwards nothing may have been complained of or asked for."""
    browser.complaints(), browser.requests()
    folder = tmp_path / "run"

    def open_page(rows, config=True, **look):
        browser.open(write_page(write(folder, rows, config)), **look)
        return browser

    yield open_page
    assert browser.complaints() == []
    own = (folder / "report" / "index.html").as_uri()
    assert [url for url in browser.requests() if url != own and not url.startswith("data:")] == []


def hostile():
    """Names and reasons that are markup, long ones, and no evaluation."""
    name = "</script><!--<script><img src=x onerror=alert(1)>" + "long" * 40
    return [loop(10, **{name: 1.0}), loop(20, **{name: 2.0}), event(20, "failed", reason=name), event(20, name, more=[name])]


KINDS = {
    "healthy": healthy,
    "failed": failed,
    "one-loop": lambda: [loop(10)],
    "nothing": list,
    "hostile": hostile,
    "float32": lambda: [loop(step, loss_scale=1.0) for step in range(10, 600, 10)],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(opened, tmp_path, kind, width, colours):
    browser = opened(KINDS[kind](), width=width, colours=colours)
    browser.screenshot(tmp_path / f"report-{kind}-{width}-{colours}.png")
    browser.run("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    assert browser.run("return document.documentElement.scrollWidth") == width
    beyond = """return [...document.querySelectorAll("main *:not(svg *)")].filter((one) =>
        one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 200))"""
    assert browser.run(beyond) == []


def test_evaluations_are_dots_and_each_curve_has_its_name(opened):
    browser = opened(healthy())
    assert browser.texts("#metrics h3") == ["loss", "accuracy"]
    assert browser.texts("#metrics .plot .name") == ["train", "eval"] * 2
    dots = browser.run(
        "return [...document.querySelectorAll('#metrics .dots')].map(one => one.getAttribute('d').split('M').length)"
    )
    assert dots == [3, 3]  # two dots, and what stands before the first


def test_pointer_tells_step_and_values_of_training_and_evaluation(opened):
    browser = opened(healthy())
    over = """const box = document.querySelectorAll(arguments[0])[0], at = box.getBoundingClientRect();
        box.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: at.left + arguments[1] * at.width,
        clientY: at.top + 1})); const tip = document.querySelector(".tip"); return tip.hidden ? null : tip.innerText"""
    assert browser.run(over, "#metrics .plot svg", 1.0).splitlines() == [
        "step 100",
        f"train {numbers.magnitude(loop(100)['loss'])}",
        f"eval {numbers.magnitude(healthy()[-1]['loss'])}",
    ]
    assert browser.run(over, "#metrics .plot svg", 0.9).splitlines()[2].endswith(", at step 100")
    assert browser.run(over, "#scales svg", 0.25).splitlines() == ["step 25", "loss scale 2,048", "1 skipped: step 25"]
    browser.run("document.querySelector('#scales .plot').dispatchEvent(new PointerEvent('pointerleave'))")
    assert browser.run("return document.querySelector('.tip').hidden")


def test_values_that_are_not_finite_and_skipped_steps_are_red_ticks(opened):
    browser = opened(failed())
    ticks = "return [...document.querySelectorAll(arguments[0])].map(one => one.querySelectorAll('.mark').length)"
    assert browser.run(ticks, "#metrics .plot") == [4, 4]
    assert browser.run(ticks, "#scales") == [4]


def test_config_is_folded_behind_what_differs(opened):
    browser = opened(healthy())
    assert browser.run("return [...document.querySelectorAll('details')].map(one => one.open)") == [True, True, False]
    assert [text.replace("\u200b", "") for text in browser.texts("details[open] .fields tbody th")] == [
        "precision.policy",
        "train.steps",
        "trainer",
    ]


def test_hostile_names_are_text(opened):
    browser = opened(hostile())
    assert browser.texts("#metrics h3")[-1].startswith("</script><!--<script><img")
    assert browser.text(".lead").startswith("Failed at step 20: <")
