"""verify on models that few write, with inputs that few give, and on what cannot be judged."""

from __future__ import annotations

import os
import signal
import threading
import time
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardplan.functional import create_schedule, verify
from shardplan.specs import Mesh, PlanError
from tests.functional.test_verify import InSingle, Mlp, X, kinds, mlp


@pytest.mark.parametrize(
    ("sch", "inputs", "said"),
    [
        (
            create_schedule(nn.Bilinear(4, 4, 4), Mesh()),
            None,
            "what this Bilinear is called with cannot be told: its forward t",
        ),
        (mlp(Mesh(tensor=2)), {"y": X["x"]}, "the whole model cannot run on them: TypeError"),
        (mlp(Mesh(data=4)), X, "the first tensor has 6 rows along axis 0, which 4 ranks along data cannot share"),
        (create_schedule(Mlp(), Mesh(tensor=2)).at["nothing"].colwise(), X, "nothing"),
        (
            create_schedule(Mlp(), Mesh(tensor=3)).at["up"].colwise(),
            X,
            r"up.weight  f32\[32@tensor, 16\]: .* 3 does not divide",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(sch, inputs, said):
    with pytest.raises(PlanError, match=said):
        verify(sch, inputs)


class Varied(Mlp):
    """Two layers whose activation, output and arguments are given."""

    def __init__(self, activation=torch.relu, output=lambda y: y):
        super().__init__()
        self.activation, self.output = activation, output

    def forward(self, x):
        return self.output(self.down(self.activation(self.up(x))))


def varied(mesh=None, **options):
    return create_schedule(Varied(**options), mesh or Mesh(tensor=2)).at["up"].colwise().at["down"].rowwise()


def wrong(hidden):
    return hidden.softmax(-1)


@pytest.mark.parametrize(
    ("options", "loss", "said"),
    [
        (
            {"activation": wrong, "output": lambda y: types.SimpleNamespace(y=y)},
            None,
            "it holds no tensor that can be found",
        ),
        ({"activation": wrong, "output": lambda y: y * torch.nan}, None, "its gradient in the whole model is not finite"),
        ({}, lambda y: y.sum() * torch.inf, "the whole model's is -?inf in step 1"),
        ({}, lambda y: y, r"of the whole model's output, a Tensor \(\[6, 5, 16\]\) it gives a tensor \[6, 5, 16\]"),
        ({}, lambda _: 1.0, "it gives a float, not one real number"),
        ({}, lambda y: y.nothing, "loss: it cannot be taken of the whole model's output, a Tensor .*: AttributeError"),
    ],
)
def test_a_whole_model_beside_which_all_look_equal_is_refused(options, loss, said):
    with pytest.raises(PlanError, match=said):
        verify(varied(**options), X, loss=loss)


@pytest.mark.parametrize(
    "inputs", [X["x"], {"x": X["x"][:0]}, [X["x"]], {1: X["x"]}, {}], ids=["tensor", "no rows", "list", "number", "none"]
)
def test_inputs_that_are_none_are_refused(inputs):
    with pytest.raises(PlanError, match="inputs: "):
        verify(varied(), inputs)


def test_no_steps_and_no_schedule_are_refused():
    with pytest.raises(ValueError, match="steps must be 1 or more, not 0"):
        verify(varied(), X, steps=0)
    with pytest.raises(TypeError, match="verify takes a schedule, not a Mlp"):
        verify(Mlp(), X)


class Told(nn.Module):
    """Returns a number beside its output."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        hidden = self.up(x)
        return self.down(hidden.relu()), float(hidden.detach().abs().mean())


def test_plain_numbers_of_an_output_are_compared():
    found = verify(create_schedule(Told(), Mesh(tensor=2)).at["up"].colwise().at["down"].rowwise(), X)
    assert kinds(found) == {"output"}
    assert "it returns the numbers [" in str(found)


def test_complex_numbers_are_compared_with_both_parts():
    def with_norm(y):
        return torch.complex(torch.zeros_like(y), y)

    assert verify(varied(output=with_norm), X).ok
    assert kinds(verify(varied(activation=wrong, output=with_norm), X)) == {"output", "loss", "gradient"}


def test_random_numbers_are_constants_in_their_range():
    def gumbel(y):
        mixed = y[torch.randperm(y.shape[0])] * torch.randint(1, 3, (1,)) + y[(torch.rand(2) * y.shape[0]).long()].sum(0)
        return (mixed - torch.log(-torch.log(torch.rand_like(y)))).softmax(-1)

    assert not verify(varied(activation=wrong, output=gumbel), X).ok
    found = verify(varied(output=gumbel), X)
    assert (found.ok, found.notes) == (True, ())


def test_a_zero_beside_other_outputs_is_a_zero():
    assert verify(varied(output=lambda y: (y, y.softmax(-1).sum(-1) - 1)), X).ok


def test_an_output_without_gradient_is_told():
    found = verify(varied(output=lambda y: y.argmax(-1)), X)
    assert found.ok
    assert found.notes == ("no gradient could be compared: the loss depends on no trained tensor",)


def test_a_gradient_of_zero_makes_no_tolerance():
    model = nn.Sequential(nn.Linear(16, 1), Centred(), nn.Linear(16, 32), InSingle(), nn.Softmax(-1), nn.Linear(32, 16))
    found = verify(create_schedule(model, Mesh(tensor=2)).at["2"].colwise().at["5"].rowwise(), {"input": X["x"]})
    assert found.tolerance < 1e-4
    assert not found.ok


class Centred(nn.Module):
    """Takes off what is the same in all features, so that the bias before it has a gradient of zero."""

    def forward(self, x):
        spread = x * torch.ones(16, dtype=x.dtype) + torch.linspace(0, 1, 16, dtype=x.dtype) * x**2
        return spread - spread.mean(-1, keepdim=True)


class Nested(Mlp):
    """Takes a dictionary of tensors."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1), persistent=False)
        self.constants = {"turn": (torch.eye(16), [torch.eye(16)])}

    def forward(self, batch):
        assert bool(self.mask.isinf().any()), "a mask stays a mask"
        out = super().forward(batch["x"]) + batch["more"][0]
        (turn, (back,)) = self.constants["turn"]
        return (out @ out.mT + self.mask).softmax(-1) @ (out @ turn @ back)


def test_inputs_masks_and_constants_may_lie_in_containers():
    sch = create_schedule(Nested(), Mesh(data=2, tensor=2)).at["up"].colwise().at["down"].rowwise()
    assert verify(sch, {"batch": {"x": X["x"], "more": [X["x"]]}}).ok


class AddedAlike(torch.autograd.Function):
    """The sum over the ranks of a part; each part has the gradient of the sum."""

    @staticmethod
    def forward(ctx, part):
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_outputs_may_be_split_where_a_loss_is_given():
    def loss(output):
        part = output.square().sum()
        return AddedAlike.apply(part) if output.shape[-1] == 8 else part

    sch = create_schedule(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), Mesh(tensor=2)).at["1"].colwise()
    assert verify(sch, {"input": X["x"]}, loss=loss).ok
    found = verify(sch, {"input": X["x"]}, loss=lambda output: output.square().sum())
    assert "loss" in kinds(found)


def asks_before_it_sends(tensor, group):
    ranks = dist.get_process_group_ranks(group.process_group)
    got = torch.empty_like(tensor)
    asked = dist.irecv(got, ranks[group.index - 1], group=group.process_group)
    dist.isend(tensor.detach(), ranks[1 - group.index], group=group.process_group).wait()
    asked.wait()
    return tensor + 0 * got


def test_a_ring_may_ask_before_it_sends():
    assert verify(varied().at["down"].sync("forward_post", asks_before_it_sends), X).ok


def sums_by_functional_collectives(tensor, group):
    functional = torch.distributed._functional_collectives
    whole = functional.all_gather_single(tensor.detach(), 0, group.process_group)
    part = functional.reduce_scatter_single(whole, "avg", 0, group.process_group)
    return tensor + functional.wait_tensor(part) - tensor.detach()


def test_functional_collectives_have_groups_too():
    found = verify(varied().at["down"].sync("forward_post", sums_by_functional_collectives), X)
    assert found.ok, found


def interrupts(tensor, group):
    if threading.current_thread() is not threading.main_thread() and group.index == 1:
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            pass
    return tensor


def test_an_interrupt_ends_the_ranks():
    sch = varied().at["down"].sync("forward_post", interrupts)
    world, state = dist.distributed_c10d._world, torch.get_rng_state()
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        verify(sch, X)
    assert threading.active_count() == before
    assert dist.distributed_c10d._world is world
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("is_forked", [True, False])
def test_ranks_that_repeat_a_head_draw_for_it_alike(is_forked):
    sch = create_schedule(Repeated(), Mesh(tensor=4)).at["q"].colwise().at["o"].rowwise().at["k"].set(out_features=8)
    sch = (
        sch.at["k"]
        .shard("weight", axis=0, granule=8, replicate=True)
        .at["k"]
        .shard("bias", axis=0, granule=8, replicate=True)
    )
    found = verify(sch.at["drop"].fork_rng() if is_forked else sch, {"x": X["x"][..., :8]})
    assert [difference.path for difference in found.differences if difference.kind == "dropout"] == ["drop"]
    assert ("where they hold the same values" in found.first.cause) == is_forked


class Repeated(nn.Module):
    """Dropout on two heads of keys, for four heads of queries."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o, self.drop = nn.Linear(8, 32), nn.Linear(8, 16), nn.Linear(32, 8), nn.Dropout(0.5)

    def forward(self, x):
        q, k = self.q(x).unflatten(-1, (-1, 8)), self.drop(self.k(x).unflatten(-1, (-1, 8)))
        return self.o((q * k.repeat_interleave(q.shape[2] // k.shape[2], 2)).flatten(2))


def test_a_buffer_that_is_made_late_is_told():
    assert verify(mlp(Mesh(tensor=2), middle=Late()), X).notes == (
        "middle.late is made while the model runs, and is not compared",
    )


class Late(nn.Module):
    """Makes a buffer when it is called."""

    def forward(self, x):
        self.register_buffer("late", x.detach().norm())
        return x.relu()


def test_stages_that_are_not_cut_are_refused():
    with pytest.raises(PlanError, match="the mesh has pipe=2, and nothing is cut"):
        verify(create_schedule(Mlp(), Mesh(pipe=2)), X)
