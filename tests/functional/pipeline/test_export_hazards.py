"""What a plain export would lose or freeze: kept, or refused with its place."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from shardplan.functional import create_schedule, plan_build, stage_modules
from shardplan.functional.layout.apply import RankContext
from shardplan.functional.pipeline.build_stages import make_stage
from shardplan.specs import Mesh, PlanError
from tests.helpers.models import llama

X = torch.zeros(4, 6, 8)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Reversed(nn.Module):
    def forward(self, x):
        return Reverse.apply(x)


class Hooked(nn.Module):
    def forward(self, x):
        y = x * 2
        y.register_hook(lambda grad: grad * 3)
        return y


class Dice(nn.Module):
    def forward(self, x):
        return x * random.random()


class Average(nn.Module):
    """Keeps a running average, without gradients."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x):
        with torch.no_grad():
            self.average.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)
        return x - self.average


class Asks(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] % 2 == 0 else x


class Model(nn.Module):
    def __init__(self, middle, after=None):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.middle = middle
        self.last = nn.Linear(8, 8)
        self.after = after or nn.Identity()

    def forward(self, x):
        return self.after(self.last(self.middle(self.first(x)).tanh()))


def cut(model, path="middle"):
    return create_schedule(model, Mesh(pipe=2)).at[path].cut_pipeline_stage()


def stages_of(sch, example=X):
    return stage_modules(plan_build(sch, example_inputs={"x": example}), sch.runtime.model)


def run(stages, x):
    return stages[1](*stages[0](x))


@pytest.mark.parametrize(
    ("middle", "text"),
    [
        (Reversed(), "middle: it has a backward of its own, which the export ignores\n      Mark the module as a leaf"),
        (Hooked(), "middle: it registers a hook on a tensor, which the export ignores"),
        (Dice(), r"\(model\): its code draws from Python's or NumPy's generator, and the export would fix what it drew"),
    ],
)
def test_what_an_export_would_lose_is_refused(middle, text):
    with pytest.raises(PlanError, match=text):
        stages_of(cut(Model(middle)))


def test_a_hook_on_the_backward_of_a_module_is_refused():
    model = Model(nn.Identity())
    model.last.register_full_backward_hook(lambda *_: None)
    with pytest.raises(PlanError, match="last: it has a hook on its backward pass"):
        stages_of(cut(model, "first"))


def test_a_leaf_keeps_its_own_gradients():
    model = Model(Reversed())
    x = torch.randn(4, 6, 8)
    model(x).sum().backward()
    expected = model.first.weight.grad.clone()
    model.zero_grad()
    run(stages_of(cut(model, "first").at["middle"].leaf()), x).sum().backward()
    assert torch.equal(model.first.weight.grad, expected)


def test_what_a_region_without_gradients_writes_is_written():
    torch.manual_seed(0)
    model, alone = Model(Average()), Model(Average())
    alone.load_state_dict(model.state_dict())
    stages = stages_of(cut(model))
    for _ in range(3):
        x = torch.randn(4, 6, 8)
        assert torch.equal(run(stages, x), alone(x))
    assert torch.equal(model.middle.average, alone.middle.average)
    assert model.middle.average.abs().sum() > 0


def test_what_a_region_without_gradients_draws_is_drawn_once():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            with torch.no_grad():
                keep = torch.rand(8) > 0.5
            return self.last(self.first(x) * keep) * keep

    model = Masked()
    x = torch.randn(4, 6, 8)
    torch.manual_seed(1)
    expected = model(x)
    stages = stages_of(cut(model, "first"))
    torch.manual_seed(1)
    assert torch.equal(run(stages, x), expected)


def test_a_size_with_which_the_code_goes_another_way_is_refused():
    model = Model(Asks())
    plan = plan_build(cut(model), example_inputs={"x": X})
    assert plan.pipeline.conditions == ("(batch % 2) == 0",)
    assert "only where     (batch % 2) == 0" in str(plan)
    first, last = stage_modules(plan, model)
    x = torch.randn(6, 3, 8)
    assert torch.equal(last(*first(x)), model(x))
    with pytest.raises(ValueError, match=r"batch is 3, sequence is 3, and the plan is for \(batch % 2\) == 0"):
        first(torch.randn(3, 3, 8))


def test_modules_that_were_put_in_evaluation_stay_so_in_training():
    model = Model(nn.Dropout(0.5), nn.Dropout(0.5))
    model.middle.eval()
    x = torch.randn(4, 6, 8)
    torch.manual_seed(1)
    expected = model(x)
    stages = stages_of(cut(model))
    torch.manual_seed(1)
    assert torch.equal(run(stages, x), expected)


def test_training_and_evaluation_may_return_other_structures():
    class Both(Model):
        def forward(self, x):
            y = super().forward(x)
            return (y,) if self.training else {"y": y}

    first, last = stages_of(cut(Both(nn.Identity()), "first"))
    assert isinstance(last(*first(X)), tuple)
    assert set(last.eval()(*first.eval()(X))) == {"y"}


def test_a_stage_stands_on_its_device_down_to_regions_without_gradients():
    model = llama("meta", use_cache=False)
    sch = create_schedule(model, Mesh(pipe=2)).at["model.layers.0"].cut_pipeline_stage()
    plan = plan_build(sch, example_inputs={"input_ids": torch.zeros(2, 8, dtype=torch.long)})
    local = RankContext(plan.mesh.coordinate(0), {}, {})
    for number in range(2):
        stage = make_stage(plan, plan.runtime.partition, number, model, local, torch.device("meta"))
        regions = [module for module in stage.modules() if isinstance(module, torch.fx.GraphModule)]
        assert regions
        nodes = [node for region in regions for node in region.graph.nodes]
        assert torch.device("cpu") not in {leaf for node in nodes for leaf in tree_leaves((node.args, node.kwargs))}
        assert not [node for node in nodes if "_assert" in str(node.target)]
        given = [torch.empty(2, 8, 64, device="meta") if number else torch.zeros(2, 8, dtype=torch.long, device="meta")]
        assert tree_leaves(stage(*given))[0].is_meta


def test_a_place_that_trains_nothing_is_refused():
    model = Model(nn.Identity())
    model.first.requires_grad_(requires_grad=False)
    with pytest.raises(PlanError, match="stage 0: it has no trained parameter, and an optimizer needs one"):
        plan_build(
            cut(model, "first"),
            target="torch",
            config={"schedule": "gpipe", "num_microbatches": 2},
            example_inputs={"x": X},
        )
