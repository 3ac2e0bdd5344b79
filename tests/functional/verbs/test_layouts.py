"""What the verbs of layouts refuse: with the path, the type, the sizes, the cause, and what to do about it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardplan.functional import create_schedule, plan_build
from shardplan.specs import Mesh, PlanError, Shard
from shardplan.specs.layout_steps import (
    DispatchTokens,
    ForkRng,
    MaskPadding,
    SetAttributes,
    SetToLocalSize,
    ShareRng,
    SumGradient,
    Sync,
    VocabParallel,
)


class Config:
    """A plain object that a module keeps."""

    def __init__(self):
        self.heads, self.nothing = 4, None


class Experts(nn.Module):
    def __init__(self, num=4):
        super().__init__()
        self.num_experts = num
        self.up = nn.Parameter(torch.empty(4, 6, 8, device="meta"))

    def reset_parameters(self):
        nn.init.normal_(self.up)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 12, device="meta"), nn.Linear(12, 8, device="meta")
        self.norm, self.e = nn.LayerNorm(8, device="meta"), nn.Embedding(10, 8, device="meta")
        self.experts = Experts()
        self.config, self.heads = Config(), 4


MODEL = Model()


def schedule(**sizes):
    return create_schedule(MODEL, Mesh(**sizes or {"tensor": 2}))


def problem_of(sch):
    with pytest.raises(PlanError) as caught:
        plan_build(sch)
    return str(caught.value)


OPTIONS = "\n      Options are blocks=(n, ...), interleaved=n, granule=n, replicate, uneven, allow_empty, pad_to_multiple=n"


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            lambda s: s.at["a"].shard("weight", axis=0, granules=2),
            "a.weight  f32[12, 8]: a split has no 'granules'\n      There are blocks, interleaved, granule, replicate,",
        ),
        (
            lambda s: s.at["a"].shard("weight", axis=0, granule=0),
            f"a.weight  f32[12, 8]: it cannot be split so: 'granule' must be >= 1: 0{OPTIONS}",
        ),
        (
            lambda s: s.at["a"].shard("weight", axis=0, blocks=12),
            f"a.weight  f32[12, 8]: it cannot be split so: blocks are sizes, such as (64, 32, 32), not 12{OPTIONS}",
        ),
        (
            lambda s: s.at["a"].shard("weight", axis=0, blocks=(6, "6")),
            "a.weight  f32[12, 8]: it cannot be split so: blocks is an integer, not '6'",
        ),
        (
            lambda s: s.at["a"].shard("weight", axis=0, replicate="yes"),
            "a.weight  f32[12, 8]: it cannot be split so: replicate is True or False, not 'yes'",
        ),
        (
            lambda s: s.at["a"].shard("weight", axis=1, pad_to_multiple=8),
            "it cannot be split so: pad_to_multiple is for the first axis, as one block of single entries",
        ),
        (
            lambda s: s.at["a"].colwise(replicate=True, uneven=True),
            "replicate repeats granules, and uneven gives some ranks fewer: an axis has one of them",
        ),
        (
            lambda s: s.at["a"].colwise(blocks=(4, 4)),
            "blocks (4, 4) have 8\n      Give the sizes of all blocks, in order\n  a.bias  f32[4|4@",
        ),
        (
            lambda s: s.at["a"].colwise(interleaved=5),
            "a.weight  f32[5x2@tensor, 8]: axis 0 has 12 entries, which 5 groups do not divide\n      Give the number",
        ),
        (
            lambda s: s.at["a"].colwise(granule=5),
            "a.weight  f32[12@tensor, 8]: axis 0 has 12 entries, which granules of 5 do not divide\n      Give the entries",
        ),
        (
            lambda s: s.at["a"].colwise(interleaved=3),
            "a.weight  f32[3x4@tensor, 8]: axis 0 has 3 groups of 4, mesh axis 'tensor' has 2, and 2 does not divide 3",
        ),
        (
            lambda s: s.at["e"].vocab_parallel(pad_to_multiple=3),
            "e.weight  f32[10+2@tensor, 8]: ",
        ),
        (
            lambda s: s.at["e"].vocab_parallel(blocks=(4, 6)),
            "e.weight  f32[4|6@tensor, 8]: its module looks up rows that follow one another, and its blocks",
        ),
        (
            lambda s: s.at["a"].colwise(gather_output=True, blocks=(6, 6)),
            "a.weight  f32[6|6@tensor, 8]: its module joins its outputs in the order of ranks, and its blocks",
        ),
        (
            lambda s: s.at["b"].rowwise(split_input=True, blocks=(6, 6)),
            "b.weight  f32[8, 6|6@tensor]: its module cuts its input in the order of ranks, and its blocks",
        ),
        (
            lambda s: s.at["a"].colwise(sequence_axis="x"),
            "a: the axis along which a sequence is split is an integer, not 'x'",
        ),
        (lambda s: s.at["b"].rowwise(sequence_axis=[]), "b: the axis along which a sequence is split is an integer, not []"),
        (lambda s: s.at["e"].vocab_parallel(sequence_axis=True), "is an integer, not True\n      sequence_axis=1"),
        (
            lambda s: s.at["norm"].colwise(),
            "norm: .colwise() is for nn.Linear and transformers' Conv1D, and this is a LayerNorm",
        ),
        (
            lambda s: (
                s.at["a"].shard("weight", axis=0, mesh_axis="data").at["a"].shard("weight", axis=1, mesh_axis="expert")
            ),
            "Keep one of them: 'expert' is a part of 'data'",
        ),
        (
            lambda s: s.at["a"].expert_parallel(),
            "a: its num_experts is None, and it holds a.weight  f32[12, 8], a.bias  f32[12]\n      Select the module whose",
        ),
        (lambda s: s.at["experts.up"].expert_parallel(), "experts.up: it selects tensors, and this verb is for modules"),
        (lambda s: s.at["a"].sync("forward_pre", "all_reduce", which=-1), "a: which is a number from 0, not -1"),
        (lambda s: s.at["a"].sync("forward_pre", "all_reduce", which=True), "a: which is a number from 0, not True"),
        (
            lambda s: s.at["a"].sync("forward_pre", "all_reduce", features=(0, 2)),
            'a: features is for the sum of a gradient\n      .sync("backward_pre", "all_reduce", features=(start, stop))',
        ),
        (
            lambda s: s.at["a"].sync("backward_pre", "all_reduce", features=(4, 2)),
            "a: features are the first entry and the one after the last, not (4, 2)",
        ),
        (
            lambda s: s.at["a"].sync("backward_pre", "all_reduce", features=(1, 2, 3)),
            "a: features are the first entry and the one after the last, not (1, 2, 3)",
        ),
        (
            lambda s: s.at["a"].sync("backward_post", "divide"),
            'a: divide is said of an activation, not of a gradient (backward_post)\n      .sync("forward_pre", "divide")',
        ),
        (lambda s: s.at["a"].sync("forward_pre", "divide", axis=1), "a: divide has no axis, and axis=1 was given"),
        (
            lambda s: s.at["a"].sync("backward_pre", "all_gather"),
            "a: all_gather needs the axis of the activation",
        ),
        (
            lambda s: s.at["a"].sync("forward_pre", "all_reduce", mesh_axis="expert"),
            "a: a sync cannot run along mesh axis 'expert'\n      It runs along data or tensor",
        ),
        (
            lambda s: s.at["a"].sum_gradient("gain"),
            "a: it has no parameter 'gain' of its own\n      Its parameters are a.bias, a.weight",
        ),
        (
            lambda s: s.at[""].sum_gradient(),
            "(model): it has no parameter of its own\n      Its parameters are none",
        ),
        (lambda s: s.at["norm"].sum_gradient(mesh_axis="pipe"), "norm: activations are not split over mesh axis 'pipe'"),
        (lambda s: s.at["norm.weight"].fork_rng(), "norm.weight: it selects tensors, and this verb is for modules"),
        (
            lambda s: s.at["norms"].sum_gradient(),
            "norms: no module and no tensor has a path like this\n      The closest are norm",
        ),
        (
            lambda s: s.at[""].set(**{"config.head": 2}),
            "(model): it has no attribute 'config.head' to set\n      The closest are config.heads",
        ),
        (lambda s: s.at[""].set(**{"confg.heads": 2}), "(model): it has no attribute 'confg.heads' to set"),
        (lambda s: s.at[""].set(**{"config.nothing.x": 2}), "(model): it has no attribute 'config.nothing.x' to set"),
        (lambda s: s.at[""].set(**{"config.": 2}), "(model): it has no attribute 'config.' to set"),
        (lambda s: s.at[""].set(**{"a.out_features": 2}), "(model): its 'a' is a module\n      Select it: sch.at['a']"),
        (lambda s: s.at[""].set(**{"config.heads": "2"}), "(model): config.heads is 4, and would become '2'"),
        (
            lambda s: s.at[""].set(**{"config.heads": 2}).set(**{"config.heads": 1}),
            "(model): config.heads is set twice, to 2 and to 1\n      Keep one of them",
        ),
        (lambda s: s.at[""].set(_modules={}), "(model): its '_modules' is no plain attribute"),
    ],
)
def test_what_is_refused_says_where_why_and_what_instead(edit, text):
    sch = edit(schedule())
    if text.endswith("f32[10+2@tensor, 8]: "):  # 12 rows are enough for two ranks, and not for eight
        plan_build(sch)
        text = (
            "e.weight  f32[10+2@tensor, 8]: axis 0 has 10 entries, padded to 12, mesh axis 'tensor' has 8, and 8 does not"
            " divide 12\n      Pad it to 24: pad_to_multiple=24"
        )
        sch = edit(schedule(tensor=8))
    assert text in problem_of(sch)


def test_heads_that_are_fewer_than_ranks_are_told_to_be_repeated():
    message = problem_of(schedule(tensor=8).at["a"].colwise(granule=3))
    assert (
        "  a.weight  f32[12@tensor, 8]: axis 0 has 4 granules of 3, mesh axis 'tensor' has 8, and 8 does not divide 4\n"
        "      Repeat them: replicate=True; or split it over 2 or 4 ranks\n" in message
    )


def test_parts_that_would_be_empty_are_told():
    message = problem_of(schedule(tensor=8).at["e"].vocab_parallel(uneven=True))
    assert (
        "e.weight  f32[10@tensor(uneven), 8]: axis 0 has 10 entries, mesh axis 'tensor' has 8, and 8 does not divide 10:"
        " 3 ranks would hold nothing\n      Allow empty parts too: allow_empty=True; or split it over 3 or 4 or 5 ranks"
        in message
    )
    assert not schedule(tensor=8).at["e"].vocab_parallel(uneven=True, allow_empty=True).problems


def test_experts_that_do_not_divide_are_told():
    message = problem_of(schedule(data=3, expert=3).at["experts"].expert_parallel())
    assert (
        "experts.up  f32[4@expert, 6, 8]: axis 0 has 4 entries, mesh axis 'expert' has 3, and 3 does not divide 4" in message
    )


def test_the_number_of_experts_is_that_of_the_tensors():
    sch = create_schedule(nn.Sequential(Experts(num=5)), Mesh(data=2, expert=2)).at["0"].expert_parallel()
    assert "0: its num_experts is 5, and it holds 0.up  f32[4, 6, 8]" in problem_of(sch)


def test_what_verbs_of_layouts_say():
    sch = schedule(data=2, expert=2, tensor=4).at["experts"].expert_parallel()
    sch = sch.at["a"].colwise(uneven=True).at["b"].rowwise(uneven=True)
    assert sch.tree["experts.up"].shards == (Shard(0, "expert"),)
    assert sch.layout == (
        SetAttributes("experts", {"num_experts": 2}),
        DispatchTokens("experts", 2),
        Sync("a", "backward_post", "all_reduce"),
        SetAttributes("a", {"out_features": 3}),
        Sync("b", "forward_post", "all_reduce"),
        SetAttributes("b", {"in_features": 3}),
    )
    sch = schedule(tensor=8).at["a"].colwise(pad_to_multiple=8).at["e"].vocab_parallel(uneven=True, allow_empty=True)
    assert MaskPadding("a", (2, 12)) in sch.layout
    assert SetAttributes("a", {"out_features": 2}) in sch.layout
    assert {VocabParallel("e", 2), SetToLocalSize("e", "num_embeddings", "weight", 0)} <= {*sch.layout}
    sch = schedule().at["norm"].sum_gradient().fork_rng().at["a"].share_rng()
    assert sch.layout == (SumGradient("norm", "weight"), SumGradient("norm", "bias"), ForkRng("norm"), ShareRng("a"))
    repeated = plan_build(schedule(tensor=8).at["a"].colwise(blocks=(6, 6), granule=3, replicate=True))
    assert SumGradient("a", "weight", sharing=((3, 4), (3, 4))) in repeated.steps
    assert SumGradient("a", "bias", sharing=((3, 4), (3, 4))) in repeated.steps


NONSENSE = ["x", "", None, -1, 0, 1.5, True, 10**30, [], (), {}, (1, 2, 3), ("a", "b"), object, float("nan"), b"x", abs]


def asked(v):
    """Every argument of every verb, with something that it may not be."""
    for option in (*Shard.__annotations__, "bogus"):
        if option not in {"axis", "mesh_axis"}:
            yield lambda s, option=option: s.at["a"].shard("weight", axis=0, **{option: v})
            yield lambda s, option=option: s.at["a"].colwise(gather_output=True, **{option: v})
            yield lambda s, option=option: s.at["b"].rowwise(split_input=True, **{option: v})
            yield lambda s, option=option: s.at["e"].vocab_parallel(**{option: v})
    yield lambda s: s.at["a"].shard("weight", axis=v)
    yield lambda s: s.at["a"].shard("weight", axis=0, mesh_axis=v)
    yield lambda s: s.at["a"].shard(v, axis=0)
    yield lambda s: s.at["a"].colwise(gather_output=v, sequence_axis=v)
    yield lambda s: s.at["b"].rowwise(split_input=v, sequence_axis=v)
    yield lambda s: s.at["e"].vocab_parallel(sequence_axis=v)
    for when in ("forward_pre", "forward_post", "backward_pre", "backward_post"):
        yield lambda s, when=when: s.at["a"].sync(when, v)
        yield lambda s, when=when: s.at["a"].sync(when, "all_gather", v)
        yield lambda s, when=when: s.at["a"].sync(when, "all_reduce", which=v)
        yield lambda s, when=when: s.at["a"].sync(when, "all_reduce", features=v)
        yield lambda s, when=when: s.at["a"].sync(when, "divide", mesh_axis=v)
    yield lambda s: s.at["a"].sync(v, "all_reduce")
    yield lambda s: s.at["a"].sum_gradient(v)
    yield lambda s: s.at["a"].sum_gradient(mesh_axis=v)
    for name in (
        "heads",
        "config.heads",
        "config.",
        ".heads",
        "config.x.y",
        "a.weight",
        "x.y",
        "..",
        "",
        "config.__class__",
    ):
        yield lambda s, name=name: s.at[""].set(**{name: v})
    yield lambda s: s.at["a"].tag(why=v)
    yield lambda s: s.at["a"].expect(v)


@pytest.mark.parametrize("mesh", [Mesh(tensor=2), Mesh(data=4, tensor=8, expert=2)], ids=str)
@pytest.mark.parametrize("value", NONSENSE, ids=repr)
def test_nonsense_is_a_problem_and_nothing_worse(value, mesh):
    sch = create_schedule(MODEL, mesh)
    for verb in asked(value):
        said = verb(sch)
        assert all(problem.cause and str(problem) for problem in said.problems)
        assert said.layout == said.layout
        assert hash(said.layout) == hash(said.layout)


def test_a_gather_of_unequal_outputs_is_told_their_sizes_or_refused():
    model = nn.Sequential(nn.Linear(4, 10, device="meta"))
    sch = create_schedule(model, Mesh(tensor=4)).at["0.weight"].shard(axis=0, uneven=True)
    sch = sch.at["0.bias"].shard(axis=0, uneven=True).at["0"].sync("forward_post", "all_gather", axis=-1)
    with pytest.raises(PlanError) as caught:
        plan_build(sch)
    assert "0.weight  f32[10@tensor(uneven), 4]: its parts differ in size from rank to rank" in str(caught.value)
    assert "sch.at['0'].colwise(gather_output=True, uneven=True)" in str(caught.value)
    told = create_schedule(model, Mesh(tensor=4)).at["0"].colwise(gather_output=True, uneven=True)
    assert any(getattr(step, "sizes", None) == (3, 10) for step in plan_build(told).steps)
