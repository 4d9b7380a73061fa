from __future__ import annotations

import base64
import re
import zlib

import pytest
import torch

from orthoreg_ext.report.figures import shortened
from orthoreg_ext.report.svg import Axis, Chart, heat, number


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis(0, 100), [0, 20, 40, 60, 80, 100]),
        (Axis(0, 17, whole=True), [0, 5, 10, 15]),
        (Axis(0, 2, whole=True), [0, 1, 2]),
        (Axis(85, 102), [85, 90, 95, 100]),
        (Axis(-1, 1), [-1, -0.5, 0, 0.5, 1]),
        (Axis(1e-9, 1, log=True), [1e-9, 1e-7, 1e-5, 1e-3, 1e-1]),
        (Axis(0.5, 200, log=True), [1, 10, 100]),
        (Axis(3, 8, log=True), [3, 4, 5, 6, 7, 8]),  # less than a factor of ten: as if linear
    ],
)
def test_ticks_are_round_numbers_inside(axis: Axis, expected: list[float]) -> None:
    found = axis.ticks()
    assert len(found) <= 6
    assert found == pytest.approx(expected)


def test_shares_of_linear_and_logarithmic_axes() -> None:
    assert Axis(10, 30).share(15) == pytest.approx(0.25)
    assert Axis(1e-4, 1, log=True).share(1e-3) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (20.0, "20"), (0.5, "0.5"), (0.1 + 0.2, "0.3"), (1500, "1500"),
        (12345, "12.3 k"), (1.5e6, "1.5 M"), (2e9, "2 G"), (1e-4, "10⁻⁴"), (2.7e-4, "2.7·10⁻⁴"),
        (-1e-6, "-1·10⁻⁶"), (1e-12, "10⁻¹²"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_points_are_where_they_should_be() -> None:
    chart = Chart(Axis(0, 10, "x"), Axis(0, 1, "y"), width=340, height=200)
    assert chart.at(0, 0) == (chart.left, chart.bottom)
    assert chart.at(10, 1) == (chart.right, chart.top)
    chart.line([(0, 0), (5, 0.5)], "own")
    chart.dot(5, 0.5, "twin", "a <tip>")
    svg = chart.svg('a "name" & <more>')
    middle = (chart.left + chart.right) / 2, (chart.top + chart.bottom) / 2
    assert f'points="{chart.left:.1f},{chart.bottom:.1f} {middle[0]:.1f},{middle[1]:.1f}"' in svg
    assert "<title>a &lt;tip&gt;</title></rect>" in svg
    assert 'aria-label="a &quot;name&quot; &amp; &lt;more&gt;"' in svg


def test_the_last_number_of_an_axis_stays_in_the_picture() -> None:
    svg = Chart(Axis(0, 80_000, "x"), Axis(0, 1, "y"), width=340).svg("name")
    assert re.search(r'<text x="340.0" y="[\d.]+" text-anchor="end">80 k</text>', svg)


def test_a_heat_map_holds_the_matrix_as_grey_values() -> None:
    matrix = torch.tensor([[0.0, 0.5], [1.0, 0.2]])
    svg = heat(matrix, "mask-1", "name")
    assert 'id="mask-1"' in svg
    assert 'mask="url(#mask-1)"' in svg
    found = re.search(r"base64,([^\"]+)", svg)
    assert found is not None
    png = base64.b64decode(found[1])
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    start = png.index(b"IDAT") + 4
    size = int.from_bytes(png[start - 8 : start - 4], "big")
    pixels = zlib.decompress(png[start : start + size])
    assert list(pixels) == [0, 0, 128, 0, 255, 51]  # a filter byte, then a row


def test_short_names_still_tell_layers_of_different_blocks_apart() -> None:
    assert shortened("features.conv_10", 16) == "features.conv_10"
    assert shortened("blocks.1.0.conv_pw", 16) == "b.1.0.conv_pw"
    assert shortened("blocks.2.1.se.conv_reduce", 16) == "b.2.1.s.conv_re…"
    names = [
        f"blocks.{i}.{j}.se.conv_{k}" for i in "12" for j in "12" for k in ("reduce", "expand")
    ]
    found = {shortened(name, 16) for name in names}
    assert len(found) == len(names)
    assert max(map(len, found)) <= 16
    assert shortened("one_very_long_name_without_dots", 8) in ("…ut_dots", "one_ver…")
