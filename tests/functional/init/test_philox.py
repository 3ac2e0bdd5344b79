"""The random bits: published vectors, and that all ways of computing them agree with a slow reference."""

from __future__ import annotations

import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardplan.functional.init import philox_cpu as philox
from shardplan.functional.init.distributions import sample
from shardplan.functional.init.flat_runs import elements, runs_of, stretches
from shardplan.functional.init.random_bits import _philox, draw_bits, draw_by_torch
from shardplan.specs.program import Bernoulli, Cauchy, Exponential, Geometric, LogNormal, Normal, TruncatedNormal, Uniform
from tests.helpers.init_programs import make, number_reference, philox_reference
from tests.helpers.processes import run_python
from tests.helpers.strategies import law
from tests.helpers.tensor_parts import one_interval, picked

VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
"""Known answers of Random123 1.14, ``kat_vectors``, for philox4x32-10: counter, key, result."""

KEY = 0x01234567, 0x89ABCDEF
starts = st.one_of(
    st.integers(0, 20),
    *(st.integers(max(0, centre - 20), centre + 20) for centre in (2**31, 2**33, 2**34, 2**35, 2**40, 2**60)),
)
words = st.integers(0, 2**32 - 1)


def hexes(text):
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter, key, expected):
    given_words = (*hexes(counter), *hexes(key))
    assert philox_reference(hexes(counter), hexes(key)) == hexes(expected)
    assert tuple(map(int, philox.philox(*map(np.uint32, given_words)))) == hexes(expected)
    by_torch = _philox(*(torch.tensor([word]) for word in given_words))
    assert tuple(word.item() for word in by_torch) == hexes(expected)


def drawn(function, table, operation, *, double, unit):
    x = torch.full((len(elements(table)),), torch.nan, dtype=torch.float64 if double else torch.float32)
    function(x, table, operation, unit=unit)
    return x


@st.composite
def tables(draw):
    """A few stretches, of keys of their own, with runs of any length that begin anywhere."""
    rows, out = [], 0
    for _ in range(draw(st.integers(1, 3))):
        length, num = draw(st.integers(1, 9)), draw(st.integers(1, 4))
        n1, n2 = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        strides = draw(st.tuples(st.integers(0, 11), st.integers(0, 2**34), st.integers(0, 2**36)))
        first = draw(st.integers(0, 5))
        rows.append((draw(words), draw(words), out, draw(starts), length, first, num, n1, n2, *strides))
        out += length * num
    return np.array(rows)


@law
@given(tables(), words, st.booleans(), st.booleans())
def test_numba_and_torch_agree_with_the_reference(table, operation, double, unit):
    by_hand = [
        number_reference(element, operation, (int(row[0]), int(row[1])), double=double, unit=unit)
        for row in table
        for element in elements(row[None]).tolist()
    ]
    for function in (draw_bits, draw_by_torch):
        assert drawn(function, table, operation, double=double, unit=unit).tolist() == by_hand


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("lead", range(5))
def test_the_counter_goes_on_into_its_second_word(double, unit, lead):
    boundary = (2 if double else 4) * 2**32
    table = np.array([(*KEY, 0, boundary - 40 - lead, 81, 0, 1, 1, 1, 0, 0, 0)])
    by_hand = [number_reference(boundary - 40 - lead + i, 3, KEY, double=double, unit=unit) for i in range(81)]
    for function in (draw_bits, draw_by_torch):
        assert drawn(function, table, 3, double=double, unit=unit).tolist() == by_hand
    assert len(set(by_hand)) == 81


@law
@given(st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple), st.data(), st.integers(1, 40), st.booleans())
def test_a_part_in_pieces_is_that_part_of_the_whole(shape, data, size, double):
    index = one_interval(*(sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape))
    rows, out = [], 0
    for runs in runs_of(shape, index):
        for stretch in stretches(runs, size, size):
            rows.append(stretch.row(KEY, out))
            out += stretch.num_elements
    total = int(np.prod(shape))
    whole = drawn(draw_bits, np.array([(*KEY, 0, 0, total, 0, 1, 1, 1, 0, 0, 0)]), 1, double=double, unit=False)
    part = whole.reshape(shape)[picked(index)].reshape(-1)
    pieces = drawn(draw_bits, np.array(rows), 1, double=double, unit=False) if rows else part[:0]
    assert torch.equal(pieces, part)


def test_keys_of_seeds_and_paths_differ():
    given_names = [(seed, path) for seed in (0, 1, 10, -1, 2**70) for path in ("", "a", "1:a", "0:a", "a.b")]
    assert len({philox.derive_key(*name) for name in given_names}) == len(given_names)
    assert philox.derive_key(0, "lm_head.weight") == (2709539374, 2407642095)  # for ever, within one random scheme


def from_words(chosen, *, double, unit):
    """The numbers of some words, by the function that the kernels inline."""
    word = torch.tensor(chosen, dtype=torch.int64)
    if double:
        return ((word >> (12 if unit else 11)).double() + 0.5) * 2.0**-52 + (0.5 if unit else 0)
    return ((word >> (9 if unit else 8)).float() + 0.5) * 2.0**-23 + (0.5 if unit else 0)


EXTREME = {
    False: [0, 1, 0x7FFFFFFF, -(2**31), -1, -(2**31) + 1, 255, 256, 511, 512, 2**30],
    True: [0, 1, 2**63 - 1, -(2**63), -1, -(2**63) + 1, 2047, 2048, 4095, 4096, 2**62],
}
LAWS = [
    (Normal(3, 2), -20, 30),
    (LogNormal(0.5, 1), 0, 1e5),
    (Uniform(-2, 2), -2, 2),
    (Uniform(1, 4), 1, 4),
    (Exponential(0.5), 0, 1e3),
    (Cauchy(1, 2), -1e17, 1e17),
    (Bernoulli(0.3), 0, 1),
    (Bernoulli(0), 0, 0),
    (Bernoulli(1), 1, 1),
    (Geometric(0.3), 1, 1e3),
    (Geometric(1), 1, 1),
    (Geometric(1e-5), 1, 1e8),
    (TruncatedNormal(0, 1, -2, 2), -2, 2),
    (TruncatedNormal(0, 1, 5, 9), 5, 9),
    (TruncatedNormal(0, 1, -9, -5), -9, -5),
    (TruncatedNormal(1, 0.02, -100, 100), 0.7, 1.3),
    (TruncatedNormal(0, 1, 36, 37), 36, 37),
]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("draw", "low", "high"), LAWS, ids=lambda x: str(x) if not isinstance(x, (int, float)) else "")
def test_no_word_leaves_the_support(draw, low, high, double):
    x = torch.empty(len(EXTREME[double]), dtype=torch.float64 if double else torch.float32)
    sample(x, draw, lambda *, unit: x.copy_(from_words(EXTREME[double], double=double, unit=unit)))
    assert x.isfinite().all()
    assert low <= x.min() <= x.max() <= high


def test_all_symmetric_numbers_have_a_finite_normal_and_are_symmetric():
    half = (torch.arange(2**23, dtype=torch.float32) + 0.5) * 2.0**-23
    assert half[-1] == 1 - 2.0**-24
    right, left = half.erfinv(), (-half).erfinv()
    assert right.isfinite().all()
    assert torch.equal(right, -left)
    assert right[0] > 0
    assert (right.diff() >= 0).all()


def test_unit_numbers_have_an_exact_complement():
    unit = (torch.arange(-(2**22), 2**22, dtype=torch.float32) + 0.5) * 2.0**-23 + 0.5
    assert unit.unique().numel() == 2**23
    assert unit.min() > 0
    assert torch.equal(1 - unit, unit.flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_are_uniform_and_fill_the_interval(dtype):
    x = make(Uniform(-1, 1), (2**16,), dtype).double()
    expected = (torch.arange(2**16) + 0.5) / 2**15 - 1
    # the chance of more than 2.5 over the root of n is once in 130 000
    assert (x.sort().values - expected).abs().max() / 2 < 2.5 / 2**8
    assert x.unique().numel() > 2**16 - 2**10


TRITON = """
    import sys
    import numpy as np, torch
    from shardplan.functional.init.random_bits import draw_by_torch
    from shardplan.functional.init.philox_cuda import draw
    cases = 0
    random = np.random.default_rng(0)
    for double in (False, True):
        boundary = (2 if double else 4) * 2**32
        starts = [0, 1, 2, 3, 5, boundary - 7, 2**34 - 3, 2**40 + 1, 2**60 + 3]
        tables = [np.array([(7, 8, 0, start, length, 0, 1, 1, 1, 0, 0, 0)]) for start in starts for length in (1, 33)]
        tables += [np.array([(2**32 - 1, 2**31, 0, 3, 1100, 0, 1, 1, 1, 0, 0, 0)])]
        rows, out = [], 0
        for length, num in [(3, 5), (1, 7), (257, 3), (4, 2)]:
            key = random.integers(0, 2**32, 2)
            rows.append((*key, out, int(random.integers(0, 2**36)), length, 2, num, 2, 3, length + 1, 2**20 + 1, 2**33 + 5))
            out += length * num
        tables.append(np.array(rows))
        for table in tables:
            for unit in (False, True):
                for operation in (5,):
                    size = int((table[:, 4] * table[:, 6]).sum())
                    a = torch.full((size + 8,), 9.0, dtype=torch.float64 if double else torch.float32)
                    b = torch.empty(size, dtype=a.dtype)
                    draw(a[:size], table, operation, unit=unit)
                    draw_by_torch(b, table, operation, unit=unit)
                    assert torch.equal(a[:size], b), (table.tolist(), unit, operation, a[:size], b)
                    assert (a[size:] == 9).all(), "it writes past its end"
                    cases += 1
    print(cases)
"""


def test_triton_agrees_in_its_interpreter():
    pytest.importorskip("triton", reason="there is no Triton for this machine")
    said = run_python(textwrap.dedent(TRITON), TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert said.split()[-1] == "80"
