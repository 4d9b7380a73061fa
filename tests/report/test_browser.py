"""The report in a real browser: nothing sticks out, overlaps, is too faint, or goes wrong."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from orthoreg_ext.report import report_html

from .pages import finished, matrices

ROOT = Path(__file__).resolve().parents[2]


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = script("scripts/browser.py")

LOOK = """
(() => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  const found = {wide: document.documentElement.scrollWidth, out: [], over: [], faint: []};
  const parse = text => { const p = text.match(/[\\d.]+/g).map(Number);
                          return {rgb: p.slice(0, 3), a: p.length > 3 ? p[3] : 1}; };
  const light = rgb => rgb.map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (let n = node; n; n = n.parentElement) {
      const colour = parse(getComputedStyle(n).backgroundColor);
      if (colour.a > 0) return colour.rgb;
    }
    return [255, 255, 255];
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim(), node = walk.currentNode.parentElement;
    if (!text || node.closest('title')) continue;
    const svg = node.closest('svg');
    const style = getComputedStyle(node);
    const ink = parse(svg ? style.fill : style.color).rgb;
    const [a, b] = [light(ink), light(behind(svg || node))].sort((x, y) => x - y);
    const ratio = (b + 0.05) / (a + 0.05);
    if (ratio < 4.5) found.faint.push(text + ' ' + ratio.toFixed(2));
    const place = node.getBoundingClientRect();
    const scrolls = node.closest('.scroll, pre');
    if (!scrolls && (place.left < -0.5 || place.right > innerWidth + 0.5)) found.out.push(text);
  }
  document.querySelectorAll('svg').forEach(svg => {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(t => [t, t.getBoundingClientRect()]);
    texts.forEach(([t, r], i) => {
      if (r.left < frame.left - 1 || r.right > frame.right + 1 || r.top < frame.top - 2 ||
          r.bottom > frame.bottom + 2) found.out.push(t.textContent);
      texts.slice(i + 1).forEach(([u, q]) => {
        const w = Math.min(r.right, q.right) - Math.max(r.left, q.left);
        const h = Math.min(r.bottom, q.bottom) - Math.max(r.top, q.top);
        if (w > 1 && h > 4) found.over.push(t.textContent + ' / ' + u.textContent);
      });
    });
  });
  document.querySelectorAll('svg g > text').forEach(name => {  // of rows, in front of their bars
    const r = name.getBoundingClientRect();
    name.closest('svg').querySelectorAll('.bar').forEach(bar => {
      const q = bar.getBoundingClientRect();
      const h = Math.min(r.bottom, q.bottom) - Math.max(r.top, q.top);
      if (h > 1 && q.width && r.right > q.left + 1) found.over.push(name.textContent + ' / bar');
    });
  });
  return found;
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = tool.chromium()
    if path is None:
        pytest.skip("no Chromium is installed")
    try:
        opened = tool.Browser(path)
    except RuntimeError as error:
        pytest.skip(f"Chromium does not start here: {error}")
    with opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = finished([98.0, 91.0, 97.0], [96.0, 97.0, 90.0], rounds=2)
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report_html(run, matrices(150)), "utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_it_fits_every_screen_in_both_schemes(
    browser: Any, page: Path, width: int, dark: bool
) -> None:
    browser.open(page, width, 800, dark)
    found = browser.evaluate(LOOK)
    assert found == {"wide": width, "out": [], "over": [], "faint": []}
    assert browser.messages == []
    asked = [url for url in browser.requests if not url.startswith("data:")]
    assert asked == [page.resolve().as_uri()]
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")


def test_the_heat_maps_follow_the_scheme(browser: Any, page: Path) -> None:
    fills = []
    for dark in (False, True):
        browser.open(page, 768, 800, dark)
        fills.append(browser.evaluate("getComputedStyle(document.querySelector('.heat')).fill"))
    assert fills == ["rgb(67, 21, 122)", "rgb(226, 204, 255)"]


def test_what_is_wrong_is_seen(browser: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(
        "<!DOCTYPE html><body><p style='width:2000px;color:#aaa;white-space:nowrap'>faint "
        + "wide " * 300
        + "</p><svg viewBox='0 0 100 20' width='100'><text x='0' y='12'>abc</text>"
        "<text x='5' y='12'>def</text><text x='90' y='12'>outside</text></svg>"
        "<img src='http://127.0.0.1:9/x.png'><script>console.error('wrong')</script>"
    )
    browser.open(broken, 1280)
    found = browser.evaluate(LOOK)
    assert found["wide"] > 1280
    assert any("outside" in text for text in found["out"])
    assert "abc / def" in found["over"]
    assert found["faint"]
    assert any("wrong" in message for message in browser.messages)
    assert "http://127.0.0.1:9/x.png" in browser.requests
