"""Each synchronisation: values and gradients by real processes against one, and it survives torch.export."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardplan.functional import create_schedule, execute, plan_build, sync
from shardplan.specs import Mesh, PlanError
from tests.ranks import results, run_ranks

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
    out = operator(x, group) if op in ("all_reduce", "sum_gradient") else operator(x, 1, NUM, rank, group)
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


LAYOUTS = {f.__name__: f for f in (whole_module, of_the_users, gathered_columns, sequence_parallel)}
X = torch.linspace(-2, 2, 32).view(4, 8)


def run_layout(rank, name):
    # a replicated bias behind a scattered sum sees its own part of the sequence, and planning with inputs would say so
    inputs = None if name == "sequence_parallel" else {"x": X}
    plan = plan_build(LAYOUTS[name](create_schedule(Net(), Mesh(tensor=2))), example_inputs=inputs)
    module = execute(plan, device="cpu").module
    x = X.clone().requires_grad_()
    out = module(x)
    out.square().sum().backward()
    index = {path: spec.index(plan.mesh.coordinate(rank)) for path, spec in plan.tree.items()}
    return out.detach(), x.grad, {path: (index[path], p.grad) for path, p in module.named_parameters()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_forward_and_backward_equal_one_process(name):
    alone = execute(plan_build(create_schedule(Net(), Mesh())), device="cpu").module
    x = X.clone().requires_grad_()
    out = alone(x)
    out.square().sum().backward()
    for ours, grad, grads in results(run_ranks(run_layout, 2, name)):
        torch.testing.assert_close(ours, out.detach())
        torch.testing.assert_close(grad, x.grad)
        for path, parameter in alone.named_parameters():
            index, local = grads[path]
            whole = parameter.grad[tuple(slice(*interval) for interval in index)]
            summed_elsewhere = name == "sequence_parallel" and path == "inner.down.bias"
            if not summed_elsewhere:  # a replicated bias behind a scattered sum sees its own part of the sequence
                torch.testing.assert_close(local, whole, msg=path)


def test_the_one_gradient_that_is_partial_is_refused_by_planning():
    with pytest.raises(
        PlanError, match=r"1 problem\n  inner.down.bias  f32\[8\]: it is whole, and meets parts of an activation"
    ):
        plan_build(sequence_parallel(create_schedule(Net(), Mesh(tensor=2))), example_inputs={"x": X})


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
