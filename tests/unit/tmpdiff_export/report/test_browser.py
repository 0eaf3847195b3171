"""A report in a browser: readable in any window, in light and in dark, and nothing is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import made_up
from helpers.chromium import CHROMIUM, Browser
from helpers.report_page import HOSTILE, page_of, with_reuse
from PIL import Image

from tmpdiff_export.report.pictures import Row, compare

PRECISIONS = {2: ("fp16", "int8"), 5: ("fp16", "fp8", "int8", "int4", "nvfp4")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH; install Debian's package chromium to check the page in a browser")
    started = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a report of so many steps and precisions, once."""
    folder = tmp_path_factory.mktemp("reports")

    @functools.cache
    def write(num_steps: int, count: int, reuse: bool = False) -> Path:
        found = made_up.calibration(num_steps, PRECISIONS[count])
        found = with_reuse(found) if reuse else found
        drawn = np.random.default_rng(0).integers(256, size=(count, 64, 64, 3)).astype(np.uint8)
        drawings = tuple(compare(name, one, drawn[0]) for name, one in zip(found.precisions, drawn, strict=True))
        path = folder / f"{num_steps}-{count}-{reuse}.html"
        path.write_text(page_of(found, [Row(HOSTILE, 0, drawings)]))
        return path

    return write


CONTRAST = """(() => {
  const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2] };
  const back = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (c != 'rgba(0, 0, 0, 0)') return c } return 'rgb(255, 255, 255)' };
  return [...document.querySelectorAll('p, b, li, td, th, dt, dd, h1, h2, h3, a, figcaption, .loss, svg text')].map(e => {
    const s = getComputedStyle(e), a = light(e.closest('svg') ? s.fill : s.color), b = light(back(e));
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 120)] })
    .sort((a, b) => a[0] - b[0])[0] })()"""

OVERLAPS = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);
  return boxes.flatMap(([a, p], k) => boxes.slice(k + 1).filter(([b, q]) =>
    Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 1)
    .map(([b]) => `${svg.querySelector('g').id}: ${a} / ${b}`)) })"""
"""Pairs of text labels of a figure that lie on each other."""

CUT_OFF = """[...document.querySelectorAll('svg')].flatMap(svg => { const o = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(e => { const r = e.getBoundingClientRect();
    return r.left < o.left - 1 || r.right > o.right + 1 || r.top < o.top - 1 || r.bottom > o.bottom + 1 })
    .map(e => `${svg.querySelector('g').id}: ${e.textContent}`) })"""
"""Text labels that reach over the edge of their figure."""


def test_overlaps_are_seen(browser: Browser, report: Callable[..., Path]) -> None:
    browser.open(report(8, 2), 1280, "light")
    browser.evaluate(
        "document.querySelectorAll('svg').forEach(e => { const t = e.querySelector('text'); t.after(t.cloneNode(true)) })"
    )
    figures = browser.evaluate("document.querySelectorAll('svg').length")
    assert len(browser.evaluate(OVERLAPS)) == figures > 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("count", PRECISIONS)
@pytest.mark.parametrize("num_steps", [8, 20, 50])
def test_page_in_a_browser(
    browser: Browser,
    report: Callable[..., Path],
    tmp_path: Path,
    num_steps: int,
    count: int,
    width: int,
    scheme: str,
) -> None:
    path = report(num_steps, count)
    browser.open(path, width, scheme)
    picture = browser.screenshot()
    assert picture.shape[1] == width
    Image.fromarray(picture).save(tmp_path / f"report-{width}-{scheme}.png")
    assert (np.median(picture) < 64) == (scheme == "dark")
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    outside = "[...document.querySelectorAll('section *')].filter(e => !e.closest('.scroll') && !e.closest('svg') && "
    assert browser.evaluate(outside + f"e.getBoundingClientRect().right > {width}).map(e => e.outerHTML)") == []
    assert browser.evaluate(OVERLAPS) == []
    assert browser.evaluate(CUT_OFF) == []
    contrast, element = browser.evaluate(CONTRAST)
    assert contrast >= 4.5, element
    sizes = "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect())"
    assert browser.evaluate(f"Math.min(...{sizes}.map(r => Math.max(r.width, r.height)))") >= 9
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)") is True
    kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for event in browser.events if event["method"] in kinds] == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]


REUSED = """[...document.querySelectorAll('.reused')].map(e => { const s = getComputedStyle(e), r = e.getBoundingClientRect();
  return [e.classList[e.classList.length - 1], s.backgroundImage, s.outlineStyle, r.width, r.height] })"""
"""Class, hatching, frame and size of every mark of a reused step."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("num_steps", [20, 50])
def test_reused_steps_are_seen(
    browser: Browser, report: Callable[..., Path], num_steps: int, width: int, scheme: str
) -> None:
    browser.open(report(num_steps, 5, True), width, scheme)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    outside = "[...document.querySelectorAll('section *')].filter(e => !e.closest('.scroll') && !e.closest('svg') && "
    assert browser.evaluate(outside + f"e.getBoundingClientRect().right > {width}).map(e => e.outerHTML)") == []
    marks = browser.evaluate(REUSED)
    hatchings = {name: hatching for name, hatching, *_ in marks}
    assert len(hatchings) == len(set(hatchings.values())) == 3
    for _, hatching, frame, across, down in marks:
        assert "repeating-linear-gradient" in hatching
        assert frame == "solid"
        assert across > 1
        assert down > 8
    # they are as wide as computed steps, which have a plain colour
    cells = "[...document.querySelectorAll('.big i')].map(e => [e.className, e.getBoundingClientRect().width, "
    cells = browser.evaluate(cells + "getComputedStyle(e).backgroundColor])")
    assert max(size for _, size, _ in cells) - min(size for _, size, _ in cells) < 1
    plain = {colour for name, _, colour in cells if not name}
    assert not plain & {colour for name, _, colour in cells if name}
    contrast, element = browser.evaluate(CONTRAST)
    assert contrast >= 4.5, element
