"""Where a model is cut: the verbs, what they refuse, and cuts that balance the stages."""

from __future__ import annotations

from collections import OrderedDict
from itertools import combinations, pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardplan.functional import create_schedule, execute, plan_build, stage_modules
from shardplan.functional.dialects import find_dialect
from shardplan.functional.pipeline.cuts import balance, longest_chain
from shardplan.specs import Mesh, PlainInput, PlanError
from shardplan.specs.pipeline import size_in
from tests.helpers.models import Block
from tests.helpers.pipelines import ARCHITECTURES, one_after_another
from tests.helpers.strategies import law

WIDTH = 8
IDS = {"ids": torch.zeros(2, 6, dtype=torch.long)}
X = {"x": torch.zeros(3, WIDTH)}
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
}
TORCH = {"schedule": "1f1b", "num_microbatches": 4}


class Stack(nn.Module):
    """An embedding, blocks, a head; one module that is called twice, one that does nothing, one that is never called."""

    def __init__(self, num_blocks=4, vocab=16, *, tied=False):
        super().__init__()
        self.embed = nn.Embedding(vocab, WIDTH)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(num_blocks))
        self.nothing = nn.Identity()
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, vocab, bias=False))
        if tied:
            self.last[1].weight = self.embed.weight

    def forward(self, ids, options=None):
        x = self.twice(self.embed(ids))
        for block in self.blocks:
            x = block(x)
        return self.last(self.nothing(self.twice(x)))


class Layers(nn.Module):
    """An embedding, layers of one weight each, a head."""

    def __init__(self, num_layers=4, vocab=16, *, tied=False):
        super().__init__()
        self.embed = nn.Embedding(vocab, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers))
        self.head = nn.Linear(WIDTH, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Loop(nn.Module):
    """Layers, one after another, of which some may be left out."""

    def __init__(self, layers, num_called=None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.num_called = num_called

    def forward(self, x):
        for layer in self.layers[: self.num_called]:
            x = torch.tanh(layer(x))
        return x


class Gate(nn.Module):
    """Code that looks at values, which torch.export refuses."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

    def forward(self, x):
        if x.sum() > 0:
            return self.drop(self.up(x))
        return self.down(x)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = Block(WIDTH), Gate(), Block(WIDTH)

    def forward(self, x):
        return self.last(self.gate(self.first(x)))


class Last(nn.Module):
    """A module that ends where one inside it ends, and another one after it."""

    def __init__(self):
        super().__init__()
        self.last, self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.head(self.last(x))


class Residual(nn.Module):
    """Two tensors whose gradients come back cross the boundary after ``second``."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        kept = self.first(x)
        return self.last(torch.tanh(self.second(kept))) + kept


def on_meta(make, *args, **options):
    with torch.device("meta"):
        return make(*args, **options)


def cut(*paths, mesh=None, model=None):
    sch = create_schedule(model or on_meta(Stack), mesh or Mesh(pipe=len(paths) + 1))
    for path in paths:
        sch = sch.at[path].cut_pipeline_stage()
    return sch


def plan(sch, example_inputs=IDS, **options):
    return plan_build(sch, example_inputs=example_inputs, **options)


def cuts_of(sch, example_inputs=IDS, **options):
    return plan(sch, example_inputs, **options).pipeline.cuts


def refusal(sch, example_inputs=IDS, **options):
    with pytest.raises(PlanError) as caught:
        plan_build(sch, example_inputs=example_inputs, **options)
    return str(caught.value)


def run(modules, model, x, seed):
    """Return the output of modules, one after another, and the gradients of a model's parameters."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = one_after_another(modules, x)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    return output, {path: parameter.grad for path, parameter in model.named_parameters() if parameter.grad is not None}


def assert_stages_are_the_model(plan, model, num_stages):
    stages = stage_modules(plan, model)
    assert len(stages) == len(plan.stages) == num_stages
    for training in (True, False):
        for module in (model, *stages):
            module.train(training)
        for seed in range(4):
            x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed)) + (3 if seed % 2 else -3)
            expected, gradients = run([model], model, x, seed)
            found, ours = run(stages, model, x, seed)
            assert torch.equal(found, expected)
            for path, gradient in gradients.items():
                assert torch.equal(ours[path], gradient), path
            assert not any(gradient.any() for path, gradient in ours.items() if path not in gradients)


# -- verbs


def test_a_pattern_cuts_all_that_it_selects():
    assert cuts_of(cut("blocks.[012]", mesh=Mesh(pipe=4))) == ("blocks.0", "blocks.1", "blocks.2")


@pytest.mark.parametrize("chosen", [some for n in (1, 2, 3) for some in combinations(range(3), n)])
def test_there_is_one_stage_more_than_cuts(chosen):
    found = plan(cut(*(f"blocks.{i}" for i in reversed(chosen)), mesh=Mesh(pipe=len(chosen) + 1)))
    assert found.pipeline.cuts == tuple(f"blocks.{i}" for i in chosen)
    assert len(found.stages) == len(chosen) + 1
    assert {spec.stage for spec in found.tree.values()} == set(range(len(chosen) + 1))


def test_cuts_in_any_order_and_said_twice_give_one_plan():
    paths = ("blocks.2", "blocks.0.up", "embed")
    plans = {plan(cut(*order, mesh=Mesh(pipe=4))).fingerprint for order in (paths, paths[::-1], (*paths, paths[0]))}
    assert len(plans) == 1


def test_what_a_stage_gives_is_what_the_next_one_takes():
    stages = plan(cut("embed", "blocks.1", "last.0")).stages
    assert [stage.outputs for stage in stages[:-1]] == [stage.inputs for stage in stages[1:]]
    assert [str(given) for given in stages[0].inputs] == ["ids i64[batch, sequence]"]
    assert [given.type for given in stages[-1].outputs] == ["f32[batch, sequence, 16]"]


class Squared(nn.Module):
    def forward(self, x):
        return (x @ x.mT).flatten(1).unsqueeze(-1).expand(-1, -1, WIDTH)


class Padded(nn.Module):
    def forward(self, x):
        return nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 4))


class Strided(nn.Module):
    def forward(self, x):
        return x[:, ::2]


@pytest.mark.parametrize("make", [Squared, Padded, Strided])
def test_sizes_that_the_code_computes_are_known_for_every_batch(make):
    model = Last()
    model.last = nn.Sequential(nn.Linear(WIDTH, WIDTH), make())
    found = plan(cut("last", model=model), {"x": torch.zeros(2, 6, WIDTH)})
    for sizes in ({"batch": 2, "sequence": 6}, {"batch": 3, "sequence": 9}):
        given = tuple(size_in(size, sizes) for size in found.stages[0].outputs[0].shape)
        assert given == model.last(torch.zeros(*sizes.values(), WIDTH)).shape


@pytest.mark.parametrize("model", [Last(), nn.Sequential(OrderedDict(last=nn.Linear(WIDTH, WIDTH), head=nn.Tanh()))])
def test_a_size_that_the_code_fixes_is_not_said_to_vary(model):
    name = "input" if isinstance(model, nn.Sequential) else "x"
    found = plan(cut("last", model=model), {name: X["x"]})
    assert found.stages[0].inputs[0].shape == ("batch", WIDTH)
    assert [size.name for size in found.pipeline.sizes] == ["batch"]


def test_a_module_that_several_stages_call_is_held_by_each():
    found = plan(cut("blocks.0", "blocks.1"))
    assert (found.tree["twice.weight"].stage, found.tree["twice.weight"].also_on) == (0, (2,))


def test_verbs_leave_the_schedule_that_they_are_called_on():
    sch = create_schedule(on_meta(Stack), Mesh(pipe=2))
    before = (sch.cuts, sch.leaves, sch.handed, sch.even)
    sch.at["blocks.0"].cut_pipeline_stage().at["blocks.1"].leaf().cut_evenly(2).with_stages([sch.runtime.model.embed])
    assert (sch.cuts, sch.leaves, sch.handed, sch.even) == before


# -- refusals


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("unused", "unused: it is never called, so that no stage can end after it\n      Cut a module that runs"),
        ("twice", "twice: it is called 2 times, so that it ends in 2 places\n      Cut a module around it"),
        (
            "nothing",
            (
                "nothing: no stage can end after it: nothing is computed in it, or in a region without gradients or under"
                " autocast, which is one operation\n      Cut the module before or around it"
            ),
        ),
        ("last", "last: nothing runs after it, and a stage would be empty\n      Cut an earlier module"),
        ("last.1", "last.1: nothing runs after it, and a stage would be empty\n      Cut an earlier module"),
    ],
)
def test_a_cut_where_no_stage_can_end_is_refused(path, text):
    assert refusal(cut(path)) == f"1 problem\n  {text}"


def test_all_wrong_cuts_are_named_at_once():
    message = refusal(cut("twice", "unused", "nothing", "last", mesh=Mesh(pipe=2)))
    assert message.startswith("4 problems\n")
    assert all(f"  {path}: " in message for path in ("twice", "unused", "nothing", "last"))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("", "(model): it is the model itself, and nothing comes after it\n      Cut a module inside it"),
        ("blocks.0.up.weight", "blocks.0.up.weight: it selects tensors, and this verb is for modules"),
        ("bloks.0", "bloks.0: no module and no tensor has a path like this\n      The closest are blocks.0"),
    ],
)
def test_a_cut_is_a_module_inside_the_model(path, text):
    assert text in refusal(cut(path))


@pytest.mark.parametrize(
    "say",
    [
        lambda sch: sch.at[""].cut_pipeline_stage(),
        lambda sch: sch.at["bloks.0"].cut_pipeline_stage(),
        lambda sch: sch.cut_evenly(0),
        lambda sch: sch.with_stages([nn.Identity()]),
    ],
)
def test_who_has_said_something_wrong_of_stages_is_not_told_that_nothing_was_said(say):
    assert "nothing is cut" not in refusal(say(create_schedule(on_meta(Stack), Mesh(pipe=2))))


def test_two_cuts_that_end_at_the_same_place_are_refused():
    message = refusal(cut("last", "last.1", model=Last()), X)
    assert message == "1 problem\n  last.1: it ends where 'last' ends, and both are cut there\n      Cut one of them"


def test_a_module_inside_a_leaf_is_not_cut():
    message = refusal(cut("blocks.0.up").at["blocks.0"].leaf())
    assert "blocks.0.up: it is inside 'blocks.0', a leaf, which runs as one operation\n      Cut after 'blocks.0'" in message


def test_the_model_itself_is_no_leaf():
    assert "(model): it is the model itself" in refusal(cut("blocks.0").at[""].leaf())


@pytest.mark.parametrize("target", [None, "deepspeed"])
@pytest.mark.parametrize(("num_cuts", "pipe"), [(2, 2), (1, 4), (1, 1)])
def test_stages_are_as_many_as_the_pipe_axis_has_places(num_cuts, pipe, target):
    config = DEEPSPEED if target else None
    message = refusal(cut(*(f"blocks.{i}" for i in range(num_cuts)), mesh=Mesh(pipe=pipe)), target=target, config=config)
    assert f"the model is cut into {num_cuts + 1} stages, and the mesh has pipe={pipe}, with one stage each" in message


def test_a_pipe_axis_without_a_cut_is_refused():
    message = refusal(cut(mesh=Mesh(pipe=2, data=3)))
    assert "(model): the mesh has pipe=2, and nothing is cut: ranks past the first stage would hold nothing" in message
    assert "sch.at[module].cut_pipeline_stage(), or sch.cut_evenly(2); Mesh(data=6, tensor=1) has as many ranks" in message


@pytest.mark.parametrize("say", [lambda sch: sch.at["blocks.0"].cut_pipeline_stage(), lambda sch: sch.cut_evenly(2)])
def test_stages_are_not_found_without_example_inputs(say):
    message = refusal(say(create_schedule(on_meta(Stack), Mesh(pipe=2))), None)
    assert "example_inputs: stages are found by calling the model on fake tensors, and it is not known with what" in message
    assert "plan_build(..., example_inputs={'input_ids': torch.zeros(2, 16, dtype=torch.long)})" in message


def test_example_inputs_are_tensors_and_plain_values():
    found = plan(cut("blocks.0"), {**IDS, "options": True})
    assert found.pipeline.example[1] == PlainInput("options", value=True)
    assert len(found.stages[0].inputs) == 1
    message = refusal(cut("blocks.0"), {**IDS, "options": object()})
    assert "example_inputs['options']: a plan holds tensors and plain values, and this is object" in message


@pytest.mark.parametrize("value", [{"scale": 2, "names": ["a"]}, ["a", 1], None])
def test_plain_values_of_any_kind_reach_the_model(value):
    class Picky(Stack):
        def forward(self, ids, options=None):
            assert type(options) is type(value)
            return super().forward(ids)

    assert plan(cut("blocks.0", model=Picky()), {**IDS, "options": value})


def test_stages_are_declared_in_one_way():
    sch = cut("blocks.0")
    assert "(model): stages are declared by cut_pipeline_stage and by cut_evenly\n      Keep one" in refusal(
        sch.cut_evenly(2)
    )
    model = sch.runtime.model
    assert "declared by cut_pipeline_stage and by with_stages" in refusal(sch.with_stages([model.embed, model.last]))
    both = create_schedule(model, Mesh(pipe=2)).cut_evenly(2).with_stages([model.embed, model.last])
    assert "declared by cut_evenly and by with_stages" in refusal(both)


# -- stages that are handed over


HAND = "sch.with_stages([model.first, model.second])"
NO_STAGE = "a stage is a module of the model, and this is none: "


def handed(model, *stages, mesh=None):
    return create_schedule(model, mesh or Mesh(pipe=len(stages))).with_stages(stages)


@pytest.mark.parametrize(
    ("choose", "text"),
    [
        (
            lambda m: [m.first, nn.Linear(2, 2)],
            f"{NO_STAGE}a Linear\n      {HAND}",
        ),
        (
            lambda m: [m.first, "gate"],
            f"{NO_STAGE}'gate'\n      Give the module itself: model.get_submodule('gate')",
        ),
        (lambda m: [m.first, None], f"{NO_STAGE}a NoneType\n      {HAND}"),
        (lambda m: [], f"it takes a list of modules, not an empty one\n      {HAND}"),
        (lambda m: 2, f"it takes a list of modules, not a int\n      {HAND}"),
        (lambda m: None, f"it takes a list of modules, not a NoneType\n      {HAND}"),
        (
            lambda m: [m.first, m.first],
            "a module belongs to one stage, and 'first' is given twice\n      Give each part of the model once",
        ),
        (
            lambda m: [m.first, m.gate, m.last, m.last.up],
            "a module belongs to one stage, and 'last.up' is inside 'last'\n      Give each part of the model once",
        ),
        (
            lambda m: [m.last.up, m.last],
            "a module belongs to one stage, and 'last.up' is inside 'last'\n      Give each part of the model once",
        ),
        (
            lambda m: [m, m.last],
            "a module belongs to one stage, and 'last' is inside '(model)'\n      Give each part of the model once",
        ),
        (
            lambda m: [m, m],
            "a module belongs to one stage, and '(model)' is given twice\n      Give each part of the model once",
        ),
    ],
)
def test_stages_that_are_handed_over_are_different_modules_of_the_model(choose, text):
    model = Gated()
    message = refusal(create_schedule(model, Mesh(pipe=2)).with_stages(choose(model)), X)
    assert message == f"1 problem\n  with_stages: {text}"


def test_handing_over_less_than_the_model_holds_is_refused():
    model = Gated()
    message = refusal(handed(model, model.first, model.last), X)
    left_out = [("up.weight", "8, 8"), ("up.bias", "8"), ("down.weight", "8, 8"), ("down.bias", "8")]
    causes = (
        f"  gate.{path}  f32[{shape}]: it is in none of the stages that were handed over\n"
        "      Hand over a module that holds it"
        for path, shape in left_out
    )
    assert message == "\n".join(["4 problems", *causes])


def test_a_tied_tensor_is_left_out_by_no_stage_that_holds_it_under_another_path():
    class Shared(Gated):
        def __init__(self):
            super().__init__()
            self.first, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.gate.weight = self.last.again = self.first.weight

    model = Shared()
    message = refusal(handed(model, model.last), X)
    assert message.startswith("2 problems\n")
    assert "  first.bias  f32[8]: it is in none" in message
    assert "  gate.bias  f32[8]: it is in none" in message


def test_stages_that_do_not_take_what_the_one_before_gives_are_refused():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(3, WIDTH)

        def forward(self, x):
            return self.second(self.first(x)[:, :3])

    model = Narrow()
    message = refusal(handed(model, model.first, model.second), X)
    assert message.startswith("1 problem\n  second: called with what was given before it (first f32[batch, 8]), it raises ")
    assert message.endswith("\n      Hand over modules each of which takes what the one before gives")
    message = refusal(handed(model, model.second, model.first), X)
    assert "  second: called with what was given before it (x f32[batch, sequence]), it raises RuntimeError: " in message


def test_stages_give_tensors():
    class Counting(nn.Module):
        def forward(self, x):
            return x, 3

    class Model(Gated):
        def __init__(self):
            super().__init__()
            del self.gate
            self.count = Counting()

        def forward(self, x):
            return self.last(self.count(self.first(x))[0])

    model = Model()
    message = refusal(handed(model, model.first, model.count, model.last), X)
    cause = "it gives a int beside its tensors\n      Let it give a tensor, or a tuple of tensors"
    assert message == f"1 problem\n  count: {cause}"


# -- code that cannot be exported


def test_what_cannot_be_exported_is_named_with_two_ways_out():
    message = refusal(cut("first", model=Gated()), X)
    assert message.startswith("1 problem\n  gate: torch.export stops in this Gate: ")
    assert "Mark it as a leaf: sch.at['gate'].leaf(); or " in message
    assert "sch.with_stages([...])" in message


def test_what_cannot_be_exported_in_the_model_itself_names_one_way_out():
    class Looks(Gated):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else self.first(x)

    message = refusal(cut("first", model=Looks()), X)
    assert "(model): torch.export stops in this Looks: " in message
    assert ".leaf()" not in message
    assert "sch.with_stages([...])" in message


def test_what_cannot_be_exported_is_said_once_and_not_on_the_terminal(capfd):
    refusal(cut("first", model=Gated()), X)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("paths", [("first",), ("gate",), ("first", "gate")])
def test_a_leaf_runs_as_it_is(paths):
    model = Gated()
    found = plan(cut(*paths, model=model).at["gate"].leaf(), X)
    assert found.pipeline.leaves == ("gate",)
    assert_stages_are_the_model(found, model, len(paths) + 1)


def test_the_text_of_a_leaf_that_digests_are_taken_of_stays_wherever_its_function_stands():
    found = plan(cut("gate", model=Gated()).at["gate"].leaf(), X)
    text = found.runtime.partition.codes[0].graphs[True].text
    assert "call_module gate(" in text
    assert "call_function shardplan.functional.opaque.tensors_of(" in text


def test_leaves_of_one_kind_run_each_with_its_own_tensors():
    model = Loop(Gate() for _ in range(4))
    found = plan(cut("layers.0", "layers.2", model=model).at["layers.*"].leaf(), X)
    assert found.pipeline.leaves == tuple(f"layers.{i}" for i in range(4))
    assert_stages_are_the_model(found, model, 3)


def test_stages_that_are_handed_over_are_not_exported():
    model = Gated()
    found = plan(handed(model, model.first, model.gate, model.last), X)
    assert found.pipeline.chain == (("first",), ("gate",), ("last",))
    assert found.pipeline.cuts == ("first", "gate")
    assert_stages_are_the_model(found, model, 3)


# -- sequences


def sequence():
    return nn.Sequential(OrderedDict(first=Block(WIDTH), gate=Gate(), last=Block(WIDTH)))


@pytest.mark.parametrize("paths", [("first",), ("gate",), ("first", "gate")])
def test_a_sequence_that_is_cut_between_its_modules_is_not_exported(paths):
    model = sequence()
    found = plan(cut(*paths, model=model), {"input": X["x"]})
    assert [name for stage in found.pipeline.chain for name in stage] == ["first", "gate", "last"]
    assert found.pipeline.cuts == paths == tuple(stage[-1] for stage in found.pipeline.chain[:-1])
    assert_stages_are_the_model(found, model, len(paths) + 1)


def test_a_sequence_that_is_cut_inside_a_module_is_exported():
    message = refusal(cut("first.up", model=sequence()), {"input": X["x"]})
    assert "gate: torch.export stops in this Gate" in message
    model = sequence()
    assert_stages_are_the_model(plan(cut("first.up", model=model).at["gate"].leaf(), {"input": X["x"]}), model, 2)


def test_modules_of_a_sequence_may_have_numbers_for_names():
    model = nn.Sequential(Block(WIDTH), Gate(), nn.Identity(), Block(WIDTH))
    for paths in (("0",), ("1",), ("0", "2")):
        assert_stages_are_the_model(plan(cut(*paths, model=model), {"input": X["x"]}), model, len(paths) + 1)


def test_a_module_that_stands_twice_in_a_sequence_runs_twice():
    again = nn.Linear(WIDTH, WIDTH)
    model = nn.Sequential(OrderedDict(first=again, middle=nn.Tanh(), last=again, end=nn.Linear(WIDTH, WIDTH)))
    assert_stages_are_the_model(plan(cut("middle", model=model), {"input": X["x"]}), model, 2)


@pytest.mark.parametrize("paths", [("last",), ("first", "last")])
def test_a_cut_after_the_last_module_of_a_sequence_is_refused(paths):
    message = refusal(cut(*paths, model=sequence(), mesh=Mesh(pipe=2)), {"input": X["x"]})
    assert "last: nothing runs after it, and a stage would be empty\n      Cut an earlier module" in message


# -- balance


@law
@given(st.data())
def test_equal_weights_are_shared_out_to_within_one(data):
    count = data.draw(st.integers(1, 40))
    num_stages = data.draw(st.integers(1, count))
    ends = balance([data.draw(st.integers(1, 5))] * count, num_stages)
    sizes = [end - start for start, end in pairwise([0, *ends])]
    assert len(sizes) == num_stages
    assert ends[-1] == count
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@law
@given(st.data())
def test_no_other_runs_have_a_lower_sum_of_squares(data):
    weights = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=8))
    num_stages = data.draw(st.integers(1, len(weights)))

    def cost(ends):
        return sum(sum(weights[start:end]) ** 2 for start, end in pairwise([0, *ends]))

    ends = balance(weights, num_stages)
    assert all(start < end for start, end in pairwise([0, *ends]))
    others = ((*some, len(weights)) for some in combinations(range(1, len(weights)), num_stages - 1))
    assert cost(ends) == min(map(cost, others))


def evenly(model, num_stages, by="parameters", example_inputs=IDS):
    """Return how many of the chain's modules each stage has."""
    sch = create_schedule(model, Mesh(pipe=num_stages)).cut_evenly(num_stages, by)
    ends = [longest_chain(model).index(path) + 1 for path in cuts_of(sch, example_inputs)]
    return [end - start for start, end in pairwise([0, *ends, len(longest_chain(model))])]


@pytest.mark.parametrize("by", ["parameters", "flops"])
@pytest.mark.parametrize(("num_layers", "num_stages"), [(4, 2), (7, 2), (7, 3), (5, 5), (6, 1)])
def test_stages_of_a_plain_stack_have_equal_shares_to_within_one_module(num_layers, num_stages, by):
    model = Loop(on_meta(nn.Linear, WIDTH, WIDTH) for _ in range(num_layers))
    shares = evenly(model, num_stages, by, X)
    assert sum(shares) == num_layers
    assert max(shares) - min(shares) <= 1


def test_embedding_and_head_count_with_the_parameters():
    assert evenly(on_meta(Layers, 8), 2) == [4, 4]
    assert evenly(on_meta(Layers, 8), 4) == [1, 3, 3, 1]
    first_heavy = on_meta(Layers, 8, vocab=24)
    first_heavy.head = on_meta(nn.Linear, WIDTH, 2)
    assert evenly(first_heavy, 2) == [3, 5]
    last_heavy = on_meta(Layers, 8, vocab=24)
    last_heavy.embed = on_meta(nn.Embedding, 2, WIDTH)
    assert evenly(last_heavy, 2) == [5, 3]
    huge = on_meta(Layers, 8, vocab=4000)
    huge.head = on_meta(nn.Linear, WIDTH, 2)
    assert evenly(huge, 3) == [1, 4, 3]


def test_a_tied_embedding_counts_at_both_ends():
    for vocab, num_stages in ((16, 2), (16, 4), (64, 2)):
        alone, tied = (on_meta(Layers, 8, vocab, tied=tied) for tied in (False, True))
        assert evenly(tied, num_stages) == evenly(alone, num_stages)


def test_only_what_computes_has_flops():
    assert evenly(on_meta(Layers, 8, vocab=16), 2, "flops") == [5, 3]
    model = on_meta(Layers, 8, vocab=32)
    assert evenly(model, 2, "flops") == [6, 2]
    model.embed = on_meta(nn.Embedding, 4000, WIDTH)
    assert evenly(model, 2, "flops") == [6, 2]


def test_flops_and_parameters_differ_where_a_module_holds_more_than_it_computes():
    class Table(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.table = nn.Embedding(rows, WIDTH)
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.linear(x) + self.table.weight[0]

    model = on_meta(lambda: Loop([Table(1000), *(Table(2) for _ in range(5))]))
    assert evenly(model, 2, "parameters", X) == [1, 5]
    assert evenly(model, 2, "flops", X) == [3, 3]


def test_a_transformer_is_cut_between_its_layers():
    model = ARCHITECTURES["llama"].make("meta")
    sch = create_schedule(model, Mesh(pipe=2)).cut_evenly(2)
    assert cuts_of(sch, ARCHITECTURES["llama"].batch()) == ("model.layers.1",)


def test_more_stages_than_layers_are_refused():
    sch = create_schedule(on_meta(Layers, 4), Mesh(pipe=5)).cut_evenly(5)
    cause = "5 stages are asked for, and the longest chain of repeated modules has 4: layers.0 to layers.3"
    fix = "Ask for fewer, or cut by hand: sch.at[module].cut_pipeline_stage()"
    assert refusal(sch) == f"1 problem\n  cut_evenly: {cause}\n      {fix}"


def test_without_repeated_modules_nothing_is_cut_evenly():
    cause = "2 stages are asked for, and no ModuleList or Sequential holds repeated modules with parameters"
    message = refusal(create_schedule(on_meta(Residual), Mesh(pipe=2)).cut_evenly(2), X)
    assert message == f"1 problem\n  cut_evenly: {cause}\n      Cut by hand: sch.at[module].cut_pipeline_stage()"


@pytest.mark.parametrize("num_stages", [0, -1, True, 2.0, "2", None])
def test_the_number_of_stages_is_a_positive_integer(num_stages):
    sch = create_schedule(on_meta(Layers), Mesh(pipe=2)).cut_evenly(num_stages)
    assert f"cut_evenly: num_stages is a positive integer, not {num_stages!r}\n      sch.cut_evenly(4)" in refusal(sch)


def test_what_can_be_balanced_is_listed():
    message = refusal(create_schedule(on_meta(Layers), Mesh(pipe=2)).cut_evenly(2, by="memory"))
    assert "cut_evenly: stages cannot be balanced by 'memory'\n      There are parameters, flops" in message


def test_layers_that_are_never_called_have_no_flops():
    model = Loop([nn.Linear(WIDTH, WIDTH) for _ in range(3)], num_called=2)
    message = refusal(create_schedule(model, Mesh(pipe=2)).cut_evenly(2, by="flops"), X)
    assert "layers.2: it is never called, so that it has no flops" in message


# -- DeepSpeed


def with_deepspeed(mesh, config=None, model=None, **changes):
    sch = cut("second", mesh=mesh, model=model or on_meta(Residual))
    sch = sch.at["first"].colwise(gather_output=True) if mesh.tensor > 1 else sch
    return {"sch": sch, "example_inputs": X, "target": "deepspeed", "config": {**(config or DEEPSPEED), **changes}}


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_pipelines_have_no_split_gradients(stage):
    message = refusal(**with_deepspeed(Mesh(pipe=2), zero_optimization={"stage": stage}))
    assert f"config.zero_optimization.stage: ZeRO {stage} splits gradients" in message
    assert 'DeepSpeed refuses it with pipe > 1\n      Write "zero_optimization": {"stage": 1}' in message


def test_deepspeed_pipelines_take_zero_1_and_zero_0_without_clipping():
    assert plan(**with_deepspeed(Mesh(pipe=2)))
    assert plan(**with_deepspeed(Mesh(pipe=2), zero_optimization={"stage": 0}, gradient_clipping=0.0))


def test_batch_sizes_are_over_data_and_micro_batches_alone():
    assert plan(**with_deepspeed(Mesh(pipe=2, data=2), train_batch_size=16))
    message = refusal(**with_deepspeed(Mesh(pipe=2, data=2), train_batch_size=32))
    assert "config.train_batch_size: 32 is not micro batch 2 x accumulation steps 4 x data 2 = 16\n      Write 16" in message


@pytest.mark.parametrize(
    ("section", "fix"),
    [
        ({}, '"pipeline": {"pipe_partitioned": false, "grad_partitioned": false}'),
        ({"grad_partitioned": False}, '"pipeline": {"pipe_partitioned": false}'),
        ({"pipe_partitioned": False, "grad_partitioned": True}, '"pipeline": {"grad_partitioned": false}'),
    ],
)
def test_with_tensor_parallelism_deepspeed_sends_back_one_gradient(section, fix):
    message = refusal(**with_deepspeed(Mesh(pipe=2, tensor=2), pipeline=section))
    cause = (
        "with tensor=2 DeepSpeed splits what it sends, and then sends exactly one gradient back; stage 0 gives 2 tensors"
        " with a gradient: first f32[batch, 8], second f32[batch, 8]"
    )
    assert message == f"1 problem\n  config.pipeline: {cause}\n      Write {fix}"


def test_with_tensor_parallelism_deepspeed_sends_back_no_less_than_one_gradient():
    class Frozen(Residual):
        def __init__(self):
            super().__init__()
            self.first.requires_grad_(False)

        def forward(self, x):
            return self.last(self.second(self.first(x)))

    sch = cut("first", mesh=Mesh(pipe=2, tensor=2), model=on_meta(Frozen))
    message = refusal(sch, X, target="deepspeed", config=DEEPSPEED)
    assert "sends exactly one gradient back; stage 0 gives 0 tensors with a gradient\n      Write " in message


def test_deepspeed_sends_several_gradients_where_it_does_not_split_what_it_sends():
    unsplit = {"pipe_partitioned": False, "grad_partitioned": False}
    assert plan(**with_deepspeed(Mesh(pipe=2, tensor=2), pipeline=unsplit)).config["pipeline"] == unsplit
    assert plan(**with_deepspeed(Mesh(pipe=2)))
    one = on_meta(Layers)
    options = {"example_inputs": IDS, "target": "deepspeed", "config": DEEPSPEED}
    assert plan(cut("layers.1", mesh=Mesh(pipe=2, tensor=2), model=one), **options)


# -- torch


def with_torch(model, *paths, mesh=None, example_inputs=IDS, **config):
    return {
        "sch": cut(*paths, mesh=mesh, model=model),
        "example_inputs": example_inputs,
        "target": "torch",
        "config": config,
    }


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "config.num_microbatches: it is a positive integer, not None"),
        ({"num_microbatches": 0}, "config.num_microbatches: it is a positive integer, not 0"),
        ({"num_microbatches": True}, "config.num_microbatches: it is a positive integer, not True"),
        ({"num_microbatches": "4"}, "config.num_microbatches: it is a positive integer, not '4'"),
        ({"num_microbatches": 2}, 'there are 2\n      Write 3 or more, or "schedule": "gpipe"'),
        (
            {**TORCH, "schedule": "zero_bubble"},
            "config.schedule: 'zero_bubble' is unknown\n      There are gpipe, 1f1b, inter",
        ),
        ({**TORCH, "shedule": "gpipe"}, "config.shedule: "),
    ],
)
def test_what_torch_cannot_schedule_is_refused(config, text):
    assert text in refusal(**with_torch(on_meta(Layers), "layers.0", "layers.2", **config))


def test_every_unknown_key_is_named():
    message = refusal(**with_torch(on_meta(Layers), "layers.1", **TORCH, loss="mse", clip=1.0))
    assert "config.clip: " in message
    assert "config.loss: " in message


def test_a_config_that_torch_does_not_read_is_refused_without_stages_too():
    with pytest.raises(PlanError, match="config"):
        plan_build(create_schedule(on_meta(Layers), Mesh()), target="torch", config={"shedule": "gpipe"})


def test_torch_needs_a_config_with_stages():
    options = with_torch(on_meta(Layers), "layers.1")
    causes = {None: "torch's pipelining needs the number of micro-batches", 3: "it is plain JSON values by name, not 3"}
    for config, cause in causes.items():
        message = refusal(**{**options, "config": config})
        assert message == f'1 problem\n  config: {cause}\n      config={{"schedule": "1f1b", "num_microbatches": 8}}'


def test_torch_takes_no_config_without_stages():
    sch = create_schedule(on_meta(Layers), Mesh())
    for config in (None, {}):
        assert plan(sch, target="torch", config=config).pipeline is None
    cause = "it is for a pipeline, and the model is not cut\n      Leave it out"
    message = refusal(sch, target="torch", config=TORCH)
    assert message == f"2 problems\n  config.schedule: {cause}\n  config.num_microbatches: {cause}"


def test_gpipe_takes_fewer_micro_batches_than_stages():
    assert plan(**with_torch(on_meta(Layers), "layers.1", schedule="gpipe", num_microbatches=1))


INTERLEAVED = {"schedule": "interleaved_1f1b", "num_microbatches": 4}


@pytest.mark.parametrize(("num_stages", "pipe"), [(2, 2), (3, 2), (4, 3)])
def test_interleaved_stages_are_several_at_each_place(num_stages, pipe):
    paths = [f"layers.{i}" for i in range(num_stages - 1)]
    message = refusal(**with_torch(on_meta(Layers), *paths, mesh=Mesh(pipe=pipe), **INTERLEAVED))
    assert f"(model): the model is cut into {num_stages} stages, and interleaved_1f1b puts 2 or more at each of " in message
    assert f"Cut it into {2 * pipe} stages: sch.cut_evenly({2 * pipe})" in message


def test_interleaved_stages_go_round():
    paths = [f"layers.{i}" for i in range(3)]
    found = plan(**with_torch(on_meta(Layers), *paths, mesh=Mesh(pipe=2), **INTERLEAVED))
    assert [found.tree[f"layers.{i}.weight"].places(found.mesh) for i in range(4)] == [(0,), (1,), (0,), (1,)]


def test_interleaved_rounds_divide_the_micro_batches():
    paths = [f"layers.{i}" for i in range(3)]
    options = with_torch(on_meta(Layers), *paths, mesh=Mesh(pipe=2), **{**INTERLEAVED, "num_microbatches": 5})
    message = refusal(**options)
    assert "config.num_microbatches: interleaved_1f1b runs 5 micro-batches in 2 rounds, which does not divide" in message
    assert "Write 4" in message


def test_two_copies_at_one_place_are_not_averaged_twice():
    class Ends(Layers):
        """The first weight is used again in the third of four stages."""

        def __init__(self):
            super().__init__()
            self.layers[2].weight = self.layers[0].weight

    paths = [f"layers.{i}" for i in range(3)]
    options = with_torch(on_meta(Ends), *paths, mesh=Mesh(pipe=2, data=2), **INTERLEAVED)
    message = refusal(**options)
    assert "layers.0.weight  f32[8, 8]: stages 0, 2 hold it, two of them at one place" in message
    assert "two DDP modules there would average it twice\n      Mesh(data=1)" in message
    assert plan(**with_torch(on_meta(Ends), *paths, mesh=Mesh(pipe=2), **INTERLEAVED))
    assert plan(**with_torch(on_meta(Layers, tied=True), *paths, mesh=Mesh(pipe=2, data=2), **INTERLEAVED))


# -- the loss


@pytest.mark.parametrize(("target", "config"), [("deepspeed", DEEPSPEED), ("torch", TORCH)])
def test_stages_cannot_train_without_a_loss(target, config):
    found = plan(cut("layers.1", model=on_meta(Layers)), target=target, config=config)
    dialect, _ = find_dialect(target)
    (problem,) = dialect.check_loss(found, None)
    assert problem.path == "loss_fn"
    assert problem.fix == "execute(plan, loss_fn=lambda output, target: ...)"
    assert dialect.check_loss(found, nn.CrossEntropyLoss()) == []


def test_deepspeed_takes_the_loss_that_the_last_stage_gives():
    class Loss(Residual):
        def forward(self, x):
            return super().forward(x).sum()

    found = plan(cut("second", model=on_meta(Loss)), X, target="deepspeed", config=DEEPSPEED)
    assert found.stages[-1].outputs[0].shape == ()
    assert find_dialect("deepspeed")[0].check_loss(found, None) == []


class RealTensors(TorchDispatchMode):
    """Notes what is made elsewhere than on meta."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "meta" and result.numel() > WIDTH:
            self.made.append(str(func))
        return result


@pytest.fixture
def _one_rank(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
def test_a_missing_loss_is_refused_before_anything_is_allocated():
    found = plan(cut("layers.1", model=on_meta(Layers), mesh=Mesh()), target="torch", config=INTERLEAVED)
    with (
        RealTensors() as real,
        pytest.raises(PlanError, match="loss_fn: a pipeline computes the loss on its last stage, and there is no function"),
    ):
        execute(found, device="cpu")
    assert real.made == []
    with RealTensors() as real:
        execute(found, device="cpu", loss_fn=nn.CrossEntropyLoss())
    assert real.made
