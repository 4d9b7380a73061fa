"""The launch plan of the filter scores (csrc/common/score_plan.h), without a device."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ("lanes", "row_slots", "group_slots", "steps", "columns", "rows", "groups")
SHIM = """
#include "csrc/common/score_plan.h"
extern "C" void plan(int64_t groups, int64_t n, int64_t k, int element, int64_t* out) {
  const orthoreg::ScorePlan p = orthoreg::plan_scores(groups, n, k, element);
  const int64_t fields[] = {p.lanes, p.row_slots, p.group_slots, p.steps,
                            p.column_blocks, p.row_blocks, p.group_blocks};
  for (int i = 0; i < 7; ++i) out[i] = fields[i];
}
"""
Plan = Callable[[int, int, int, int], dict[str, int]]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("plan")
    (folder / "shim.cpp").write_text(SHIM)
    library = folder / "shim.so"
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, f"-I{ROOT}", folder / "shim.cpp", "-o", library], check=True)
    function = ctypes.CDLL(str(library)).plan
    wide = ctypes.c_int64
    function.argtypes = [wide, wide, wide, ctypes.c_int, ctypes.POINTER(wide)]

    def call(groups: int, n: int, k: int, element: int) -> dict[str, int]:
        out = (wide * len(FIELDS))()
        function(groups, n, k, element, out)
        return dict(zip(FIELDS, out, strict=True))

    return call


def own(element: int) -> tuple[int, int]:  # columns and rows of a thread at once
    return {2: (8, 2), 4: (4, 4), 8: (4, 2)}[element]


TABLE = [  # groups, n, k, bytes of an element; as FIELDS
    ((1, 512, 4608, 4), (32, 8, 1, 16, 36, 4, 1)),
    ((1, 512, 4608, 2), (32, 8, 1, 8, 18, 8, 1)),
    ((1, 64, 64, 4), (16, 16, 1, 4, 1, 1, 1)),
    ((512, 1, 9, 4), (4, 1, 64, 4, 1, 1, 8)),
    ((32, 4, 36, 4), (16, 4, 4, 4, 1, 1, 8)),
    ((1, 2048, 1, 4), (4, 64, 1, 4, 1, 8, 1)),
    ((1, 1, 100_000, 4), (32, 1, 8, 8, 782, 1, 1)),
    ((1, 0, 10, 4), (4, 1, 64, 4, 1, 0, 1)),
]


@pytest.mark.parametrize(("shape", "want"), TABLE)
def test_hand_computed(plan: Plan, shape: tuple[int, ...], want: tuple[int, ...]) -> None:
    assert tuple(plan(*shape).values()) == want


@pytest.mark.parametrize("seed", range(300))
def test_pieces_cover_the_layer_and_fit_a_block(plan: Plan, seed: int) -> None:
    generator = random.Random(seed)
    groups, n, k = (int(2 ** generator.uniform(0, top)) for top in (8, 12, 14))
    element = generator.choice((2, 4, 8))
    columns, rows = own(element)
    p = plan(groups, n, k, element)
    assert p["lanes"] * p["row_slots"] * p["group_slots"] == 256
    assert p["lanes"] in {2, 4, 8, 16, 32}
    assert p["lanes"] >= rows, "as many lanes as rows that are summed in one go"
    assert p["steps"] % rows == 0
    assert p["row_slots"] < 2 * n or p["row_slots"] == 1
    for pieces, size, whole in (
        (p["columns"], p["lanes"] * columns, k),
        (p["rows"], p["row_slots"] * p["steps"], n),
        (p["groups"], p["group_slots"], groups),
    ):
        assert (pieces - 1) * size < whole <= pieces * size
    # fewer than half of the lanes idle, but for the few columns that one piece has at least
    assert p["columns"] * p["lanes"] * columns < max(2 * k, 33)


@pytest.mark.parametrize(("model", "units"), [("wide", 4096), ("tiny", 1)])
def test_large_layers_make_many_blocks_and_tiny_ones_few(plan: Plan, model, units: int) -> None:
    shape = {"wide": (1, 4096, 16384, 4), "tiny": (1, 16, 27, 4)}[model]
    p = plan(*shape)
    assert p["columns"] * p["rows"] * p["groups"] == units
