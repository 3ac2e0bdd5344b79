"""Activations and gradients that differ from the whole model's are found while planning."""

from __future__ import annotations

import pytest
import torch
import transformers
from attrs import evolve
from torch import nn

from shardplan.functional import create_schedule, plan_build
from shardplan.functional.frontends import schedule_from_tp_plan
from shardplan.functional.types import gradients
from shardplan.functional.types.gradient import UNKNOWN_GRADIENT
from shardplan.functional.types.memory import written
from shardplan.functional.types.moves import alike
from shardplan.specs import Mesh, PlanError
from tests.helpers.models import llama, split_llama

TOKENS = {"input_ids": torch.empty(2, 8, dtype=torch.long, device="meta")}
INPUT = {"input": torch.empty(2, 4)}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 128}


def causal(name):
    config = getattr(transformers, f"{name}Config")(**SIZES, num_key_value_heads=4)
    with torch.device("meta"):
        return getattr(transformers, f"{name}ForCausalLM")(config)


class Scaled(nn.Module):
    """A whole tensor between two split ones."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8, device="meta"), nn.Linear(8, 4, device="meta")
        self.scale = nn.Parameter(torch.empty((), device="meta"))

    def forward(self, x):
        return self.down(self.up(x) * self.scale)


def refusal(sch, **inputs):
    with pytest.raises(PlanError) as caught:
        plan_build(sch, example_inputs=inputs)
    return str(caught.value)


def test_a_whole_parameter_that_meets_parts_is_refused():
    sch = create_schedule(Scaled(), Mesh(tensor=2)).at["up"].colwise().at["down"].rowwise().at["scale"].init(1.0)
    message = refusal(sch, x=torch.empty(2, 4))
    assert message.startswith("1 problem\n  scale  f32[]: it is whole, and meets parts of an activation in its module")


def test_a_frozen_one_has_no_gradient_to_lose():
    model = Scaled()
    model.scale.requires_grad_(requires_grad=False)
    sch = create_schedule(model, Mesh(tensor=2)).at["up"].colwise().at["down"].rowwise().at["scale"].init(1.0)
    assert plan_build(sch, example_inputs={"x": torch.empty(2, 4)})


def test_no_gradient_is_lost_in_silence(monkeypatch):
    monkeypatch.setattr(gradients._Walk, "_contribution", lambda *_: UNKNOWN_GRADIENT)
    model = nn.Sequential(nn.Linear(4, 8, device="meta"), nn.Linear(8, 4, device="meta"))
    sch = create_schedule(model, Mesh(tensor=2)).at["0"].colwise().at["1"].rowwise()
    plan = plan_build(sch, example_inputs=INPUT)
    (lost,) = plan.equality.unfollowed
    assert str(lost) == "0.weight: nobody could follow its gradient, nor those of 3 more tensors"


@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm"])
def test_gradients_pass_operators_with_a_derivative_of_their_own(way):
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, experts_implementation=way))
    sch = schedule_from_tp_plan(model, Mesh(tensor=2))
    plan = plan_build(sch, example_inputs=TOKENS, init_weights=False)
    assert plan.equality.answer == "holds"
    step = next(step for step in sch.layout if step.module.endswith("layers.1.mlp.experts") and step.when == "backward_post")
    for layout in ([other for other in sch.layout if other is not step], [*sch.layout, step]):
        with pytest.raises(PlanError, match=r"model.layers.1.mlp.experts: "):
            plan_build(evolve(sch, layout=layout), example_inputs=TOKENS, init_weights=False)


def test_a_tensor_that_torch_gives_a_gradient_and_nobody_followed_is_told(monkeypatch):
    monkeypatch.setattr(gradients._Walk, "_backward", lambda *_: None)
    model = nn.Sequential(nn.Linear(4, 8, device="meta"), nn.Linear(8, 4, device="meta"))
    plan = plan_build(create_schedule(model, Mesh(tensor=2)).at["0"].colwise().at["1"].rowwise(), example_inputs=INPUT)
    (lost,) = plan.equality.unfollowed
    assert str(lost) == "0.bias: nobody could follow its gradient, nor those of 3 more tensors"


class Picked(nn.Module):
    """A block that works on some tokens alone, as on those that stand for an image."""

    def __init__(self):
        super().__init__()
        self.first, self.up = (nn.Linear(4, num, device="meta") for num in (4, 8))
        self.down = nn.Linear(8, 4, device="meta")

    def forward(self, x, chosen):
        y = self.first(x)
        return y.clone().index_put((chosen,), self.down(self.up(y[chosen]).tanh()))


@pytest.mark.parametrize(("chosen", "answer"), [(True, "refused"), (False, "not followed")])
def test_a_gradient_that_no_entry_of_the_example_has_is_not_taken_for_right(chosen, answer):
    sch = create_schedule(Picked(), Mesh(tensor=2)).at["up.{weight,bias}"].shard(axis=0).at["down"].rowwise()
    inputs = {"x": torch.empty(2, 4), "chosen": torch.tensor([chosen, chosen])}
    if answer == "refused":
        with pytest.raises(PlanError, match="up: a whole activation meets parts here"):
            plan_build(sch, example_inputs=inputs)
    else:
        assert plan_build(sch, example_inputs=inputs).equality.answer == answer


def test_memory_does_not_forget_what_ranks_have_drawn_for_themselves():
    zeros, drawn = evolve(alike((4,), (2,)), fill=0.0), evolve(alike((4,), (2,)), is_drawn=True)
    assert written(zeros, alike((4,), (2,)), rank=0).kind == "whole"
    assert written(zeros, drawn, rank=0).kind == "unknown"


def test_sums_that_count_twice_are_told_once_for_all_layers():
    sch = split_llama(llama(), Mesh(tensor=2)).at["model.layers.*.input_layernorm"].sum_gradient()
    message = refusal(sch, **TOKENS)
    assert "model.layers.{0..1}.input_layernorm.weight" in message
    assert "its gradient counts 2 times, by what its module sums or divides" in message
    doubled = split_llama(llama(), Mesh(tensor=2)).at["model.norm"].sync("backward_pre", "all_reduce")
    assert "model.norm: the gradient of model.embed_tokens.weight and that of" in refusal(doubled, **TOKENS)


def test_norms_of_split_heads_are_found_in_qwen_3():
    message = refusal(split_llama(causal("Qwen3"), Mesh(tensor=2)), **TOKENS)
    assert "model.layers.{0..1}.self_attn.q_norm.weight  f32[128]: it is whole, and meets parts" in message
    assert "model.layers.{0..1}.self_attn.k_norm.weight" in message


@pytest.mark.parametrize("name", ["Qwen2", "Gemma2", "Mistral"])
def test_sound_layouts_are_accepted(name):
    assert plan_build(split_llama(causal(name), Mesh(data=2, tensor=2)), example_inputs=TOKENS)


def test_a_missing_sum_of_gradients_is_found_with_its_mend():
    sch = create_schedule(llama(), Mesh(tensor=2))
    sch = sch.at["**.[qkv]_proj.weight"].shard(axis=0).at["**.o_proj"].rowwise()
    message = refusal(sch, **TOKENS)
    assert "model.layers.{0..1}.self_attn.q_proj: a whole activation meets parts here" in message
    assert "sch.at['model.layers.*.self_attn.q_proj'].sync('backward_post', 'all_reduce')" in message
    assert plan_build(sch.at["**.self_attn"].sync("backward_post", "all_reduce"), example_inputs=TOKENS)


def test_a_synchronised_module_that_is_not_called_is_refused():
    class Direct(Scaled):
        def forward(self, x):
            return nn.functional.linear(self.up(x), self.down.weight, self.down.bias)

    model = Direct()
    model.scale = None
    sch = create_schedule(model, Mesh(tensor=2)).at["up"].colwise().at["down"].rowwise()
    assert "down: it is not called in this forward pass, so that nothing is synchronised there" in refusal(
        sch, x=torch.empty(2, 4)
    )


def test_written_views_are_followed():
    class Buffered(Scaled):
        def forward(self, x):
            up = self.up(x)
            out = torch.zeros(2, *up.shape)
            out[1] = up
            return self.down(out[1] * self.scale)

    sch = create_schedule(Buffered(), Mesh(tensor=2)).at["up"].colwise().at["down"].rowwise().at["scale"].init(1.0)
    assert "scale  f32[]: it is whole, and meets parts" in refusal(sch, x=torch.empty(2, 4))


def test_what_is_written_where_a_mask_says_is_followed():
    class Masked(Scaled):
        def forward(self, x):
            up = self.up(x) * 1
            up[up > 1] = 0
            return self.down(up)

    model = Masked()
    model.scale = None
    sch = create_schedule(model, Mesh(tensor=2)).at["up"].colwise().at["down"].rowwise()
    assert plan_build(sch, example_inputs={"x": torch.empty(2, 4)}).equality.answer == "holds"


class Groups(nn.Module):
    """Heads in groups, as a fused matrix has them, scaled by numbers of their own."""

    def __init__(self):
        super().__init__()
        self.groups, self.up, self.down = 2, nn.Linear(4, 16, device="meta"), nn.Linear(16, 4, device="meta")

    def forward(self, x):
        y = self.up(x).unflatten(-1, (self.groups, -1, 2))
        return self.down(y.tanh().flatten(-3))


@pytest.mark.parametrize(("granule", "answer"), [(2, "not followed"), (1, "refused")])
def test_parts_along_two_axes_at_once_are_not_followed_and_others_are_refused(granule, answer):
    """Two ranks share a group: each has two of its four pairs, or single entries of all pairs."""
    blocks = (4, 4) if granule == 2 else (2, 2, 2, 2)
    sch = create_schedule(Groups(), Mesh(tensor=4)).at["up"].colwise(interleaved=2, blocks=blocks, granule=granule)
    sch = sch.at["down"].rowwise(interleaved=2, blocks=blocks, granule=granule).at[""].set(groups=1)
    try:
        said = plan_build(sch, example_inputs={"x": torch.empty(2, 4)}).equality.answer
    except PlanError:
        said = "refused"
    assert said == answer
