"""The report in headless Chromium: charts are drawn, filters filter, texts stay texts, both themes are legible."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from minem.report.page import write_report
from tests.minem.browser import CHROMIUM, Browser
from tests.minem.made_runs import answer, make_run, sample

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed (Debian: apt-get install chromium)")

HOSTILE = (
    "</script><script>document.title = 'hurt'; alert(1)</script><img src=x onerror='alert(2)'><b>bold</b> &amp; <!--"
)
STATUSES = ("accepted", "wrong", "unparsed", "truncated")
IDS = [f"toy-train-{number:03d}" for number in range(1, 16)]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    rows = [
        sample(
            id_, iteration, status=STATUSES[number % 4], text=f"text of {id_}", prompt=("plain", "hinted")[number % 2]
        )
        for iteration in (1, 2)
        for number, id_ in enumerate(IDS)
    ]
    hostile = [sample(HOSTILE, 1, attempt=2, status="wrong", text=HOSTILE + "\u202e", answer=HOSTILE)]
    base = [answer(f"q{i}", "wrong" if i % 3 else "accepted", f"base {i}") for i in range(12)]
    last = [answer(f"q{i}", "accepted" if i % 3 else "wrong", HOSTILE) for i in range(12)]
    runs = [
        make_run(folder / name, samples=rows + more, base=base, last=last, run__seed=seed, sampler__name=sampler)
        for name, more, seed, sampler in (("a", hostile, 0, "rsm"), ("b", [], 1, "rsm"), ("c <i>", [], 0, "star"))
    ]
    path = '<path d="M0 0 9 9" style="stroke: #000000"/>'
    svg = '<svg aria-label="plot" viewBox="0 0 9 9" onload="alert(3)"><script>alert(4)</script>' + path + "</svg>"
    comparison = {
        "tables": [{"title": HOSTILE, "note": "", "columns": ["sampler", HOSTILE], "rows": [[HOSTILE, 1]]}],
        "plots": [{"title": "plot", "svg": svg}],
    }
    write_report(runs, folder / "page.html", comparison)
    write_report(runs[:1], folder / "quiet.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture
def opened(browser, page):
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(page.with_name("quiet.html"))
    yield browser
    assert browser.complaints == []
    assert browser.requests == [page.with_name("quiet.html").as_uri()]


def count(browser: Browser, section: str) -> int:
    """How many match, by the count of the section."""
    return int(re.match(r"[\d,]+", browser.value(f"document.querySelector('#{section} .count').textContent"))[0])


def shown(browser: Browser, section: str) -> list[str]:
    """The texts of the rows that are shown."""
    rows = f"[...document.querySelectorAll('#{section} .row')].map(row => row.textContent)"
    return json.loads(browser.value(f"JSON.stringify({rows})"))


def choose(browser: Browser, section: str, name: str, value: str) -> None:
    """Fill in a filter and send the event that a person's input would."""
    field = f"document.querySelector('#{section} [name={name}]')"
    browser.value(f"{field}.value = {json.dumps(value)}; {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")


def test_it_opens_without_complaints_and_asks_for_nothing(opened):
    assert opened.value("document.title") == "a · minem"


def test_charts_are_drawn(opened):
    sizes = json.loads(
        opened.value(
            "JSON.stringify([...document.querySelectorAll('figure.chart > svg')].map(svg => {"
            "const box = svg.getBoundingClientRect();"
            "const line = svg.querySelector('path[clip-path][style*=\"stroke: var(--series-\"]');"
            "return [box.width, box.height, svg.querySelectorAll('text').length, line.getTotalLength()]}))"
        )
    )
    assert len(sizes) == 8
    assert all(width > 200 and height > 100 and texts >= 4 and length > 0 for width, height, texts, length in sizes)


def test_filters(opened):
    everything = count(opened, "samples")
    assert everything == 31
    assert len(shown(opened, "samples")) == 20
    choose(opened, "samples", "status", "wrong")
    wrong = shown(opened, "samples")
    assert len(wrong) == count(opened, "samples") == 9
    assert all(text.startswith("wrong") for text in wrong)
    choose(opened, "samples", "iteration", "2")
    assert len(shown(opened, "samples")) == count(opened, "samples") == 4
    choose(opened, "samples", "status", "")
    choose(opened, "samples", "kind", "hinted")
    assert count(opened, "samples") == 7
    choose(opened, "samples", "id", IDS[1])
    assert [IDS[1] in text for text in shown(opened, "samples")] == [True]
    choose(opened, "samples", "id", "nobody")
    assert (count(opened, "samples"), shown(opened, "samples")) == (0, [])
    for name in ("iteration", "kind", "id"):
        choose(opened, "samples", name, "")
    choose(opened, "samples", "text", f"TEXT of {IDS[4]}")
    assert count(opened, "samples") == 2
    choose(opened, "samples", "text", "")
    assert count(opened, "samples") == everything


def test_pages_turn(opened):
    first = shown(opened, "samples")
    opened.value("document.querySelector('#samples .after').click()")
    second = shown(opened, "samples")
    assert len(first) + len(second) == 31
    assert not set(first) & set(second)
    assert opened.value("document.querySelector('#samples .after').disabled")
    opened.value("document.querySelector('#samples .before').click()")
    assert shown(opened, "samples") == first


def test_a_sample_has_its_status_prompt_and_log_probability(opened):
    choose(opened, "samples", "id", IDS[1])
    (one, _) = shown(opened, "samples")
    for part in ("wrong", "hinted prompt", "iteration 1", "log q as drawn -1.50 (-0.500 a token)", "3 tokens"):
        assert part in one
    assert "Reason step by step" in one


def test_flips_are_filtered_too(opened):
    assert count(opened, "flips") == 12
    choose(opened, "flips", "kind", "became wrong")
    assert len(shown(opened, "flips")) == count(opened, "flips") == 4


def test_markup_in_texts_is_shown_as_text(opened):
    choose(opened, "samples", "text", "alert(1)")
    (one,) = shown(opened, "samples")
    assert HOSTILE in one
    assert "\\u202e" in one
    choose(opened, "flips", "kind", "became right")
    assert HOSTILE in shown(opened, "flips")[0]
    assert opened.value("document.querySelectorAll('.row script, .row img, .row b').length") == 0
    assert opened.value("document.title") == "a · minem"


def test_several_runs_and_a_comparison_with_a_plot_that_would_run_scripts(browser, page):
    browser.complaints.clear()
    browser.open(page)
    assert browser.value("document.title") == "3 runs · minem"
    assert not [complaint for complaint in browser.complaints if "Content Security Policy" not in complaint]
    assert HOSTILE in browser.value("document.querySelector('#comparison caption').textContent")
    choose(browser, "samples", "run", "2")
    assert all("c <i>" in text for text in shown(browser, "samples"))
    assert count(browser, "samples") == 30
    assert browser.value("document.querySelectorAll('.legend li').length") == 2


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)" (WCAG 2)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrasts(browser: Browser) -> dict[str, float]:
    """Contrast with the page's paper of everything that must be read, the texts and lines of charts too."""
    wanted = {
        "body": "color",
        ".quiet": "color",
        "nav a": "color",
        ".badge.accepted": "color",
        ".badge.wrong": "color",
        ".badge.unparsed": "color",
        ".row .facts": "color",
        "figure.chart > svg": "fill",  # inherited by elements without a fill of their own
        "figure.chart > svg text": "fill",
        "figure.chart > svg path[clip-path][style*='stroke: var(--series-0)']": "stroke",
    }
    of = "JSON.stringify(Object.entries(%s).map(([s, p]) => getComputedStyle(document.querySelector(s))[p]))"
    colours = json.loads(browser.value(of % json.dumps(wanted)))
    paper = luminance(browser.value("getComputedStyle(document.body).backgroundColor"))
    return {
        selector: (max(paper, luminance(colour)) + 0.05) / (min(paper, luminance(colour)) + 0.05)
        for selector, colour in zip(wanted, colours, strict=True)
    }


@pytest.mark.parametrize("system", ["light", "dark"])
def test_both_themes_are_legible_and_the_button_changes_them(browser, page, system):
    browser.open(page.with_name("quiet.html"), system)
    for theme in (system, {"light": "dark", "dark": "light"}[system], system):
        paper = luminance(browser.value("getComputedStyle(document.body).backgroundColor"))
        assert (paper < 0.1) == (theme == "dark")
        assert min(contrasts(browser).values()) >= 4.5, (theme, contrasts(browser))
        assert (
            browser.value("document.getElementById('theme').textContent") == {"light": "Dark", "dark": "Light"}[theme]
        )
        browser.value("document.getElementById('theme').click()")


def test_controls_have_names_and_the_page_fits_a_phone(browser, page):
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1, mobile=True)
    try:
        browser.open(page)
        assert browser.value("document.documentElement.scrollWidth") <= 360
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")
    unnamed = "[...document.querySelectorAll('select, input')].filter(field => !field.labels.length).length"
    assert browser.value(unnamed) == 0
    assert browser.value("[...document.querySelectorAll('button')].filter(b => !b.textContent.trim()).length") == 0
    assert browser.value("document.querySelectorAll('.chart > svg:not([aria-label])').length") == 0
