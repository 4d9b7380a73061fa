"""Charts as inline SVG in the page's colours: classes instead of colours, no references outside."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from torch import Tensor

WIDTH = 340  # user units; a panel is about as many pixels wide, so that text keeps its size
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """One axis: the range of its values, and how they are written.

    Attributes:
        low: smallest value shown; above 0 where `log`.
        high: largest value shown, above `low`.
        label: what is measured.
        log: whether equal factors are equal distances.
        whole: whether only whole numbers get a tick.
    """

    low: float
    high: float
    label: str = ""
    log: bool = False
    whole: bool = False

    def share(self, value: float) -> float:
        """Returns where a value lies between `low` (0) and `high` (1)."""
        values = value, self.low, self.high
        at, low, high = (math.log10(v) for v in values) if self.log else values
        return (at - low) / (high - low)

    def ticks(self, most: int = 6) -> list[float]:
        """Returns at most so many round numbers on the axis."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            if last > first:
                every = -(-(last - first + 1) // most)
                return [10.0**power for power in range(first, last + 1, every)]
        span = self.high - self.low
        power = 10 ** math.floor(math.log10(span / most))
        steps = [power * step for step in (1, 2, 5, 10)]
        least = 1 if self.whole else 0
        step = next(s for s in steps if span / s <= most and s >= least)
        first = math.ceil(self.low / step - 1e-9)
        found = [n * step for n in range(first, first + most + 2)]
        return [value for value in found if value <= self.high + 1e-9 * span]


def number(value: float, digits: int = 4) -> str:
    """Returns a number as short as an axis needs it: 20, 0.5, 1.5 M, 10⁻⁴."""
    size = abs(value)
    for scale, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if size >= scale and size >= 1e4:
            return f"{value / scale:.3g}{unit}"
    if size == 0 or size >= 1e-3:
        return f"{value:.{digits}g}"
    power = math.floor(math.log10(size) + 1e-9)
    factor = value / 10.0**power
    mantissa = "" if abs(factor - 1) < 1e-6 else f"{factor:.2g}·"
    return f"{mantissa}10{str(power).translate(_SUPERSCRIPT)}"


class Chart:
    """A plane with two axes, onto which marks are put in the order of the calls.

    Args:
        x: the horizontal axis.
        y: the vertical axis.
        width: of the whole chart, in user units.
        height: likewise.
        left: room for the numbers of the vertical axis.
    """

    def __init__(
        self, x: Axis, y: Axis, *, width: int = WIDTH, height: int = 210, left: int = 40
    ) -> None:
        self.x, self.y, self.width, self.height = x, y, width, height
        self.left, self.right = left, width - 10
        self.top, self.bottom = 24 if y.label else 8, height - (36 if x.label else 20)
        self._parts: list[str] = []
        self._axes()

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Returns where a point of the plane is in the picture."""
        return (
            self.left + self.x.share(x) * (self.right - self.left),
            self.bottom - self.y.share(y) * (self.bottom - self.top),
        )

    def line(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        """Joins points; `kind` holds CSS classes, such as ``"own thick"``."""
        places = " ".join("{:.1f},{:.1f}".format(*self.at(*point)) for point in points)
        self._parts.append(f'<polyline class="line {kind}" points="{places}"/>')

    def dot(self, x: float, y: float, kind: str, tip: str = "", size: float = 3.5) -> None:
        """A disc, or a square where the classes name the twin; `tip` appears under the pointer."""
        across, down = self.at(x, y)
        if "twin" in kind.split():
            where = f'x="{across - size:.1f}" y="{down - size:.1f}"'
            mark = f'<rect class="dot {kind}" {where} width="{2 * size:g}" height="{2 * size:g}"'
        else:
            mark = f'<circle class="dot {kind}" cx="{across:.1f}" cy="{down:.1f}" r="{size:g}"'
        self._parts.append(f"{mark}><title>{escape(tip)}</title></{mark[1 : mark.index(' ')]}>")

    def bar(self, x: tuple[float, float], y: tuple[float, float], kind: str, tip: str = "") -> None:
        """A rectangle between two values on each axis."""
        (left, bottom), (right, top) = self.at(x[0], y[0]), self.at(x[1], y[1])
        self._parts.append(
            box(left, top, max(right - left - 0.6, 0.6), bottom - top, f"bar {kind}", tip)
        )

    def rule(self, x: float, text: str = "") -> None:
        """A dashed vertical line, with a text above the plane."""
        across, _ = self.at(x, self.y.low)
        top = self.top - 6 if text else self.top
        self._parts.append(f'<path class="rule" d="M{across:.1f} {top}V{self.bottom}"/>')
        if text:
            after_label = 8 + 6.5 * len(self.y.label)
            right = self.width - 3.5 * len(text)
            middle = max(min(across, right), after_label + 3.5 * len(text))
            self._parts.append(label(middle, 14, text, "middle"))

    def svg(self, name: str) -> str:
        """Returns the picture; `name` says in words what it shows."""
        return picture(self.width, self.height, "".join(self._parts), name)

    def _axes(self) -> None:
        parts = self._parts
        for value in self.y.ticks(5):
            _, down = self.at(self.x.low, value)
            place = f'x1="{self.left}" x2="{self.right}" y1="{down:.1f}" y2="{down:.1f}"'
            parts.append(f'<line class="grid" {place}/>')
            parts.append(label(self.left - 5, down + 4, number(value), "end"))
        room = max(2, (self.right - self.left) // 48)
        for value in self.x.ticks(room):
            across, _ = self.at(value, self.y.low)
            place = f'x1="{across:.1f}" x2="{across:.1f}" y1="{self.bottom}" y2="{self.bottom + 4}"'
            parts.append(f'<line class="axis" {place}/>')
            # the last number must not leave the picture
            anchor = "end" if across > self.right - 8 else "middle"
            edge = self.width if anchor == "end" else across
            parts.append(label(edge, self.bottom + 17, number(value), anchor))
        place = f'x1="{self.left}" x2="{self.right}" y1="{self.bottom}" y2="{self.bottom}"'
        parts.append(f'<line class="axis" {place}/>')
        if self.y.label:
            parts.append(label(0, 11, self.y.label))
        if self.x.label:
            middle = (self.left + self.right) / 2
            parts.append(label(middle, self.height - 4, self.x.label, "middle"))


def picture(width: float, height: float, content: str, name: str) -> str:
    """Returns an ``<svg>`` that a screen reader calls by its name."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(name)}">'
        f"{content}</svg>"
    )


def label(x: float, y: float, text: str, anchor: str = "start") -> str:
    """Returns a text in the picture."""
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}"{side}>{escape(text)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, tip: str = "") -> str:
    """Returns a rectangle."""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    inside = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<rect class="{kind}" {place}>{inside}</rect>'


def heat(
    matrix: Tensor,  # [n, n] in [0, 1]
    identifier: str,
    name: str,
) -> str:
    """Returns a matrix as a square: no ink for 0, full ink for 1.

    The numbers are the opacity of a mask over one rectangle, so the colour is the page's.

    Args:
        matrix: what to draw.
        identifier: of the mask; no other on the page may have it.
        name: what the picture shows, in words.
    """
    rows = (255 * matrix.clamp(0, 1)).round().int().tolist()
    image = base64.b64encode(_png(rows)).decode()
    place = f'width="{WIDTH}" height="{WIDTH}"'
    return picture(
        WIDTH,
        WIDTH,
        f'<mask id="{identifier}"><image class="cells" {place} preserveAspectRatio="none" '
        f'href="data:image/png;base64,{image}"/></mask>'
        f'<rect class="paper" {place}/><rect class="heat" {place} mask="url(#{identifier})"/>'
        f'<rect class="frame" x="0.5" y="0.5" width="{WIDTH - 1}" height="{WIDTH - 1}"/>',
        name,
    )


def _png(rows: Sequence[Sequence[int]]) -> bytes:
    """A grey image of 8 bits a pixel."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows), 9)
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
