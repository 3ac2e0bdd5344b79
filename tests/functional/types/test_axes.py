"""What the algebra says that ranks hold, against numpy on every rank; and the views and slices of real models."""

from __future__ import annotations

from functools import partial
from math import prod

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from shardplan.functional.types.axes import (
    Alike,
    Parts,
    Whole,
    axis_of,
    canonical,
    equal,
    holders,
    is_whole,
    join,
    local_size,
    meet,
    padding,
    parts_in,
    repeat_each,
    reshape,
    size_of,
    take,
    tile,
    whole,
)
from shardplan.functional.types.axis_text import text
from shardplan.specs import Mesh, Shard

from ...helpers.strategies import fitting_shards, law

often = settings(law, max_examples=200)

# What an axis says, read without the algebra


def ranks_of(*axes):
    return range(max((len(parts.held) for axis in axes if (parts := parts_in(axis))), default=2))


def held(axis, rank):
    """Entries that a rank has, -1 for padding; of equal ones the first."""
    found = [0]
    for factor in axis:
        match factor:
            case Whole(size):
                own = range(size)
            case Parts(size, ranks):
                own = [entry if entry < size else None for entry in ranks[rank]]
            case Alike(_, local):
                own = [0] * local
        found = [-1 if i == -1 or j is None else i * factor.size + j for i in found for j in own]
    return np.array(found, int)


def firsts(axis):
    """For each entry of the whole axis, the first that equals it."""
    found = [0]
    for factor in axis:
        own = [0] * factor.size if isinstance(factor, Alike) else range(factor.size)
        found = [i * factor.size + j for i in found for j in own]
    return np.array(found, int)


def values(axes):
    """A whole tensor, all of whose entries differ that are not said to be equal."""
    numbers = np.arange(prod(map(size_of, axes))).reshape([size_of(axis) for axis in axes])
    return numbers[np.ix_(*map(firsts, axes))] if axes else numbers


def part(tensor, axes, rank):
    """What a rank has of a whole tensor."""
    places = [held(axis, rank) for axis in axes]
    own = tensor[np.ix_(*[np.maximum(place, 0) for place in places])] if axes else tensor
    is_padding = np.zeros(own.shape, bool)
    for number, place in enumerate(places):
        is_padding |= (place < 0).reshape([-1 if other == number else 1 for other in range(len(axes))])
    return np.where(is_padding, -1, own)


def check(result, axes, locals_of, operands):
    """Check that a result has these axes: on every rank, all of it somewhere, and equal where it is said to be."""
    assert result.shape == tuple(map(size_of, axes))
    if axes:
        assert (result == result[np.ix_(*map(firsts, axes))]).all()
    had = set()
    for rank in ranks_of(*operands):
        claimed = part(result, axes, rank)
        assert claimed.shape == tuple(local_size(axis, rank) for axis in axes)
        assert (locals_of(rank) == claimed).all()
        had |= set(claimed.reshape(-1))
    assert had - {-1} == set(result.reshape(-1))


# Strategies


@st.composite
def split_axes(draw, num=None):
    """An axis that is split as parameters are, or with any entries on any rank, in any order, also padding."""
    num = num or draw(st.integers(1, 4))
    if draw(st.booleans()):
        mesh = Mesh(tensor=num)
        axis = axis_of(*draw(fitting_shards(mesh)), mesh)
    else:
        size, unit = draw(st.integers(1, 6)), draw(st.integers(1, 2))
        ranks = [draw(st.lists(st.integers(0, size + draw(st.integers(0, 1))), max_size=3, unique=True)) for _ in range(num)]
        missing = set(range(size)).difference(*ranks)
        ranks[0] = draw(st.permutations([*ranks[0], *missing]))
        axis = canonical([Parts(size, ranks), Whole(unit)])
    assume(size_of(axis) and local_size(axis))
    return axis


@st.composite
def loose_axes(draw, num=None, *, alike=True):
    """An axis with factors around the split one."""
    some = st.builds(Whole, st.integers(1, 4))
    if alike:
        some |= st.builds(Alike, st.integers(1, 4), st.integers(1, 3))
    few = st.lists(some, max_size=2)
    return canonical([*draw(few), *draw(split_axes(num) | some.map(lambda factor: (factor,))), *draw(few)])


def is_even(*axes):
    return len({tuple(local_size(axis, rank) for axis in axes) for rank in ranks_of(*axes)}) == 1


# Laws


@law
@given(st.data(), st.integers(1, 4))
def test_an_axis_holds_what_its_shard_says(data, num):
    mesh = Mesh(tensor=num)
    shard, size = data.draw(fitting_shards(mesh))
    axis = axis_of(shard, size, mesh)
    assert size_of(axis) == size
    for rank in range(num if parts_in(axis) else 1):
        own = held(axis, rank)
        intervals = shard.intervals(size, mesh.coordinate(rank))
        assert [entry for entry in own if entry >= 0] == [entry for low, high in intervals for entry in range(low, high)]
        assert len(own) == local_size(axis, rank) == shard.length(size, mesh.coordinate(rank))
        assert padding(axis) or (own >= 0).all()


@often
@given(loose_axes(alike=False), st.integers(1, 3), st.integers(1, 3))
def test_what_is_held_has_one_form(axis, outer, inner):
    axis = canonical([Whole(outer), *axis, Whole(inner)])
    if not is_whole(axis):
        entries = [held(axis, rank) for rank in ranks_of(axis)]
        assume(all((own >= 0).any() for own in entries if len(own)))  # padding alone is the same in several forms
        again = canonical([Parts(size_of(axis), [np.where(own < 0, size_of(axis) + 7, own).tolist() for own in entries])])
        assert equal(again, axis)
        num = sum(int((own >= 0).sum()) for own in entries)
        once = [entry for own in entries for entry in own if entry >= 0]
        assert holders(axis) == ("once" if len(set(once)) == num else "repeated")


def test_runs_that_end_within_those_of_other_ranks_are_not_units():
    overlapping = Parts(4, ((0, 1, 2), (2, 3)))
    assert canonical([overlapping]) == (overlapping,)


@often
@given(st.data())
def test_a_view(data):
    axes = data.draw(st.lists(loose_axes(alike=True).filter(lambda a: not parts_in(a)), max_size=2))
    axes = tuple(data.draw(st.permutations([*axes, data.draw(loose_axes())])))
    assume(all(size_of(axis) for axis in axes))
    sizes = [(factor.size, local_size((factor,))) for axis in axes for factor in axis]
    pieces = []
    for size, local in sizes:
        cut = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        local_cut = cut if size == local else data.draw(st.sampled_from([n for n in range(1, local + 1) if local % n == 0]))
        pieces += [(cut, local_cut), (size // cut, local // local_cut)]
    if data.draw(st.integers(0, 3)) == 0:
        pieces = data.draw(st.permutations(pieces))
    bounds = sorted(data.draw(st.lists(st.integers(0, len(pieces)), max_size=2)))
    groups = [pieces[i:j] for i, j in zip([0, *bounds], [*bounds, len(pieces)], strict=True)]
    shape, local_shape = ([prod(pair[which] for pair in group) for group in groups] for which in (0, 1))
    found = reshape(axes, shape, local_shape)
    event(f"a view: {'no' if isinstance(found, str) else 'yes'}")
    if not isinstance(found, str):
        assert tuple(map(local_size, found)) == tuple(local_shape)

        def local(rank):
            own = local_shape if is_even(*axes) else [local_size(axis, rank) for axis in found]
            return part(values(axes), axes, rank).reshape(own)

        check(values(axes).reshape(shape), found, local, axes)


@often
@given(st.data())
def test_a_slice(data):
    axis = data.draw(loose_axes())
    size, length = size_of(axis), local_size(axis)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2)))
    places = np.flatnonzero((held(axis, 0) >= start) & (held(axis, 0) < stop))
    local_start, local_stop = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
    if data.draw(st.integers(0, 3)) == 0:
        local_start, local_stop = sorted(data.draw(st.tuples(*[st.integers(0, length)] * 2)))
    found = take(axis, start, stop, local_start, local_stop)
    event(f"a slice: {'no' if isinstance(found, str) else 'yes' if is_whole(axis) else 'yes, of parts'}")
    if isinstance(found, str):
        return

    def local(rank):
        own = part(values([axis]), [axis], rank)
        if is_even(axis) or (stop < size and (start, stop) == (local_start, local_stop)):  # else it asks for sizes
            return own[local_start:local_stop]
        ranges = [own[low : low + local_size(found, rank)] for low in range(len(own) + 1)]
        claimed = part(values([axis])[start:stop], [found], rank)
        return next((some for some in ranges if some.shape == claimed.shape and (some == claimed).all()), own)

    check(values([axis])[start:stop], (found,), local, [axis])


@often
@given(st.data(), st.integers(1, 3))
def test_a_concatenation(data, num):
    axes = data.draw(st.lists(loose_axes(num) | split_axes(num), min_size=1, max_size=3))
    if data.draw(st.booleans()):
        axes = [axes[0]] * len(axes)
    found = join(axes)
    event(f"a concatenation: {'no' if isinstance(found, str) else 'yes'}")
    if not isinstance(found, str):
        offsets = np.cumsum([0, *map(size_of, axes)])
        tensors = [values([axis]) + at for axis, at in zip(axes, offsets, strict=False)]

        def local(rank):
            return np.concatenate([part(tensor, [axis], rank) for axis, tensor in zip(axes, tensors, strict=True)])

        check(np.concatenate(tensors), (found,), local, axes)


@law
@given(loose_axes(), st.integers(1, 3), st.integers(1, 3))
def test_repetition(axis, num, local_num):
    tensor = values([axis])
    own = partial(part, tensor, [axis])
    check(np.repeat(tensor, num), (repeat_each(axis, num, local_num),), lambda rank: own(rank).repeat(local_num), [axis])
    check(np.tile(tensor, num), (tile(axis, num),), lambda rank: np.tile(own(rank), num), [axis])


def one_of_the_equal(draw, axis, rank):
    """For each entry that a rank has, one that equals it; now and then another."""
    alike = firsts(axis)
    found = []
    for entry in held(axis, rank).tolist():
        equals = np.flatnonzero(alike == entry).tolist() if entry >= 0 else [size_of(axis)]
        is_right = draw(st.integers(0, 9))
        found.append(draw(st.sampled_from([e for e in equals if e not in found] or equals)) if is_right else 0)
    return found


@often
@given(st.data())
def test_two_operands(data):
    a = data.draw(loose_axes())
    match data.draw(st.sampled_from(["any", "alike", "one of the equal ones"])):
        case "any":
            b = data.draw(loose_axes())
        case "alike":
            b = canonical(
                Alike(factor.size, local_size((factor,))) if data.draw(st.booleans()) else factor
                for factor in a
                if isinstance(factor, Whole) or is_even((factor,))
            )
        case _:
            b = canonical([Parts(size_of(a), [one_of_the_equal(data.draw, a, rank) for rank in ranks_of(a)])])
            assume(set().union(*(held(b, rank) for rank in ranks_of(b))) >= set(range(size_of(b))))
    a, b = data.draw(st.permutations([a, b]))
    found = meet(a, b)
    assert found == meet(b, a)
    event(f"two operands: {'no' if found is None else 'yes'}")
    assert found is not None or a != b
    if found is not None:
        assert set().union(*(held(found, rank) for rank in ranks_of(a, b))) - {-1} == set(firsts(found))
    if found is not None:
        whole_a, whole_b = values([a]), values([b])
        for rank in ranks_of(a, b):
            ours = held(found, rank)
            for axis, tensor in ((a, whole_a), (b, whole_b)):
                own = part(tensor, [axis], rank)
                if all(isinstance(factor, Alike) for factor in axis):  # of any number, on ranks that have another number
                    own = np.resize(own, ours.shape)
                assert (own[ours >= 0] == tensor[ours[ours >= 0]]).all()


# What must work

FOUR, TWO = Mesh(tensor=4), Mesh(tensor=2)
KV = axis_of(Shard(0, granule=16, replicate=True), 32, FOUR)  # two heads of 16, each on two ranks
QUERY = axis_of(Shard(0, granule=16), 128, FOUR)  # eight heads
SPLIT = axis_of(Shard(0), 64, TWO)


def viewed(axes, shape, local_shape):
    found = reshape(tuple(axes), shape, local_shape)
    assert not isinstance(found, str), found
    return found


def taken(axis, *bounds):
    found = take(axis, *bounds)
    assert not isinstance(found, str), found
    return found


def test_heads_and_back():
    batch, sequence, hidden = whole(2), whole(16), axis_of(Shard(0), 128, FOUR)
    axes = viewed((batch, sequence, hidden), (2, 16, 8, 16), (2, 16, 2, 16))
    assert list(map(text, axes)) == ["2", "16", "8@tensor", "16"]
    assert viewed(axes, (2, 16, 128), (2, 16, 32)) == (batch, sequence, hidden)


def test_fused_query_key_value():
    fused = axis_of(Shard(0, blocks=(64, 64, 64)), 192, TWO)
    query = taken(fused, 0, 64, 0, 32)
    assert equal(query, SPLIT)
    assert [taken(fused, at, at + 64, at // 2, at // 2 + 32) for at in (64, 128)] == [query, query]
    assert join([query, query, query]) == fused
    assert viewed((fused,), (3, 4, 16), (3, 2, 16))[1] == axis_of(Shard(0), 4, TWO)
    grouped = axis_of(Shard(0, blocks=(128, 32, 32), granule=16, replicate=True), 192, FOUR)
    assert [taken(grouped, 0, 128, 0, 32), taken(grouped, 128, 160, 32, 48)] == [QUERY, KV]
    assert join([QUERY, KV, KV]) == grouped
    assert text(grouped) == "128|32|32@tensor(repeated)"


def test_fused_rows_split_as_one_block_are_refused():
    rows = axis_of(Shard(0), 192, TWO)
    assert (
        take(rows, 0, 64, 0, 32)
        == "entries 0 to 64 are entries 0 to 64 on rank 0, as far as it has them, and the code takes entries 0 to 32"
    )
    assert take(rows, 0, 64, 0, 64) == "rank 1 has none of entries 0 to 64, and the code takes its entries 0 to 64"
    assert reshape((rows,), (3, 4, 16), (3, 2, 16)) == "its entries are shared out in units of 96, and here in units of 64"


def test_gate_and_up():
    fused = axis_of(Shard(0, blocks=(64, 64)), 128, TWO)
    halves = [taken(fused, 0, 64, 0, 32), taken(fused, 64, 128, 32, 64)]
    assert halves == [SPLIT, SPLIT]
    assert meet(*halves) == SPLIT
    assert text(fused) == "64|64@tensor"
    uneven = axis_of(Shard(0, blocks=(5, 5), uneven=True), 10, TWO)
    assert taken(uneven, 0, 5, 0, 3) == taken(uneven, 5, 10, 3, 6) == axis_of(Shard(0, uneven=True), 5, TWO)


def test_gpt_neox_heads():
    fused = axis_of(Shard(0, interleaved=8), 8 * 3 * 16, FOUR)
    heads, each = viewed((fused,), (8, 48), (2, 48))
    assert (text(heads), text(each)) == ("8@tensor", "48")
    assert taken(each, 16, 32, 16, 32) == whole(16)
    few = axis_of(Shard(0, interleaved=2, blocks=(16, 8)), 48, FOUR)
    assert sorted(set(held(few, 0)) | set(held(few, 1))) == list(range(24))


def test_grouped_heads_repeated():
    num_kv, each = viewed((KV,), (2, 16), (1, 16))
    repeated = repeat_each(num_kv, 4, 2)
    num_query, _ = viewed((QUERY,), (8, 16), (2, 16))
    assert meet(num_query, repeated) == meet(repeated, num_query) == num_query
    assert meet(num_query, tile(num_kv, 4)) is None
    assert meet(num_query, (Alike(4, 2), *num_kv)) is None
    merged = viewed((num_kv, (Alike(4, 2),), each), (8, 16), (2, 16))
    assert merged == (repeated, each)
    assert meet(num_query, repeat_each(axis_of(Shard(0, replicate=True), 1, FOUR), 8, 2)) == num_query


def test_two_factors_split_over_the_same_ranks_are_refused():
    half = axis_of(Shard(0), 2, TWO)
    assert meet((*half, Alike(2, 1)), (Alike(2, 1), *half)) is None


def test_filled_memory_has_any_layout():
    assert meet((Alike(128, 32),), QUERY) == meet(QUERY, (Alike(128, 32),)) == QUERY
    assert meet((Alike(128, 128),), QUERY) is None
    assert join([QUERY, (Alike(128, 32),)]) == join([QUERY, QUERY])
    uneven = axis_of(Shard(0, uneven=True), 3, TWO)
    assert join([uneven, (Alike(3, 2),)]) == "the ranks have some of entries that are all equal, and it is open which"


def test_padded_vocabulary():
    vocabulary = axis_of(Shard(0, pad_to_multiple=8), 50257, Mesh(tensor=8))
    assert padding(vocabulary)
    assert text(vocabulary) == "50257+7@tensor"
    assert viewed((whole(6), vocabulary), (2, 3, 50257), (2, 3, 6283))[2] == vocabulary
    assert padding(taken(vocabulary, 0, 50257, 0, 6283))
    assert not padding(axis_of(Shard(0, pad_to_multiple=8), 48, Mesh(tensor=8)))


def test_padding_among_other_entries():
    padded, even = axis_of(Shard(0, pad_to_multiple=4), 7, TWO), axis_of(Shard(0), 4, TWO)
    both = join([padded, even])
    assert [held(both, rank).tolist() for rank in (0, 1)] == [[0, 1, 2, 3, 7, 8], [4, 5, 6, -1, 9, 10]]
    assert take(both, 7, 11, 4, 6) == even
    assert take(both, 0, 7, 0, 4) == padded


def test_slices_of_what_is_repeated():
    uneven = Parts(3, ((0, 1), (2,)))
    assert take((Alike(2, 2), Whole(4)), 0, 4, 0, 4) == whole(4)
    assert isinstance(take((Alike(2, 2), Whole(4)), 0, 4, 1, 5), str)
    assert take((Alike(4, 2), Whole(4)), 4, 12, 0, 4) == (Alike(2, 1), Whole(4))
    assert take((Alike(3, 2), uneven), 0, 3, 0, 2) == "entries 0 to 3 are a part of entries that are repeated"


def test_a_split_sequence_merged_with_the_batch():
    batch, sequence, hidden = whole(2), axis_of(Shard(0), 64, TWO), whole(8)
    merged = viewed((batch, sequence, hidden), (128, 8), (64, 8))
    assert viewed(merged, (2, 64, 8), (2, 32, 8)) == (batch, sequence, hidden)
    assert text(merged[0]) == "64|64@tensor"


def test_uneven_heads():
    rows = axis_of(Shard(0, granule=16, uneven=True), 7 * 16, TWO)
    assert list(map(text, viewed((rows,), (7, 16), (4, 16)))) == ["7@tensor(uneven)", "16"]


def test_reasons():
    assert reshape((SPLIT,), (4, 16), (4, 8)) == "each rank has 2 of 4 entries there, and the code makes 4 of 4"
    assert reshape((axis_of(Shard(0), 96, Mesh(tensor=3)),), (4, 24), (4, 8)) == (
        "its entries are shared out in units of 32, and here in units of 24"
    )
    assert join([SPLIT, whole(4)]) == "64@tensor is split, and 4, joined to it, is whole"


@pytest.mark.parametrize(
    ("shard", "size"),
    [
        (Shard(0), 4096),
        (Shard(0, blocks=(64, 32, 32)), 128),
        (Shard(0, blocks=(64, 16, 16), granule=16, replicate=True), 96),
        (Shard(0, granule=16, uneven=True), 7 * 16),
        (Shard(0, pad_to_multiple=8), 50257),
    ],
)
def test_text_is_that_of_specs(shard, size):
    assert text(axis_of(shard, size, Mesh(tensor=4))) == shard.axis_type(size)
