"""Sizes that may differ, and stages as records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.specs import Activation, PlainInput, Stage
from shardplan.specs.json_values import thawed
from shardplan.specs.pipeline import size_in
from tests.helpers.strategies import json_values, law

SIZES = {"batch": 4, "sequence": 12}
formulas = st.recursive(
    st.integers(0, 9).map(str) | st.sampled_from(sorted(SIZES)),
    lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from("+-*"), inner) | inner.map("(-{})".format),
    max_leaves=6,
)


@law
@given(formulas)
def test_a_formula_of_sizes_is_python_arithmetic(formula):
    assert size_in(formula, SIZES) == eval(formula, {}, SIZES)


@given(st.integers(), st.integers(1, 9))
def test_a_number_is_itself_and_division_rounds_down(number, divisor):
    assert size_in(number, {}) == number
    assert size_in("(number) // (divisor)", {"number": number, "divisor": divisor}) == number // divisor


@pytest.mark.parametrize(
    ("formula", "part"),
    [
        ("length", "length"),
        ("batch + length", "length"),
        ("batch / 2", "batch / 2"),
        ("open('x')", r"open\('x'\)"),
        ("1.5", "1.5"),
    ],
)
def test_what_is_no_formula_of_known_sizes_is_named(formula, part):
    with pytest.raises(ValueError, match=f"{part} is no size that can be computed from batch, sequence"):
        size_in(formula, SIZES)


def test_an_activation_is_printed_with_the_names_of_its_sizes():
    assert str(Activation("add_3", ("batch", "2*sequence", 16), "bfloat16", 0)) == "add_3 bf16[batch, 2*sequence, 16]"
    assert Activation("loss", (), "float32", 4).type == "f32[]"


@given(st.lists(st.integers(0, 2**40), max_size=4))
def test_a_stage_gives_the_bytes_of_all_its_outputs(sizes):
    outputs = tuple(Activation(f"x_{i}", (), "uint8", size) for i, size in enumerate(sizes))
    assert Stage((), (), outputs, "").output_bytes == sum(sizes)


def test_a_plain_input_is_plain():
    assert hash(PlainInput("options", {"layers": [1, {"deep": None}]})) is not None
    with pytest.raises(ValueError, match="value: a plan holds plain, finite JSON values, not"):
        PlainInput("options", float("nan"))


@law
@given(json_values)
def test_a_plain_input_thaws_to_what_was_given(value):
    frozen = PlainInput("x", value)
    assert hash(frozen) == hash(PlainInput("x", value))
    assert thawed(frozen.value) == value
    assert thawed(thawed(frozen.value)) == value
    kinds = {type(part) for part in _parts(thawed(frozen.value))}
    assert kinds <= {dict, list, str, int, float, bool, type(None)}


def _parts(value):
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _parts(inner)
