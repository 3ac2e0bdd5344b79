"""Boxes are cut into messages: together they are the box, in its order, and none is too large."""

from __future__ import annotations

from math import prod

from hypothesis import given
from hypothesis import strategies as st

from shardplan.functional.saving import messages

sizes = st.lists(st.integers(1, 9), max_size=3)


def elements(box):
    """The places in a box, in order."""
    places = [()]
    for start, stop in box:
        places = [(*place, at) for place in places for at in range(start, stop)]
    return places


def box_at(starts, box_sizes):
    return tuple((start, start + size) for start, size in zip(starts, box_sizes, strict=True))


@given(sizes, st.data(), st.sampled_from([1, 2, 4]), st.integers(4, 200))
def test_messages_are_the_box_in_its_order_and_none_is_too_large(box_sizes, data, item_bytes, most):
    starts = [data.draw(st.lists(st.integers(0, 9), min_size=len(box_sizes), max_size=len(box_sizes))) for _ in range(2)]
    there, own = (box_at(some, box_sizes) for some in starts)
    before, messages.MESSAGE_BYTES = messages.MESSAGE_BYTES, most
    try:
        cut = list(messages.messages(there, own, item_bytes))
    finally:
        messages.MESSAGE_BYTES = before
    for number, whole in enumerate((there, own)):
        assert [place for pair in cut for place in elements(pair[number])] == elements(whole)
    for a, b in cut:
        shapes = [[stop - start for start, stop in box] for box in (a, b)]
        assert shapes[0] == shapes[1]
        assert item_bytes * prod(shapes[0]) <= most
