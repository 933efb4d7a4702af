"""The page in a browser: headless Chromium, where there is one. REQUIRE_BROWSER=1 makes its absence a failure."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_samples import answer, write_dataset, write_lines, write_run, write_scores
from small_world import run

from mmrlhf_jax.objectives import DPO, MMDPO

pytestmark = pytest.mark.slow

HOSTILE = (
    "<script>document.title='owned';alert(1)</script>",
    "<img src=x onerror=\"document.title='owned';alert(1)\">",
    "\"><svg onload=alert(1)>'/></textarea></style></title><b id=owned>",
    "javascript:alert(1)//\u202e{{7*7}}\x07",
)
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
BOXES = "all => all.map(each => { const box = each.getBoundingClientRect(); return [box.width, box.height] })"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A browser of the system's; none is downloaded."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        found, sync_playwright = None, None
    if not found:
        missing = "there is no Chromium, or no playwright (the `browser` extra) to drive it"
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """Two runs, scores and answers in which every text that data may decide tries to become markup."""
    directory = tmp_path_factory.mktemp("hostile")
    data = write_dataset(directory / "world", HOSTILE)
    write_scores(data, [0.0, 1.0, -1.0], HOSTILE[0], model=HOSTILE[2])
    odd = {step: {HOSTILE[1]: step} for step in range(1, 41)} | {7: {"loss": float("nan")}}
    first = write_run(directory / "<b onclick=alert(1)>run", MMDPO(), dataset=data, more=odd)
    second = write_run(directory / "second", DPO(), dataset=data, steps=700)
    write_lines(first / "environment.jsonl", [{"step": 0, "device": HOSTILE[0], "packages": {HOSTILE[1]: HOSTILE[2]}}])
    rows = range(len(HOSTILE))
    before = [answer(data, row, text=HOSTILE[row], wrong=[[0, 5, HOSTILE[1]]], missing=[HOSTILE[0]]) for row in rows]
    after = [answer(data, row, text="x" * 4000, critiques=[HOSTILE[row]], score=1.0) for row in rows]
    files = [write_lines(directory / f"{name}.jsonl", lines) for name, lines in (("a", before), ("b", after))]
    page = directory / "report.html"
    run("report", first, second, "--answers", f"<i>before={files[0]}", files[1], "--output", page)
    return page


@pytest.fixture(scope="module")
def real(small_world, tmp_path_factory) -> Path:
    """Of a run that was really trained, evaluated, answered with and scored by a reward model of its own."""
    directory = tmp_path_factory.mktemp("real")
    data = shutil.copytree(small_world.dataset, directory / "data")  # scores are written beside it
    given = ("--dataset", data, "--output", directory / "run", "--data.max-steps", 3, "--reference", "online")
    held_out = ("--evaluation.every", 1, "--evaluation.share", 0.3)
    run("train", "configs/tiny.py", "--model", small_world.model, *given, *held_out)
    judge = ("--dataset", data, "--output", directory / "judge", "--data.max-steps", 2)
    run("train", "configs/tiny_reward.py", "--model", small_world.model, *judge)
    short = ("--max-new-tokens", 4, "--dtype", "float32")
    run("annotate", "--dataset", data, "--model", directory / "judge", "--with", "reward", *short)
    for name, model in (("before", small_world.model), ("after", directory / "run")):
        run("generate", "--model", model, "--dataset", data, "--output", directory / f"{name}.jsonl", *short)
    page = directory / "report.html"
    answers = [directory / "before.jsonl", directory / "after.jsonl"]
    run("report", directory / "run", directory / "judge", "--answers", *answers, "--output", page)
    return page


class Visit:
    """A page that was opened, and what happened meanwhile."""

    def __init__(self, browser, file: Path, width: int = 1280, scheme: str = "light"):
        self.said: list[str] = []
        self.requests: list[str] = []
        self.refused: dict[str, str | None] = {}
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("requestfailed", lambda request: self.refused.update({request.url: request.failure}))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri(), wait_until="load")


@pytest.fixture(params=["hostile", "real"])
def file(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_loads_nothing_reports_no_error_and_fits_its_window(browser, file, width, scheme):
    visit = Visit(browser, file, width, scheme)
    for summary in visit.page.query_selector_all("summary"):
        summary.click()
    assert visit.said == []
    assert [url for url in visit.requests if not url.startswith("data:image/")] == [file.as_uri()]
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    wide = visit.page.eval_on_selector_all(
        "main *",
        f"all => all.filter(e => !e.closest('.scroll, svg') && e.getBoundingClientRect().right > {width})"
        ".map(e => e.outerHTML.slice(0, 200))",
    )
    assert wide == []


def test_every_chart_is_drawn_and_has_words(browser, file):
    page = Visit(browser, file).page
    boxes = page.eval_on_selector_all("svg", BOXES)
    assert len(boxes) > 10
    assert all(width > 200 and height > 100 for width, height in boxes)
    lines = page.eval_on_selector_all("svg path.line, svg path.dashed", BOXES)
    assert lines
    assert all(width > 0 or height > 0 for width, height in lines)
    labels = page.eval_on_selector_all("svg", "all => all.map(e => e.getAttribute('aria-label'))")
    assert all(len(label) > 20 and "nan" not in label.lower() for label in labels)
    images = page.eval_on_selector_all("img", "all => all.map(e => [e.naturalWidth > 0, e.alt])")
    assert images
    assert all(drawn and alt for drawn, alt in images)


def test_what_is_hostile_is_text(browser, hostile):
    visit = Visit(browser, hostile)
    texts = visit.page.text_content("body")
    for attack in HOSTILE[:3]:
        assert attack in texts
    assert "⟨U+202E⟩{{7*7}}⟨U+0007⟩" in texts
    assert visit.page.query_selector_all("script, iframe, object, #owned, [onclick], [onerror], [onload]") == []
    assert visit.page.title().startswith("Report: <b onclick=alert(1)>run")
    assert visit.said == []


def test_even_an_injected_element_could_neither_run_nor_load(browser, hostile, tmp_path):
    """What the policy is for: the escaping is taken away, and still nothing happens."""
    injected = tmp_path / "injected.html"
    owned = "document.title='owned'"
    attack = f"<script>{owned}</script><img src='https://example.invalid/a.png' onerror=\"{owned}\">"
    injected.write_text(hostile.read_text().replace("<main", f"{attack}<main"))
    visit = Visit(browser, injected)
    assert visit.page.title() != "owned"
    assert len(visit.said) >= 2  # the policy says what it refused
    assert visit.refused == {"https://example.invalid/a.png": "csp"}  # stopped before anything was sent


def test_dark_is_dark_and_light_is_light(browser, real):
    colours = {}
    for scheme in ("light", "dark"):
        page = Visit(browser, real, scheme=scheme).page
        shown = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        colours[scheme] = [sum(map(int, each[4:-1].split(","))) / 3 for each in shown]
    assert colours["light"][0] > 200 > 80 > colours["light"][1]
    assert colours["dark"][0] < 60 < 180 < colours["dark"][1]


def test_the_keyboard_reaches_everything_that_opens_or_scrolls_and_shows_where_it_is(browser, real):
    page = Visit(browser, real).page
    wanted = page.eval_on_selector_all("a, summary", "all => all.length") + page.eval_on_selector_all(
        ".scroll", "all => all.filter(e => e.checkVisibility()).length"
    )
    reached = set()
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        outline, place = page.evaluate(
            "() => { const e = document.activeElement; const all = [...document.querySelectorAll('*')];"
            " return [getComputedStyle(e).outlineStyle, all.indexOf(e)] }"
        )
        if page.evaluate("document.activeElement !== document.body"):
            assert outline == "solid"
            reached.add(place)
    assert len(reached) == wanted
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.evaluate("e => e.open")


def test_the_pointer_reads_values_off_a_curve(browser, real):
    page = Visit(browser, real).page
    zone = page.locator(".zone").first
    assert zone.locator(".say").evaluate("e => getComputedStyle(e).visibility") == "hidden"
    zone.locator("> rect").hover()
    assert zone.locator(".say").evaluate("e => getComputedStyle(e).visibility") == "visible"
    assert "step" in zone.locator(".say").text_content()
