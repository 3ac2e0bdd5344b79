"""Code of the user's own that runs in the backward pass is followed: functions of autograd, and hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from shardplan.functional import create_schedule, plan_build
from shardplan.specs import Mesh, PlanError


class Scaled(Function):
    """The identity, of which the gradient is scaled."""

    @staticmethod
    def forward(ctx, y):
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Clipped(Scaled):
    """The identity, of which the gradient is brought to the length 1 in each sample."""

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.norm(dim=-1, keepdim=True)


class Product(Function):
    """A product with a result of its own that is saved, and a second operand."""

    @staticmethod
    def forward(ctx, y, z):
        out = y * z
        ctx.save_for_backward(y, z, out)
        return out, y + z

    @staticmethod
    def backward(ctx, grad, more):
        y, z, _ = ctx.saved_tensors
        return grad * z + more, grad * y + more


class Shifted(Function):
    """The identity, of which the gradient is another value in the backward pass."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.roll(1, -1)


class Computed(Function):
    """A function that is computed again in its backward pass."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y.sigmoid() * y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            out = y.sigmoid() * y
        return torch.autograd.grad(out, y, grad)


class Stops(Scaled):
    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


class Block(nn.Module):
    """A column-split layer, a row-split layer, and code before, between and behind them."""

    def __init__(self, before=None, between=None, behind=None):
        super().__init__()
        self.first, self.up, self.down = (nn.Linear(*size, device="meta") for size in ((4, 4), (4, 8), (8, 4)))
        self.codes = [before, between, behind]

    def forward(self, x):
        before, between, behind = (code or (lambda y: y) for code in self.codes)
        return behind(self.down(between(self.up(before(self.first(x))))))


def law(*codes, mend=None):
    """Return ``holds``, the reasons why nobody can tell, or those of a refusal."""
    sch = create_schedule(Block(*codes), Mesh(tensor=2))
    sch = sch.at["up.{weight,bias}"].shard(axis=0).at["up"].sync("backward_post", "all_reduce").at["down"].rowwise()
    try:
        plan = plan_build(sch, example_inputs={"x": torch.empty(2, 3, 4)})
    except PlanError as error:
        return str(error)
    return "; ".join(str(lost) for lost in plan.equality.unfollowed) or "holds"


def hooked(hook):
    def code(y):
        y = y * 1
        y.register_hook(hook)
        return y

    return code


@pytest.mark.parametrize("code", [Scaled.apply, Computed.apply, hooked(lambda grad: grad * 2), hooked(print)])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_code_that_works_entry_by_entry_is_right_everywhere(code, place, capsys):
    assert law(*(code if at == place else None for at in range(3))) == "holds"


@pytest.mark.parametrize("code", [Clipped.apply, hooked(lambda grad: grad / grad.norm(dim=-1, keepdim=True))])
@pytest.mark.parametrize("place", [0, 2])
def test_code_may_look_at_all_features_of_a_whole_gradient(code, place):
    assert law(*(code if at == place else None for at in range(3))) == "holds"


def test_code_must_not_look_at_all_features_of_a_part():
    assert "the backward pass of Clipped (test_backward_code.py" in law(None, Clipped.apply)
    assert "a hook of a gradient" in law(None, hooked(lambda grad: grad / grad.norm(dim=-1, keepdim=True)))


def test_a_gradient_that_is_still_to_be_summed_may_only_be_worked_on_linearly():
    def twice(function):
        """Use the whole operand of the split layer, whose sum stands before the code."""

        class Up(nn.Linear):
            def forward(self, x):
                return super().forward(function(x))

        block = Block()
        block.up = Up(4, 8, device="meta")
        sch = create_schedule(block, Mesh(tensor=2))
        sch = sch.at["up.{weight,bias}"].shard(axis=0).at["up"].sync("backward_post", "all_reduce").at["down"].rowwise()
        return plan_build(sch, example_inputs={"x": torch.empty(2, 3, 4)})

    assert twice(Scaled.apply).equality.answer == "holds"
    with pytest.raises(PlanError, match=r"up: the backward pass of Clipped .*is not linear in what is still to be summed"):
        twice(Clipped.apply)


def test_several_operands_and_results_are_followed():
    def code(y):
        out, more = Product.apply(y, y.sin())
        return out + more

    assert law(code, code, code) == "holds"
    assert law(lambda y: Product.apply(y, y.sin())[1], lambda y: Product.apply(y, y.sin())[0]) == "holds"


def test_what_comes_back_must_be_the_gradient_of_the_parts():
    assert "roll" in law(None, Shifted.apply)
    assert law(Shifted.apply, None, Shifted.apply) == "holds"


def test_code_that_stops_is_not_followed():
    assert "it stops with NotImplementedError" in law(Stops.apply, Stops.apply)
    assert law(Stops.apply) == law(None, None, Stops.apply) == "holds"  # whole, whatever it is


def test_a_hook_that_is_removed_does_nothing():
    def code(y):
        y = y * 1
        y.register_hook(lambda grad: grad / grad.norm()).remove()
        return y

    assert law(code, code, code) == "holds"


def test_hooks_of_one_value_run_one_after_the_other():
    def code(y):
        y = y * 1
        y.register_hook(lambda grad: grad * 2)
        y.register_hook(lambda grad: grad.softmax(-1))
        return y

    assert law(code) == "holds"
    assert "softmax is taken over them" in law(None, code)


def test_functions_within_a_block_that_is_computed_again():
    assert law(None, lambda y: checkpoint(Computed.apply, y, use_reentrant=False)) == "holds"
    assert law(None, lambda y: checkpoint(Computed.apply, y, use_reentrant=True)) == "holds"
    assert "Clipped" in law(None, lambda y: checkpoint(Clipped.apply, y, use_reentrant=True))
