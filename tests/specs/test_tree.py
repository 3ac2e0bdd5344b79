"""A tree finds each tensor by any of its paths; a plan takes only trees that fit its mesh."""

from __future__ import annotations

import re

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from shardplan.specs import Mesh, ParamSpec, Plan, PlanError, Problem, Shard, SpecTree
from shardplan.specs.plan import misfits
from shardplan.specs.steps import Generate, Place, Tie
from tests.helpers.strategies import folder_of, law, meshes, paths, trees

TIED = ParamSpec("embed.weight", (8, 4), "float32", tie=("head.weight",))
LAYERS = tuple(ParamSpec(f"layers.{i}.weight", (4,), "float32") for i in range(3))


@st.composite
def trees_on_meshes(draw):
    mesh = draw(meshes())
    return draw(trees(mesh)), mesh


@law
@given(trees_on_meshes())
def test_every_path_leads_to_its_tensor(case):
    tree, _ = case
    for spec in tree.specs:
        assert all(tree[path] is spec for path in spec.paths)
    assert list(tree) == [spec.path for spec in tree.specs]
    assert tuple(tree.values()) == tree.specs
    assert len(tree) == len(tree.specs)
    assert list(tree.all_paths) == [path for spec in tree.specs for path in spec.paths]


@law
@given(trees_on_meshes())
def test_the_bytes_of_all_ranks_are_those_of_each_tensor_on_its_stages(case):
    tree, mesh = case
    everywhere = [mesh.coordinate(rank) for rank in range(mesh.num_ranks)]
    held = sum(spec.local_bytes(here) for here in everywhere for spec in tree.values() if here.pipe in spec.places(mesh))
    of_a_stage = {spec.path: sum(map(spec.local_bytes, everywhere)) // mesh.pipe for spec in tree.values()}
    assert held == sum(of_a_stage[spec.path] * (1 + len(spec.also_on)) for spec in tree.values())


@law
@given(trees_on_meshes())
def test_trees_of_equal_specs_are_equal(case):
    tree, _ = case
    again = SpecTree([evolve(spec) for spec in tree.specs])
    assert again == tree
    assert hash(again) == hash(tree)
    assert tree.map(lambda spec: spec) == tree
    assert tree.map(lambda spec: evolve(spec, stage=spec.stage + 1)) != tree or not tree


def test_order_counts_in_equality():
    assert SpecTree(LAYERS) != SpecTree(reversed(LAYERS))


def test_select_gives_each_match_once_in_order():
    tree = SpecTree([*LAYERS, TIED])
    assert tree.select("layers.[02].weight") == (LAYERS[0], LAYERS[2])
    assert tree.select("{embed,head}.weight") == (TIED,)
    assert tree.select("head.weight") == (TIED,)
    assert tree.select("**") == tree.specs
    assert tree.select("layers") == ()


def test_replace_changes_the_named_specs_alone():
    tree, moved = SpecTree(LAYERS), evolve(LAYERS[1], dtype="bfloat16")
    assert tree.replace({LAYERS[1].path: moved}).specs == (LAYERS[0], moved, LAYERS[2])
    assert tree.specs == LAYERS


def test_a_path_is_claimed_once():
    with pytest.raises(ValueError, match=r"two tensors claim the path 'head\.weight'"):
        SpecTree([TIED, ParamSpec("head.weight", (8, 4), "float32")])


def test_an_unknown_path_names_the_closest():
    with pytest.raises(KeyError, match=r"no tensor 'layer\.0\.weight'; the closest are layers\.0\.weight"):
        SpecTree(LAYERS)["layer.0.weight"]
    with pytest.raises(KeyError, match="no tensor 'weight'"):
        SpecTree()["weight"]
    assert SpecTree(LAYERS).get("layer.0.weight") is None


@law
@given(trees_on_meshes())
def test_a_tree_that_fits_is_planned(case):
    tree, mesh = case
    assert misfits(mesh, tree) == []
    steps = [Place(spec.stage, (spec.path,)) for spec in tree.values()]
    assert Plan(mesh, tree, steps, folder=folder_of(tree)).tree is tree


def test_a_plan_collects_all_that_does_not_fit():
    tree = SpecTree(
        [
            ParamSpec("a", (6, 4), "float32", shards=(Shard(0),)),
            ParamSpec("b", (9,), "bfloat16", shards=(Shard(0),), stage=1),
            ParamSpec("c", (4,), "float32", shards=(Shard(0, "pipe"),), also_on=(2,)),
        ]
    )
    with pytest.raises(PlanError) as caught:
        Plan(Mesh(data=2, tensor=4), tree, steps=())
    assert str(caught.value).splitlines() == [
        "5 problems",
        "  a  f32[6@tensor, 4]: axis 0 has 6 entries, mesh axis 'tensor' has 4, and 4 does not divide 6",
        "      Pad it to 8: pad_to_multiple=4; or split it over 2 or 3 ranks",
        "  b  bf16[9@tensor]: stage 1 is not on mesh pipe=1 data=2 tensor=4",
        "  b  bf16[9@tensor]: axis 0 has 9 entries, mesh axis 'tensor' has 4, and 4 does not divide 9",
        "      Pad it to 12: pad_to_multiple=4; or split it over 3 ranks",
        "  c  f32[4@pipe]: stage 2 is not on mesh pipe=1 data=2 tensor=4",
        "  c  f32[4@pipe]: a tensor is not split over 'pipe'",
        "      Split over 'tensor'",
    ]


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (Place(0, ("embed.weight", "v")), "v: a Place step names it, but no tensor has it"),
        (Generate(0, (), (), scratch=("v",)), "v: a Generate step names it, but no tensor has it"),
        (Tie(0, "embed.weight", ("v",)), "v: a Tie step names it, but no tensor has it"),
        (Tie(0, "v", ("head.weight",)), "v: a Tie step names it, but no tensor has it"),
    ],
)
def test_a_step_names_only_tensors_that_are_there(step, text):
    with pytest.raises(PlanError, match=f"1 problem\n  {text}"):
        Plan(Mesh(), SpecTree([TIED]), [step])


def named(path):
    """A path without numbers: nothing of it is folded."""
    return re.sub(r"[0-9]", "n", path)


@law
@given(st.lists(st.builds(Problem, paths.map(named), st.sampled_from(["cause", "other"])), min_size=1, max_size=5))
def test_an_error_tells_each_problem_once_in_order(problems):
    error = PlanError([*problems, *problems])
    assert error.problems == tuple(dict.fromkeys(problems))
    title, *lines = str(error).splitlines()
    assert title == f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    assert lines == [f"  {problem.path}: {problem.cause}" for problem in error.problems]


def test_a_problem_shows_path_type_cause_and_fix():
    assert str(Problem("w", "it is odd", "Make it even", "f32[3]")) == "  w  f32[3]: it is odd\n      Make it even"
    assert str(Problem("", "it is empty")) == "  (model): it is empty"


def test_problems_of_repeated_layers_are_told_once_with_a_pattern_that_mends_all():
    def problem(layer):
        path = f"layers.{layer}.gain"
        return Problem(path, "nobody writes it", f"sch.at[{path!r}].init(0.0)", "f32[3]")

    error = PlanError([problem(layer) for layer in range(32)])
    assert len(error.problems) == 32
    assert str(error).splitlines() == [
        "32 problems",
        "  layers.{0..31}.gain  f32[3]: nobody writes it",
        "      sch.at['layers.*.gain'].init(0.0)",
    ]
