"""Small models of families, split by the frontends, compute beside the whole model what it computes, with dropout too."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from benchmarks.judged_families import HEADING, INFERRED, Judged, judge, small_model, table
from benchmarks.transformers_coverage import replace_part
from shardplan.functional import plan_build, verify
from shardplan.functional.frontends import infer_schedule, made_inputs, schedule_from_tp_plan
from shardplan.specs import Mesh, PlanError
from shardplan.specs.layout_steps import ForkRng, ShareRng, SumGradient, Sync

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers has to say of default configurations

DECLARED = [
    "gemma3n_text",
    "seed_oss",
    "t5gemma",
    "llama",
    "deepseek_v3",
    "gemma2",
    "gpt_oss",
    "mixtral",
    "olmo2",
    "qwen3_next",
]


@pytest.mark.parametrize("model_type", DECLARED)
def test_as_they_declare(model_type):
    found = judge(Judged(model_type, "tp_plan", 2))
    assert (found.verdict, found.cause) == ("right", "")


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "t5", "deepseek_v3", "whisper", "bloom"])
def test_as_their_graphs_allow(model_type):
    found = judge(Judged(model_type, "infer", 2))
    assert (found.verdict, found.cause) == ("right", "")


def steps_of(sch, kind):
    return {step.module for step in sch.layout if isinstance(step, kind)}


def test_dropout_of_whole_activations_inside_an_attention_that_drops_parts():
    sch = infer_schedule(small_model("gpt2", Mesh(tensor=2)), Mesh(tensor=2))
    assert steps_of(sch, ForkRng) == {"transformer.h.0.attn", "transformer.h.1.attn"}
    assert steps_of(sch, ShareRng) == {"transformer.h.0.attn.resid_dropout", "transformer.h.1.attn.resid_dropout"}


def test_dropout_after_the_output_projection_in_the_same_code():
    sch = schedule_from_tp_plan(small_model("starcoder2", Mesh(tensor=2)), Mesh(tensor=2))
    assert steps_of(sch, ForkRng) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    shared = {(step.module, step.onwards) for step in sch.layout if isinstance(step, ShareRng)}
    assert shared == {("model.layers.0.self_attn.o_proj", True), ("model.layers.1.self_attn.o_proj", True)}


def test_dropout_of_features_before_the_down_projection():
    sch = schedule_from_tp_plan(small_model("t5gemma", Mesh(tensor=2)), Mesh(tensor=2))
    assert {path for path in steps_of(sch, ForkRng) if "encoder.layers.0" in path} == {
        "model.encoder.layers.0.self_attn",
        "model.encoder.layers.0.mlp.dropout",
    }


def test_features_of_which_statistics_are_taken_are_gathered():
    sch = schedule_from_tp_plan(small_model("gemma3n_text", Mesh(tensor=2)), Mesh(tensor=2))
    gate = [str(step) for step in sch.layout if step.module == "model.layers.0.mlp.gate_proj"]
    down = [str(step) for step in sch.layout if step.module == "model.layers.0.mlp.down_proj"]
    assert "forward_post all_gather(axis=-1)@tensor" in gate
    assert "backward_post all_gather(axis=-1)@tensor" in down


def test_an_attention_that_is_given_whole_heads_is_refused():
    sch = schedule_from_tp_plan(small_model("neomme", Mesh(tensor=2)), Mesh(tensor=2))
    with pytest.raises(PlanError, match=r"self_attn: it is given 'value_embeds' with the features of all heads"):
        plan_build(sch)


class Twice(nn.Module):
    """One dropout for parts and for whole activations."""

    def __init__(self):
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(8, 32), nn.Dropout(0.1), nn.Linear(32, 8)

    def forward(self, x):
        return self.drop(self.down(self.drop(torch.relu(self.up(x)))))


class After(Twice):
    """Dropouts in one module's code: of parts, and after the sum of whole activations."""

    def forward(self, x):
        hidden = nn.functional.dropout(torch.relu(self.up(x)), 0.1, self.training)
        return nn.functional.dropout(self.down(hidden), 0.1, self.training)


class Before(Twice):
    """The other way round."""

    def forward(self, x):
        hidden = torch.relu(self.up(nn.functional.dropout(x, 0.1, self.training)))
        return self.down(nn.functional.dropout(hidden, 0.1, self.training))


@pytest.mark.parametrize(("kind", "is_split"), [(After, True), (Before, False)])
def test_dropouts_in_one_code(kind, is_split):
    x = {"x": torch.randn(3, 8)}
    sch = infer_schedule(nn.Sequential(kind()), Mesh(tensor=2), example_inputs={"input": x["x"]})
    assert bool(sch.tree["0.up.weight"].shards) == is_split
    assert steps_of(sch, ForkRng) == ({"0"} if is_split else set())
    assert steps_of(sch, ShareRng) == ({"0.down"} if is_split else set())
    assert verify(sch, {"input": x["x"]}).ok


def test_a_dropout_of_parts_and_of_whole_activations_keeps_the_parts_whole():
    sch = infer_schedule(Twice(), Mesh(tensor=2), example_inputs={"x": torch.randn(3, 8)})
    assert not any(spec.shards for spec in sch.tree.values())
    assert sch.tree["up.weight"].tags["why"] == (
        "whole: drop drops entries of it and of whole activations, by random numbers of one kind"
    )


def test_a_key_that_all_heads_share_sums_its_gradient():
    sch = infer_schedule(small_model("deepseek_v3", Mesh(tensor=2)), Mesh(tensor=2))
    (step,) = [
        step
        for step in sch.layout
        if isinstance(step, Sync) and step.module == "model.layers.0.self_attn.kv_a_proj_with_mqa"
    ]
    config = sch.runtime.model.config
    assert (step.when, step.op) == ("backward_pre", "all_reduce")
    assert step.features == (config.kv_lora_rank, config.kv_lora_rank + config.qk_rope_head_dim)


class Shared(nn.Module):
    """A whole activation that heads share: as keys of one head, or added to parts; used whole as well, or not."""

    def __init__(self, *, is_whole_too=False):
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.o, self.other = nn.Linear(16, 32), nn.Linear(16, 12), nn.Linear(32, 16), nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.ones(8))
        self.is_whole_too = is_whole_too

    def forward(self, x):
        q = self.q(x).unflatten(-1, (self.num_heads, 8))
        first, second = self.k(x).split((8, 4), dim=-1)
        key = torch.tanh(first) * self.scale
        made = self.o((q * torch.sigmoid(key.unsqueeze(-2).expand(-1, -1, self.num_heads, -1))).flatten(-2))
        whole = key.sum(-1, keepdim=True) if self.is_whole_too else second.sum(-1, keepdim=True)
        return made + self.other(x).sum(-1, keepdim=True) + whole


@pytest.mark.parametrize("num", [2, 4])
def test_the_sum_is_taken_at_the_output_of_a_linear_module(num):
    sch = infer_schedule(Shared(), Mesh(tensor=num), example_inputs={"x": torch.randn(3, 5, 16)})
    (step,) = [step for step in sch.layout if isinstance(step, Sync) and step.module == "k"]
    assert (step.when, step.features) == ("backward_pre", (0, 8))
    assert steps_of(sch, SumGradient) == {""}  # of scale
    assert verify(sch, {"x": torch.randn(3, 5, 16)}).ok


def test_an_activation_with_two_kinds_of_uses_keeps_the_parts_whole():
    sch = infer_schedule(Shared(is_whole_too=True), Mesh(tensor=2), example_inputs={"x": torch.randn(3, 5, 16)})
    assert not any(spec.shards for spec in sch.tree.values())
    assert "a whole activation meets parts, and is used whole too" in sch.tree["q.weight"].tags["why"]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_that_skip_no_number_compute_the_first_expert_with_weight_zero(implementation):
    mesh = Mesh(data=2, expert=2)
    model = small_model("gpt_oss", mesh)
    model.config._experts_implementation = implementation
    assert verify(schedule_from_tp_plan(model, mesh), made_inputs(model, batch=6)).ok


def test_what_is_refused_is_said(monkeypatch):
    model = small_model("llama", Mesh(tensor=2))
    model._tp_plan = {**model._tp_plan, "model.layers.*.mlp.act_fn": "unheard_of"}
    monkeypatch.setattr("benchmarks.judged_families.small_model", lambda *_: model)
    found = judge(Judged("llama", "tp_plan", 2))
    assert (found.verdict, found.cause.partition(" The")[0]) == (
        "refused",
        "model.layers.*.mlp.act_fn: the style 'unheard_of' is unknown",
    )


def test_the_table_counts_and_takes_its_place():
    told = "gradient: q.weight: its gradient differs by 12 %"
    outcomes = [
        Judged("llama", "tp_plan", 2, "Llama", "right", "", ("input_ids",)),
        Judged("llama", "tp_plan", 4, "Llama", "differs", told, ("input_ids",)),
        Judged("gpt2", "infer", 2, "GPT2", "right", "", ("input_ids",)),
    ]
    text = table(outcomes)
    assert "| tp_plan, 4 | 0 | 1 | 0 | 0 |" in text
    assert f"| llama | Llama | input_ids | right | differs | {told} |" in text
    page = replace_part("# First\n\nwords\n\n# Last\n\nmore\n", HEADING, text)
    assert page == f"# First\n\nwords\n\n# Last\n\nmore\n\n{text}"
    assert replace_part(page, HEADING, text) == page
    assert replace_part(page, "# First", "# First\n\nother\n") == f"# First\n\nother\n\n# Last\n\nmore\n\n{text}"


def test_sixty_types_are_inferred():
    assert len(set(INFERRED)) == len(INFERRED) >= 60
    assert set(INFERRED) <= set(CONFIG_MAPPING)
