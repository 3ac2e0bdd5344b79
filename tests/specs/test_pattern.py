"""A glob selects paths: ``*`` within one name, ``**`` across names."""

from __future__ import annotations

from contextlib import suppress
from fnmatch import fnmatchcase

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardplan.specs.pattern import closest, compile_pattern
from tests.helpers.strategies import law, paths


def selects(pattern, path):
    return bool(compile_pattern(pattern).fullmatch(path))


def selects_by_names(pattern, path):
    """The same law said name by name; ``**`` stands alone, and at the end for one name or more."""
    match pattern, path:
        case [], _:
            return not path
        case ["**"], _:
            return bool(path)
        case ["**", *rest], _:
            return any(selects_by_names(rest, path[start:]) for start in range(len(path) + 1))
        case [glob, *rest], [name, *below]:
            return fnmatchcase(name, glob) and selects_by_names(rest, below)
        case _:
            return False


globs = st.lists(st.sampled_from(["**", "*", "a", "?", "a*", "*b", "?b", "[ab]", "[ab]b", "[a-b]*"]), min_size=1, max_size=4)
few_names = st.lists(st.sampled_from(["a", "b", "c", "ab", "bb", "cb"]), min_size=1, max_size=4)


@law
@given(globs, few_names)
def test_a_pattern_selects_name_by_name(pattern, path):
    assert selects(".".join(pattern), ".".join(path)) == selects_by_names(pattern, path)


@law
@given(paths, paths)
def test_a_path_selects_itself_alone(pattern, path):
    assert selects(pattern, pattern)
    assert selects(pattern, path) == (pattern == path)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("model.*.weight", ["model.norm.weight"], ["model.layers.0.weight", "model.weight"]),
        ("layers.*_proj", ["layers.q_proj"], ["layers.0.q_proj"]),
        ("**.weight", ["weight", "a.weight", "a.b.weight"], ["aweight", "a.bias", "weight.a"]),
        ("model.**.weight", ["model.weight", "model.a.b.weight"], ["model.weight.a", "a.model.weight"]),
        ("model.**", ["model.a", "model.a.b"], ["model", "models.a"]),
        ("layers.?", ["layers.0"], ["layers.10", "layers.", "layers"]),
        ("a?b", ["axb"], ["a.b"]),
        ("[qkv]_proj", ["q_proj", "k_proj", "v_proj"], ["o_proj", "qk_proj", "_proj"]),
        ("layers.[0-3]", ["layers.0", "layers.3"], ["layers.4", "layers.-"]),
        ("layers.[!0]", ["layers.1"], ["layers.0", "layers.10"]),
        ("{gate,up}_proj", ["gate_proj", "up_proj"], ["gate,up_proj", "down_proj", "{gate,up}_proj"]),
        ("layers.{0,1{0,1}}", ["layers.0", "layers.10", "layers.11"], ["layers.1", "layers.12"]),
        ("{a.b,c}.weight", ["a.b.weight", "c.weight"], ["a.weight"]),
        ("{*.q,**.k}", ["a.q", "k", "a.b.k"], ["a.b.q", "q"]),
        ("a,b", ["a,b"], ["a", "b"]),
        ("a.b", ["a.b"], ["axb"]),
        ("a+(b)$", ["a+(b)$"], ["aab", "ab"]),
    ],
)
def test_what_a_pattern_selects(pattern, yes, no):
    assert [path for path in (*yes, *no) if selects(pattern, path)] == yes


@pytest.mark.parametrize("pattern", ["a[!x]b", "a[+-9]b", "a[.]b"])
def test_a_bracket_stands_for_one_character_of_a_name(pattern):
    assert not selects(pattern, "a.b")


def test_two_stars_within_a_name_do_not_swallow_its_dot():
    assert selects("layers.1**.bias", "layers.12.bias")
    assert not selects("layers.1**.bias", "layers.1bias")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("layers.[qk", r"pattern 'layers\.\[qk': '\[' has no partner"),
        ("layers.qk]", r"pattern 'layers\.qk\]': '\]' has no partner"),
        ("[]", r"pattern '\[\]': '\[' has no partner"),
        ("{gate,up", r"pattern '\{gate,up': '\{' is not closed"),
        ("{gate,{up}", r"pattern '\{gate,\{up\}': '\{' is not closed"),
        ("gate,up}", r"pattern 'gate,up\}': '\}' has no partner"),
    ],
)
def test_a_bracket_without_a_partner_is_an_error(pattern, text):
    with pytest.raises(ValueError, match=text):
        compile_pattern(pattern)


@law
@given(st.text("ab.*?[]{},!^-&\\", max_size=8))
@example("[!]")
@example("[^]")
@example("[b-a]")
@example("[[a]")
@example("[a&&b]")
def test_every_text_is_a_pattern_or_a_value_error(text):
    with suppress(ValueError):
        compile_pattern(text)


def test_the_closest_paths_come_best_first_and_at_most_three():
    layers = [f"model.layers.{i}.mlp" for i in range(9)]
    assert closest("model.layer.*.mlp", ["lm_head", *layers])[0] == "model.layers.0.mlp"
    assert len(closest("model.layer.*.mlp", layers)) == 3
    assert closest("rotary", ["lm_head", *layers]) == []
