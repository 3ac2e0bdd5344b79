"""Repeated modules, exported once: the stages are those of an export of each, whatever the modules do."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest
import torch
from torch import nn

from shardplan.functional import create_schedule, plan_build, stage_modules
from shardplan.functional.types.check import Checked
from shardplan.specs import Mesh, dumps, loads
from tests.helpers.models import Block
from tests.helpers.pipelines import ARCHITECTURES, one_after_another

WIDTH = 8
X = {"x": torch.zeros(3, WIDTH)}
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "mixtral": "model.layers", "bert": "bert.encoder.layer"}
MODES = 2
"""A model is exported in training and in evaluation."""


@pytest.fixture(autouse=True)
def _layers_of_these_tests_are_known(monkeypatch):
    """What is repeated are layers of libraries; those of these tests count as such."""
    import_module("shardplan.functional.model.repeated_layers")
    monkeypatch.setattr(
        sys.modules["shardplan.functional.model.repeated_layers"], "_LIBRARIES", ("torch", "transformers", "tests")
    )


@pytest.fixture
def repeated(monkeypatch):
    """What was found to be repeated: pairs of a module and the one that stood for it, and whether it was written out."""
    found = []
    module = sys.modules["shardplan.functional.pipeline.export"]
    write_out = module.write_out

    def noted(graph, repeats, *args):
        is_written = write_out(graph, repeats, *args)
        found.append(({(path, first.path) for path, first in repeats.repeated}, is_written))
        return is_written

    monkeypatch.setattr(module, "write_out", noted)
    return found


@pytest.fixture
def each(monkeypatch):
    """Return a function that calls another while every module is exported on its own."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            repeats = sys.modules["shardplan.functional.pipeline.repeat_markers"].MarkedLayers
            patch.setattr(repeats, "watch", lambda *_: None)
            return function(*args, **kwargs)

    return call


class Model(nn.Module):
    """Layers between an embedding of the input and a head."""

    def __init__(self, layers):
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(layers)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def planned(model, *cuts, example=None):
    sch = create_schedule(model, Mesh(pipe=len(cuts) + 1))
    for path in cuts:
        sch = sch.at[path].cut_pipeline_stage()
    return plan_build(sch, example_inputs=example or X)


def run(modules, model, x, seed=0):
    """Return the output of modules, one after another, and the gradients of a model's parameters."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = one_after_another(modules, x)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    drawn = torch.rand(1)
    return output, drawn, {path: p.grad for path, p in model.named_parameters() if p.grad is not None}


def assert_stages_are_the_model(model, plan, seeds=2):
    stages = stage_modules(plan, model)
    for training in (True, False):
        for module in (model, *stages):
            module.train(training)
        for seed in range(seeds):
            x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed))
            expected, drawn, gradients = run([model], model, x, seed)
            found, also_drawn, ours = run(stages, model, x, seed)
            assert torch.equal(found, expected)
            assert torch.equal(also_drawn, drawn)
            assert ours.keys() >= gradients.keys()
            for path, gradient in gradients.items():
                assert torch.equal(ours[path], gradient), path
            assert not any(gradient.any() for path, gradient in ours.items() if path not in gradients)
    return stages


def assert_alike(model, *cuts):
    """Assert that stages are the model."""
    plan = planned(model, *cuts)
    assert_stages_are_the_model(model, plan)
    return plan


def pairs(repeated):
    """Return what was repeated in training, where evaluation had the same."""
    training, evaluation = repeated[:MODES]
    assert training == evaluation
    assert training[1], "it was exported again"
    return {(int(path.rpartition(".")[2]), int(first.rpartition(".")[2])) for path, first in training[0]}


# -- transformers


@pytest.mark.parametrize("name", LAYERS)
def test_transformers_have_the_same_stages_however_layers_are_exported(name, repeated, each):
    architecture = ARCHITECTURES[name]
    model = architecture.make("meta", num_hidden_layers=4, n_layer=4) if name == "gpt2" else None
    model = model or architecture.make("meta", num_hidden_layers=4)
    cuts = (f"{LAYERS[name]}.0", f"{LAYERS[name]}.2")
    plan = architecture.plan(model, cuts)
    for found, is_written in repeated:
        assert is_written
        layers = {pair for pair in found if pair[0].rpartition(".")[0] == LAYERS[name]}
        assert len(layers) == 3 - (name == "bert")  # to its first layer mask and ids may still differ in length
    repeated.clear()
    alone = each(architecture.plan, model, cuts)
    assert all(not found for found, _ in repeated)
    assert [stage.digest for stage in plan.stages] == [stage.digest for stage in alone.stages]
    assert plan.fingerprint == alone.fingerprint
    assert dumps(loads(dumps(plan))) == dumps(alone)


# -- what layers differ in


class Scaled(nn.Module):
    """Its code reads a number that each layer has of its own."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.linear = scale, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.linear(x)) * self.scale


class Odd(nn.Module):
    """Its code goes one of two ways."""

    def __init__(self, index):
        super().__init__()
        self.index, self.up, self.down = index, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        if self.index % 2:
            return x + self.up(x)
        return x * torch.sigmoid(self.down(x))


class Named(nn.Module):
    """It has a number that its code does not read."""

    def __init__(self, index):
        super().__init__()
        self.index, self.linear = index, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Inner(nn.Module):
    """What differs is inside a module inside it."""

    def __init__(self, scale):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), Scaled(scale))

    def forward(self, x):
        return x + self.inner(x)


class Configured(nn.Module):
    """What differs is in an object that each layer has of its own."""

    def __init__(self, config):
        super().__init__()
        self.config, self.linear = config, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.linear(x) * self.config["scale"]


class Option(nn.Module):
    """Its code asks whether it has an attribute, which not every layer has."""

    def __init__(self, scale=None):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        if scale is not None:
            self.scale = scale

    def forward(self, x):
        return self.linear(x) * getattr(self, "scale", 0.5)


class Plain(nn.Module):
    """It holds a tensor that is no parameter and no buffer."""

    def __init__(self, value):
        super().__init__()
        self.linear, self.shift = nn.Linear(WIDTH, WIDTH), [torch.full((WIDTH,), value)]

    def forward(self, x):
        return torch.tanh(self.linear(x) + self.shift[0])


class Constant(nn.Module):
    """It holds a tensor as an attribute."""

    def __init__(self, value):
        super().__init__()
        self.linear, self.shift = nn.Linear(WIDTH, WIDTH), torch.full((WIDTH,), value)

    def forward(self, x):
        return torch.tanh(self.linear(x) + self.shift)


class Sized(nn.Module):
    """Layers of one class and of other shapes."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, width), nn.Linear(width, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Method(nn.Module):
    """Its code reads by way of a property, of a method and of an operator of Python's."""

    def __init__(self, index):
        super().__init__()
        self.index, self.linear = index, nn.Linear(WIDTH, WIDTH)

    @property
    def doubled(self):
        return 2 * self.index

    def sign(self):
        return (-1) ** self.index

    def forward(self, x):
        return torch.tanh(self.linear(x)) * self.sign() + self.doubled


class Function(nn.Module):
    """Each layer has a function of its own."""

    def __init__(self, index):
        super().__init__()
        self.linear, self.act = nn.Linear(WIDTH, WIDTH), (torch.tanh, torch.sigmoid)[index % 2]

    def forward(self, x):
        return self.act(self.linear(x))


class Wide(nn.Module):
    """The layer is told by what it is called with, and by what the class says."""

    def __init__(self, index):
        super().__init__()
        self.index, self.linear = index, nn.Linear(WIDTH, WIDTH)

    def __len__(self):
        return self.index

    def forward(self, x):
        return self.linear(x) * (len(self) + 1)


class Default(nn.Module):
    """What the class says, a layer may say otherwise."""

    scale = 1.0

    def __init__(self, scale=None):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        if scale is not None:
            self.scale = scale

    def forward(self, x):
        return torch.tanh(self.linear(x)) * self.scale


class Overridden(Function):
    """What a method of the class does, a layer may do otherwise."""

    def __init__(self, index):
        super().__init__(index)
        act = vars(self).pop("act")
        if index % 2:
            self.activate = act

    def activate(self, x):
        return torch.tanh(x)

    def forward(self, x):
        return self.activate(self.linear(x))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: map(Named, range(5)), {(1, 0), (2, 0), (3, 0), (4, 0)}),
        (lambda: map(Scaled, (1.0, 2.0, 3.0, 4.0)), set()),
        (lambda: map(Scaled, (2.0, 3.0, 2.0, 3.0)), {(2, 0), (3, 1)}),
        (lambda: map(Scaled, (1, 1.0, True, 1)), {(3, 0)}),
        (lambda: map(Inner, (2.0, 3.0, 2.0, 3.0)), {(2, 0), (3, 1)}),
        (lambda: map(Odd, range(4)), set()),
        (lambda: map(Odd, (0, 1, 0, 1, 1)), {(2, 0), (3, 1), (4, 1)}),
        (lambda: map(Configured, [{"scale": n} for n in (2, 3, 2)]), {(2, 0)}),
        (lambda: map(Option, (None, 2.0, None, 2.0, None)), {(2, 0), (3, 1), (4, 0)}),
        (lambda: map(Plain, (1.0, 2.0, 3.0)), set()),
        (lambda: map(Constant, (1.0, 2.0, 3.0)), set()),
        (lambda: map(Sized, (8, 4, 8, 4, 4)), {(2, 0), (3, 1), (4, 1)}),
        (lambda: map(Method, (0, 1, 0, 2)), {(2, 0)}),
        (lambda: map(Function, range(4)), {(2, 0), (3, 1)}),
        (lambda: map(Wide, (0, 1, 2)), set()),
        (lambda: map(Default, (None, None, 2.0, None)), {(1, 0), (3, 0)}),
        (lambda: map(Default, (2.0, 3.0, 2.0, 4.0)), {(2, 0)}),
        (lambda: map(Overridden, (0, 0, 1, 0)), {(1, 0), (3, 0)}),
        (lambda: (nn.Dropout(p) for p in (0.1, 0.5, 0.1, 0.9)), {(2, 0)}),
    ],
)
def test_a_layer_stands_for_those_alone_that_agree_in_what_its_code_reads(make, expected, repeated):
    torch.manual_seed(0)
    model = Model(make())
    assert_alike(model, "blocks.0")
    assert pairs(repeated) == expected


def test_a_layer_of_another_mode_is_exported_on_its_own(repeated):
    torch.manual_seed(0)
    model = Model([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(p)) for p in (0.1, 0.5, 0.1, 0.5)])
    assert_alike(model, "blocks.0")
    assert {(2, 0), (3, 1)} <= pairs_in(repeated, "blocks.")


def pairs_in(repeated, prefix):
    """Return the pairs of modules right under a prefix."""
    found, is_written = repeated[0]
    assert is_written
    names = ((path.removeprefix(prefix), first.removeprefix(prefix)) for path, first in found)
    return {(int(path), int(first)) for path, first in names if path.isdigit()}


@pytest.mark.parametrize("frozen", ["linear.weight", "linear"])
def test_a_layer_with_frozen_tensors_gets_no_gradients(frozen, repeated):
    torch.manual_seed(0)
    model = Model(map(Named, range(4)))
    model.get_submodule("blocks.2.linear").requires_grad_(requires_grad=False)
    if frozen == "linear.weight":
        model.get_submodule("blocks.2.linear").bias.requires_grad_()
    assert_alike(model, "blocks.0")
    assert pairs(repeated) == {(1, 0), (3, 0)}


def test_layers_that_share_tensors_share_gradients(repeated):
    torch.manual_seed(0)
    model = Model(map(Named, range(4)))
    model.blocks[2].linear.weight = model.blocks[0].linear.weight
    model.blocks[3].linear = model.blocks[1].linear
    model.embed.weight = model.blocks[1].linear.weight
    assert_alike(model, "blocks.0", "blocks.2")
    assert pairs(repeated) == set()  # a layer with a tensor of another one is like no other


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("tied", [0, 2])
@pytest.mark.parametrize("what", ["weight", "module"])
def test_a_layer_with_one_tensor_in_two_places_is_not_taken_for_one_with_two(tied, what):
    torch.manual_seed(0)
    model = Model(Two() for _ in range(4))
    block = model.blocks[tied]
    if what == "weight":
        block.down.weight = block.up.weight
    else:
        block.down = block.up
    assert_alike(model, "blocks.1")


def test_a_layer_that_uses_a_tensor_of_the_model_uses_that_one(repeated):
    class Borrowing(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.linear, self.table = nn.Linear(WIDTH, WIDTH), table

        def forward(self, x):
            return self.table(torch.tanh(self.linear(x)))

    torch.manual_seed(0)
    table = nn.Linear(WIDTH, WIDTH)
    other = nn.Linear(WIDTH, WIDTH)
    assert_alike(Model(Borrowing((table, other)[i % 2]) for i in range(4)), "blocks.1")
    assert repeated


# -- what layers do besides


class Writes(nn.Module):
    """It writes an attribute of itself."""

    def __init__(self):
        super().__init__()
        self.linear, self.count = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x):
        self.last = x.shape
        return torch.tanh(self.linear(x)) * len(self.last)


class ReadsAll(nn.Module):
    """It reads all of its attributes at once."""

    def __init__(self, scale):
        super().__init__()
        self.linear, self.scale = nn.Linear(WIDTH, WIDTH), scale

    def forward(self, x):
        return torch.tanh(self.linear(x)) * vars(self)["scale"]


class ReadsDict(ReadsAll):
    def forward(self, x):
        return torch.tanh(self.linear(x)) * self.__dict__["scale"]


class WritesDict(ReadsAll):
    def forward(self, x):
        self.__dict__["last"] = self.scale
        return torch.tanh(self.linear(x)) * self.last


class Gate(nn.Module):
    """Code that looks at values."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.up(x)) if x.sum() > 0 else self.down(x)


class Holding(nn.Module):
    """It holds a module that is a leaf."""

    def __init__(self, index):
        super().__init__()
        self.index, self.norm, self.gate = index, nn.LayerNorm(WIDTH), Gate()

    def forward(self, x):
        return x + self.gate(self.norm(x))


class Counting(nn.Module):
    """It counts in a buffer how often it ran in training."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.count.add_(1.0)
        return torch.tanh(self.linear(x) + self.count)


class InPlace(nn.Module):
    """It writes into what it is given."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x.mul_(0.5)
        return x.add_(torch.tanh(self.linear(x.clone())))


class Same(nn.Module):
    """It returns what it is given."""

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "make",
    [
        lambda: (Writes() for _ in range(4)),
        lambda: map(ReadsAll, (1.0, 2.0, 1.0, 3.0)),
        lambda: map(ReadsDict, (1.0, 2.0, 1.0, 3.0)),
        lambda: map(WritesDict, (1.0, 2.0, 1.0, 3.0)),
        lambda: (nn.Sequential(nn.Linear(WIDTH, WIDTH), Same()) for _ in range(4)),
        lambda: (Same() for _ in range(4)),
        lambda: (nn.Identity() for _ in range(4)),
    ],
)
def test_whatever_a_layer_does_stages_are_the_model(make):
    torch.manual_seed(0)
    assert_alike(Model(make()), "embed")


class Twofold(Model):
    """What the first layer is given is made by the model."""

    def forward(self, x):
        x = self.embed(x) * 2.0
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_layers_may_write_into_the_tensor_that_they_are_given():
    torch.manual_seed(0)
    assert_alike(Twofold(InPlace() for _ in range(4)), "embed")


class Remembers(nn.Module):
    """It appends to a list that all layers have."""

    def __init__(self, seen):
        super().__init__()
        self.linear, self.seen = nn.Linear(WIDTH, WIDTH), seen

    def forward(self, x):
        self.seen.append(torch.tanh(self.linear(x)))
        return self.seen[-1]


class Remembering(Model):
    def __init__(self):
        seen = []
        super().__init__(Remembers(seen) for _ in range(4))
        self.seen = seen

    def forward(self, x):
        self.seen.clear()
        return super().forward(x) + sum(self.seen)


def test_layers_that_write_into_what_they_have_in_common_are_each_exported():
    torch.manual_seed(0)
    assert_alike(Remembering(), "embed")


class Lists(nn.Module):
    """It appends to a list that it is given."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, seen=None, options=None):
        x = torch.tanh(self.linear(x))
        if seen is not None:
            seen.append(x)
        if options is not None:
            options["last"] = x
        return x


class Collecting(Model):
    def forward(self, x):
        x, seen, options = self.embed(x), [], {}
        for block in self.blocks:
            x = block(x, seen, options=options)
        return self.head(x + sum(seen) + options["last"])


def test_layers_that_write_into_what_they_are_given_are_each_exported(repeated):
    torch.manual_seed(0)
    model = Collecting(Lists() for _ in range(4))
    assert_alike(model, "blocks.1")
    assert pairs(repeated) == set()


class Pair(nn.Module):
    """It gives a tensor beside what it is given, a number and nothing."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask, *, scale=1.0):
        return (torch.tanh(self.linear(x)) * scale + mask, mask), (x.mean(), None, 3)


class Pairs(Model):
    def forward(self, x):
        x, mask, total = self.embed(x), x > 0, 0.0
        for number, block in enumerate(self.blocks):
            (x, mask), (mean, nothing, three) = block(x, mask, scale=float(number // 2))
            assert nothing is None
            total = total + mean * three
        return self.head(x) + total


def test_layers_that_give_several_things_are_called_alike_or_not_repeated(repeated):
    torch.manual_seed(0)
    assert_alike(Pairs(Pair() for _ in range(4)), "blocks.1")
    assert pairs(repeated) == {(1, 0), (3, 2)}


def leafed(model, *cuts):
    sch = create_schedule(model, Mesh(pipe=len(cuts) + 1)).at["blocks.*.gate"].leaf()
    for path in cuts:
        sch = sch.at[path].cut_pipeline_stage()
    return plan_build(sch, example_inputs=X)


@pytest.mark.parametrize("paths", [("blocks.1",), ("blocks.0", "blocks.2.gate")])
def test_a_leaf_inside_a_layer_is_that_layers_own(paths):
    torch.manual_seed(0)
    model = Model(map(Holding, range(4)))
    plan = leafed(model, *paths)
    assert_stages_are_the_model(model, plan, seeds=6)


def test_buffers_that_layers_write_are_their_own(repeated):
    torch.manual_seed(0)
    model = Model(Counting() for _ in range(4))
    plan = planned(model, "blocks.1")
    stages = stage_modules(plan, model)
    x, expected = torch.randn(5, WIDTH), []
    for modules in ([model], stages):
        with torch.no_grad():
            for block in model.blocks:
                block.count.zero_()
        expected.append([run(modules, model, x)[0] for _ in range(3)])
        assert [block.count.item() for block in model.blocks] == [3.0] * 4
    assert all(map(torch.equal, *expected))
    assert repeated


def test_batch_norms_keep_statistics_of_their_own():
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))  # noqa: E731
    model = Model(make() for _ in range(4))
    plan = planned(model, "blocks.1")
    stages, state = stage_modules(plan, model), {path: t.clone() for path, t in model.state_dict().items()}
    x, found = torch.randn(5, WIDTH), []
    for modules in ([model], stages):
        model.load_state_dict(state)
        output = run(modules, model, x)[0]
        found.append((output, {path: t.clone() for path, t in model.state_dict().items()}))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[1][1][path], tensor) for path, tensor in found[0][1].items())
    assert not torch.equal(state["blocks.3.1.running_mean"], found[1][1]["blocks.3.1.running_mean"])


# -- how layers are called


class Tower(Model):
    """Layers that nobody trains, before others that are trained."""

    def __init__(self, layers, others):
        super().__init__(layers)
        self.others = nn.ModuleList(others)

    def forward(self, x):
        with torch.no_grad():
            for block in self.blocks:
                x = block(x)
        x = self.embed(x)
        for other in self.others:
            x = other(x)
        return self.head(x)


@pytest.mark.parametrize("paths", [("embed",), ("embed", "others.1")])
def test_layers_without_gradients_are_the_models(paths):
    torch.manual_seed(0)
    model = Tower(map(Named, range(4)), map(Scaled, (2.0, 2.0, 2.0, 3.0)))
    model.blocks.requires_grad_(requires_grad=False)
    assert_alike(model, *paths)


def test_some_layers_without_gradients_do_not_stop_the_gradients_of_others():
    class Some(Model):
        def forward(self, x):
            x = self.embed(x)
            for number, block in enumerate(self.blocks):
                with torch.set_grad_enabled(number % 2 == 0 and torch.is_grad_enabled()):
                    y = block(x)
                x = x + y
            return self.head(x)

    torch.manual_seed(0)
    assert_alike(Some(map(Named, range(5))), "blocks.1")


@pytest.mark.parametrize("paths", [("blocks.2.up",), ("blocks.0.up", "blocks.3.norm")])
def test_a_cut_inside_a_repeated_layer(paths, repeated):
    torch.manual_seed(0)
    model = Model(Block(WIDTH) for _ in range(4))
    assert_alike(model, *paths)
    assert pairs(repeated) == {(1, 0), (2, 0), (3, 0)}


@pytest.mark.parametrize("path", ["blocks.2.inner.0"])
def test_a_cut_inside_a_repeated_layer_where_another_module_has_two_paths(path):
    torch.manual_seed(0)
    model = Model(map(Inner, (2.0, 2.0, 2.0)))
    model.again = model.embed
    assert_alike(model, path)


class Again(Model):
    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(block(x))
        return self.head(x)


@pytest.mark.parametrize("layer", [Named, Odd])
def test_layers_that_are_called_twice_in_a_row(layer, repeated):
    torch.manual_seed(0)
    plan = assert_alike(Again(layer(i // 2) for i in range(4)), "embed")
    found = repeated[0][0]
    assert ("blocks.1", "blocks.0") in found
    assert ("blocks.0", "blocks.0") in found
    with pytest.raises(Exception, match=r"blocks.2: it is called 2 times, so that it ends in 2 places"):
        planned(plan.runtime.model, "blocks.2")


def test_layers_that_are_called_in_another_order_or_not_at_all():
    class Shuffled(Model):
        def forward(self, x):
            x = self.embed(x)
            for number in (3, 0, 2):
                x = self.blocks[number](x)
            return self.head(x)

    torch.manual_seed(0)
    assert_alike(Shuffled(map(Named, range(4))), "blocks.0")


class Group(nn.Module):
    """Layers that hold layers."""

    def __init__(self, scales):
        super().__init__()
        self.parts = nn.ModuleList(map(Scaled, scales))

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def test_layers_inside_layers_are_those_of_the_model():
    torch.manual_seed(0)
    model = Model(map(Group, ([1.0] * 3, [2.0] * 3, [1.0, 2.0, 1.0], [1.0] * 3)))
    assert_alike(model, "blocks.1", "blocks.2.parts.0")


def test_layers_that_hold_repeated_layers_are_repeated(repeated):
    planned(Model(Group([1.0] * 3) for _ in range(4)), "blocks.1")
    assert {(f"blocks.{i}", "blocks.0") for i in (1, 2, 3)} <= repeated[0][0]


# -- hooks of the user's


@pytest.mark.parametrize("path", ["blocks.0", "blocks.2.linear"])
def test_a_hook_on_one_layer_changes_that_layer(path, repeated):
    torch.manual_seed(0)
    model = Model(map(Named, range(4)))
    model.get_submodule(path).register_forward_hook(lambda *args: args[-1] * 3.0)
    assert_alike(model, "blocks.1")
    hooked = int(path.split(".")[1])
    first, *others = (i for i in range(4) if i != hooked)
    assert pairs(repeated) == {(other, first) for other in others}


def test_a_hook_before_one_layer_changes_that_layer():
    torch.manual_seed(0)
    model = Model(map(Named, range(4)))
    model.blocks[2].register_forward_pre_hook(lambda _, args: (args[0] * 3.0,))
    assert_alike(model, "blocks.1")


# -- how often a model's code runs


def count_calls(num_layers, *cuts):
    """Return how often the forward of a layer runs while a model is planned, and of how many of them tensors are fake."""
    calls = []

    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            calls.append(x)
            return torch.tanh(self.linear(x))

    planned(Model(Noting() for _ in range(num_layers)), *cuts)
    return len(calls)


def leave_out_the_passes_at_local_shapes(monkeypatch):
    for name, found in (("check_types", Checked()), ("follow_microbatch", None)):
        monkeypatch.setattr(sys.modules["shardplan.functional.plan"], name, lambda *_, found=found: found)


def test_the_code_of_a_layer_runs_as_often_in_a_deep_model_as_in_a_shallow_one(monkeypatch, each):
    leave_out_the_passes_at_local_shapes(monkeypatch)
    shallow = count_calls(1, "embed")
    assert shallow >= MODES
    for num_layers in (3, 4, 12, 24):
        assert count_calls(num_layers, "blocks.1") == shallow
    assert each(count_calls, 12, "blocks.1") == 12 * shallow


def test_the_passes_at_local_shapes_run_two_layers_each(monkeypatch):
    deep = count_calls(12, "blocks.1")
    leave_out_the_passes_at_local_shapes(monkeypatch)
    assert deep - count_calls(12, "blocks.1") == 2 + 2 + 2  # of a rank, of the whole model, and with a backward pass
