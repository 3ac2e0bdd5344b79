"""Each synchronisation: values and gradients by real processes against one, and it survives torch.export."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardplan.functional import create_schedule, execute, plan_build
from shardplan.functional.layout import collectives as sync
from shardplan.specs import Mesh
from shardplan.specs.layout_steps import SumGradient, Sync
from tests.helpers.ranks import results, run_ranks
from tests.helpers.tensor_parts import picked

NUM = 2
WHOLE = torch.arange(24, dtype=torch.float64).view(4, 6) / 7
WEIGHT = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)


def part(tensor, rank, axis):
    return tensor.chunk(NUM, dim=axis)[rank].contiguous()


def apply(rank, op, x, weight):
    """Return the output of an operator on this rank's input, and the gradient of ``(output * weight).sum()``."""
    x = x.clone().requires_grad_()
    group = dist.new_group(list(range(NUM))).group_name
    operator = getattr(sync, op)
    sizes = {"all_gather": (3, 6), "split": (3, 3)}.get(op, ())
    out = operator(x, group) if op in ("all_reduce", "sum_gradient") else operator(x, 1, NUM, rank, *sizes, group)
    (grad,) = torch.autograd.grad((out * weight).sum(), x)
    return out.detach(), grad


def sums(rank, op):
    return apply(rank, op, WHOLE * (rank + 1), WEIGHT * (rank + 1))


def gathers(rank, op):
    return apply(rank, op, part(WHOLE, rank, 1), WEIGHT * (rank + 1))


def keeps_a_part(rank, op):
    return apply(rank, op, WHOLE * (rank + 1), part(WEIGHT, rank, 1) * (rank + 1))


def test_all_reduce_sums_forward_and_passes_gradients():
    for rank, (out, grad) in enumerate(results(run_ranks(sums, NUM, "all_reduce"))):
        torch.testing.assert_close(out, WHOLE * 3)
        torch.testing.assert_close(grad, WEIGHT * (rank + 1))


def test_sum_gradient_passes_forward_and_sums_gradients():
    for rank, (out, grad) in enumerate(results(run_ranks(sums, NUM, "sum_gradient"))):
        torch.testing.assert_close(out, WHOLE * (rank + 1))
        torch.testing.assert_close(grad, WEIGHT * 3)


def test_all_gather_joins_and_keeps_its_own_gradient():
    for rank, (out, grad) in enumerate(results(run_ranks(gathers, NUM, "all_gather"))):
        torch.testing.assert_close(out, WHOLE)
        torch.testing.assert_close(grad, part(WEIGHT * (rank + 1), rank, 1))


def test_gather_sum_joins_and_sums_gradients():
    for rank, (out, grad) in enumerate(results(run_ranks(gathers, NUM, "gather_sum"))):
        torch.testing.assert_close(out, WHOLE)
        torch.testing.assert_close(grad, part(WEIGHT * 3, rank, 1))


def test_reduce_scatter_sums_its_part_and_joins_gradients():
    joined = torch.cat([part(WEIGHT, rank, 1) * (rank + 1) for rank in range(NUM)], dim=1)
    for rank, (out, grad) in enumerate(results(run_ranks(keeps_a_part, NUM, "reduce_scatter"))):
        torch.testing.assert_close(out, part(WHOLE * 3, rank, 1))
        torch.testing.assert_close(grad, joined)


def test_split_keeps_its_part_and_joins_gradients():
    joined = torch.cat([part(WEIGHT, rank, 1) * (rank + 1) for rank in range(NUM)], dim=1)
    for rank, (out, grad) in enumerate(results(run_ranks(keeps_a_part, NUM, "split"))):
        torch.testing.assert_close(out, part(WHOLE * (rank + 1), rank, 1))
        torch.testing.assert_close(grad, joined)


def numbers(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def through(function, x, weight):
    """What a function gives, and the gradient of its weighted sum; ``weight`` is as long as what it gives."""
    x = x.clone().requires_grad_()
    out = function(x)
    assert out.shape == weight.shape
    (grad,) = torch.autograd.grad((out * weight).sum(), x)
    return out.detach(), grad


def pad(x, axis, length):
    """Zeros at the end of an axis."""
    missing = list(x.shape)
    missing[axis] = length - x.shape[axis]
    return torch.cat([x, x.new_zeros(missing)], axis)


CASES = {
    "even": (0, 3, 12),
    "uneven": (1, 3, 10),  # the last of four has one entry
    "some empty": (0, 2, 5),  # the last of four has none
    "padded": (2, 4, 13),
    "all padding": (1, 4, 5),
}
"""Axis, entries of the first of four ranks, and of all."""


def whole_and_parts(name, num):
    """A whole tensor, its axis, how many entries the first rank has, and those of all, and the bounds of each part."""
    axis, part, size = CASES[name]
    part *= 4 // num
    shape = [3, 3, 3]
    shape[axis] = size
    bounds = [(min(rank * part, size), min((rank + 1) * part, size)) for rank in range(num)]
    return numbers(*shape), axis, (part, size), bounds


def each_operator(rank, num):
    """Run every operator for every case, each once forward and backward."""
    group = sync.SyncGroup(dist.new_group(list(range(num))).group_name, num, rank)
    made = {}
    for name in CASES:
        whole, axis, sizes, bounds = whole_and_parts(name, num)
        padded = "padd" in name
        start, stop = bounds[rank]
        own = whole.narrow(axis, start, stop - start)
        own = pad(own, axis, sizes[0]) if padded else own
        weight = numbers(*whole.shape, seed=rank + 1)
        made["joined", name] = through(lambda x, a=axis, s=sizes, g=group: sync.gather_parts(x, a, g, s), own, weight)
        length = min(sizes[0], max(0, sizes[1] - rank * sizes[0]))
        mine = whole.narrow(axis, start, length)
        of_mine = numbers(*mine.shape, seed=rank + 1)
        made["own_part", name] = through(lambda x, a=axis, s=sizes, g=group: sync.take_part(x, a, g, s), whole, of_mine)
    x, weight = numbers(4, 8, seed=rank), numbers(4, 8, seed=rank + 1)
    for key, step in STEPS.items():
        of_half = weight[:, : 8 // num] if key in {"split", "scattered"} else weight
        longer = numbers(4, 8 * num, seed=rank + 1) if key in {"gathered", "gathered_sum", "joined_back"} else of_half
        made[key] = through(lambda x, s=step, g=group: sync.sync_function(s)(x, g), x, longer)
    made["averaged"] = through(lambda x, g=group: sync.average_gradient(x, 3, g.name), x, weight)
    return made


STEPS = {
    "summed": Sync("m", "forward_post", "all_reduce"),
    "passed": Sync("m", "backward_post", "all_reduce"),
    "passed_of": Sync("m", "backward_pre", "all_reduce", features=(2, 5)),
    "gathered": Sync("m", "forward_post", "all_gather", -1),
    "gathered_sum": Sync("m", "forward_pre", "all_gather", -1),
    "scattered": Sync("m", "forward_post", "reduce_scatter", -1),
    "split": Sync("m", "backward_post", "all_gather", -1),
    "joined_back": Sync("m", "backward_pre", "reduce_scatter", -1),
    "divided": Sync("m", "forward_pre", "divide"),
}


def expected(num):
    """The same by one process, from what all ranks have: autograd through the whole job, rank by rank."""
    xs, weights = ([numbers(4, 8, seed=rank + add) for rank in range(num)] for add in (0, 1))
    longer = [numbers(4, 8 * num, seed=rank + 1) for rank in range(num)]
    shorter = [weight[:, : 8 // num] for weight in weights]
    own = [slice(8 * rank, 8 * rank + 8) for rank in range(num)]
    few = [slice(8 // num * rank, 8 // num * (rank + 1)) for rank in range(num)]
    of_some = [weight.clone() for weight in weights]
    for weight in of_some:
        weight[:, 2:5] = sum(weights)[:, 2:5]
    joined = torch.cat(xs, 1)
    return {
        "summed": [(sum(xs), weight) for weight in weights],
        "passed": [(x, sum(weights)) for x in xs],
        "passed_of": list(zip(xs, of_some, strict=True)),
        "gathered": [(joined, weight[:, at]) for weight, at in zip(longer, own, strict=True)],
        "gathered_sum": [(joined, sum(longer)[:, at]) for at in own],
        "scattered": [(sum(xs)[:, at], torch.cat(shorter, 1)) for at in few],
        "split": [(x[:, at], torch.cat(shorter, 1)) for x, at in zip(xs, few, strict=True)],
        "joined_back": [(joined, sum(longer)[:, at]) for at in own],
        "divided": [(x / num, weight / num) for x, weight in zip(xs, weights, strict=True)],
        "averaged": [(x, sum(weights) / 3) for x in xs],
    }


@pytest.mark.parametrize("num", [2, 4])
def test_operators_and_their_gradients_with_parts_of_any_size(num):
    ranks = results(run_ranks(each_operator, num, num))
    for key, by_rank in expected(num).items():
        for made, (out, grad) in zip(ranks, by_rank, strict=True):
            torch.testing.assert_close(made[key], (out, grad), rtol=1e-14, atol=1e-14)
    for name in CASES:
        whole, axis, (part, size), bounds = whole_and_parts(name, num)
        seen = []
        for rank, made in enumerate(ranks):
            start, stop = bounds[rank]
            weight = numbers(*whole.shape, seed=rank + 1)
            out, grad = made["joined", name]
            assert torch.equal(out, whole), "padding is left out"
            mine = weight.narrow(axis, start, stop - start)
            assert torch.equal(grad, pad(mine, axis, part) if "padd" in name else mine), "what is padding has no gradient"
            out, grad = made["own_part", name]
            assert torch.equal(out, whole.narrow(axis, start, stop - start))
            seen.append(numbers(*out.shape, seed=rank + 1))
            assert grad.shape[axis] == size
        for made in ranks:
            assert torch.equal(made["own_part", name][1], torch.cat(seen, axis))


def adjoint(rank, num):
    """The sum over ranks of <J v, w> and of <v, J^T w>, for operators whose backward is their adjoint."""
    group = sync.SyncGroup(dist.new_group(list(range(num))).group_name, num, rank)
    found = {}
    for name in ("gathered_sum", "scattered", "joined_back"):
        function = sync.sync_function(STEPS[name])
        x = numbers(4, 8, seed=rank).requires_grad_()
        out = function(x, group)
        w = numbers(*out.shape, seed=rank + 10)
        (grad,) = torch.autograd.grad(out, x, w)
        v = numbers(4, 8, seed=rank + 20)
        both = torch.stack([(function(v, group) * w).sum(), (grad * v).sum()])
        found[name] = sync.all_reduce(both, group.name)
    return found


def test_gradients_are_adjoint_to_what_goes_forward():
    for found in results(run_ranks(adjoint, 4, 4)):
        for name, (forward, backward) in found.items():
            torch.testing.assert_close(forward, backward, msg=name)


@pytest.mark.parametrize("op", ["own_part", "reduce_scatter"])
def test_unequal_parts_without_sizes_are_refused(op):
    group = sync.SyncGroup("", 4, 0)
    with pytest.raises(ValueError, match=r"axis 1 of an activation of shape \[2, 6\] cannot be split into 4 equal parts"):
        sync.take_part(torch.ones(2, 6), 1, group, None) if op == "own_part" else sync.reduce_scatter(
            torch.ones(2, 6), 1, 4, 0, ""
        )


class Net(nn.Module):
    """Keyword arguments, a tuple as output, biases."""

    def __init__(self, device="meta"):
        super().__init__()
        self.inner = Inner(device)
        self.last = nn.Linear(8, 4, device=device)

    def forward(self, x):
        hidden, _ = self.inner(hidden=x, scale=2)
        return self.last(hidden)


class Inner(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.up = nn.Linear(8, 16, device=device)
        self.down = nn.Linear(16, 8, device=device)

    def forward(self, scale, hidden):
        return self.down(torch.relu(self.up(hidden))) * scale, "kept"


def twice_summed(tensor, group):
    """A synchronisation of the user's own, made of the operators."""
    return sync.all_reduce(tensor, group.name)


def whole_module(sch):
    """The split is declared on the linears, the synchronisation on the module around them."""
    sch = sch.at["inner.up"].shard("weight", axis=0).shard("bias", axis=0)
    sch = sch.at["inner"].sync("backward_post", "all_reduce")
    return sch.at["inner.down"].rowwise()


def sequence_parallel(sch):
    """The activations between the blocks are split along axis 0."""
    sch = sch.at["inner.up"].shard("weight", axis=0).shard("bias", axis=0).sync("forward_pre", "all_gather", axis=0)
    sch = sch.at["inner.down"].shard("weight", axis=1).sync("forward_post", "reduce_scatter", axis=0)
    sch = sch.at["inner"].sync("backward_post", "all_gather", axis=0)
    return sch.at["inner"].sync("forward_post", "all_gather", axis=0)


def of_the_users(sch):
    return sch.at["inner.up"].colwise().at["inner.down"].shard("weight", axis=1).sync("forward_post", twice_summed)


def gathered_columns(sch):
    return sch.at["inner.up"].colwise(gather_output=True).at["last"].colwise(gather_output=True)


def bare_tensors(sch):
    """Code multiplies with tensors directly: no module is called that a synchronisation could stand at."""
    sch = sch.at["up.weight"].shard(axis=0).sum_products("gradients")
    return sch.at["down.weight"].shard(axis=1).sum_products("outputs")


class Bare(nn.Module):
    def __init__(self, device="meta"):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16, bias=False, device=device), nn.Linear(16, 8, bias=False, device=device)

    def forward(self, x):
        hidden = nn.functional.linear(x.tanh(), self.up.weight).relu()
        return x + hidden @ self.down.weight.T


LAYOUTS = {f.__name__: f for f in (whole_module, of_the_users, gathered_columns, sequence_parallel, bare_tensors)}
MODELS = {"bare_tensors": Bare}
X = torch.linspace(-2, 2, 32).view(4, 8)


def run_layout(rank, name):
    plan = plan_build(LAYOUTS[name](create_schedule(MODELS.get(name, Net)(), Mesh(tensor=2))), example_inputs={"x": X})
    module = execute(plan, device="cpu").module
    x = X.clone().requires_grad_()
    out = module(x)
    out.square().sum().backward()
    index = {path: spec.index(plan.mesh.coordinate(rank)) for path, spec in plan.tree.items()}
    return out.detach(), x.grad, {path: (index[path], p.grad) for path, p in module.named_parameters()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_forward_and_backward_equal_one_process(name):
    alone = execute(plan_build(create_schedule(MODELS.get(name, Net)(), Mesh())), device="cpu").module
    x = X.clone().requires_grad_()
    out = alone(x)
    out.square().sum().backward()
    for ours, grad, grads in results(run_ranks(run_layout, 2, name)):
        torch.testing.assert_close(ours, out.detach())
        torch.testing.assert_close(grad, x.grad)
        for path, parameter in alone.named_parameters():
            index, local = grads[path]
            whole = parameter.grad[picked(index)]
            torch.testing.assert_close(local, whole, msg=path)


def test_a_bias_behind_a_scattered_sum_sums_its_gradient():
    plan = plan_build(sequence_parallel(create_schedule(Net(), Mesh(tensor=2))), example_inputs={"x": X})
    assert [step for step in plan.steps if isinstance(step, SumGradient)] == [SumGradient("inner.down", "bias")]
    frozen = Net()
    frozen.inner.down.bias.requires_grad_(requires_grad=False)
    plan = plan_build(sequence_parallel(create_schedule(frozen, Mesh(tensor=2))), example_inputs={"x": X})
    assert not [step for step in plan.steps if isinstance(step, SumGradient)]


def export(rank):
    plan = plan_build(create_schedule(Net(), Mesh(tensor=2)).at["inner.up"].colwise().at["inner.down"].rowwise())
    module = execute(plan, device="cpu").module
    exported = torch.export.export(module, (X,), strict=False)
    called = [str(node.target) for node in exported.graph.nodes if "shardplan" in str(node.target)]
    return called, torch.equal(exported.module()(X), module(X))


@pytest.mark.filterwarnings("ignore")
def test_operators_survive_export():
    for called, same in results(run_ranks(export, 2)):
        assert called == ["shardplan.sum_gradient.default", "shardplan.all_reduce.default"]
        assert same


def padded(rank):
    embedding = nn.Embedding(8, 4, padding_idx=5, device="meta")
    plan = plan_build(create_schedule(embedding, Mesh(tensor=2)).at[""].vocab_parallel())
    module = execute(plan, device="cpu").module
    ids = torch.tensor([[0, 3, 4, 5, 7, 5]])
    out = module(ids)
    out.sum().backward()
    return out.detach(), module.weight.grad


def test_a_split_vocabulary_looks_up_every_row_and_leaves_the_padding_alone():
    alone = execute(
        plan_build(create_schedule(nn.Embedding(8, 4, padding_idx=5, device="meta"), Mesh())), device="cpu"
    ).module
    ids = torch.tensor([[0, 3, 4, 5, 7, 5]])
    out = alone(ids)
    out.sum().backward()
    for rank, (ours, grad) in enumerate(results(run_ranks(padded, 2))):
        assert torch.equal(ours, out.detach())
        assert torch.equal(grad, alone.weight.grad[4 * rank : 4 * rank + 4])


class Outputs(NamedTuple):
    hidden: torch.Tensor
    extra: str


class Named(nn.Module):
    """Arguments by name, a named tuple as output, hooks of the user's on both sides."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4, device="meta")
        self.block = NamedBlock()

    def forward(self, ids):
        return self.block(self.embed(input=ids)).hidden


class NamedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 8, device="meta")
        self.down = nn.Linear(8, 4, device="meta")
        self.down.register_forward_hook(lambda module, args, output: output.relu())

    def forward(self, x):
        return Outputs(self.down(input=self.up(input=x)), "kept")


def run_named(rank):
    sch = create_schedule(Named(), Mesh(tensor=2)).at["embed"].vocab_parallel()
    sch = sch.at["block.up"].colwise().at["block.down"].rowwise().at["block"].sync("forward_post", kept)
    plan = plan_build(sch, example_inputs={"ids": torch.arange(8)})
    return execute(plan, device="cpu").module(torch.arange(8)).detach()


def kept(tensor, group):
    """A synchronisation that leaves its tensor as it is."""
    return tensor


def test_names_named_tuples_and_hooks_of_the_user():
    alone = execute(plan_build(create_schedule(Named(), Mesh())), device="cpu").module(torch.arange(8)).detach()
    for ours in results(run_ranks(run_named, 2)):
        torch.testing.assert_close(ours, alone)
