"""Each split is what arrays cut by hand are; its parts cover the axis; what does not fit is told, and what it says would."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard as DTensorShard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from shardplan.specs import Mesh, Shard
from tests.helpers.strategies import fitting_shards, law, meshes
from tests.helpers.tensor_parts import by_hand, entries

MESH_AXES = ("data", "expert", "tensor")


def places(mesh, mesh_axis):
    """A coordinate at each place along a mesh axis, in order."""
    return [mesh.coordinate(rank) for rank in mesh.groups(mesh_axis)[0]]


@st.composite
def cases(draw):
    """A mesh, a split that fits it, the size of its axis, and a coordinate at each place along its mesh axis."""
    mesh, mesh_axis = draw(meshes(6)), draw(st.sampled_from(MESH_AXES))
    shard, size = draw(fitting_shards(mesh, draw(st.integers(0, 1)), mesh_axis))
    return shard, size, places(mesh, mesh_axis)


@st.composite
def any_shards(draw):
    """A split that may fit, and the size of an axis; options do not contradict each other."""
    axis, mesh_axis = draw(st.integers(0, 1)), draw(st.sampled_from(MESH_AXES))
    few = st.sampled_from([1, 1, 2, 3, 4])
    kind = draw(st.sampled_from(["pad", "uneven", "groups", "replicate", "granules"]))
    if kind == "pad":
        return Shard(0, mesh_axis, pad_to_multiple=draw(st.integers(1, 9))), draw(st.integers(0, 36))
    granule, groups = draw(few), draw(few) if kind in {"groups", "replicate"} else 1
    blocks = draw(st.lists(st.integers(1, 8).map(lambda count: count * granule), max_size=3))
    size = draw(st.sampled_from([sum(blocks) * groups or 24, sum(blocks) * groups or 30, draw(st.integers(0, 36))]))
    replicate, uneven = kind == "replicate", kind == "uneven"
    empty = uneven and draw(st.booleans())
    return Shard(axis, mesh_axis, blocks, groups, granule, replicate, uneven, empty), size


@law
@given(cases())
def test_each_rank_holds_what_cutting_by_hand_gives_it(case):
    shard, size, everywhere = case
    held = [entries(shard.intervals(size, here)) for here in everywhere]
    assert held == [part.tolist() for part in by_hand(shard, size, len(everywhere))]


@law
@given(cases())
def test_intervals_are_in_order_apart_and_not_empty(case):
    shard, size, everywhere = case
    for here in everywhere:
        bounds = [bound for interval in shard.intervals(size, here) for bound in interval]
        assert all(low < high for low, high in pairwise(bounds)), "neither touching nor empty"
        assert not bounds or 0 <= bounds[0] < bounds[-1] <= size
        assert all(type(bound) is int for bound in bounds)


@law
@given(cases())
def test_every_entry_is_held_once_or_by_as_many_neighbours_as_is_said(case):
    shard, size, everywhere = case
    holders = {}
    for place, here in enumerate(everywhere):
        for part in shard.held(size, here):
            for entry in range(part.start, part.stop):
                holders.setdefault(entry, []).append((place, part.holder, part.num_holders))
    assert sorted(holders) == list(range(size))
    for found in holders.values():
        first = found[0][0]
        assert found == [(first + at, at, len(found)) for at in range(len(found))]
        assert first % len(found) == 0, "they are a group of neighbours"
        assert shard.replicate or len(found) == 1
    if not shard.replicate:
        in_order = [entry for here in everywhere for entry in entries(shard.intervals(size, here))]
        assert in_order == list(range(size)) or len(shard.blocks) > 1


@law
@given(cases())
def test_lengths_add_up_and_the_first_rank_has_the_longest(case):
    shard, size, everywhere = case
    lengths = [shard.length(size, here) for here in everywhere]
    filled = [len(entries(shard.intervals(size, here))) for here in everywhere]
    assert shard.longest(size, everywhere[0].mesh) == lengths[0] == max(lengths)
    assert shard.is_even(size, everywhere[0].mesh) == (len(set(lengths)) == 1)
    if shard.pad_to_multiple > 1 and len(everywhere) > 1:
        assert sum(lengths) % shard.pad_to_multiple == 0
        assert 0 <= sum(lengths) - size < shard.pad_to_multiple
        # all padding comes after all entries
        assert filled == [min(lengths[0], max(0, size - place * lengths[0])) for place in range(len(lengths))]
    else:
        assert lengths == filled
        held = Counter(part.num_holders for here in everywhere for part in shard.held(size, here))
        assert sum(lengths) == size or set(held) - {1}


@law
@given(cases())
def test_no_granule_is_cut(case):
    shard, size, everywhere = case
    blocks = shard.blocks or ((size // shard.interleaved,) if size else ())
    granules, first = [], 0
    for _ in range(shard.interleaved):
        for block in blocks:
            granules += [set(range(at, min(at + shard.granule, first + block))) for at in range(first, first + block)][
                :: shard.granule
            ]
            first += block
    for here in everywhere:
        held = set(entries(shard.intervals(size, here)))
        assert all(granule <= held or not granule & held for granule in granules)


@law
@given(cases())
def test_of_each_block_every_rank_has_its_share_in_order(case):
    shard, size, everywhere = case
    if shard.interleaved > 1 or shard.replicate or shard.uneven or not shard.blocks:
        return
    num, starts = len(everywhere), np.cumsum([0, *shard.blocks])
    for place, here in enumerate(everywhere):
        held = entries(shard.intervals(size, here))
        shares = [
            range(start + place * block // num, start + (place + 1) * block // num)
            for start, block in zip(starts, shard.blocks, strict=False)
        ]
        assert held == [entry for share in shares for entry in share]


@law
@given(st.integers(0, 60), st.integers(1, 9))
def test_uneven_parts_are_those_of_torch_and_of_dtensor(size, num):
    mesh = Mesh(tensor=num)
    shard = Shard(0, uneven=True, allow_empty=True)
    chunks = torch.arange(size).chunk(num)
    for place, here in enumerate(places(mesh, "tensor")):
        held = entries(shard.intervals(size, here))
        assert held == (chunks[place].tolist() if place < len(chunks) else [])
        length, offset = DTensorShard.local_shard_size_and_offset(size, num, place)
        assert held == list(range(offset, offset + length))


@law
@given(st.lists(st.integers(0, 12), min_size=2, max_size=3), meshes(4))
def test_two_uneven_axes_are_those_of_dtensor(shape, mesh):
    of_data, of_tensor = (Shard(axis, name, uneven=True, allow_empty=True) for axis, name in ((0, "data"), (1, "tensor")))
    placements = [DTensorShard(0), DTensorShard(1)]
    for rank in range(mesh.num("data", "tensor")):
        here = mesh.coordinate(rank)
        local, offset = _compute_local_shape_and_global_offset(
            shape, (mesh.data, mesh.tensor), [here.data, here.tensor], placements
        )
        for shard, axis in ((of_data, 0), (of_tensor, 1)):
            assert entries(shard.intervals(shape[axis], here)) == list(range(offset[axis], offset[axis] + local[axis]))
    assert not Replicate().is_shard()


@law
@given(any_shards(), st.integers(2, 8))
def test_what_does_not_fit_is_what_cannot_be_held(case, num):
    shard, size = case
    mesh = Mesh(data=num, expert=num) if shard.mesh_axis != "tensor" else Mesh(tensor=num)
    misfit = shard.misfit(size, num)
    for here in places(mesh, shard.mesh_axis):
        if misfit is None:
            assert entries(shard.intervals(size, here)) == by_hand(shard, size, num)[here.index(shard.mesh_axis)].tolist()
        else:
            with pytest.raises(ValueError, match=re.escape(misfit.cause)):
                shard.held(size, here)
    if misfit is not None:
        assert misfit.cause.startswith(f"axis {shard.axis} has ")
        assert misfit.fix


@settings(law, max_examples=300)
@given(any_shards(), st.integers(2, 8))
def test_what_is_told_to_be_done_can_be_done(case, num):
    shard, size = case
    misfit = shard.misfit(size, num)
    if misfit is None:
        return
    if found := re.search(r"[Pp]ad it to (\d+): pad_to_multiple=(\d+)", misfit.fix):
        padded, multiple = map(int, found.groups())
        mended = Shard(shard.axis, shard.mesh_axis, pad_to_multiple=multiple)
        assert mended.misfit(size, num) is None
        assert mended.length(size, Mesh(tensor=num, data=num, expert=num).coordinate(0)) * num == padded
    if "replicate=True" in misfit.fix:
        assert evolve(shard, replicate=True).misfit(size, num) is None
    if "allow_empty=True" in misfit.fix:
        assert evolve(shard, allow_empty=True).misfit(size, num) is None
    if "uneven=True" in misfit.fix:
        assert evolve(shard, uneven=True, allow_empty=True).misfit(size, num) is None
    if found := re.search(r"plit it over ([\d or]+) ranks", misfit.fix):
        for fewer in found[1].split(" or "):
            assert int(fewer) < num
            assert shard.misfit(size, int(fewer)) is None


@law
@given(any_shards())
def test_one_rank_holds_all_however_it_is_said(case):
    shard, size = case
    held = shard.intervals(size, Mesh(pipe=2).coordinate(1))
    assert held == (((0, size),) if size else ())
    assert shard.length(size, Mesh().coordinate(0)) == size


NONSENSE = ("x", None, 1.5, -1, [], 10**30, True, {}, "0", float("nan"))


@pytest.mark.parametrize("value", NONSENSE, ids=repr)
@pytest.mark.parametrize("name", ["axis", "blocks", "interleaved", "granule", "replicate", "uneven", "pad_to_multiple"])
def test_nonsense_is_refused_when_a_split_is_made(name, value):
    try:
        shard = Shard(**{"axis": 0, name: value})
    except (TypeError, ValueError):
        return
    shard.misfit(12, 4)
    assert str(shard.axis_type(12))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"axis": 1, "pad_to_multiple": 4}, "pad_to_multiple is for the first axis, as one block of single entries"),
        ({"pad_to_multiple": 4, "granule": 2}, "pad_to_multiple is for the first axis, as one block of single entries"),
        ({"pad_to_multiple": 4, "uneven": True}, "pad_to_multiple is for the first axis"),
        ({"replicate": True, "uneven": True}, "replicate repeats granules, and uneven gives some ranks fewer"),
        ({"interleaved": 2, "uneven": True}, "interleaved groups are split evenly"),
        ({"allow_empty": True}, "allow_empty is for uneven splits"),
        ({"blocks": (4, 0)}, "'blocks' must be >= 1: 0"),
        ({"interleaved": 0}, "'interleaved' must be >= 1: 0"),
        ({"granule": -2}, "'granule' must be >= 1: -2"),
        ({"mesh_axis": "model"}, r"'mesh_axis' must be in \('pipe', 'data', 'expert', 'tensor'\)"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Shard(**{"axis": 0, **options})


@pytest.mark.parametrize(
    ("shard", "size", "num", "cause", "fix"),
    [
        (
            Shard(0),
            50257,
            8,
            "axis 0 has 50257 entries, mesh axis 'tensor' has 8, and 8 does not divide 50257",
            "Pad it to 50264: pad_to_multiple=8; or allow uneven parts: uneven=True; or leave it whole",
        ),
        (
            Shard(1),
            6,
            4,
            "axis 1 has 6 entries, mesh axis 'tensor' has 4, and 4 does not divide 6",
            "Split it over 2 or 3 ranks",
        ),
        (
            Shard(0, granule=128),
            256,
            8,
            "axis 0 has 2 granules of 128, mesh axis 'tensor' has 8, and 8 does not divide 2",
            "Repeat them: replicate=True; or split it over 2 ranks",
        ),
        (
            Shard(0, blocks=(8, 4)),
            16,
            2,
            r"axis 0 has 16 entries, and blocks \(8, 4\) have 12",
            "Give the sizes of all blocks, in order",
        ),
        (
            Shard(0, interleaved=4, blocks=(2, 2)),
            24,
            2,
            r"axis 0 has 24 entries, and blocks \(2, 2\) in each of 4 groups have 16",
            "Give the sizes of all blocks, in order",
        ),
        (
            Shard(0, interleaved=2, blocks=(3, 4)),
            14,
            8,
            "axis 0 has a block of 3 entries, mesh axis 'tensor' has 8, 4 for each of 2 groups, and 4 does not divide 3",
            "Split it over 2 ranks",
        ),
        (
            Shard(1, "data", blocks=(8, 2)),
            10,
            4,
            "axis 1 has a block of 2 entries, mesh axis 'data' has 4, and 4 does not divide 2",
            "Repeat them: replicate=True; or split it over 2 ranks",
        ),
        (Shard(0), 7, 10**9, "axis 0 has 7 entries, mesh axis 'tensor' has 1000000000, and .*", "Pad it to 1000000000"),
        (Shard(0, interleaved=5), 24, 2, "axis 0 has 24 entries, which 5 groups do not divide", "Give the number of groups"),
        (
            Shard(0, granule=5),
            24,
            2,
            "axis 0 has 24 entries, which granules of 5 do not divide",
            "Give the entries that stay together, such as those of a head",
        ),
        (
            Shard(0, interleaved=3),
            24,
            2,
            "axis 0 has 3 groups of 8, mesh axis 'tensor' has 2, and 2 does not divide 3",
            "",
        ),
        (
            Shard(0, uneven=True),
            9,
            8,
            "axis 0 has 9 entries, mesh axis 'tensor' has 8, and 8 does not divide 9: 3 ranks would hold nothing",
            "Allow empty parts too: allow_empty=True; or split it over 2 or 3 or 5 ranks",
        ),
        (
            Shard(0, pad_to_multiple=9),
            10,
            4,
            "axis 0 has 10 entries, padded to 18, mesh axis 'tensor' has 4, and 4 does not divide 18",
            "Pad it to 36: pad_to_multiple=36",
        ),
        (
            Shard(0, pad_to_multiple=6),
            13,
            4,
            "axis 0 has 13 entries, padded to 18, mesh axis 'tensor' has 4, and 4 does not divide 18",
            "Pad it to 24: pad_to_multiple=12",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_its_sizes_and_the_nearest_that_fits(shard, size, num, cause, fix):
    misfit = shard.misfit(size, num)
    assert re.fullmatch(cause, misfit.cause)
    assert fix in misfit.fix


def test_a_huge_axis_is_arithmetic_alone():
    shard = Shard(0, blocks=(2**60, 2**59, 2**59), granule=128)
    mesh = Mesh(tensor=2**20)
    assert len(shard.intervals(2**61, mesh.coordinate(2**20 - 1))) == 3
    assert shard.length(2**61, mesh.coordinate(0)) == 2**41
