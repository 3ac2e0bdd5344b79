"""Stages of a model, one after another, are the model: outputs, gradients, random numbers, state and paths."""

from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from shardplan.functional import create_schedule, plan_build, stage_modules
from shardplan.specs import Mesh, PlanError, dumps, loads
from tests.functional.test_purity import pure
from tests.helpers.pipelines import ARCHITECTURES, one_after_another

EAGER = {"llama": "llama eager", "mixtral": "mixtral eager"}
"""Where torch's own attention gets no mask, an export keeps the causal one, and the kernel is another one."""


@cache
def cut(name, dropout=0.0):
    """Return a model with its values, the plan that cuts it, and its stages; one export serves many tests."""
    model = ARCHITECTURES[name].make(dropout=dropout)
    plan = ARCHITECTURES[name].plan(model)
    return model, plan, stage_modules(plan, model)


def set_mode(model, stages, *, training):
    for module in (model, *stages):
        module.train(training)
        module.zero_grad()


def tensors_of(output):
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


def gradients(module, output):
    weights = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(5))
    module.zero_grad()
    (output.logits * weights).sum().backward()
    return {path: p.grad.clone() for path, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("rows", "longer"), [(4, 0), (3, 5), (1, -4), (7, 0)])
def test_outputs_in_evaluation_are_those_of_the_model(name, rows, longer):
    model, _, stages = cut(name)
    set_mode(model, stages, training=False)
    batch = ARCHITECTURES[name].batch(rows, longer)
    with torch.no_grad():
        expected, found = model(**batch), one_after_another(stages, *batch.values())
    assert type(found) is type(expected)
    assert tensors_of(expected).keys() == tensors_of(found).keys()
    for key, tensor in tensors_of(expected).items():
        assert torch.equal(tensors_of(found)[key], tensor), key


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("rows", "longer"), [(4, 0), (3, 5)])
def test_outputs_and_gradients_in_training_are_those_of_the_model(name, rows, longer):
    model, _, stages = cut(name)
    set_mode(model, stages, training=True)
    batch = ARCHITECTURES[name].batch(rows, longer)
    expected = model(**batch)
    before = gradients(model, expected)
    found = one_after_another(stages, *batch.values())
    assert torch.equal(found.logits, expected.logits)
    after = gradients(model, found)
    assert after.keys() == before.keys()
    for path, gradient in before.items():
        if name in EAGER:
            assert_close(after[path], gradient)
        else:
            assert torch.equal(after[path], gradient), path


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama eager"])
def test_dropout_follows_the_mode_and_draws_what_the_model_draws(name):
    model, _, stages = cut(name, 0.3)
    batch = ARCHITECTURES[name].batch()
    outputs = {}
    for training in (True, False, True):
        set_mode(model, stages, training=training)
        torch.manual_seed(7)
        expected = model(**batch)
        drawn = torch.rand(1)
        torch.manual_seed(7)
        found = one_after_another(stages, *batch.values())
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(torch.rand(1), drawn)
        if training:
            before = gradients(model, expected)
            after = gradients(model, found)
            assert all(torch.equal(after[path], gradient) for path, gradient in before.items())
        outputs[training] = found.logits
    torch.manual_seed(8)
    assert not torch.equal(one_after_another(stages, *batch.values()).logits, outputs[True])
    assert not torch.equal(outputs[True], outputs[False])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_keep_their_paths_and_are_those_of_the_model(name):
    model, plan, stages = cut(name)
    held = {}
    for number, stage in enumerate(stages):
        assert all(model.get_parameter(path) is parameter for path, parameter in stage.named_parameters())
        for path in stage.state_dict():
            held.setdefault(path, []).append(number)
    assert held.keys() == model.state_dict().keys()
    for spec in plan.tree.values():
        if spec.kind != "non_persistent_buffer":
            assert {number for path in spec.paths for number in held[path]} == {spec.stage, *spec.also_on}, spec.path


def test_a_tied_head_stands_under_its_own_path():
    _, plan, stages = cut("llama eager")
    first, *_, last = (set(stage.state_dict()) for stage in stages)
    assert "model.embed_tokens.weight" in first
    assert "lm_head.weight" not in first
    assert "lm_head.weight" in last
    assert "model.embed_tokens.weight" not in last
    tied = plan.tree["model.embed_tokens.weight"]
    assert (tied.stage, tied.also_on) == (0, (2,))
    assert stages[0].get_parameter("model.embed_tokens.weight") is stages[2].get_parameter("lm_head.weight")


@pytest.mark.parametrize("name", ["llama", "llama eager", "gemma 2", "mixtral", "gpt2", "bert", "opt"])
def test_hidden_states_cross_and_what_is_cheap_is_computed_again(name):
    _, plan, _ = cut(name)
    for stage, after in pairwise(plan.stages):
        hidden, *others = stage.outputs
        assert (hidden.shape, hidden.dtype, hidden.requires_grad) == (("batch", "sequence", 32), "float32", True)
        assert len(others) <= ARCHITECTURES[name].mask
        for other in others:
            assert (other.dtype, other.num_bytes, other.requires_grad) == ("bool", 4 * 12, False)
        assert after.inputs == stage.outputs


def test_a_mask_of_padding_crosses_as_booleans():
    _, plan, _ = cut("llama eager")
    for stage in plan.stages[:-1]:
        assert [output.type for output in stage.outputs] == ["f32[batch, sequence, 32]", "bool[batch, 1, 1, sequence]"]


def test_buffers_that_are_needed_again_are_held_on_every_stage_that_computes_with_them():
    model, plan, stages = cut("llama")
    spec = plan.tree["model.rotary_emb.inv_freq"]
    assert (spec.stage, spec.also_on) == (0, (1,))
    for stage in stages:
        assert torch.equal(dict(stage.named_buffers())["model.rotary_emb.inv_freq"], model.model.rotary_emb.inv_freq)
        assert "model.rotary_emb.inv_freq" not in stage.state_dict()


def test_what_a_stage_does_not_use_is_passed_on_hop_by_hop():
    architecture = ARCHITECTURES["t5"]
    model = architecture.make()
    plan = architecture.plan(model, ("encoder.block.0", "encoder.block.1", "decoder.block.0"))
    stages = stage_modules(plan, model)
    for stage in plan.stages[:2]:
        assert "decoder_input_ids" in [output.name for output in stage.outputs]
    batch = architecture.batch(rows=3, longer=2)
    for stage in stages:
        stage.eval()
    ids = plan.stages[0].outputs.index(next(o for o in plan.stages[0].outputs if o.name == "decoder_input_ids"))
    assert torch.equal(stages[0](*batch.values())[ids], batch["decoder_input_ids"])
    model.eval()
    assert torch.equal(one_after_another(stages, *batch.values()).logits, model(**batch).logits)


@pytest.mark.parametrize("name", ["llama eager", "t5"])
def test_a_loaded_plan_makes_the_same_stages(name):
    model, plan, stages = cut(name)
    loaded = loads(dumps(plan))
    assert loaded == plan
    assert loaded.pipeline == plan.pipeline
    again = stage_modules(loaded, model)
    set_mode(model, (*stages, *again), training=False)
    batch = ARCHITECTURES[name].batch(2, 3)
    assert [list(stage.state_dict()) for stage in again] == [list(stage.state_dict()) for stage in stages]
    assert torch.equal(one_after_another(again, *batch.values()).logits, model(**batch).logits)


def test_a_model_of_other_tensors_is_refused_with_their_paths():
    row = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = plan_build(
        create_schedule(row, Mesh(pipe=2)).at["1"].cut_pipeline_stage(), example_inputs={"input": torch.ones(3, 4)}
    )
    other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2), nn.Linear(2, 2))
    with pytest.raises(PlanError) as caught:
        stage_modules(plan, other)
    assert [problem.path for problem in caught.value.problems] == ["0.weight", "0.bias", "2.weight", "3.weight", "3.bias"]
    assert "orig_shape (6, 4) instead of (8, 4)" in str(caught.value)


def test_other_code_of_the_same_shapes_is_refused_by_the_number_of_its_stage():
    _, plan, _ = cut("llama")
    loaded = loads(dumps(plan))
    with pytest.raises(PlanError, match="stage 0, 1 computes something else than the planned one"):
        stage_modules(loaded, ARCHITECTURES["llama"].make(hidden_act="gelu"))
    other = ARCHITECTURES["llama"].make()
    other.model.layers[2].mlp.act_fn = nn.GELU()
    with pytest.raises(PlanError, match="stage 1 computes something else than the planned one"):
        stage_modules(loaded, other)


def test_planning_stages_leaves_no_trace():
    architecture = ARCHITECTURES["llama eager"]
    model, batch = architecture.make("meta"), {k: v.to("meta") for k, v in architecture.batch().items()}
    modules = {path: dict(vars(module)) for path, module in model.named_modules()}
    with pure():
        plan = plan_build(architecture.schedule(model), example_inputs=batch)
        assert dumps(plan)
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == modules
    with torch.no_grad(), pure():
        assert plan_build(architecture.schedule(model), example_inputs=batch).fingerprint == plan.fingerprint


def test_a_model_with_values_keeps_them_and_its_mode():
    architecture = ARCHITECTURES["bert"]
    model = architecture.make(dropout=0.3).eval()
    before = {path: (tensor.data_ptr(), tensor.clone(), tensor._version) for path, tensor in model.state_dict().items()}
    modules = {path: dict(vars(module)) for path, module in model.named_modules()}
    plan = architecture.plan(model)
    stage_modules(plan, model)
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == modules
    after = model.state_dict()
    assert all(before[path][0] == tensor.data_ptr() for path, tensor in after.items())
    assert all(torch.equal(before[path][1], tensor) for path, tensor in after.items())
    assert all(before[path][2] == tensor._version for path, tensor in after.items())


# -- what a stage is called with


def plan_of(model, example, *cuts):
    sch = create_schedule(model, Mesh(pipe=len(cuts) + 1))
    for path in cuts:
        sch = sch.at[path].cut_pipeline_stage()
    return plan_build(sch, example_inputs=example)


def stages_of(model, example, *cuts):
    return stage_modules(plan_of(model, example, *cuts), model)


class Body(nn.Module):
    """Two layers; how they are used is up to others."""

    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)


class FixedByView(Body):
    def forward(self, x):
        return self.second(self.first(x).view(2, 16, -1))


class FixedByTable(Body):
    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(16, 8))

    def forward(self, x):
        return self.second(self.first(x + self.positions))


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        (FixedByView, (3, 16, 8), r"axis 0 of x f32\[2, 16, 8\] is 3, and the model's code fixes it at the 2"),
        (FixedByView, (2, 18, 8), r"axis 1 of x f32\[2, 16, 8\] is 18, and the model's code fixes it at the 16"),
        (FixedByTable, (3, 18, 8), r"axis 1 of x f32\[batch, 16, 8\] is 18, and the model's code fixes it at the 16"),
        (FixedByTable, (3, 16, 9), r"axis 2 of x f32\[batch, 16, 8\] is 9, and the model's code fixes it at the 8"),
        (FixedByTable, (16, 8), r"x f32\[batch, 16, 8\] is given with shape \[16, 8\]"),
    ],
)
def test_another_size_than_a_fixed_one_is_refused(kind, shape, message):
    model = kind()
    first, _ = stages_of(model, {"x": torch.zeros(2, 16, 8)}, "first")
    with pytest.raises(ValueError, match=message):
        first(torch.zeros(shape))


def test_a_size_that_is_not_fixed_may_differ():
    model = FixedByTable()
    stages = stages_of(model, {"x": torch.zeros(2, 16, 8)}, "first")
    x = torch.randn(5, 16, 8)
    assert torch.equal(one_after_another(stages, x), model(x))


def test_more_positions_than_there_are_is_refused():
    _, plan, (first, _) = cut("bert")
    assert {size.name: size.most for size in plan.pipeline.sizes}["sequence"] == 512
    ids = torch.zeros(1, 513, dtype=torch.long)
    with pytest.raises(ValueError, match="sequence is 513, and the plan is for 0 to 512"):
        first(ids, torch.ones_like(ids))
    ids = ids[:, :512]
    assert first(ids, torch.ones_like(ids))[0].shape == (1, 512, 32)


def test_sizes_of_one_name_are_equal():
    _, _, (first, *_) = cut("llama eager")
    with pytest.raises(ValueError, match=r"axis 1 of attention_mask .* is 11, and sequence is 12 before"):
        first(torch.zeros(2, 12, dtype=torch.long), torch.ones(2, 11, dtype=torch.long))


@pytest.mark.parametrize("given", [0, 1, 3])
def test_another_number_of_inputs_is_refused(given):
    _, _, (first, second, _) = cut("llama eager")
    ids = torch.zeros(2, 12, dtype=torch.long)
    with pytest.raises(
        TypeError, match=rf"stage 0 takes 2 tensors, not {given}: input_ids i64\[batch, sequence\], attention"
    ):
        first(*[ids] * given)
    with pytest.raises(TypeError, match=rf"stage 1 takes 2 tensors, not {given}"):
        second(*[ids] * given)


# -- state, writes, and what nobody uses


class Unused(Body):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("idle", torch.randn(2))

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_what_nothing_uses_still_has_a_stage():
    model = Unused()
    plan = plan_of(model, {"x": torch.zeros(2, 8)}, "first")
    stages = stage_modules(plan, model)
    for path in ("unused", "idle"):
        assert plan.tree[path].also_on == ()
        assert [path in stage.state_dict() for stage in stages] == [n == plan.tree[path].stage for n in range(2)]


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.linear = nn.Linear(8, 6)
        self.norm2 = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean(-1)
        return self.head(self.norm2(self.linear(x)).relu())


def sequence_normed():
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


@pytest.mark.parametrize(
    ("make", "cuts", "shape"),
    [(Normed, ("norm",), (4, 3, 9)), (Normed, ("linear",), (4, 3, 9)), (sequence_normed, ("2",), (4, 3))],
)
def test_running_statistics_follow_training(make, cuts, shape):
    torch.manual_seed(0)
    model = make()
    alone = copy.deepcopy(model)
    stages = stages_of(model, {"input" if make is sequence_normed else "x": torch.zeros(shape)}, *cuts)
    for step in range(3):
        x = torch.randn(5, *shape[1:], generator=torch.Generator().manual_seed(step))
        losses = []
        for module, call in ((alone, alone), (model, lambda x: one_after_another(stages, x))):
            out = call(x)
            losses.append(out.square().sum())
            module.zero_grad()
            losses[-1].backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.sub_(0.01 * parameter.grad)
        assert torch.equal(*losses)
    for path, tensor in alone.state_dict().items():
        assert torch.equal(model.state_dict()[path], tensor), path
    assert alone.state_dict()["norm.running_mean" if make is Normed else "1.running_mean"].any()
    for module in (alone, *stages):
        module.eval()
    x = torch.randn(3, *shape[1:])
    assert torch.equal(one_after_another(stages, x), alone(x))


class WritesAcross(Body):
    """A view that the first stage makes crosses beside what the second stage writes in place."""

    def forward(self, x):
        h = self.first(x)
        flat = h.view(-1)
        h = h.add_(1.0)
        return self.second(h) + flat.sum()


class WritesInput(Body):
    """The second stage writes in place what the first one made, and nobody reads it before."""

    def forward(self, x):
        h = self.first(x)
        return self.second(h.mul_(2.0))


class WritesWithin(Body):
    def forward(self, x):
        h = self.first(x) * 2.0
        h.add_(1.0)
        return self.second(h)


class Counts(Body):
    """A buffer that the second stage updates and the first one reads."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        h = self.first(x + self.count)
        self.count.add_(1.0)
        return self.second(h)


@pytest.mark.parametrize("kind", [WritesAcross, WritesInput, Counts])
def test_writing_in_place_what_an_earlier_stage_holds_is_refused(kind):
    with pytest.raises(PlanError, match=r"writes .*in stage 1 what stage 0 holds too, and they do not share memory"):
        plan_of(kind(), {"x": torch.zeros(2, 8)}, "first")


def test_writing_in_place_within_a_stage_is_kept():
    model = WritesWithin()
    stages = stages_of(model, {"x": torch.zeros(2, 8)}, "first")
    x = torch.randn(5, 8)
    assert torch.equal(one_after_another(stages, x), model(x))
