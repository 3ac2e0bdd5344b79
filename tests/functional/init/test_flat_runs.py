"""Runs and boxes: which elements of a tensor a part or a view covers, against NumPy's own slicing."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.functional.init.flat_runs import elements, first_and_last, runs_of, stretches
from shardplan.functional.init.strided_views import box_of, box_shape
from shardplan.specs.index import row_major
from tests.helpers.strategies import law

KEY = 5, 6


@st.composite
def parts(draw, most=3, least=0):
    """A shape, and for each axis from ``least`` to ``most`` intervals that do not touch."""
    shape = draw(st.lists(st.integers(least, 6), max_size=6).map(tuple))
    bounds = [sorted(draw(st.sets(st.integers(0, n), min_size=2 * least, max_size=2 * most))) for n in shape]
    return shape, tuple(tuple(zip(of_axis[::2], of_axis[1::2], strict=False)) for of_axis in bounds)


def flat(shape, index):
    chosen = [[at for interval in intervals for at in range(*interval)] for intervals in index]
    return np.arange(prod(shape)).reshape(shape)[np.ix_(*chosen)].reshape(-1).tolist() if shape else [0]


def table_of(shape, index, room, size):
    rows, out = [], 0
    for runs in runs_of(shape, index):
        for stretch in stretches(runs, room, size):
            rows.append(stretch.row(KEY, out))
            out += stretch.num_elements
    return np.array(rows, dtype=np.int64).reshape(-1, 12)


@law
@given(parts())
def test_runs_are_the_part_in_order(part):
    shape, index = part
    found = runs_of(shape, index)
    assert sum(runs.num_elements for runs in found) == len(flat(shape, index))
    assert elements(table_of(shape, index, 10**9, 10**9)).tolist() == flat(shape, index)


@law
@given(parts(), st.integers(1, 30), st.integers(1, 30))
def test_stretches_cover_their_runs_once_in_order(part, room, size):
    shape, index = part
    table = table_of(shape, index, room, size)
    assert elements(table).tolist() == flat(shape, index)
    low, high = first_and_last(table)
    for row, first, last in zip(table, low, high, strict=True):
        assert [first, last] == [min(elements(row[None])), max(elements(row[None]))]


@law
@given(parts(), st.integers(1, 30), st.integers(1, 30))
def test_each_stretch_fits_into_the_room_that_is_left(part, room, size):
    shape, index = part
    for runs in runs_of(shape, index):
        left = room
        for stretch in stretches(runs, room, size):
            assert 0 < stretch.num_elements <= left
            left = left - stretch.num_elements or size


@pytest.mark.parametrize(
    ("shape", "index", "num"),
    [
        ((4096, 4096), (((0, 4096),), ((0, 4096),)), [(1, 2**24)]),
        ((4096, 4096), (((512, 1024),), ((0, 4096),)), [(1, 2**21)]),
        ((4096, 4096), (((0, 4096),), ((512, 1024),)), [(4096, 512)]),
        ((1, 8, 1, 6), (((0, 1),), ((2, 4),), ((0, 1),), ((0, 6),)), [(1, 12)]),
        ((4096, 4096), (((0, 512), (1024, 1536)), ((0, 4096),)), [(1, 2**21)] * 2),  # q and k of a fused projection
        ((4096, 4096), (((0, 512), (1024, 1536)), ((0, 2048),)), [(512, 2048)] * 2),
        ((3, 8, 5), (((0, 3),), ((0, 2), (4, 6)), ((0, 5),)), [(1, 10)] * 6),  # the gates and the ups of each expert
        ((), (), [(1, 1)]),
    ],
)
def test_runs_are_as_long_as_they_can_be(shape, index, num):
    assert [(runs.num_runs, runs.length) for runs in runs_of(shape, index)] == num


def test_runs_of_no_elements_are_none():
    assert not runs_of((0, 4), ((), ((0, 4),)))
    assert not runs_of((4, 0), (((1, 2),), ()))
    assert not runs_of((4, 4), ((), ((0, 1), (2, 4))))
    assert not runs_of((4, 4), (((0, 1), (2, 4)), ()))


def test_places_beyond_32_bits_are_exact():
    shape, index = (2**22, 2**20), (((2**22 - 2, 2**22),), ((2**20 - 3, 2**20),))
    low = (2**22 - 2) * 2**20
    expected = [low + 2**20 - 3 + i for i in range(3)] + [low + 2**21 - 3 + i for i in range(3)]
    assert elements(table_of(shape, index, 100, 100)).tolist() == expected


@st.composite
def views(draw):
    """A whole tensor and some view of it, made by slices, steps, permutations and reshapes."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple))
    whole = np.arange(prod(shape), dtype=np.int64).reshape(shape)
    view = whole
    for _ in range(draw(st.integers(0, 4))):
        match draw(st.sampled_from(["slice", "step", "permute", "reshape", "pick", "diagonal"])):
            case "slice" | "step" as kind if view.ndim:
                axis = draw(st.integers(0, view.ndim - 1))
                start = draw(st.integers(0, view.shape[axis]))
                step = draw(st.integers(1, 3)) if kind == "step" else 1
                view = view[(slice(None),) * axis + (slice(start, draw(st.integers(start, view.shape[axis])), step),)]
            case "permute":
                view = view.transpose(draw(st.permutations(range(view.ndim))))
            case "reshape":
                wanted = draw(st.sampled_from([(-1,), (view.size, 1), (2, -1), (-1, 3), (2, 3, -1)]))
                if view.size and view.size % abs(prod(wanted)) == 0 and np.shares_memory(view.reshape(wanted), whole):
                    view = view.reshape(wanted)
            case "pick" if view.ndim and view.shape[0]:
                view = view[draw(st.integers(0, view.shape[0] - 1)), ...]
            case "diagonal" if view.ndim == 2:
                view = view.diagonal()
            case _:
                pass
    offset = (view.__array_interface__["data"][0] - whole.__array_interface__["data"][0]) // 8
    return shape, offset, view, whole


def covered(shape, box):
    slices = tuple(slice(None) if interval is None else slice(*interval) for interval in box)
    return np.arange(prod(shape)).reshape(shape)[slices]


@law
@given(views())
def test_a_box_covers_exactly_its_view(given_view):
    shape, offset, view, _ = given_view
    box = box_of(shape, offset, view.shape, tuple(stride // 8 for stride in view.strides))
    if box is not None:
        assert sorted(covered(shape, box).reshape(-1).tolist()) == sorted(view.reshape(-1).tolist())
        assert prod(box_shape(shape, box)) == view.size


@law
@given(parts(most=1, least=1), st.data())
def test_slices_and_permutations_are_boxes(part, data):
    shape, of_axes = part
    index = [interval for (interval,) in of_axes]
    steps = [data.draw(st.integers(1, 3)) for _ in shape]
    whole = np.arange(prod(shape), dtype=np.int64).reshape(shape)
    view = whole[tuple(slice(*interval, step) for interval, step in zip(index, steps, strict=True))]
    view = view.transpose(data.draw(st.permutations(range(len(shape)))))
    offset = sum(low * stride for (low, _), stride in zip(index, row_major(shape), strict=True))
    box = box_of(shape, offset, view.shape, tuple(stride // 8 for stride in view.strides))
    assert box is not None
    assert sorted(covered(shape, box).reshape(-1).tolist()) == sorted(view.reshape(-1).tolist())


@pytest.mark.parametrize(
    ("shape", "offset", "sizes", "strides"),
    [
        ((4, 4), 0, (4,), (5,)),  # a diagonal
        ((4, 4), 0, (4, 4), (0, 1)),  # one row, many times
        ((4, 6), 3, (8,), (1,)),  # from within one row into the next
        ((4, 6), 0, (6,), (4,)),  # every fourth of all
        ((2, 2), 0, (4, 4), (4, 1)),  # more than there is
        ((4,), 0, (4, 2), (2, 1)),  # halves of elements
    ],
)
def test_what_is_no_box_is_told(shape, offset, sizes, strides):
    assert box_of(shape, offset, sizes, strides) is None


@pytest.mark.parametrize(
    ("shape", "offset", "sizes", "strides"),
    [((4, 4), 8, (0, 4), (4, 1)), ((4, 4), 0, (4, 0), (4, 1)), ((4,), 4, (0,), (1,))],
)
def test_a_view_of_nothing_covers_nothing(shape, offset, sizes, strides):
    box = box_of(shape, offset, sizes, strides)
    assert box is None or prod(box_shape(shape, box)) == 0
