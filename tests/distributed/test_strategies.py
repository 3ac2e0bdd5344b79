"""Every strategy and mesh gives the same weights, and every rank's receipt is what the audit predicted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardplan.functional import create_schedule, execute, plan_build, predict, resolve
from shardplan.functional.interpreter import work
from shardplan.specs import Mesh
from shardplan.specs.steps import Broadcast, EvaluateWhole, Generate, Scatter, TakeWhole
from tests.helpers.models import Plain, schedule
from tests.helpers.ranks import results, run_ranks
from tests.helpers.training import local_tensors, put_together


def execute_ranks(rank, name, mesh, options):
    plan = plan_build(schedule(name, mesh), **options)
    built = execute(plan, device="cpu", progress=False)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in built.module.state_dict().values()}
    return local_tensors(built.module, plan.tree), built.receipt, sum(storages.values())


def unsplit(name):
    module = execute(plan_build(schedule(name)), device="cpu").module
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.mark.parametrize("name", ["llama", "plain"])
@pytest.mark.parametrize("mesh", [Mesh(tensor=2), Mesh(tensor=4), Mesh(data=2, tensor=2), Mesh(data=2)], ids=str)
@pytest.mark.parametrize("strategy", ["local", "scatter", "broadcast"])
def test_weights_are_the_unsplit_ones_and_receipts_the_predicted(name, mesh, strategy):
    plan = plan_build(schedule(name, mesh), strategy=strategy)
    ranks = results(run_ranks(execute_ranks, mesh.num_ranks, name, mesh, {"strategy": strategy}))
    weights = put_together(plan, [local for local, _, _ in ranks])
    for path, tensor in unsplit(name).items():
        assert torch.equal(weights[path], tensor), path
    for rank, (_, receipt, held_by_state) in enumerate(ranks):
        assert receipt == predict(plan, rank)
        if strategy == "local":
            assert [call.op for call in receipt.collectives] == ["all_gather", "all_gather"]
        persistent = [s for s in plan.tree.values() if s.kind != "non_persistent_buffer"]
        assert held_by_state == sum(spec.local_bytes(mesh.coordinate(rank)) for spec in persistent)


def test_scatter_gives_no_other_rank_a_whole_tensor():
    mesh = Mesh(data=2, tensor=2)
    plan = plan_build(schedule("llama", mesh), strategy="scatter")
    split = {path for path, spec in plan.tree.items() if spec.shards}
    for rank in range(1, 4):
        here = mesh.coordinate(rank)
        for step in plan.steps:
            task = resolve(step, here, plan.tree)
            if isinstance(task, work.Message):
                assert all(piece.shape != piece.spec.orig_shape for piece in task.pieces if piece.path in split)
            assert not isinstance(step, (Generate, EvaluateWhole, TakeWhole)) or isinstance(task, work.Nothing)


def sort_draws(weight):
    """Init code that mixes elements."""
    weight.copy_(torch.randn_like(weight).sort(dim=0).values)


class Mixed(nn.Module):
    """Tensors of every kind: drawn, orthogonal, computed on the side, filled, and with values already."""

    def __init__(self, width=16, device="meta"):
        super().__init__()
        self.embed = nn.Embedding(40, width, padding_idx=2, device=device)
        self.orthogonal = nn.Linear(width, 4 * width, device=device)
        self.sorted = nn.Linear(4 * width, width, bias=False, device=device)
        self.wide = nn.Linear(width, 4 * width, device=device, dtype=torch.bfloat16)
        self.register_buffer("frequencies", torch.empty(4 * width, device=device))
        self.register_buffer("table", torch.empty(4 * width, width, dtype=torch.float64, device=device), persistent=False)
        self.register_buffer("mask", torch.empty(8, 8, dtype=torch.bool, device=device))
        self.kept = nn.Parameter(torch.arange(float(width)))
        self.scale = nn.Parameter(torch.empty((), device=device))

    def reset_parameters(self):
        with torch.no_grad():
            steps = torch.arange(self.frequencies.numel())
            frequencies = 1.0 / 10000 ** (steps / steps.numel())
            self.frequencies.copy_(frequencies)
            self.table.copy_(torch.outer(steps, frequencies[: self.table.shape[1]]).sin())
            self.mask.copy_(torch.ones_like(self.mask).tril())
            self.scale.fill_(2.5)


def mixed_schedule(mesh):
    sch = create_schedule(Mixed(), mesh).at["orthogonal.weight"].init(nn.init.orthogonal_)
    sch = sch.at["sorted.weight"].init(sort_draws)
    sch = sch.at["{orthogonal,wide,embed}.weight"].shard(axis=0).at["{orthogonal,wide}.bias"].shard(axis=0)
    sch = sch.at["sorted.weight"].shard(axis=1).at["table"].shard(axis=0).at["frequencies"].shard(axis=0)
    return sch.at[""].sync("forward_post", "all_gather", -1)


OPAQUE = {"orthogonal.weight", "sorted.weight"}


def execute_mixed(rank, mesh, strategy, seed):
    plan = plan_build(mixed_schedule(mesh), strategy=strategy, seed=seed)
    built = execute(plan, device="cpu", progress=False)
    return local_tensors(built.module, plan.tree), built.receipt, predict(plan, rank)


def mixed_weights(mesh, strategy, seed=3):
    """Return the logical tensors that real processes get, and the receipts, which are the predicted ones."""
    ranks = results(run_ranks(execute_mixed, mesh.num_ranks, mesh, strategy, seed))
    assert [receipt for _, receipt, _ in ranks] == [predicted for *_, predicted in ranks]
    plan = plan_build(mixed_schedule(mesh), strategy=strategy, seed=seed)
    return put_together(plan, [local for local, *_ in ranks]), [receipt for _, receipt, _ in ranks]


@pytest.fixture(scope="module")
def mixed_alone():
    """The logical tensors that one process makes."""
    module = execute(plan_build(mixed_schedule(Mesh()), seed=3), device="cpu").module
    return {path: t.detach() for path, t in (*module.named_parameters(), *module.named_buffers())}


@pytest.mark.parametrize("mesh", [Mesh(tensor=1), Mesh(tensor=2), Mesh(tensor=4), Mesh(data=2, tensor=2)], ids=str)
@pytest.mark.parametrize("strategy", ["local", "scatter", "broadcast"])
def test_weights_are_bit_equal_between_strategies_and_meshes(mesh, strategy, mixed_alone):
    weights, _ = mixed_weights(mesh, strategy)
    assert weights.keys() == mixed_alone.keys()
    for path, tensor in mixed_alone.items():
        assert weights[path].dtype == tensor.dtype
        assert torch.equal(weights[path], tensor), path
    frame = weights["orthogonal.weight"]
    torch.testing.assert_close(frame.T @ frame, torch.eye(16), rtol=1e-4, atol=1e-5)
    assert weights["sorted.weight"].diff(dim=0).min() >= 0
    assert not weights["embed.weight"][2].any()
    assert weights["embed.weight"].std() > 0.9
    assert torch.equal(weights["mask"], torch.ones(8, 8, dtype=torch.bool).tril())
    assert torch.equal(weights["kept"], torch.arange(16.0))


def test_another_seed_gives_other_weights_and_the_same_constants(mixed_alone):
    weights, _ = mixed_weights(Mesh(tensor=2), "local", seed=4)
    same = {path for path, tensor in mixed_alone.items() if torch.equal(weights[path], tensor)}
    assert same == {"frequencies", "table", "mask", "kept", "scale"}


def test_locally_only_what_has_no_program_travels():
    mesh = Mesh(data=2, tensor=2)
    plan = plan_build(mixed_schedule(mesh), strategy="local")
    sent = {path for step in plan.steps if isinstance(step, (Scatter, Broadcast)) for path in step.paths}
    assert sent == {*OPAQUE, "kept"}
    part = sum(plan.tree[path].local_bytes(mesh.coordinate(0)) for path in OPAQUE)
    for rank, receipt in enumerate(mixed_weights(mesh, "local")[1]):
        calls = [(call.op, call.mesh_axes, call.num_bytes) for call in receipt.collectives if call.mesh_axes]
        expected = [("broadcast", ("data",), part), ("broadcast", ("data", "tensor"), 4 * 16)]
        assert sorted(calls) == ([*expected, ("scatter", ("tensor",), part)] if rank < 2 else expected)


def test_small_replicated_tensors_travel_together():
    plan = plan_build(schedule("llama", Mesh(tensor=2)), strategy="scatter")
    replicated = [path for path, spec in plan.tree.items() if not spec.shards]
    broadcasts = [step for step in plan.steps if isinstance(step, Broadcast)]
    assert [set(step.paths) for step in broadcasts] == [set(replicated)]
    assert len([step for step in plan.steps if isinstance(step, Scatter)]) == 1


def wide(width):
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False), nn.LayerNorm(width))


def test_large_tensors_travel_alone_and_are_freed_before_the_next():
    width = 4096
    mesh = Mesh(tensor=4)
    sch = create_schedule(wide(width), mesh).at["0"].colwise().at["1"].rowwise()
    one, part = 4 * width * width, width * width
    maker, other = (predict(plan_build(sch, strategy="scatter"), rank) for rank in (0, 1))
    assert [call.num_bytes for call in maker.collectives if call.op == "scatter"] == [part, part]
    # the first is split into rows, which are views; the second into columns, which are copied once
    assert maker.peak_bytes == part + one + one + part
    assert other.peak_bytes == other.held_bytes + 8 * width  # the bucket of the norm's weight and bias
    classic = predict(plan_build(sch, strategy="broadcast"), 1)
    assert classic.peak_bytes == part + one + part
    for rank in range(4):
        born_in_parts = predict(plan_build(sch, strategy="local"), rank)
        assert born_in_parts.peak_bytes == born_in_parts.held_bytes == 2 * part + 8 * width


def kept_values(rank, mesh):
    torch.manual_seed(rank)
    model = Plain(device="cpu")
    sch = create_schedule(model, mesh).at["blocks.*.up"].colwise().at["blocks.*.down"].rowwise()
    plan = plan_build(sch)
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    built = execute(plan, device="cpu")
    after = model.state_dict()
    assert all(torch.equal(before[path], after[path]) for path in before)
    return local_tensors(built.module, plan.tree), before, built.receipt


def test_values_of_the_first_rank_win_and_the_modules_stay():
    mesh = Mesh(data=2, tensor=2)
    ranks = results(run_ranks(kept_values, 4, mesh))
    sch = create_schedule(Plain(device="cpu"), mesh).at["blocks.*.up"].colwise().at["blocks.*.down"].rowwise()
    plan = plan_build(sch)
    weights = put_together(plan, [local for local, _, _ in ranks])
    for path, tensor in ranks[0][1].items():
        assert torch.equal(weights[plan.tree[path].path], tensor)
    assert [receipt for _, _, receipt in ranks] == [predict(plan, rank) for rank in range(4)]


def own_values(rank, mesh):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4, device="meta"))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(32).view(8, 4) + 100 * rank)
    plan = plan_build(create_schedule(model, mesh).at["0"].colwise().at["1"].rowwise(), init_weights=False)
    built = execute(plan, device="cpu")
    return built.module[0].weight.detach(), built.module[1].weight.shape, built.receipt, predict(plan, rank)


def test_no_init_sends_nothing_and_slices_what_each_rank_has():
    for rank, (weight, shape, receipt, predicted) in enumerate(results(run_ranks(own_values, 2, Mesh(tensor=2)))):
        assert torch.equal(weight, (torch.arange(32.0).view(8, 4) + 100 * rank)[4 * rank : 4 * rank + 4])
        assert shape == (4, 4)
        assert [call.op for call in receipt.collectives] == ["all_gather", "all_gather"]
        assert receipt == predicted


DTYPES = ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "complex64", "int64", "int8", "uint8", "bool"]


class ManyTypes(nn.Module):
    def __init__(self):
        super().__init__()
        for name in DTYPES:
            self.register_buffer(f"{name}_split", torch.empty(4, 6, dtype=getattr(torch, name), device="meta"))
            self.register_buffer(f"{name}_whole", torch.empty(3, dtype=getattr(torch, name), device="meta"))
        self.register_buffer("scalar", torch.empty((), device="meta"))
        self.register_buffer("nothing", torch.empty(0, 3, device="meta"))

    def reset_parameters(self):
        for buffer in self.buffers():
            if buffer.numel():
                buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape) % 2)


def many_types(rank, strategy):
    sch = create_schedule(ManyTypes(), Mesh(tensor=2))
    for name in DTYPES:
        sch = sch.at[f"{name}_split"].shard(axis=1)
    plan = plan_build(sch, strategy=strategy)
    built = execute(plan, device="cpu")
    return {name: b.to(torch.complex64) for name, b in built.module.named_buffers()}, built.receipt, predict(plan, rank)


@pytest.mark.parametrize("strategy", ["local", "scatter", "broadcast"])
def test_every_dtype_and_shape_is_made_and_travels(strategy):
    for rank, (buffers, receipt, predicted) in enumerate(results(run_ranks(many_types, 2, strategy))):
        assert receipt == predicted
        for name in DTYPES:
            whole = (torch.arange(24).view(4, 6) % 2).to(torch.complex64)
            assert torch.equal(buffers[f"{name}_split"], whole[:, 3 * rank : 3 * rank + 3]), name
            assert torch.equal(buffers[f"{name}_whole"], torch.tensor([0, 1, 0]).to(torch.complex64))
        assert buffers["scalar"] == 0
        assert buffers["nothing"].shape == (0, 3)


def split_over_data(mesh):
    sch = create_schedule(nn.Linear(8, 8, bias=False, device="meta"), mesh).at["weight"].shard(axis=0, mesh_axis="data")
    return plan_build(sch.at[""].sync("forward_post", "all_gather", axis=-1, mesh_axis="data"))


def over_data(rank, mesh):
    plan = split_over_data(mesh)
    built = execute(plan, device="cpu")
    return local_tensors(built.module, plan.tree), built.receipt == predict(plan, rank)


def test_tensors_split_over_data():
    mesh = Mesh(data=2, tensor=2)
    ranks = results(run_ranks(over_data, 4, mesh))
    weights = put_together(split_over_data(mesh), [local for local, _ in ranks])
    alone = execute(plan_build(create_schedule(nn.Linear(8, 8, bias=False, device="meta"), Mesh())), device="cpu").module
    assert torch.equal(weights["weight"], alone.weight)
    assert all(same for _, same in ranks)


def with_scripted(rank):
    torch.manual_seed(rank)
    scripted = torch.jit.script(nn.Linear(4, 4))
    model = nn.Sequential(scripted, nn.Linear(4, 4, device="meta"))
    before = scripted.weight.detach().clone()
    plan = plan_build(create_schedule(model, Mesh(tensor=2)))
    built = execute(plan, device="cpu")
    assert torch.equal(scripted.weight, before)
    return before, built.module[0].weight.detach(), built.receipt == predict(plan, rank)


def test_scripted_modules_keep_their_values_and_those_of_the_first_rank_win():
    ranks = results(run_ranks(with_scripted, 2))
    assert not torch.equal(ranks[0][0], ranks[1][0])
    for _, weight, same in ranks:
        assert torch.equal(weight, ranks[0][0])
        assert same
