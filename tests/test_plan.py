"""The launch plan of the tiled kernels: every entry is computed once, from the shapes alone."""

from __future__ import annotations

import pytest
import torch

from orthoreg_ext.build_info import compiled, reason

if not compiled:
    pytest.skip(reason, allow_module_level=True)

from orthoreg_ext import _host

Shape = tuple[int, int, int, bool]  # groups, filters of a group, entries, columns
SLAB = 32


def up(a: int, b: int) -> int:
    return -(-a // b)


def gram_rows(shape: Shape) -> int:
    return shape[2] if shape[3] else shape[1]


def inner(shape: Shape) -> int:
    return shape[1] if shape[3] else shape[2]


def random_shapes(seed: int) -> list[Shape]:
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    largest = [40, 300, 5000][seed % 3]
    return [
        (integer(1, 3), integer(0, largest), integer(0, largest), bool(integer(0, 1)))
        for _ in range(integer(1, 500 if seed % 5 == 0 else 20))
    ]


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("tile", [0, 32, 64, 128])
def test_every_tile_and_slice_is_one_unit(seed: int, tile: int) -> None:
    shapes = random_shapes(seed)
    plan = _host.build_plan(shapes, tile=tile)
    seen: dict[str, dict[int, int]] = {"gram": {}, "gradient": {}}
    for kernel, launches in (("gram", plan["gram"]), ("gradient", plan["gradient"])):
        for launch in launches:
            t, first, slab = launch["tile"], 0, 0
            assert not tile or t == tile
            assert 0 < len(launch["items"]) <= _host.LAYERS_PER_LAUNCH
            for item in launch["items"]:
                shape = shapes[item["layer"]]
                groups, n, width, _ = shape
                assert item["first_unit"] == first
                first += item["units"]
                assert item["layer"] not in seen[kernel]
                seen[kernel][item["layer"]] = item["units"]
                if kernel == "gradient":
                    assert item["units"] == groups * up(n, t) * up(width, t)
                    continue
                across = up(gram_rows(shape), t)
                tiles = groups * across * (across + 1) // 2
                assert item["units"] == tiles * item["slices"]
                length = item["slice_length"]
                assert length % SLAB == 0
                # the slices cover the inner entries, and none of them is empty
                assert length * item["slices"] >= inner(shape)
                assert item["slices"] == 1 or length * (item["slices"] - 1) < inner(shape)
                if item["slices"] > 1:
                    assert item["first_slab"] == slab
                    slab += item["units"]
            assert launch["units"] == first
    for kernel, rows in (("gram", gram_rows), ("gradient", lambda s: s[1] * s[2])):
        assert set(seen[kernel]) == {i for i, s in enumerate(shapes) if rows(s) > 0}


@pytest.mark.parametrize("seed", range(30))
def test_parts_of_the_penalty_have_a_place_each(seed: int) -> None:
    shapes = random_shapes(seed)
    plan = _host.build_plan(shapes)
    taken = set()
    for launch in plan["gram"]:
        for item in launch["items"]:
            tiles = item["units"] // item["slices"]
            places = set(range(item["first_part"], item["first_part"] + tiles))
            assert not places & taken
            taken |= places
    assert taken == set(range(plan["parts"]))


def test_a_resnet50_needs_little_workspace() -> None:
    from benchmarks.models import MODELS

    shapes = []
    for n, *entries in MODELS["resnet50"]():
        k = int(torch.Size(entries).numel())
        shapes.append((1, n, k, n > k))
    slopes = sum(4 * min(n, k) ** 2 for _, n, k, _ in shapes)
    assert slopes + 4 * _host.build_plan(shapes)["slab_entries"] <= 40e6


def test_dearest_units_come_first_and_long_ones_are_cut() -> None:
    shapes = [(1, 64, 64, False), (1, 64, 6400, False), (1, 64, 640, False)]
    (launch,) = _host.build_plan(shapes)["gram"]
    assert [item["layer"] for item in launch["items"]][-1] == 0
    lengths = {item["layer"]: item["slice_length"] for item in launch["items"]}
    slices = {item["layer"]: item["slices"] for item in launch["items"]}
    assert slices[0] == 1
    assert slices[1] == 25
    assert lengths[1] == 256


def test_tiles_grow_with_the_work() -> None:
    few = [(1, 16, 144, False), (1, 64, 576, False)]
    assert {launch["tile"] for launch in _host.build_plan(few)["gram"]} == {64}
    many = [(1, 16, 144, False)] * 200 + few
    assert {launch["tile"] for launch in _host.build_plan(many)["gram"]} == {32, 64}
    large = [(1, 512, 4608, False)] * 8
    assert {launch["tile"] for launch in _host.build_plan(large)["gram"]} == {128}
    assert {launch["tile"] for launch in _host.build_plan(large)["gradient"]} == {128}
    assert {launch["tile"] for launch in _host.build_plan(large[:1])["gram"]} == {64}


def test_small_networks_are_fused() -> None:
    resnet56 = [(1, 16, 144, False)] * 19 + [(1, 32, 288, False)] * 18 + [(1, 64, 576, False)] * 18
    plan = _host.build_plan(resnet56, fused=True)
    assert plan["fused"]
    (launch,) = plan["gradient"]
    assert launch["units"] >= 132  # enough for a large GPU
    for other in ((2, 16, 144, False), (1, 65, 144, False), (1, 64, 10**7, False)):
        assert not _host.build_plan([*resnet56, other], fused=True)["fused"]


def test_more_layers_than_a_launch_describes() -> None:
    most = _host.LAYERS_PER_LAUNCH
    launches = _host.build_plan([(1, 1, 1, False)] * (2 * most + 1))["gram"]
    assert [len(launch["items"]) for launch in launches] == [(2 * most + 1) // 3] * 3


def test_waves_hold_as_much_as_they_may() -> None:
    sizes = [400] * 5 + [80000, 36]
    assert _host.waves(sizes, 10**9) == [0, 7]
    assert _host.waves(sizes, 1) == [0, 1, 2, 3, 4, 5, 6, 7]  # one alone may exceed it
    assert _host.waves(sizes, 800) == [0, 2, 4, 5, 6, 7]
    assert _host.waves([0, 0, 5, 0], 5) == [0, 4]
    assert _host.waves([], 10) == [0, 0]


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="a shape is"):
        _host.build_plan([(0, 1, 1, False)])
