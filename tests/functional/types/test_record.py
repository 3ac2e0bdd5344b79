"""A run on fake tensors, written down: values, calls, modules, whose code runs, and that the user's model stays as it is."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from torch import nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from shardplan.functional import create_schedule
from shardplan.functional.layout.local_model import LocalModel
from shardplan.functional.model.rng_state import FORKS
from shardplan.functional.types.record import Stopped, record_local, record_whole
from shardplan.functional.types.tape import ValueRef
from shardplan.specs import Mesh
from shardplan.specs.layout_steps import AddBiasAfterSync, ForkRng, ShareRng


def recorded(forward, *shapes, **modules):
    """Return the tape of a model with this forward pass, run on inputs of these shapes."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for name, module in modules.items():
                setattr(self, name, module)

        def forward(self, *args, **given):
            return forward(self, *args, *given.values())

    inputs = {f"x{at}": torch.empty(shape, device="meta") for at, shape in enumerate(shapes)}
    return whole(Model(), inputs)


def whole(model, inputs):
    sch = create_schedule(model, Mesh())
    tape = record_whole(LocalModel(model, sch.mesh, sch.tree, sch.layout, example_inputs=inputs))
    assert not isinstance(tape, Stopped), repr(tape.error)
    return tape


def calls(tape):
    """Return the calls, without those of autograd, which detaches the results that it saves."""
    return [call for call in tape.calls if call.name != "detach"]


def names(tape):
    return [call.name for call in calls(tape)]


def split(model, edit, inputs):
    sch = edit(create_schedule(model, Mesh(tensor=2)))
    return LocalModel(model, sch.mesh, sch.tree, sch.layout, example_inputs=inputs)


def operands(call):
    return [value.value for value in call.arguments.values() if isinstance(value, ValueRef)]


def test_values_pass_from_call_to_call_and_tensors_have_paths():
    linear = nn.Linear(4, 8)
    tape = recorded(lambda self, x: self.linear(x).relu().sum(0), (2, 4), linear=linear)
    assert names(tape) == ["linear", "relu", "sum"]
    linear, relu, total = calls(tape)
    assert operands(relu) == list(linear.results)
    assert operands(total) == list(relu.results)
    assert tape.outputs == list(total.results)
    paths = {name: tape.values[ref.value].path for name, ref in linear.arguments.items()}
    assert paths == {"input": "", "weight": "linear.weight", "bias": "linear.bias"}
    assert linear.arguments["input"] == ValueRef(tape.inputs["x0"], requires_grad=False)
    assert linear.arguments["weight"].requires_grad
    assert total.arguments["dim"] == [0]
    assert tape.values[total.results[0]].shape == (8,)
    assert (linear.module, relu.module) == ("linear", "")
    assert relu.is_pointwise
    assert not total.is_pointwise
    assert relu.line.startswith("test_record.py:")


def test_a_change_through_a_view_gives_every_view_a_new_value():
    def forward(_, x):
        y = x + 1
        half = y[0]
        half.mul_(2)
        return y + half

    tape = recorded(forward, (2, 4))
    add, _, change, written, *_, last = [call for call in calls(tape) if call.name != "view"]
    assert (change.name, written.name) == ("mul_", "written")
    assert operands(written) == [add.results[0], change.results[0]]
    assert operands(last) == [written.results[0], change.results[0]]
    storages = {tape.values[number].storage for call in (add, change, written) for number in call.results}
    assert len(storages) == 1


def test_views_that_are_gone_are_not_written():
    def forward(_, x):
        y = x + 1
        first = y[0].sin()
        y.mul_(2)
        return y + first

    with torch.no_grad():
        assert "written" not in names(recorded(forward, (2, 4)))


def test_functions_that_run_several_operators_are_one_call():
    def forward(_, x, w):
        y = x @ w
        y = torch.einsum("ab,bc->ac", y, w)
        y = scaled_dot_product_attention(y[None], y[None], y[None])
        y = y.reshape(-1, 2).flatten().reshape(2, -1)
        return dropout(y, 0.5, training=True)

    tape = recorded(forward, (2, 4), (4, 4))
    assert [name for name in names(tape) if name != "unsqueeze"] == [
        "matmul",
        "einsum",
        "scaled_dot_product_attention",
        "reshape",
        "flatten",
        "reshape",
        "dropout",
    ]
    by_name = {call.name: call for call in tape.calls}
    assert by_name["einsum"].arguments["equation"] == "ab,bc->ac"
    assert len(by_name["einsum"].arguments["tensors"]) == 2
    assert by_name["reshape"].arguments["shape"] == [2, -1]
    assert not by_name["scaled_dot_product_attention"].is_random
    assert by_name["dropout"].is_random


def test_attention_of_torch_is_seen_inside():
    tape = recorded(lambda self, x: self.attention(x, x, x)[0], (3, 2, 8), attention=nn.MultiheadAttention(8, 2))
    assert names(tape).count("linear") == 2
    assert "addmm" not in names(tape)


def test_constants_are_written_with_their_values():
    tape = recorded(lambda _, x: x + torch.tensor([1.0, x.shape[1]]).sum(), (2, 4))
    constant = next(call for call in tape.calls if call.name == "constant")
    assert constant.arguments == {"values": [1.0, 4.0]}


def test_reading_a_value_is_a_call():
    assert "_local_scalar_dense" in names(recorded(lambda _, x: x if x.sum() else -x, (2, 4)))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_the_code_of_an_autograd_function_has_its_name():
    tape = recorded(lambda self, x: Double.apply(self.linear(x)).sin(), (2, 4), linear=nn.Linear(4, 4))
    assert {call.name: call.function for call in calls(tape)} == {"linear": "", "exp": "Double", "sin": ""}
    assert calls(tape)[-1].arguments["self"].requires_grad


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_keep_gradients(use_reentrant):
    tape = recorded(
        lambda self, x: checkpoint(lambda y: y.sin().cos(), self.linear(x), use_reentrant=use_reentrant).exp(),
        (2, 4),
        linear=nn.Linear(4, 4),
    )
    assert names(tape) == ["linear", "sin", "cos", "exp"]
    assert all(call.arguments["self"].requires_grad and not call.function for call in calls(tape)[1:])


def test_modules_have_their_inputs_and_outputs_outside_the_hooks_of_the_layout():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    inputs = {"input": torch.empty(2, 4, device="meta")}
    subject = split(model, lambda sch: sch.at["0"].colwise().at["1"].rowwise(), inputs)
    tape = record_local(evolve(subject, layout=(*subject.layout, AddBiasAfterSync("1"))))
    assert not isinstance(tape, Stopped)
    assert [(call.name, call.step is None) for call in tape.calls] == [
        ("shardplan::sum_gradient", False),
        ("linear", True),
        ("linear", True),
        ("shardplan::all_reduce", False),
        ("add", False),
    ]
    first, second, root = tape.modules
    assert (first.path, second.path, root.path) == ("0", "1", "")
    assert first.inputs == root.inputs == (tape.inputs["input"],)
    assert second.inputs == first.outputs == tape.calls[1].results
    assert second.outputs == root.outputs == tape.calls[-1].results
    assert [(call.start, call.stop) for call in tape.modules] == [(0, 2), (2, 5), (0, 5)]
    assert tape.values[first.outputs[0]].shape == (2, 4)
    assert tape.calls[2].arguments["bias"] is None
    assert tape.num_calls == {"": 1, "0": 1, "1": 1}
    assert tape.calls[0].arguments["group"] == "tensor"
    assert tape.calls[0].arguments["x"].requires_grad is False
    assert tape.calls[3].arguments["x"].requires_grad


def test_the_lookup_of_own_rows_is_of_the_step_except_the_lookup():
    tape = record_local(
        split(
            nn.Embedding(8, 4, padding_idx=1),
            lambda sch: sch.at[""].vocab_parallel(),
            {"input": torch.empty(2, dtype=torch.long, device="meta")},
        )
    )
    assert not isinstance(tape, Stopped)
    assert [call.name for call in tape.calls if call.step is None] == ["embedding"]
    assert {"where", "masked_fill", "shardplan::own_ids"} <= {call.name for call in tape.calls if call.step is not None}


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.shared, self.onwards = nn.Dropout(0.5), nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x):
        x = self.inner(x)
        x = self.inner(self.shared(x))
        return self.inner(self.onwards(x))


def test_forked_random_numbers_are_told_apart():
    model = nn.Sequential(nn.Dropout(0.5), Noisy(), nn.Dropout(0.5))
    sch = create_schedule(model, Mesh(tensor=2))
    layout = (ForkRng("1"), ShareRng("1.shared"), ShareRng("1.onwards", onwards=True))
    inputs = {"input": torch.empty(2, 4, device="meta")}
    for _ in range(2):
        tape = record_local(LocalModel(model, sch.mesh, sch.tree, layout, example_inputs=inputs))
        assert not isinstance(tape, Stopped)
        assert [call.is_forked for call in tape.calls] == [False, True, False, True, False, False, False]


class Stops(nn.Module):
    def forward(self, x):
        return x @ x


@pytest.mark.parametrize("inner", [False, True])
def test_a_run_that_stops_leaves_no_random_numbers_of_its_own_behind(inner):
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), Stops()))
    sch = create_schedule(model, Mesh(tensor=2))
    layout = (ForkRng("1"), *([ForkRng("1.1")] if inner else []))
    subject = LocalModel(model, sch.mesh, sch.tree, layout, example_inputs={"input": torch.empty(2, 4, device="meta")})
    assert isinstance(record_local(subject), Stopped)
    assert (FORKS.outside, FORKS.differ) == ([], False)


def test_repeated_layers_are_skipped_in_both_runs():
    model = nn.Sequential(nn.Embedding(8, 4), *(nn.Linear(4, 4) for _ in range(5)))
    subject = split(
        nn.Sequential(model),
        lambda sch: sch.at["0.*"].set(in_features=4),
        {"input": torch.empty(2, dtype=torch.long, device="meta")},
    )
    for record in (record_whole, record_local):
        tape = record(subject)
        assert not isinstance(tape, Stopped)
        assert [(skipped.path, skipped.representative) for skipped in tape.skipped] == [
            (f"0.{at}", "0.2") for at in (3, 4, 5)
        ]
        first, second = (call for call in tape.calls if call.name == "linear")
        assert tape.skipped[0].inputs == second.results
        assert tape.skipped[0].representative_inputs == first.results
        assert len([call for call in record(subject, skip=False).calls if call.name == "linear"]) == 5


def test_a_run_that_stops_says_where():
    class Picks(nn.Module):
        def forward(self, x):
            return x.unique()

    sch = create_schedule(model := nn.Sequential(nn.ReLU(), Picks()), Mesh())
    stopped = record_whole(LocalModel(model, sch.mesh, sch.tree, example_inputs={"input": torch.empty(2, device="meta")}))
    assert isinstance(stopped, Stopped)
    assert stopped.path == "1"


def test_the_users_model_stays_as_it_is():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    whole(model, {"input": torch.ones(2, 4)})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.compiler.is_compiling()


def test_values_that_are_assumed_are_marked():
    tape = recorded(lambda _, x: x[x.sum(1) > 0][torch.arange(2) > 0], (2, 4))
    assert [call.is_guessed for call in tape.calls if call.name == "index"] == [True, False]


class Experts(nn.Module):
    """Experts that each compute the tokens which chose them, as most code does."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        total = torch.zeros_like(x)
        for expert in range(2):
            (places,) = torch.where(chosen == expert)
            if len(places):
                total.index_add_(0, places, self.experts[expert](x[places]))
        return total


def test_all_experts_run():
    tape = whole(Experts(), {"x": torch.empty(2, 4, device="meta")})
    assert [call.module for call in tape.calls if call.name == "linear"] == ["router", *(f"experts.{n}" for n in range(2))]


def test_the_operator_that_takes_the_arguments_is_recorded():
    def forward(_, x):
        x = x.repeat_interleave(2, dim=1)
        x = torch.repeat_interleave(input=x, repeats=3, dim=0)
        return torch.repeat_interleave(x, torch.tensor([1] * 6), 0)

    tape = recorded(forward, (2, 4))
    calls = [call for call in tape.calls if call.name == "repeat_interleave"]
    assert [(call.arguments["repeats"], call.arguments["dim"]) for call in calls[:2]] == [(2, 1), (3, 0)]
    assert isinstance(calls[2].arguments["repeats"], ValueRef)
    assert all(isinstance(call.arguments["self"], ValueRef) for call in calls)
    assert tape.values[tape.outputs[0]].shape == (6, 8)
