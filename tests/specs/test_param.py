"""The parts of a tensor, put together, are the tensor; a spec is what it says, and nothing else."""

from __future__ import annotations

from collections import Counter
from itertools import product
from math import prod

import pytest
import torch
from attrs import evolve
from attrs.exceptions import FrozenInstanceError
from hypothesis import example, given
from hypothesis import strategies as st

from shardplan.specs import (
    Constant,
    InitProgram,
    Made,
    Mesh,
    Node,
    Operation,
    Origin,
    ParamSpec,
    Shard,
    TensorCall,
)
from shardplan.specs.dtypes import human_bytes, is_known, num_bytes, short_name
from shardplan.specs.index import index_shape
from shardplan.specs.program import (
    Bernoulli,
    Cauchy,
    Exponential,
    Fill,
    Geometric,
    LogNormal,
    Map,
    Normal,
    Set,
    TruncatedNormal,
    Uniform,
)
from tests.helpers.strategies import FINE_AXES, law, meshes, numbers, operations, param_specs, programs
from tests.helpers.tensor_parts import by_hand, entries, picked

FACTORS = {"data": ("expert_data", "expert")}
WEIGHT = ParamSpec("up.weight", (8, 4), "float32", shards=(Shard(0),))


def everywhere(mesh):
    return [mesh.coordinate(rank) for rank in range(mesh.num_ranks)]


def elements(index):
    return list(product(*map(entries, index)))


def num_holders(spec, mesh):
    """How many ranks of a replica group hold each element, by cutting axes by hand."""
    of_axes = [Counter(range(size)) for size in spec.orig_shape]
    for shard in spec.shards:
        parts = by_hand(shard, spec.orig_shape[shard.axis], mesh.num(shard.mesh_axis))
        of_axes[shard.axis] = Counter(entry for part in parts for entry in part.tolist())
    return {at: prod(of_axes[axis][entry] for axis, entry in enumerate(at)) for at in product(*map(range, spec.orig_shape))}


@st.composite
def specs_on_meshes(draw):
    mesh = draw(meshes())
    return draw(param_specs(mesh)), mesh


@law
@given(specs_on_meshes())
def test_each_replica_group_holds_each_element_as_often_as_it_is_repeated(case):
    spec, mesh = case
    split = {factor for shard in spec.shards for factor in FACTORS.get(shard.mesh_axis, (shard.mesh_axis,))}
    replicas = {}
    for here in everywhere(mesh):
        replica = tuple(here.index(mesh_axis) for mesh_axis in FINE_AXES if mesh_axis not in split)
        replicas.setdefault(replica, Counter()).update(elements(spec.index(here)))
    whole = Counter(num_holders(spec, mesh))
    assert len(replicas) == mesh.num_ranks // mesh.num(*split)
    assert all(held == whole for held in replicas.values())
    assert set(whole.values()) <= {1} or any(shard.replicate for shard in spec.shards)


@law
@given(specs_on_meshes())
def test_parts_put_together_are_the_tensor(case):
    spec, mesh = case
    whole = torch.arange(prod(spec.orig_shape)).view(spec.orig_shape)
    again = torch.full_like(whole, -1)
    for here in everywhere(mesh):
        index = picked(spec.index(here))
        assert torch.equal(again[index][again[index] >= 0], whole[index][again[index] >= 0])
        again[index] = whole[index]
    assert torch.equal(again, whole)


@law
@given(specs_on_meshes())
def test_shape_bytes_and_index_say_the_same_but_for_padding(case):
    spec, mesh = case
    padded = {shard.axis for shard in spec.shards if shard.pad_to_multiple > 1 and mesh.num(shard.mesh_axis) > 1}
    for here in everywhere(mesh):
        held, shape = index_shape(spec.index(here)), spec.local_shape(here)
        assert held == tuple(len(entries(intervals)) for intervals in spec.index(here))
        assert [axis for axis, size in enumerate(shape) if size != held[axis]] in ([], [0])
        assert held == shape or padded == {0}
        assert spec.local_bytes(here) == prod(shape) * num_bytes(spec.dtype)
        if not padded:
            assert spec.local_bytes(here) == len(elements(spec.index(here))) * num_bytes(spec.dtype)
    assert spec.num_elements == prod(spec.orig_shape)


@law
@given(specs_on_meshes())
def test_the_bytes_of_all_ranks_add_up_to_the_total_times_the_holders(case):
    spec, mesh = case
    held = sum(num_holders(spec, mesh).values()) * num_bytes(spec.dtype)
    split = {factor for shard in spec.shards for factor in FACTORS.get(shard.mesh_axis, (shard.mesh_axis,))}
    replicas = mesh.num_ranks // mesh.num(*split)
    filled = sum(prod(index_shape(spec.index(here))) for here in everywhere(mesh)) * num_bytes(spec.dtype)
    assert filled == held * replicas
    assert sum(spec.local_bytes(here) for here in everywhere(mesh)) >= filled


def test_two_axes_over_expert_and_tensor_are_cut_each_on_its_own():
    mesh = Mesh(data=4, tensor=2, expert=2)
    spec = ParamSpec("experts.gate_up", (4, 12, 3), "float32", shards=(Shard(0, "expert"), Shard(1, blocks=(6, 6))))
    assert spec.type == "f32[4@expert, 6|6@tensor, 3]"
    assert spec.mesh_axes(mesh.coordinate(0)) == ("expert", "tensor")
    assert spec.index(mesh.coordinate(3)) == (((2, 4),), ((3, 6), (9, 12)), ((0, 3),))
    # the same experts again after two places along data
    assert [spec.index(mesh.coordinate(rank)) for rank in range(4)] == [
        spec.index(mesh.coordinate(rank)) for rank in range(4, 8)
    ]


@law
@given(specs_on_meshes())
def test_only_mesh_axes_longer_than_one_split(case):
    spec, mesh = case
    split = spec.mesh_axes(mesh.coordinate(0))
    used = {shard.mesh_axis for shard in spec.shards}
    assert list(split) == [m for m in ("data", "expert", "tensor") if mesh.num(m) > 1 and m in used]
    if not split:
        assert spec.local_shape(mesh.coordinate(mesh.num_ranks - 1)) == spec.orig_shape


def test_a_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="axis 0 has 6 entries, mesh axis 'tensor' has 4, and 4 does not divide 6"):
        ParamSpec("w", (6,), "float32", shards=(Shard(0),)).index(Mesh(tensor=4).coordinate(0))


@law
@given(specs_on_meshes())
def test_the_printed_type_names_every_axis_and_its_mesh_axis(case):
    spec, _ = case
    split = {shard.axis: shard for shard in spec.shards}
    short, _, sizes = spec.type.rstrip("]").partition("[")
    axes = sizes.split(", ") if sizes else []
    assert short == short_name(spec.dtype)
    for axis, (size, shown) in enumerate(zip(spec.orig_shape, axes, strict=True)):
        if axis not in split:
            assert shown == str(size)
            continue
        numbers, _, over = shown.partition("@")
        shard = split[axis]
        assert over.partition("(")[0] == shard.mesh_axis
        assert ("(repeated)" in over, "(uneven)" in over) == (shard.replicate, shard.uneven)
        padded = -(-size // shard.pad_to_multiple) * shard.pad_to_multiple
        assert eval(numbers.replace("x", "*").replace("|", "+")) == padded  # as it is read
    assert str(spec) == f"{spec.path}  {spec.type}"


def test_specs_of_equal_fields_are_equal():
    first = ParamSpec("w", [4, 2], "float32", shards=[Shard(0)], tags={"a": [1, 2], "b": {"c": 3}}, tie=("v",))
    second = ParamSpec("w", (4, 2), "float32", shards=(Shard(0),), tags={"b": {"c": 3}, "a": (1, 2)}, tie=("v",))
    assert first == second
    assert hash(first) == hash(second)


def test_the_origin_of_a_spec_is_outside_equality():
    decided = evolve(WEIGHT, origin=Origin("shard", "**", "train.py:12"))
    assert decided == WEIGHT
    assert hash(decided) == hash(WEIGHT)
    assert decided.origin != WEIGHT.origin


@pytest.mark.parametrize(
    "change",
    [
        {"path": "down.weight"},
        {"orig_shape": (4, 8)},
        {"dtype": "bfloat16"},
        {"kind": "buffer"},
        {"shards": ()},
        {"shards": (Shard(0, "data"),)},
        {"stage": 1},
        {"also_on": (1,)},
        {"tags": {"note": 1}},
        {"tie": ("alias",)},
        {"requires_grad": False},
        {"source": InitProgram([Operation(Fill(0))])},
        {"source": Made((TensorCall("up.weight", "train:fill"),))},
    ],
)
def test_every_other_field_counts_in_equality(change):
    assert evolve(WEIGHT, **change) != WEIGHT


def test_a_spec_is_frozen_all_the_way_down():
    spec = ParamSpec("w", (4,), "float32", tags={"a": {"b": [1]}})
    with pytest.raises(FrozenInstanceError):
        spec.path = "v"
    with pytest.raises(TypeError, match="frozendict"):
        spec.tags["a"] = 1
    with pytest.raises(TypeError, match="frozendict"):
        spec.tags["a"]["b"] = 1
    assert spec.tags["a"]["b"] == (1,)


def test_an_edit_is_checked_like_a_new_record():
    with pytest.raises(ValueError, match="w: one axis is split twice"):
        ParamSpec("w", (4, 4), "float32", shards=(Shard(0),)).shard(Shard(0, "data"))
    with pytest.raises(ValueError, match=r"up\.weight: no axis 0 in shape \[\]"):
        evolve(WEIGHT, orig_shape=())


def test_sharding_adds_one_axis_and_its_origin():
    origin = Origin("shard", "w", "train.py:3")
    spec = WEIGHT.shard(Shard(1, "data"), origin)
    assert spec.shards == (Shard(0), Shard(1, "data"))
    assert spec.origin is origin
    assert spec.type == "f32[8@tensor, 4@data]"


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: ParamSpec("w", (4,), "quint4x2"), ValueError, "w: dtype 'quint4x2' is unknown to plans"),
        (lambda: ParamSpec("w", (4,), "float32", shards=(Shard(1),)), ValueError, r"w: no axis 1 in shape \[4\]"),
        (
            lambda: ParamSpec("w", (4, 4), "float32", shards=(Shard(0), Shard(1))),
            ValueError,
            "w: one mesh axis is split twice",
        ),
        (
            lambda: ParamSpec("w", (4, 4), "float32", shards=(Shard(0, "data"), Shard(1, "expert"))),
            ValueError,
            "w: it is split over 'data' and over 'expert', which is a part of 'data'",
        ),
        (lambda: ParamSpec("w", (4, -1), "float32"), ValueError, "'orig_shape' must be >= 0: -1"),
        (lambda: ParamSpec("w", (4, 0.5), "float32"), TypeError, "orig_shape is an integer, not 0.5"),
        (lambda: ParamSpec("w", (4,), "float32", kind="weight"), ValueError, "'kind' must be in .*'weight'"),
        (lambda: ParamSpec("w", (4,), "float32", stage=-1), ValueError, "'stage' must be >= 0: -1"),
        (lambda: ParamSpec(7, (4,), "float32"), TypeError, "'path' must be <class 'str'>"),
        (lambda: Normal(0, -0.1), ValueError, "'std' must be >= 0: -0.1"),
        (lambda: Normal(float("nan"), 1), ValueError, "mean is a finite number, not nan"),
        (lambda: Normal("a few", 1), ValueError, "could not convert string to float: 'a few'"),
        (lambda: Uniform(0, float("inf")), ValueError, "high is a finite number, not inf"),
        (lambda: TruncatedNormal(0, 0, -1, 1), ValueError, "'std' must be > 0: 0.0"),
        (lambda: TruncatedNormal(0, 1, float("-inf"), 1), ValueError, "low is a finite number, not -inf"),
        (
            lambda: TruncatedNormal(0, 1, 2, -2),
            ValueError,
            "nothing of a normal of mean 0.0 and std 1.0 lies between 2.0 and -2.0",
        ),
        (
            lambda: TruncatedNormal(0, 1, 50, 51),
            ValueError,
            "nothing of a normal of mean 0.0 and std 1.0 lies between 50.0 and",
        ),
        (lambda: Exponential(0), ValueError, "'rate' must be > 0: 0.0"),
        (lambda: LogNormal(0, 0), ValueError, "'std' must be > 0: 0.0"),
        (lambda: Cauchy(0, -1), ValueError, "'sigma' must be > 0: -1.0"),
        (lambda: Bernoulli(1.5), ValueError, "p is a probability, not 1.5"),
        (lambda: Bernoulli(float("nan")), ValueError, "p is a probability, not nan"),
        (lambda: Geometric(0), ValueError, "'p' must be > 0: 0.0"),
        (lambda: Geometric(-1), ValueError, "p is a probability, not -1.0"),
        (lambda: Fill(1j), ValueError, r"value: a plan holds plain, finite JSON values, not 1j"),
        (lambda: Map("add_.Tensor", (1j,)), ValueError, r"args: a plan holds plain, finite JSON values, not \(1j,\)"),
        (lambda: Node("full", ([4], {1: 2})), ValueError, "args: a plan holds plain, finite JSON values"),
        (lambda: Shard(-1), ValueError, "'axis' must be >= 0: -1"),
        (
            lambda: Shard(0, "model"),
            ValueError,
            r"'mesh_axis' must be in \('pipe', 'data', 'expert', 'tensor'\) \(got 'model'\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


@law
@given(numbers)
def test_a_fill_gives_back_its_number(number):
    assert repr(Fill(number).number) == repr(number)


@law
@given(operations)
def test_an_operation_overwrites_if_it_reaches_every_element_and_looks_at_none(operation):
    assert operation.overwrites == (operation.box is None and type(operation.what) is not Map)
    assert not evolve(operation, box=((0, 1, 1),)).overwrites


@law
@given(programs, operations)
def test_a_program_forgets_what_is_overwritten_altogether_and_nothing_else(program, operation):
    kept = () if operation.overwrites else program.operations
    assert program.then(operation).operations == (*kept, operation)


def test_a_program_names_the_constants_of_its_operations_in_order():
    one, two, three = (Constant((), "float32", [Node("full", ([], number))]) for number in (1, 2, 3))
    added = Map("add_.Tensor", ({"node": 1},), {"alpha": {"node": 0}}, [two, one])
    made = InitProgram(map(Operation, (Set(three), Fill(0), added, Normal(0, 1))))
    assert made.constants == (three, two, one)


def test_a_program_is_frozen_all_the_way_down():
    node = Node("full", ([4], 0.5), {"dtype": {"dtype": "float32"}})
    made = InitProgram([Operation(Map("mul_.Tensor", [{"node": 0}], {}, [Constant([4], "float32", [node])]))])
    assert hash(made) == hash(evolve(made))
    assert node.args == ((4,), 0.5)
    with pytest.raises(TypeError, match="frozendict"):
        node.kwargs["dtype"]["dtype"] = "float64"
    with pytest.raises(TypeError, match="frozendict"):
        made.operations[0].what.args[0]["node"] = 1
    with pytest.raises(FrozenInstanceError):
        made.operations[0].what = Fill(0)


def test_several_split_axes_are_asked_as_shards():
    assert [ParamSpec("w", (4,), "float32").shard_axis, WEIGHT.shard_axis] == [None, 0]
    with pytest.raises(ValueError, match=r"up\.weight is split along 2 axes; ask \.shards"):
        _ = WEIGHT.shard(Shard(1, "data")).shard_axis


@pytest.mark.parametrize(("path", "module"), [("weight", ""), ("layers.0.weight", "layers.0")])
def test_the_module_is_the_path_without_its_last_name(path, module):
    assert ParamSpec(path, (1,), "float32").module == module


@pytest.mark.parametrize("dtype", [name for name in dir(torch) if is_known(name)])
def test_bytes_of_an_element_are_those_of_torch(dtype):
    assert str(getattr(torch, dtype)) == f"torch.{dtype}"
    assert num_bytes(dtype) == getattr(torch, dtype).itemsize


@law
@given(st.integers(0, 2**60))
@example(2**20 - 1)
def test_human_bytes_are_right_to_the_digits_shown(count):
    number, unit = human_bytes(count).split()
    scale = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert abs(float(number) * scale - count) <= scale * 0.05 * (1 + 1e-9)
    assert float(number) < 1024 or unit == "TiB"
