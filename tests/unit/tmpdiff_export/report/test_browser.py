"""A report in a browser: readable in any window, in light and in dark, and nothing is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.chromium import CHROMIUM, Browser
from PIL import Image


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH; install Debian's package chromium to check the page in a browser")
    started = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


CONTRAST = """(() => {
  const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2] };
  const back = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (c != 'rgba(0, 0, 0, 0)') return c } return 'rgb(255, 255, 255)' };
  return [...document.querySelectorAll('p, b, td, th, dt, dd, h1, h2, h3, a, figcaption, .loss, svg text')].map(e => {
    const s = getComputedStyle(e), a = light(e.closest('svg') ? s.fill : s.color), b = light(back(e));
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 120)] })
    .sort((a, b) => a[0] - b[0])[0] })()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_page_in_a_browser(
    browser: Browser, written: tuple[Path, dict[str, Any]], tmp_path: Path, width: int, scheme: str
) -> None:
    browser.open(written[0], width, scheme)
    picture = browser.screenshot()
    assert picture.shape[1] == width
    Image.fromarray(picture).save(tmp_path / f"report-{width}-{scheme}.png")
    assert (np.median(picture) < 64) == (scheme == "dark")
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    outside = "[...document.querySelectorAll('section *')].filter(e => !e.closest('.scroll') && !e.closest('svg') && "
    assert browser.evaluate(outside + f"e.getBoundingClientRect().right > {width}).map(e => e.outerHTML)") == []
    contrast, element = browser.evaluate(CONTRAST)
    assert contrast >= 4.5, element
    sizes = "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect())"
    assert browser.evaluate(f"Math.min(...{sizes}.map(r => Math.max(r.width, r.height)))") >= 9
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)") is True
    kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for event in browser.events if event["method"] in kinds] == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [written[0].as_uri()]
