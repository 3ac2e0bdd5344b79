"""Whatever goes wrong, every rank ends with the first error's text, none hangs, and the user's module is as it was."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardplan.functional import create_schedule, execute, plan_build
from shardplan.specs import Mesh
from tests.helpers.models import MODELS, schedule
from tests.helpers.ranks import results, run_ranks

TENSOR_2 = Mesh(tensor=2)


def errors(job, num_ranks, *args):
    outcomes = run_ranks(job, num_ranks, *args)
    assert all(outcome.error for outcome in outcomes), outcomes
    return [outcome.error for outcome in outcomes]


def write_unpointwise(module):
    """Give tensors values by an operator that no init program has, so that the code itself is run."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.copy_(torch.rand_like(tensor).sort(dim=0).values)


def fails_for_real(module, path):
    """Init code that works while planning, and fails in the middle when it is run."""
    write_unpointwise(module)
    if path == "blocks.1.up" and not isinstance(module.weight.detach(), torch._subclasses.FakeTensor):
        msg = "the disk is full"
        raise OSError(msg)


def failing_init(rank, mesh, strategy, first_large):
    model, split = MODELS["plain"][0](), MODELS["plain"][1]
    plan = plan_build(split(model, mesh), init_weights=fails_for_real, strategy=strategy)
    if first_large:  # every tensor travels alone
        from shardplan.functional.planning import value_steps as route

        route.BUCKET_BYTES = 1
        plan = plan_build(split(model, mesh), init_weights=fails_for_real, strategy=strategy)
    try:
        execute(plan, device="cpu")
    finally:
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        assert model.blocks[0].up.out_features == 64
        assert model.head.weight is model.embed.weight
        assert not model.blocks[0].up._forward_pre_hooks


@pytest.mark.parametrize("mesh", [TENSOR_2, Mesh(data=2, tensor=2)], ids=str)
@pytest.mark.parametrize("strategy", ["local", "scatter", "broadcast"])
@pytest.mark.parametrize("alone", [False, True])
def test_init_code_that_raises_on_the_maker_ends_every_rank(mesh, strategy, alone):
    for text in errors(failing_init, mesh.num_ranks, mesh, strategy, alone):
        assert text == "ExecutionError: rank 0: OSError: the disk is full"


def test_init_code_that_raises_in_one_process_raises_itself():
    plan = plan_build(schedule("plain"), init_weights=fails_for_real)
    with pytest.raises(OSError, match="the disk is full"):
        execute(plan, device="cpu")
    assert all(tensor.is_meta for tensor in plan.runtime.model.state_dict().values())


def failing_evaluation(rank, failing_ranks, strategy):
    """No room for a part that a rank evaluates by itself."""
    from shardplan.functional.interpreter import torch_effects as effects

    def evaluate(jobs, seed):
        msg = "no room for a chunk"
        raise MemoryError(msg)

    if rank in failing_ranks:
        effects.evaluate = evaluate
    plan = plan_build(schedule("plain", TENSOR_2), strategy=strategy)
    try:
        execute(plan, device="cpu")
    finally:
        assert all(tensor.is_meta for tensor in plan.runtime.model.state_dict().values())


@pytest.mark.parametrize(
    ("strategy", "failing"),
    [("local", (1,)), ("local", (0,)), ("local", (0, 1)), ("scatter", (0,)), ("broadcast", (0,))],
)
def test_a_program_that_cannot_be_evaluated_on_some_ranks_ends_all(strategy, failing):
    for text in errors(failing_evaluation, 2, failing, strategy):
        assert text == f"ExecutionError: rank {failing[0]}: MemoryError: no room for a chunk"


def failing_sync(rank, failing_ranks):
    """Something that fails late, on some ranks: a tensor that cannot be put in place."""
    model = Guarded()
    plan = plan_build(create_schedule(model, TENSOR_2).at["inner"].colwise(gather_output=True))
    os.environ["GUARDED_FAILS"] = "yes" if rank in failing_ranks else ""
    execute(plan, device="cpu")


class Guarded(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = GuardedLinear(4, 4, device="meta")

    def forward(self, x):
        return self.inner(x)


class GuardedLinear(nn.Linear):
    def __setattr__(self, name, value):
        is_local_bias = name == "bias" and isinstance(value, torch.Tensor) and not value.is_meta and value.numel() == 2
        if is_local_bias and os.environ.get("GUARDED_FAILS") == "yes":
            msg = "no room for the bias"
            raise MemoryError(msg)
        super().__setattr__(name, value)


@pytest.mark.parametrize("failing", [(1,), (0,), (0, 1)])
def test_an_error_on_some_ranks_ends_all(failing):
    for text in errors(failing_sync, 2, failing):
        assert text == f"ExecutionError: rank {failing[0]}: MemoryError: no room for the bias"


def with_other_plan(rank, what):
    mesh, seed, name, config = TENSOR_2, 0, "plain", None
    if rank == 1:
        mesh = Mesh(data=2) if what == "mesh" else mesh
        seed = 7 if what == "seed" else seed
        name = "llama" if what == "model" else name
    sch = schedule(name, mesh)
    if rank == 1 and what == "sync":
        sch = sch.at["blocks.0"].sync("forward_pre", "all_reduce")
    if what == "program":
        sch = sch.at["blocks.0.norm.weight"].init(1.0 + rank)
    if what == "config":
        config = {"train_batch_size": 2 + 2 * rank, "gradient_clipping": 0.0}
    plan = plan_build(sch, seed=seed, target="deepspeed" if config else None, config=config)
    before = torch.get_rng_state()
    try:
        execute(plan, device="cpu")
    finally:
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("mesh", "rank 0 has mesh pipe=1 data=1 tensor=2, rank 1 has mesh pipe=1 data=2 tensor=1"),
        ("seed", "rank 0 has seed 0, rank 1 has seed 7"),
        ("model", "rank 1 differs from rank 0 in its tensors and its steps"),
        ("program", "rank 1 differs from rank 0 in its tensors"),
        ("sync", "rank 1 differs from rank 0 in its steps"),
        ("config", "rank 1 differs from rank 0 in its target or config"),
    ],
)
def test_another_plan_on_one_rank_is_an_error_on_every_rank(what, text):
    for error in errors(with_other_plan, 2, what):
        assert error == f"ExecutionError: the ranks do not have the same plan: {text}"


def from_another_line(rank):
    sch = create_schedule(nn.Linear(4, 4, device="meta"), TENSOR_2).at[""]
    lines = [
        lambda: sch.colwise(gather_output=True),
        lambda: sch.colwise(gather_output=True),
    ]
    sch = lines[rank]()
    return execute(plan_build(sch), device="cpu").receipt.rank


def test_a_plan_from_another_line_of_code_is_the_same_plan():
    assert results(run_ranks(from_another_line, 2)) == [0, 1]


def for_mesh(rank, mesh):
    execute(plan_build(schedule("plain", mesh)), device="cpu")


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tensor=4)], ids=str)
def test_another_world_size_is_an_error_on_every_rank(mesh):
    for error in errors(for_mesh, 2, mesh):
        assert error.startswith("ExecutionError: rank 0: PlanError: 1 problem\n")
        assert f"({mesh}), and the process group has 2" in error


def with_other_model(rank):
    plan = plan_build(schedule("plain", TENSOR_2))
    model = MODELS["plain"][0]()
    if rank == 1:
        model.blocks[0].up = nn.Linear(16, 32, device="meta")
    execute(plan, model, device="cpu")


def test_another_model_on_one_rank_is_an_error_on_every_rank():
    for error in errors(with_other_model, 2):
        assert error.startswith("ExecutionError: rank 1: PlanError: ")
        cause = "the model is not the planned one: orig_shape (32, 16) instead of (64, 16)"
        assert f"blocks.0.up.weight  f32[64@tensor, 16]: {cause}" in error


def with_bad_layout(rank):
    sch = create_schedule(nn.Sequential(nn.Linear(4, 4, device="meta")), TENSOR_2).at["0"].colwise()
    execute(plan_build(sch), device="cpu")


def test_a_plan_that_the_audit_refuses_is_not_executed():
    for error in errors(with_bad_layout, 2):
        assert "0.weight: f32[4@tensor, 4] is split (32 B a rank), and no synchronisation follows in the model" in error


def with_bad_optimizer(rank):
    def optimizer(parameters):
        if rank:
            msg = "no such rule"
            raise KeyError(msg)
        return torch.optim.SGD(parameters, lr=0.1)

    execute(plan_build(schedule("plain", TENSOR_2)), device="cpu", optimizer=optimizer)


def test_an_optimizer_that_raises_on_one_rank_ends_every_rank():
    for error in errors(with_bad_optimizer, 2):
        assert error == "ExecutionError: rank 1: KeyError: 'no such rule'"


class UnprintableError(Exception):
    def __str__(self):
        return self.nothing


def exits(module):
    write_unpointwise(module)
    if not isinstance(next(module.parameters()).detach(), torch._subclasses.FakeTensor):
        raise SystemExit(4) if os.environ["RAISES"] == "exit" else UnprintableError


def with_exit(rank, what):
    os.environ["RAISES"] = what
    execute(plan_build(schedule("plain", TENSOR_2), init_weights=exits), device="cpu")


@pytest.mark.parametrize(
    ("what", "text"), [("exit", "SystemExit: 4"), ("error", "UnprintableError: (its text cannot be made:")]
)
def test_whatever_is_raised_reaches_every_rank(what, text):
    for error in errors(with_exit, 2, what):
        assert error.startswith(f"ExecutionError: rank 0: {text}")


def strided_values(rank):
    model = nn.Linear(4, 8, bias=False)
    model.weight = nn.Parameter(torch.arange(32.0).view(4, 8).t())
    plan = plan_build(create_schedule(model, TENSOR_2).at[""].colwise(gather_output=True))
    return execute(plan, device="cpu").module.weight.detach()


def test_values_with_strides_travel():
    whole = torch.arange(32.0).view(4, 8).t()
    for rank, part in enumerate(results(run_ranks(strided_values, 2))):
        assert torch.equal(part, whole[4 * rank : 4 * rank + 4])


def with_bad_device(rank):
    execute(plan_build(schedule("plain", TENSOR_2)), device="cpu" if rank else "nonsense")


def test_a_device_that_is_none_ends_every_rank():
    for error in errors(with_bad_device, 2):
        assert error.startswith("ExecutionError: rank 0: RuntimeError: ")


def dies(rank):
    plan = plan_build(schedule("plain", TENSOR_2))
    if rank == 1:
        os._exit(3)
    execute(plan, device="cpu")


def test_a_rank_that_dies_does_not_hang_the_others():
    first, second = run_ranks(dies, 2)
    assert "Connection closed by peer" in first.error or "Timed out" in first.error or "connect" in first.error.lower()
    assert second.error == "the process ended with exit code 3"


def without_group(rank):
    dist.destroy_process_group()
    execute(plan_build(schedule("plain", TENSOR_2)), device="cpu")


def test_no_process_group_says_how_to_make_one():
    for error in errors(without_group, 2):
        assert "the plan is for 2 ranks, and there is no process group" in error
        assert "torchrun --nproc-per-node 2" in error
        assert "init_process_group()" in error
