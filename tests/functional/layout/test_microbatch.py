"""What a micro-batch leaves behind, followed on fake tensors, is what a real forward and backward pass leave behind."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from attrs import evolve
from torch import nn
from torch.utils._pytree import tree_leaves

from shardplan.functional import create_schedule, plan_build
from shardplan.functional.layout.forward import saved_activations
from shardplan.functional.layout.forward.microbatch import follow_microbatch
from shardplan.functional.layout.forward.saved_activations import blocks
from shardplan.functional.layout.local_model import LocalModel
from shardplan.functional.model.repeated_layers import RepeatedLayers
from shardplan.specs import Mesh, Microbatch, Saved, dumps, loads
from tests.helpers import families
from tests.helpers.families import MAKERS, family, inputs, schedule_of
from tests.helpers.models import llama, plain, split_plain

IDS = {"ids": torch.zeros(2, 4, dtype=torch.long)}
TOKENS = {"input_ids": torch.empty(2, 8, dtype=torch.long, device="meta")}


class RealPass:
    """What autograd keeps of a real pass, counted here anew, and the parameters that have no gradient after it."""

    def __init__(self, model, given, kept):
        self.model, self.given, self.saved, self.open = model, Counter(), Counter(), [""]
        own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.held = {"saved": dict.fromkeys(own), "given": dict.fromkeys(own)}
        for one in kept:
            module = model.get_submodule(one.module)
            module.register_forward_pre_hook(self.entering(one), with_kwargs=True, prepend=True)
            module.register_forward_hook(self.leave)
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor):
            self.out = model(**given)

    def backward(self):
        sum(leaf.sum() for leaf in tree_leaves(self.out) if isinstance(leaf, torch.Tensor) and leaf.requires_grad).backward()
        return tuple(name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None)

    def entering(self, one):
        def enter(_, args, kwargs):
            self.open.append(one.module)
            leaves = tree_leaves((args, kwargs)) if one.is_block else ()
            self.given[one.module] += sum(self.new("given", leaf) for leaf in leaves if torch.is_tensor(leaf))

        return enter

    def leave(self, *_):
        self.open.pop()

    def keep(self, tensor):
        self.saved[self.open[-1]] += self.new("saved", tensor)
        return tensor

    def new(self, kind, tensor):
        storage = tensor.untyped_storage()
        is_new = storage.data_ptr() not in self.held[kind]
        self.held[kind].setdefault(storage.data_ptr(), storage)  # alive, so that no other one gets its place
        return storage.nbytes() if is_new else 0

    def saved_of(self, found):
        return tuple(Saved(one.module, self.saved[one.module], self.given[one.module], one.is_block) for one in found.saved)


def follow(model, given, **mesh):
    return plan_build(create_schedule(model, Mesh(**mesh)), example_inputs=given).microbatch


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit", "mixtral"])
def test_what_autograd_keeps_is_what_it_really_keeps(name):
    given = {argument: tensor.clone() for argument, tensor in inputs(name, 0)[0].items()}
    found = follow(family(name), given)
    torch.manual_seed(0)
    model = MAKERS[name]()
    real = RealPass(model, given, found.saved)
    ids_of_experts = 4 * 4 if name == "mixtral" else 0  # transformers' float32 stand-in hides the offsets of 4 experts
    assert real.saved_of(found) == tuple(
        evolve(one, saved_bytes=one.saved_bytes + (ids_of_experts if one.is_block else 0)) for one in found.saved
    )
    assert sum(one.saved_bytes for one in found.saved) > 2**16
    assert found.without_gradient == real.backward() == ()
    assert [one.module for one in found.saved if one.is_block] == [one.module for one in found.saved if one.input_bytes]


def test_what_is_dropped_out_and_computed_again():
    model = llama("cpu", attention_dropout=0.1)
    model.activation_checkpointing_enable()
    given = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
    found = follow(model, given)
    real = RealPass(model, given, found.saved)
    assert sum(one.saved_bytes for one in found.saved) == real.saved.total()
    kept_whole = follow(llama(attention_dropout=0.1), given)
    layers = [one.input_bytes for one in kept_whole.saved if one.is_block]
    assert sum(layers) < real.saved.total() < sum(one.saved_bytes for one in kept_whole.saved) / 3


class Around(nn.Module):
    """A scripted module and a tensor in a plain attribute, which a copy that is looked at shares with the user's model."""

    def __init__(self):
        super().__init__()
        self.scripted = torch.jit.script(nn.Linear(4, 4))
        self.plain = [torch.ones(4, requires_grad=True)]

    def forward(self, x):
        return self.scripted(x) * self.plain[0]


def test_what_a_copy_shares_with_the_model_has_no_gradient_after():
    model = Around()
    found = follow(model, {"x": torch.ones(2, 4)})
    assert sum(one.saved_bytes for one in found.saved) > 0
    assert found.without_gradient == ()
    assert all(tensor.grad is None for tensor in (*model.parameters(), *model.plain))


class Partly(nn.Module):
    """Something trained that is not used, something behind a detach, something frozen, and a tie."""

    def __init__(self, device="meta"):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4, device=device), nn.Linear(4, 4, device=device)
        self.behind, self.frozen = nn.Linear(4, 4, device=device), nn.Linear(4, 4, device=device)
        self.head = nn.Linear(4, 4, device=device)
        self.also_unused = nn.Linear(4, 4, bias=False, device=device)
        self.also_unused.weight = self.unused.weight
        self.frozen.requires_grad_(requires_grad=False)

    def forward(self, x):
        y = self.frozen(self.used(x)) + self.behind(x).detach()
        return {"hidden": [self.head(y)], "length": 3, "ids": torch.zeros(2, dtype=torch.long)}


def test_what_no_gradient_reaches():
    x = torch.ones(2, 4)
    found = follow(Partly(), {"x": x})
    assert found.without_gradient == ("unused.weight", "unused.bias", "behind.weight", "behind.bias")
    assert found.without_gradient == RealPass(Partly("cpu"), {"x": x}, []).backward()
    its_input = 2 * 4 * 4  # of the used one and of the head; the others need none
    assert found.saved == (Saved("used", its_input), Saved("head", its_input))


def test_a_model_that_is_not_trained():
    model = split_plain(plain(), Mesh(tensor=2)).runtime.model.requires_grad_(requires_grad=False).eval()
    found = plan_build(split_plain(model, Mesh(tensor=2)), example_inputs=IDS).microbatch
    assert {call.direction for call in found.calls} == {"forward"}
    assert not any(one.saved_bytes for one in found.saved)
    assert found.without_gradient == ()


UP, DOWN = 2 * 8 * 4, 2 * 4 * 4
"""Bytes of the output of a linear of 4 to 8 features for 2 rows, and of its input."""


@pytest.mark.parametrize(
    ("when", "op", "forward", "backward"),
    [
        ("forward_post", "all_reduce", ("all_reduce", UP), None),
        ("forward_post", "all_gather", ("all_gather", 2 * UP), None),
        ("forward_post", "reduce_scatter", ("reduce_scatter", UP), ("all_gather", UP)),
        ("forward_pre", "all_reduce", ("all_reduce", DOWN), None),
        ("forward_pre", "all_gather", ("all_gather", 2 * DOWN), ("reduce_scatter", 2 * DOWN)),
        ("backward_post", "all_reduce", None, ("all_reduce", DOWN)),
        ("backward_post", "all_gather", None, ("all_gather", DOWN)),
        ("backward_pre", "reduce_scatter", ("all_gather", 2 * UP), ("reduce_scatter", 2 * UP)),
        ("forward_post", "divide", None, None),
    ],
)
def test_each_synchronisation_sends_what_its_table_says(when, op, forward, backward):
    model = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 8, device="meta"), nn.Tanh())
    sch = create_schedule(model, Mesh(data=2)).at["1"]
    sch = sch.sync(when, op, mesh_axis="data", **({"axis": 0} if op in ("all_gather", "reduce_scatter") else {}))
    found = follow_microbatch(LocalModel(model, sch.mesh, sch.tree, sch.layout, example_inputs={"input": torch.empty(2, 4)}))
    sent = {call.direction: (call.op, call.num_bytes) for call in found.calls}
    assert sent == {way: what for way, what in (("forward", forward), ("backward", backward)) if what}
    assert {(c.module, c.mesh_axis, c.num_calls, c.cargo) for c in found.calls} <= {("1", "data", 1, "activations")}


def test_gradients_that_neighbours_sum_are_told_from_activations():
    sch = create_schedule(llama(num_key_value_heads=2), Mesh(tensor=4))
    sch = sch.at["**.q_proj"].colwise(granule=8).at["**.[kv]_proj"].colwise(granule=8, replicate=True)
    sch = sch.at["**.self_attn"].set(num_key_value_groups=2).at["**.o_proj"].rowwise(granule=8)
    found = plan_build(sch, example_inputs=TOKENS).microbatch
    of_keys = [call for call in found.calls if call.module == "model.layers.1.self_attn.k_proj"]
    assert {(c.direction, c.op, c.mesh_axis, c.num_calls, c.num_bytes, c.cargo) for c in of_keys} == {
        ("backward", "all_reduce", "tensor", 1, 2 * 8 * 64 * 4, "activations"),
        ("backward", "all_reduce", "tensor", 1, 8 * 64 * 4, "gradients"),
    }


@pytest.mark.parametrize("name", ["llama", "bert", "gemma2", "deepseek_v3"])
def test_of_repeated_layers_two_stand_for_all(name, monkeypatch):
    monkeypatch.setitem(families._SMALL, "num_hidden_layers", 7)
    sch = schedule_of(name, Mesh(data=2, expert=2, tensor=2) if name == "deepseek_v3" else Mesh(tensor=2))
    given = {**inputs(name, 0)[0], **({} if name == "bert" else {"use_cache": False})}
    once = plan_build(sch, example_inputs=given).microbatch
    ran = []
    monkeypatch.setattr(RepeatedLayers, "_watched_forward", lambda self, path, module, forward: ran.append(path) or forward)
    each = plan_build(sch, example_inputs=given).microbatch
    assert len(ran) >= 2 * 7
    assert len(each.calls) > 7
    assert once == each


def test_where_the_model_is_cut_makes_no_difference():
    whole = plan_build(split_plain(plain(), Mesh(tensor=2)), example_inputs=IDS)
    sch = split_plain(plain(), Mesh(pipe=2, tensor=2)).at["blocks.0"].cut_pipeline_stage()
    assert plan_build(sch, example_inputs=IDS).microbatch == whole.microbatch


def test_a_plan_with_a_micro_batch_is_the_plan_without_it_and_one_record_more():
    sch = split_plain(plain(), Mesh(tensor=2))
    plan = plan_build(sch, example_inputs=IDS)
    assert isinstance(plan.microbatch, Microbatch)
    assert plan.microbatch.calls
    assert loads(dumps(plan)) == plan
    assert evolve(plan, microbatch=None) == plan_build(sch)
    with torch.inference_mode():
        assert plan_build(sch, example_inputs=IDS).fingerprint == plan.fingerprint


@torch.library.custom_op("shardplan_tests::without_gradient", mutates_args=())
def without_gradient(x: torch.Tensor) -> torch.Tensor:
    """Give twice the input."""
    return x * 2


without_gradient.register_fake(torch.empty_like)


class Forward(nn.Linear):
    """Has no backward pass."""

    def forward(self, x):
        return without_gradient(super().forward(x))


class InPlace(nn.Linear):
    """Writes into its weight, which cannot be done where gradients are noted."""

    def forward(self, x):
        return super().forward(x) + self.weight.mul_(1).sum()


class Asks(nn.Linear):
    """Asks for values again and again where gradients are noted."""

    def forward(self, x):
        x = super().forward(x)
        return x * sum(x[0, 0].item() for _ in range(100)) if torch.is_grad_enabled() else x


@pytest.mark.parametrize("kind", [Forward, InPlace, Asks])
def test_what_has_no_backward_pass_is_planned_without_a_record(kind):
    plan = plan_build(create_schedule(kind(4, 4, device="meta"), Mesh()), example_inputs={"x": torch.empty(2, 4)})
    assert plan.microbatch is None


def test_an_error_of_the_record_itself_is_not_hidden(monkeypatch):
    monkeypatch.setattr(saved_activations.SavedActivations, "_note", None)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        follow(nn.Linear(4, 4, device="meta"), {"input": torch.empty(2, 4)})


def test_blocks_are_the_outermost_repeated_layers():
    expert = nn.ModuleList(nn.Linear(1, 1) for _ in range(2))
    layers = nn.ModuleList(nn.ModuleDict({"experts": expert}) for _ in range(2))
    model = nn.ModuleDict(
        {"one": nn.ModuleList([nn.Tanh()]), "few": nn.Sequential(expert, nn.Linear(1, 1)), "layers": layers}
    )
    assert list(blocks(model)) == ["few.0.0", "few.0.1"]
    assert list(blocks(nn.ModuleDict({"h": nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Tanh(), nn.Tanh()))}))) == [
        "h.1.0",
        "h.1.1",
    ]
