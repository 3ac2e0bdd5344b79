"""What changes from one plan to another: all of it is told, swapping mirrors it, what moves is what masks count."""

from __future__ import annotations

import numpy as np
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.functional import audit, diff, plan_build
from shardplan.functional.auditing.moved_bytes import moves
from shardplan.specs import Mesh, ParamSpec, Plan, Shard, Silence, SpecTree, as_plain, dumps
from shardplan.specs.dtypes import num_bytes
from shardplan.specs.steps import Allocate, Place
from tests.helpers.models import schedule
from tests.helpers.num_calls import num_calls
from tests.helpers.processes import run_python
from tests.helpers.strategies import fitting_shards, law, meshes, paths, plans

DEEPSPEED = {"train_batch_size": 8, "gradient_clipping": 1.0, "optimizer": {"type": "Adam"}}


def llama(mesh, **arguments):
    return plan_build(schedule("llama", mesh), init_weights=False, **arguments)


def placed(mesh, *specs, **fields):
    """A plan that allocates its tensors and no more."""
    tree = SpecTree(specs)
    held = {at: tuple(s.path for s in specs if at in s.places(mesh)) for at in range(mesh.pipe)}
    steps = [kind(at, held[at]) for at in held for kind in (Allocate, Place)]
    return Plan(mesh, tree, steps, **fields)


@st.composite
def layouts(draw, mesh, path, shape):
    """A tensor of a shape, split somehow that fits a mesh."""
    shards, axes = [], draw(st.permutations(range(len(shape))))
    for axis, mesh_axis in zip(
        axes, draw(st.permutations(["tensor", draw(st.sampled_from(["data", "expert"]))])), strict=False
    ):
        tried = draw(st.sampled_from([{}, {"uneven": True, "allow_empty": True}, {"replicate": True}, {"granule": 2}]))
        for shard in (Shard(axis, mesh_axis, **tried), draw(fitting_shards(mesh, axis, mesh_axis))[0]):
            if shard.misfit(shape[axis], mesh.num(mesh_axis)) is None and draw(st.booleans()):
                shards.append(shard)
                break
    stages = draw(st.lists(st.integers(0, mesh.pipe - 1), min_size=1, max_size=2, unique=True))
    dtype, kind = draw(st.sampled_from(["float32", "bfloat16"])), draw(st.sampled_from(["parameter", "buffer"]))
    return ParamSpec(path, shape, dtype, kind, shards, stages[0], tuple(stages[1:]))


@st.composite
def pairs(draw):
    """Two plans with tensors in common, on two meshes."""
    one, other = draw(meshes(4)), draw(meshes(4))
    named = draw(st.dictionaries(paths, st.lists(st.sampled_from([2, 4, 6, 12]), min_size=1, max_size=2), max_size=3))
    shapes = {path: tuple(shape) for path, shape in named.items()}
    return [
        Plan(mesh, SpecTree([draw(layouts(mesh, path, shape)) for path, shape in shapes.items()]), ())
        for mesh in (one, other)
    ]


def mask(plan, path, rank):
    """Which elements of a tensor a rank holds."""
    spec = plan.tree[path]
    held = np.zeros(spec.orig_shape, bool)
    if rank < plan.mesh.num_ranks and (here := plan.mesh.coordinate(rank)).pipe in spec.places(plan.mesh):
        axes = [[entry for interval in axis for entry in range(*interval)] for axis in spec.index(here)]
        held[np.ix_(*axes)] = True
    return held


@law
@given(pairs())
def test_what_moves_is_what_each_rank_lacks_element_by_element(pair):
    before, after = pair
    received = [
        sum((mask(after, p, r) & ~mask(before, p, r)).sum() * num_bytes(after.tree[p].dtype) for p in after.tree)
        for r in range(after.mesh.num_ranks)
    ]
    found, rank, worst = moves(before, after)
    assert sum(move.total_bytes for move in found) == sum(received)
    assert worst == max(received)
    assert rank == (received.index(worst) if worst else None)
    assert all(0 < move.worst_bytes <= worst for move in found)


@settings(law, max_examples=10)
@given(plans())
def test_a_plan_does_not_differ_from_itself(plan):
    found = diff(plan, plan)
    assert found.is_empty
    assert str(found) == f"no change: both are plan {plan.fingerprint[:12]}"


TENSORS = {name: ParamSpec(f"layers.{name}.weight", (8, 4), "float32") for name in "0123"}
CHANGES = {
    "type": {"dtype": "bfloat16"},
    "stage": {"stage": 1},
    "trained": {"requires_grad": False},
    "ties": {"tie": ("head.weight",)},
    "tags": {"tags": {"decay": 0.1}},
    "kind": {"kind": "buffer"},
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_said_of_a_tensor_is_compared_and_folded(what):
    mesh = Mesh(pipe=2)
    before = placed(mesh, *TENSORS.values())
    changed = [path for path in TENSORS if path == "0" or what != "ties"]  # one path is of one tensor
    after = placed(mesh, *(evolve(spec, **CHANGES[what]) if path in changed else spec for path, spec in TENSORS.items()))
    found = diff(before, after)
    assert {change.what for change in found.tensors} == {what}
    swapped = diff(after, before)
    assert [(c.path, c.before, c.after) for c in swapped.tensors] == [(c.path, c.after, c.before) for c in found.tensors]
    assert ("layers.{0..3}.weight" in str(found)) == (what != "ties")


def test_what_a_type_has_no_word_for_is_told():
    before, after = (placed(Mesh(tensor=2), ParamSpec("w", (8,), "float32", shards=(Shard(0, granule=n),))) for n in (1, 2))
    (change,) = diff(before, after).tensors
    assert change.what == "split"
    assert "granule=2" in change.after


def test_swapping_mirrors_what_came_and_what_is_held():
    before = placed(Mesh(tensor=2), TENSORS["0"], TENSORS["1"], seed=1)
    after = placed(Mesh(tensor=2), TENSORS["1"].shard(Shard(0)), TENSORS["2"], target="torch", config={"a": {"b": 1}})
    there, back = diff(before, after), diff(after, before)
    assert there.added == back.removed == ("layers.2.weight",)
    assert there.removed == back.added == ("layers.0.weight",)
    mirrored = [(c.path, c.after, c.before) for c in there.fields]
    assert sorted(mirrored, key=str) == sorted([(c.path, c.before, c.after) for c in back.fields], key=str)
    assert {c.path for c in there.fields} == {"target", "seed", "config.a.b", "equal"}
    assert [(r.num_ranks, r.after, r.before) for r in there.ranks] == [(r.num_ranks, r.before, r.after) for r in back.ranks]
    assert [(s.what, s.after, s.before) for s in there.spreads] == [(s.what, s.before, s.after) for s in back.spreads]
    assert (there.came, there.went) == (back.went, back.came)
    assert (there.moved_bytes, back.moved_bytes) == (0, 2 * 64)


def test_a_pull_request_reads_what_a_split_changes():
    before, after = llama(Mesh(data=2, tensor=2), target="deepspeed", config=DEEPSPEED), llama(Mesh(data=1, tensor=4))
    text = str(diff(before, after))
    assert text.startswith(f"plan {before.fingerprint[:12]} -> plan {after.fingerprint[:12]}\n")
    for line in (
        "plan    mesh                      pipe=1 data=2 tensor=2 -> pipe=1 data=1 tensor=4\n",
        "config.train_batch_size   8 -> nothing\n",
        "~  model.layers.{0..1}.self_attn.q_proj  out_features=32 -> out_features=16\n",
        "held      153.3 KiB -> 77.3 KiB (-76.0 KiB)    153.3 KiB -> 77.3 KiB (-76.0 KiB)    613.1 KiB -> 309.1 KiB",
        "0      data  gradients  all_reduce  1 -> 0 (-1)  153.2 KiB -> 0 B (-153.2 KiB)\n",
        "model.layers.{0..1}.mlp.gate_proj.weight     f32[96@tensor, 64]   24.0 KiB        12.0 KiB\n",
    ):
        assert line in text, text
    assert text.endswith("152.0 KiB in all; rank 1 receives most, 76.0 KiB")
    assert as_plain(diff(before, after))["before"] == before.fingerprint


def test_ranks_of_one_mesh_are_compared_kind_by_kind():
    uneven = [ParamSpec("w", (7, 4), "float32", shards=(Shard(0, uneven=True),)), TENSORS["0"]]
    mesh = Mesh(data=2048, tensor=4)
    before, after = placed(mesh, uneven[0], seed=1), placed(mesh, *uneven)
    found = diff(before, after)
    reports = audit(before), audit(after)
    assert sum(row.num_ranks for row in found.ranks) == mesh.num_ranks
    for row in found.ranks:
        rank = row.coordinate.rank
        assert (row.before, row.after) == tuple(report.memory(rank) for report in reports)
    assert len(found.ranks) < 9


def test_what_only_a_hash_can_tell_is_told():
    before = placed(Mesh(), TENSORS["0"], TENSORS["1"])
    order = Plan(Mesh(), SpecTree([TENSORS["1"], TENSORS["0"]]), before.steps)
    assert [change.path for change in diff(before, order).fields] == ["tree"]
    steps = Plan(Mesh(), before.tree, before.steps[::-1])
    assert [change.path for change in diff(before, steps).fields] == ["steps"]
    silent = evolve(before, silences=[Silence("SP021", "**", "meant")])
    assert [(c.path, c.after) for c in diff(before, silent).fields] == [("silences.SP021 **", "meant")]


def test_ranks_are_not_counted_one_by_one_and_torch_is_not_imported(tmp_path):
    specs = [
        ParamSpec(f"layers.{i}.{j}.weight", (4096, 4096), "bfloat16", shards=(Shard(j % 2),))
        for i in range(40)
        for j in range(7)
    ]
    few, many = (
        [Plan(mesh, SpecTree(specs), ()) for mesh in (Mesh(data=2 * data, tensor=8), Mesh(data=data, tensor=16))]
        for data in (128, 1024)
    )
    assert num_calls(moves, *many) == num_calls(moves, *few)
    for name, plan in zip(("before", "after"), many, strict=True):
        (tmp_path / name).write_text(dumps(plan))
    run_python(
        "import sys, pathlib; from shardplan.specs import loads; from shardplan.functional import diff;"
        "diff(*(loads((pathlib.Path(sys.argv[1]) / name).read_text()) for name in ('before', 'after')));"
        "assert 'torch' not in sys.modules",
        tmp_path,
    )


def test_what_is_no_plan_is_told():
    plan = plan_build(schedule("plain"))
    for pair in ((plan, "plan.json"), (schedule("plain"), plan)):
        with pytest.raises(TypeError, match=r"diff takes two plans, not a (str|Schedule)"):
            diff(*pair)
