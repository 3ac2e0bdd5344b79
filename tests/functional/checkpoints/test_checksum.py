"""The sum of a tensor finds each bit that flips and each two elements that change places; sums of parts add up to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.functional.checkpoints.assembly import Assembly, narrowed
from shardplan.functional.checkpoints.byte_ranges import select
from shardplan.functional.checkpoints.checksum import MODULUS, position_sum, sum_selected
from shardplan.functional.checkpoints.expected_checksums import ExpectedSum, expected_sums, wrong_sums
from shardplan.specs import Mesh, ParamSpec, Shard, SpecTree
from shardplan.specs.index import whole_index
from shardplan.specs.ownership import held_first
from shardplan.specs.source import Loaded
from shardplan.specs.stored import Part, StoredTensor
from tests.helpers.strategies import law

WORDS = (np.uint8, np.uint16, np.uint32, np.uint64)


def by_hand(elements, start=0):
    return sum(int(x) * (2 * i + 1) for i, x in enumerate(elements, start)) % MODULUS


@law
@given(st.data(), st.sampled_from(WORDS), st.integers(0, 2**40))
def test_it_is_the_formula(data, word, start):
    elements = data.draw(st.lists(st.integers(0, np.iinfo(word).max), max_size=40))
    assert position_sum(np.array(elements, word), start) == by_hand(elements, start)


@pytest.mark.parametrize("word", WORDS)
def test_large_ones_wrap(word):
    elements = np.full(100_003, np.iinfo(word).max, word)
    assert position_sum(elements, 2**62) == by_hand(elements.tolist(), 2**62)


@law
@given(st.data(), st.sampled_from(WORDS))
def test_sums_of_parts_add_up(data, word):
    raw = np.frombuffer(data.draw(st.binary(min_size=8, max_size=400)), np.uint8)
    elements = raw[: len(raw) // 8 * 8].view(word)
    cut = data.draw(st.integers(0, len(elements)))
    parts = position_sum(elements[:cut]) + position_sum(elements[cut:], cut)
    assert parts % MODULUS == position_sum(elements)


@pytest.mark.parametrize("word", WORDS)
def test_each_flipped_bit_and_each_exchange_is_seen(word):
    raw = np.random.default_rng(0).integers(0, 256, 256, np.uint8)
    whole = position_sum(raw.view(word))
    for byte in range(len(raw)):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            assert position_sum(raw.view(word)) != whole
            raw[byte] ^= 1 << bit
    elements = raw.view(word)
    for first in range(len(elements)):
        for second in range(first):
            if elements[first] != elements[second]:
                elements[[first, second]] = elements[[second, first]]
                assert position_sum(elements) != whole
                elements[[first, second]] = elements[[second, first]]
    assert position_sum(elements) == whole


SHARDS = [
    (),
    (Shard(0),),
    (Shard(1, "data"),),
    (Shard(0), Shard(1, "data")),
    (Shard(0, granule=6, replicate=True),),
    (Shard(0, granule=6, replicate=True), Shard(1, "data")),
    (Shard(0, blocks=(8, 4), granule=2, replicate=True),),  # some ranks hold only one of their parts first
    (Shard(0, blocks=(8, 4)), Shard(1, "data", blocks=(4, 2, 4))),
    (Shard(1, uneven=True),),
    (Shard(0, pad_to_multiple=16),),
    (Shard(0, interleaved=2),),
    (Shard(0, "expert"), Shard(1, uneven=True)),
]


@settings(law, max_examples=60)
@given(
    st.sampled_from(SHARDS), st.sampled_from(["float32", "bfloat16", "uint8", "complex128", "int64"]), st.integers(1, 500)
)
def test_what_each_rank_holds_first_adds_up_over_any_mesh(shards, dtype, window):
    mesh = Mesh(data=2, tensor=4, expert=2)
    spec = ParamSpec("w", (12, 10), dtype, shards=shards)
    item = getattr(torch, dtype).itemsize
    raw = np.random.default_rng(0).integers(0, 256, 120 * item, np.uint8)
    part = Part.whole(StoredTensor("f", "w", 0, (12, 10), dtype))
    total = 0
    for rank in range(mesh.num_ranks):
        here = mesh.coordinate(rank)
        taken, first = select(part, spec.index(here)), held_first(spec, here)
        if taken is None or first is None:
            continue
        counted = select(part, first).entries
        for some in taken.windows(window):
            read = np.concatenate([raw[start : start + size] for start, size in some.runs()])
            total += sum_selected(read, some, counted)
    assert total % MODULUS == position_sum(raw.view(f"u{min(item, 8)}"))


def loaded(path, tensor, dtype="float32"):
    return ParamSpec(path, tensor.shape, dtype, source=Loaded(tensor.parts))


def stored(key, known=7):
    return Assembly.of([Part.whole(StoredTensor("f", key, 0, (4, 6), "float32", sum=known))])


def test_what_is_read_whole_is_checked_and_counts_once():
    qkv = stored("qkv")
    tree = SpecTree(
        [
            *(loaded(f"{name}.weight", narrowed(qkv, 1, at, at + 2)) for at, name in enumerate("qkv", 0) if at % 2 == 0),
            loaded("k.weight", narrowed(qkv, 1, 4, 6)),
            loaded("embed.weight", stored("embed")),
            loaded("head.weight", stored("embed")),
            loaded("some.weight", narrowed(stored("more"), 0, 0, 3)),
            loaded("plain.weight", stored("plain", None)),
        ]
    )
    known = expected_sums(tree)
    assert {key: one.counting for key, one in known.items()} == {
        ("f", "embed"): frozenset({("embed.weight", 0)}),
        ("f", "qkv"): frozenset({("q.weight", 0), ("v.weight", 0), ("k.weight", 0)}),
    }


def test_a_sum_that_differs_is_told_with_file_and_tensor():
    known = {("f", "a"): ExpectedSum(7, frozenset()), ("f", "b"): ExpectedSum(2**64 - 1, frozenset())}
    (problem,) = wrong_sums(known, {("f", "a"): 7, ("f", "b"): 1}, {})
    assert str(problem).startswith(
        "  b: what is read of f has the sum 0000000000000001, and ffffffffffffffff was saved: it is damaged\n"
    )


def test_a_scalar_has_a_sum():
    part = Part.whole(StoredTensor("f", "scale", 0, (), "float32"))
    raw = np.frombuffer(np.float32(2.5).tobytes(), np.uint8).copy()
    assert sum_selected(raw, select(part, whole_index(())), ()) == position_sum(raw.view(np.uint32))
