"""The report in a real browser: what is drawn, what it asks the network for, and what a hand can do with it.

Skipped where playwright or a Chromium is missing: `pip install playwright`, and Debian's package `chromium`.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.histories import record
from lightning_gradclip import NormClip
from lightning_gradclip.report.find import find_runs
from lightning_gradclip.report.page import write_report

api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright: pip install playwright")

# A browser is one.
pytestmark = pytest.mark.processes

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
NAUGHTY = "<b>bold</b><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("the browser tests need a Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def norms_of(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.normal(0, 0.3, count)) * np.where(rng.random(count) < 0.01, 30.0, 1.0)
    norms[count // 2] = np.nan
    return norms


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run, two runs side by side, a long one, what a logger kept, and runs in which nothing is as usual."""
    folder = tmp_path_factory.mktemp("report")
    scopes = {name: norms_of(800) * scale for name, scale in (("encoder", 0.3), (NAUGHTY, 0.2), ("head", 1e-6))}
    scopes["head"][:200] = np.nan
    record(folder / "one" / "gradclip", norms_of(800), 1.5, scopes=scopes, method=NormClip(max_norm=1.5))
    record(folder / "two" / NAUGHTY.replace("/", "") / "gradclip", norms_of(800), 1.5, method=NormClip(max_norm=1.5))
    record(folder / "two" / "plain" / "gradclip", norms_of(800, 1), 0.5, scopes=scopes, method=NormClip(max_norm=0.5))
    record(folder / "long", norms_of(1_000_000), 2.0, method=NormClip(max_norm=2.0))
    for name, odd in (("single", 1.0), ("zero", np.zeros(9)), ("nan", np.full(9, np.nan)), ("far", [1e-300, 1e300])):
        norms = np.atleast_1d(np.array(odd))
        record(folder / "odd" / name, norms, 1.0, scopes={"a": norms, "b": norms}, method=NormClip())
    (folder / "logged").mkdir()
    lines = [f"{step},0.1,{1 + step % 3},{3 + step % 5},1,0.5,0,0" for step in range(0, 400, 10)]
    header = "step,clip_rate,norm,norm_max,norm_clipped,coef_min,skipped,nonfinite".replace(",", ",gradclip/")
    (folder / "logged" / "metrics.csv").write_text("\n".join([header, *lines]) + "\n")
    made = {name: folder / f"{name}.html" for name in ("one", "two", "long", "odd", "logged")}
    for name, path in made.items():
        write_report(find_runs([folder / name]), path)
    return made


class Opened:
    """A page with everything it said and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.address = path.as_uri()
        self.page.wait_for_selector("html[data-drawn=yes]", timeout=60_000)

    def assert_quiet(self) -> None:
        """Nothing went wrong, and nobody but the file itself was asked."""
        assert self.said == []
        assert [url for url in self.asked if not url.startswith(("data:", "blob:"))] == [self.address]

    def drawn(self, chart: str, run: int = 0) -> dict[str, Any]:
        """Traces by name, and the range of the horizontal axis, as Plotly has them."""
        return (
            self.page.locator(f"[data-chart={chart}]")
            .nth(run)
            .evaluate(
                """element => ({
                traces: Object.fromEntries(element.data.map(one => [one.name ?? one.type, (one.x ?? []).length])),
                range: element.layout.xaxis.range, text: element.textContent,
            })"""
            )
        )


@pytest.fixture(scope="module")
def opened(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """Opens a page; loading one takes seconds, so that tests that ask for the same share it."""
    known: dict[str, Opened] = {}

    def opening(name: str, **options: Any) -> Opened:
        key = f"{name} {options}"
        if key not in known:
            known[key] = Opened(browser, pages[name], **options)
        return known[key]

    yield opening
    for one in known.values():
        one.context.close()


def test_every_chart_is_drawn_and_nobody_is_asked(opened: Any) -> None:
    one = opened("one")
    charts = one.page.locator("[data-chart]")
    assert charts.count() == 4
    for i in range(4):
        assert charts.nth(i).locator(".main-svg").count() > 0
    assert set(one.drawn("norms")["traces"]) == {
        "before clipping",
        "after clipping",
        "limit",
        "clipped",
        "NaN or infinite",
    }
    assert one.drawn("norms")["traces"]["before clipping"] == 800
    assert set(one.drawn("whatIf")["traces"]) == {"steps clipped", "mean factor", "strongest factor"}
    assert one.page.locator("[data-chart=heat] .hm image").count() == 1
    one.assert_quiet()


def test_odd_runs_are_drawn(opened: Any) -> None:
    odd = opened("odd")
    assert odd.page.locator("[data-chart=norms] .main-svg").count() > 3
    assert odd.page.locator("[data-chart=heat] .main-svg").count() > 3
    assert odd.drawn("norms", 1)["traces"]["NaN or infinite"] == 9
    odd.assert_quiet()


def test_log_events_are_drawn_as_what_they_are(opened: Any) -> None:
    logged = opened("logged")
    traces = set(logged.drawn("norms")["traces"])
    assert traces == {"largest before clipping", "mean before clipping", "mean after clipping", "clipped"}
    assert set(logged.drawn("whatIf")["traces"]) == {"log events with a clipped step", "strongest factor"}
    assert "clips a step between" in logged.page.locator("#answer").text_content()
    logged.assert_quiet()


def test_names_are_shown_as_text(opened: Any) -> None:
    one, two = opened("one"), opened("two")
    assert NAUGHTY in one.page.locator("table").all_text_contents()[2] or NAUGHTY in one.page.content().replace(
        "&lt;", "<"
    ).replace("&gt;", ">")
    labels = one.page.locator("[data-chart=heat] .yaxislayer-above text").all_text_contents()
    assert any(NAUGHTY in label for label in labels)
    assert any(NAUGHTY.replace("/", "") in name for name in two.page.locator("h3").all_text_contents())
    assert NAUGHTY.replace("/", "") in two.drawn("spread")["text"]
    for page in (one.page, two.page):
        assert page.locator("img").count() == 0
        assert page.locator("main b, svg b").count() == 0
    one.assert_quiet()
    two.assert_quiet()


def test_runs_stand_side_by_side_on_one_scale(opened: Any) -> None:
    two = opened("two")
    charts = two.page.locator("[data-chart=norms]")
    boxes = [charts.nth(i).bounding_box() for i in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    ranges = [charts.nth(i).evaluate("element => element.layout.yaxis.range") for i in range(2)]
    assert ranges[0] == ranges[1]
    assert two.page.locator("[data-chart=heat]").count() == 1
    two.assert_quiet()


def drag(page: Any, chart: str, start: float, end: float) -> None:
    """Drag over a part of a chart's width."""
    box = page.locator(f"[data-chart={chart}] .nsewdrag").first.bounding_box()
    height = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + start * box["width"], height)
    page.mouse.down()
    page.mouse.move(box["x"] + end * box["width"], height, steps=5)
    page.mouse.up()


def test_zooming_in_shows_what_the_whole_run_hides(opened: Any) -> None:
    long = opened("long")
    whole = long.drawn("norms")
    assert whole["traces"]["before clipping"] <= 3100
    assert "median" in whole["traces"]
    line = long.page.locator("[data-chart=norms]").evaluate("element => [element.data[0].x, element.data[0].y]")
    starts, tops = np.array(line[0][::2], dtype=int), np.array(line[1][1::2])
    # Each point stands for hundreds of steps, and for the largest of them.
    assert np.diff(starts).max() > 500
    assert np.allclose(tops, np.fmax.reduceat(norms_of(1_000_000), starts), rtol=1e-6)
    long.page.locator("[data-chart=norms]").scroll_into_view_if_needed()
    drag(long.page, "norms", 0.5, 0.52)
    long.page.wait_for_selector("[data-chart=norms][data-range]")
    long.page.wait_for_timeout(500)
    near = long.drawn("norms")
    low, high = near["range"]
    assert 400_000 < low < high < 600_000
    assert high - low < 50_000
    # Buckets of 31 steps instead of 21 times as many.
    steps = long.page.locator("[data-chart=norms]").evaluate("element => element.data[0].x.slice(0, 60)")
    assert np.diff(steps[::2]).max() <= 31
    long.page.locator("[data-chart=norms] .nsewdrag").first.dblclick()
    long.page.wait_for_selector("[data-chart=norms]:not([data-range])")
    long.assert_quiet()


def test_hovering_names_the_step(opened: Any) -> None:
    one = opened("one")
    one.page.locator("[data-chart=norms]").scroll_into_view_if_needed()
    box = one.page.locator("[data-chart=norms] .nsewdrag").first.bounding_box()
    one.page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] * 0.7)
    one.page.wait_for_selector("[data-chart=norms] .hoverlayer .hovertext", timeout=5000)
    assert "step" in one.page.locator("[data-chart=norms] .hoverlayer").text_content()
    heat = one.page.locator("[data-chart=heat]")
    heat.scroll_into_view_if_needed()
    box = heat.locator(".nsewdrag").first.bounding_box()
    one.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    one.page.wait_for_selector("[data-chart=heat] .hoverlayer .hovertext", timeout=5000)
    # In the middle is the scope whose name would be markup.
    assert NAUGHTY in heat.locator(".hoverlayer").text_content()
    one.assert_quiet()


def test_a_limit_can_be_tried(opened: Any) -> None:
    one = opened("one")
    slider, answer = one.page.locator("#limit"), one.page.locator("#answer")
    slider.fill("0")
    assert "clips 100 % of the steps" in answer.text_content()
    slider.fill("1000")
    assert "clips 0 % of the steps." in answer.text_content()
    slider.fill("400")
    limit = float(slider.get_attribute("aria-valuetext"))
    norms = norms_of(800)
    share = float(answer.text_content().split("clips ")[1].split(" %")[0]) / 100
    # Between two of the limits that the page knows.
    assert share == pytest.approx(float(np.mean(norms[np.isfinite(norms)] > limit)), abs=0.02)
    one.assert_quiet()


def text_color(page: Any) -> str:
    """Of the charts, as they are drawn."""
    return page.locator("[data-chart=norms] .xtick text").first.evaluate("element => getComputedStyle(element).fill")


def test_themes_follow_the_system_and_the_switch(opened: Any) -> None:
    one = opened("one")
    background = "getComputedStyle(document.body).backgroundColor"
    assert one.page.evaluate(background) == "rgb(255, 255, 255)"
    light = text_color(one.page)
    one.page.emulate_media(color_scheme="dark")
    one.page.wait_for_selector("html[data-theme=dark]")
    one.page.wait_for_timeout(500)
    assert one.page.evaluate(background) == "rgb(20, 23, 27)"
    assert text_color(one.page) != light
    one.page.get_by_text("light", exact=True).click()
    one.page.wait_for_selector("html[data-theme=light]")
    one.page.wait_for_timeout(500)
    assert text_color(one.page) == light
    one.page.get_by_text("auto", exact=True).click()
    one.page.wait_for_selector("html[data-theme=dark]")
    one.page.emulate_media(color_scheme="light")
    one.page.wait_for_selector("html[data-theme=light]")
    one.assert_quiet()


def test_a_phone_shows_all_of_it(opened: Any) -> None:
    phone = opened("two", viewport={"width": 390, "height": 844}, device_scale_factor=2, has_touch=True, is_mobile=True)
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 390
    for chart in phone.page.locator("[data-chart]").all():
        box = chart.bounding_box()
        assert 0 <= box["x"] < box["x"] + box["width"] <= 390
    # A finger on a chart scrolls the page.
    assert phone.page.locator("[data-chart=norms]").first.evaluate("element => element.layout.dragmode") is False
    phone.assert_quiet()


def test_it_prints_light_and_without_controls(opened: Any) -> None:
    one = opened("one")
    one.page.emulate_media(color_scheme="dark")
    one.page.wait_for_selector("html[data-theme=dark]")
    one.page.evaluate(
        """window.themes = []; new MutationObserver(() => window.themes.push(document.documentElement.dataset.theme))
        .observe(document.documentElement, {attributes: true})"""
    )
    assert one.page.pdf(format="A4").startswith(b"%PDF")
    assert one.page.evaluate("window.themes") == ["light", "dark"]
    one.page.emulate_media(media="print")
    assert not one.page.locator("fieldset").is_visible()
    assert not one.page.locator("#limit").is_visible()
    one.page.emulate_media(media="screen", color_scheme="light")
    one.page.wait_for_selector("html[data-theme=light]")
    one.assert_quiet()


def test_without_scripts_the_words_and_tables_are_there(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["one"].as_uri())
    assert page.locator("li").count() >= 4
    assert page.get_by_text("median norm").first.is_visible()
    assert page.locator("figure").count() == page.locator("figure[aria-label]").count() == 4
    context.close()


MEDIANS = """([from, to]) => {
  const trace = normTraces(RUNS[0], from, to).find(one => one.name === "median");
  return trace ? [trace.x, trace.y, RUNS[0].norms.width] : null;
}"""


@pytest.mark.parametrize(("name", "count"), [("long", 1_000_000), ("one", 800), ("middle", 20_000)])
def test_a_drawn_median_is_one_of_the_steps_at_every_zoom(
    browser: Any, pages: dict[str, Path], name: str, count: int, tmp_path: Path
) -> None:
    if name not in pages:
        record(tmp_path / name, norms_of(count), 2.0, method=NormClip(max_norm=2.0))
        pages[name] = tmp_path / "page.html"
        write_report(find_runs([tmp_path / name]), pages[name])
    opened, norms, looked = Opened(browser, pages[name]), norms_of(count), 0
    rng = np.random.default_rng(0)
    for part in (1, 0.5, 0.1, 0.03):
        first = float(rng.integers(0, int(count * (1 - part)) + 1))
        drawn = opened.page.evaluate(MEDIANS, [first, first + count * part])
        if drawn is None:
            continue
        x, y, width = drawn
        for place in rng.choice(len(x) - 1, 20):
            begin, end = int(x[place]), int(x[place + 1])
            assert y[place] == pytest.approx(np.nanmedian(norms[begin:end]), rel=1e-6)
            looked += end - begin > width
    assert looked or name == "one"
    opened.context.close()


def test_a_page_is_light(pages: dict[str, Path]) -> None:
    assert pages["one"].stat().st_size < 2_200_000
    assert pages["two"].stat().st_size < 2_200_000
    assert pages["long"].stat().st_size < 10_000_000
