"""Whatever is declared: it is refused, or a plan comes of it that keeps every law, on all of its ranks."""

from __future__ import annotations

import itertools
from unittest.mock import patch

import torch
from attrs import evolve
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from shardplan.functional import audit, create_schedule, plan_build, predict
from shardplan.functional.model.copy import get_tensor
from shardplan.functional.planning import value_steps as route
from shardplan.specs import Mesh, PlanError, dumps, loads
from tests.helpers.simulate import simulate, whole_tensors
from tests.helpers.tensor_parts import picked, without_padding

WIDTH, VOCAB = 8, 12


class Conv(Conv1D):
    """As transformers has it, with init code of its own."""

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class Shifted(nn.Module):
    """A linear module between two norms, with a buffer of its own."""

    def __init__(self, *, persistent):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), Conv(WIDTH, 2 * WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("shift", torch.empty(WIDTH), persistent=persistent)

    def reset_parameters(self):
        self.shift.copy_(torch.arange(float(self.shift.numel())))

    def forward(self, x):
        return self.norm(x + self.inner(x)) + self.shift


PARTS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "unbiased": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "conv": lambda: Conv(WIDTH, WIDTH),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "tanh": nn.Tanh,
    "lasting": lambda: Shifted(persistent=True),
    "passing": lambda: Shifted(persistent=False),
}


@st.composite
def models(draw, min_size=1):
    """A sequence with an embedding, nests and a head; some tensors are tied, frozen, of bfloat16 or have values already."""
    names = draw(st.lists(st.sampled_from(sorted(PARTS)), min_size=min_size, max_size=4))
    with torch.device("meta"):
        parts = [PARTS[name]() for name in names]
        if draw(st.booleans()):
            parts = [*parts[:1], nn.Sequential(*parts[1:])] if parts[1:] else parts
        head = nn.Linear(WIDTH, VOCAB, bias=draw(st.booleans()))
        model = nn.Sequential(nn.Embedding(VOCAB, WIDTH), *parts, head)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.shape == (WIDTH, WIDTH)]
    if draw(st.booleans()):
        model[-1].weight = model[0].weight
    if len(linear) > 1 and draw(st.booleans()):
        linear[-1].weight = linear[0].weight
    for parameter in model.parameters():
        parameter.requires_grad_(draw(st.integers(0, 9)) > 0)
    if draw(st.integers(0, 4)) == 0:
        model[1].to_empty(device="cpu")
        for tensor in (*model[1].parameters(), *model[1].buffers()):
            tensor.data.copy_(torch.arange(float(tensor.numel())).view(tensor.shape))
    if draw(st.integers(0, 9)) == 0:
        model.to(torch.bfloat16)
    return model


def sort_draws(tensor):
    """Init code that no init program stands for."""
    tensor.copy_(torch.rand_like(tensor).sort(dim=0).values)


splits = st.sampled_from(
    [
        *[{}] * 3,
        *({"granule": num} for num in (2, 4)),
        {"granule": 4, "replicate": True},
        *2 * ({"uneven": True, "allow_empty": True},),
        *({"uneven": True, **more} for more in ({}, {"granule": 3}, {"allow_empty": True})),
        *({"pad_to_multiple": num} for num in (2, 3, 8)),
        *({"blocks": (WIDTH // 2, WIDTH // 2)}, {"blocks": (4, 2, 2), "granule": 2, "replicate": True}, {"interleaved": 2}),
    ]
)


def gathered(draw, at, split):
    """A tensor is split along any axis and mesh axis, and the module's outputs are gathered."""
    mesh_axis = draw(st.sampled_from(["tensor", "tensor", "data"]))
    sch = at.shard(draw(st.sampled_from(["weight", "bias"])), axis=draw(st.integers(0, 1)), mesh_axis=mesh_axis, **split)
    return sch.sync("forward_post", "all_gather", axis=-1, mesh_axis=mesh_axis)


OPS = {"forward_post": ("all_reduce", "divide"), "backward_post": ("all_reduce",)}
VERBS = {
    "colwise": lambda draw, at, split: at.colwise(gather_output=draw(st.integers(0, 3)) > 0, **split),
    "rowwise": lambda draw, at, split: at.rowwise(split_input=draw(st.integers(0, 3)) > 0, **split),
    "vocab_parallel": lambda draw, at, split: at.vocab_parallel(**split),
    "shard": gathered,
    "sum_gradient": lambda draw, at, split: at.sum_gradient(),
    "sync": lambda draw, at, split: at.sync(when := draw(st.sampled_from(sorted(OPS))), draw(st.sampled_from(OPS[when]))),
    "init": lambda draw, at, split: at.init(draw(st.sampled_from([0.5, 1, nn.init.ones_, nn.init.normal_]))),
    "tag": lambda draw, at, split: at.tag(decay=draw(st.floats(0, 1))),
}
FITTING = {
    "Linear": ("colwise", "rowwise", "shard"),
    "Conv": ("colwise", "rowwise", "shard"),
    "Embedding": ("vocab_parallel", "shard"),
    "LayerNorm": ("sum_gradient", "init"),
}


@st.composite
def declared(draw, sch):
    """The schedule, with a few more verbs: mostly such as fit the module."""
    kinds = {m.path: type(sch.runtime.model.get_submodule(m.path)).__name__ for m in sch.modules}
    matrices = [spec.path for spec in sch.tree.values() if len(spec.orig_shape) == 2 and spec.path.endswith(".weight")]
    fitting = [path for path in kinds if kinds[path] in FITTING]
    for path in draw(st.lists(st.sampled_from(fitting), min_size=2, max_size=5, unique=True)):
        some = FITTING[kinds[path]] if draw(st.integers(0, 9)) else tuple(VERBS)
        sch = VERBS[draw(st.sampled_from((*some * 3, "init", "tag", "sync")))](draw, sch.at[path], draw(splits))
    if draw(st.booleans()):
        sch = sch.at[draw(st.sampled_from(matrices))].init(sort_draws)
    return sch


meshes = st.sampled_from(
    [
        *(Mesh(tensor=tensor) for tensor in (2, 3, 4, 8)),
        *(Mesh(data=data, tensor=tensor) for data, tensor in ((2, 1), (2, 2), (2, 4), (4, 2), (3, 2))),
        Mesh(data=4, expert=2, tensor=2),
        Mesh(),
    ]
)
strategies = st.sampled_from(["local", "scatter", "broadcast"])
buckets = st.sampled_from([1, 300, 2**20])
"""Bytes up to which tensors travel together: each alone, a few, all."""


def unsplit(sch):
    """The same model and init code, for one rank."""
    plain = create_schedule(sch.runtime.model, Mesh())
    return evolve(plain, tree=plain.tree.map(lambda s: evolve(s, source=sch.tree[s.path].source)), runtime=sch.runtime)


def check(sch, bucket_bytes, **options):
    """Return whether there is a plan; then its laws hold, and its ranks together hold the whole tensors."""
    try:
        with patch.object(route, "BUCKET_BYTES", bucket_bytes):
            plan = plan_build(sch, **options)
    except PlanError:
        return False
    assert loads(dumps(plan)) == plan
    report = audit(plan)
    for proof in report.proofs:
        assert proof.answer != "fails", proof
    whole = whole_tensors(plan, plan_build(unsplit(sch), seed=plan.seed))
    for rank, ended in enumerate(simulate(plan)):
        here = plan.mesh.coordinate(rank)
        assert ended.ledger.receipt(rank) == predict(plan, rank)
        assert set(ended.installed) == {s.path for s in plan.tree.values() if here.pipe in s.places(plan.mesh)}
        for path, tensor in ended.installed.items():
            spec = plan.tree[path]
            index = spec.index(here)
            assert torch.equal(without_padding(tensor, index), whole[path][picked(index)]), f"{spec} on rank {rank}"
            assert len({id(get_tensor(ended.module, alias)) for alias in spec.paths}) == 1
    return True


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_what_is_declared_is_refused_or_keeps_every_law(data):
    sch = data.draw(declared(create_schedule(data.draw(models()), data.draw(meshes))))
    event(str(check(sch, data.draw(buckets), strategy=data.draw(strategies), seed=data.draw(st.integers(0, 3)))))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_what_is_cut_is_refused_or_keeps_every_law(data):
    model = data.draw(models(min_size=2))
    mesh = data.draw(
        st.sampled_from([Mesh(pipe=2), Mesh(pipe=2, tensor=2), Mesh(pipe=2, data=2, tensor=2), Mesh(pipe=3, data=2)])
    )
    sch = data.draw(declared(create_schedule(model, mesh)))
    ends = st.lists(st.integers(0, len(model) - 2), min_size=mesh.pipe - 1, max_size=mesh.pipe - 1, unique=True)
    for end in data.draw(ends):
        sch = sch.at[str(end)].cut_pipeline_stage()
    inputs = {"input": torch.zeros(2, 6, dtype=torch.long)}
    event(str(check(sch, data.draw(buckets), strategy=data.draw(strategies), example_inputs=inputs)))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_uneven_parts_that_travel_together_keep_every_law(data):
    """Messages of one scatter have one size, whatever each rank gets."""
    with torch.device("meta"):
        sizes = data.draw(st.lists(st.integers(1, 11), min_size=2, max_size=4))
        model = nn.Sequential(*(nn.Linear(width, height) for width, height in itertools.pairwise((3, *sizes))))
    sch = create_schedule(model, Mesh(tensor=data.draw(st.integers(2, 4))))
    for number in range(len(sizes)):
        sch = sch.at[str(number)].colwise(gather_output=True, uneven=True, allow_empty=True)
    assert check(sch, data.draw(buckets), strategy="scatter")
