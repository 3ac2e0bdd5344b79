"""Hypothesis strategies for the records, and the settings under which laws are tried."""

from __future__ import annotations

from math import prod
from typing import get_args

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from shardplan.specs import (
    Activation,
    Constant,
    Coordinate,
    InitProgram,
    Kind,
    Made,
    Mesh,
    MeshAxis,
    Microbatch,
    ModuleCall,
    ModuleValues,
    Node,
    Operation,
    Origin,
    OwnValues,
    ParamSpec,
    Pipeline,
    PlainInput,
    Plan,
    Saved,
    Shard,
    Silence,
    SpecTree,
    Stage,
    SyncCall,
    TensorCall,
    TensorInput,
    Trust,
    Uninitialised,
    VariableSize,
)
from shardplan.specs.json_values import to_plain
from shardplan.specs.layout_steps import (
    AddBiasAfterSync,
    DispatchTokens,
    ForkRng,
    MaskPadding,
    SetAttributes,
    SetToLocalSize,
    ShareRng,
    SumGradient,
    SumProducts,
    Sync,
    SyncOp,
    VocabParallel,
    When,
)
from shardplan.specs.program import (
    Bernoulli,
    Cauchy,
    Exponential,
    Fill,
    Geometric,
    LogNormal,
    Map,
    Normal,
    Set,
    TruncatedNormal,
    Uniform,
)
from shardplan.specs.source import CodeKind, Loaded, Materialised, Unknown
from shardplan.specs.steps import (
    Agree,
    Allocate,
    AsDTensors,
    Broadcast,
    CheckLoaded,
    EvaluateShard,
    EvaluateWhole,
    Generate,
    LoadOwn,
    LoadShard,
    MakeGroups,
    MakeOptimizer,
    MakeTieGroups,
    Place,
    Scatter,
    SendCopy,
    Slice,
    SumTied,
    TakeShard,
    TakeStages,
    TakeWhole,
    Tie,
    Wrap,
)
from shardplan.specs.stored import Folder, Part, StoredFile, StoredTensor
from shardplan.specs.traffic import Cargo

law = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""How often a law is tried; put it above ``@given``."""

NEIGHBOURS = (
    *(("pipe",), ("data",), ("expert_data",), ("expert",), ("tensor",)),
    *(("pipe", "data"), ("pipe", "expert_data"), ("expert", "tensor"), ("data", "tensor"), ("pipe", "data", "tensor")),
)
"""All sets of mesh axes that form groups, each by its shortest name."""

FINE_AXES = ("pipe", "expert_data", "expert", "tensor")
"""The mesh axes, outermost first, with ``data`` in its two factors."""

words = st.text("abcxyz", min_size=1, max_size=3)
names = st.integers(0, 12).map(str) | st.text("01", min_size=1, max_size=2) | st.text("abqkv_01", min_size=1, max_size=4)
paths = st.lists(names, min_size=1, max_size=4).map(".".join)
functions = st.sampled_from(["train:init", "train:Model.init", "shapes.layers:fill"])
dtypes = st.sampled_from(["float32", "bfloat16", "float8_e4m3fn", "complex64", "int64", "bool"])
stage_axes = st.sampled_from([("data",), ("expert",), ("tensor",), ("data", "tensor"), ("expert", "tensor")])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2), max_leaves=4
)
json_objects = st.dictionaries(words, json_values, max_size=3)
origins = st.none() | st.builds(
    Origin, st.sampled_from(["shard", "tag"]), paths, st.sampled_from(["train.py:1", "train.py:2"])
)

reals = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
chances = st.floats(0, 1)
halves = st.floats(-1e307, 1e307)
widths = st.floats(0, 1e307)
intervals = st.lists(reals, min_size=2, max_size=2).map(sorted)
draws = st.one_of(
    st.builds(Normal, reals, positive | st.just(0)),
    intervals.map(lambda bounds: Uniform(*bounds)),
    positive.map(lambda bound: Uniform(-bound, bound)),
    st.builds(lambda mean, std, a, b: TruncatedNormal(mean, std, mean - a, mean + b), halves, positive, widths, widths),
    st.sampled_from([TruncatedNormal(0, 1, 3, 4), TruncatedNormal(0, 0.02, -0.5, -0.04), TruncatedNormal(0, 1, 2, 2)]),
    st.builds(Exponential, positive),
    st.builds(LogNormal, reals, positive),
    st.builds(Bernoulli, chances),
    st.builds(Cauchy, reals, positive),
    st.builds(Geometric, st.floats(0, 1, exclude_min=True)),
)

numbers = st.booleans() | st.integers() | st.floats()
"""Of any kind, infinities and no-numbers included; in arguments ``to_plain`` spells those out."""

plain_arguments = st.none() | words | numbers.map(to_plain)
spelled = st.one_of(
    dtypes.map(lambda name: {"dtype": name}),
    st.sampled_from(["contiguous_format", "channels_last"]).map(lambda name: {"memory_format": name}),
    st.lists(numbers.map(to_plain), max_size=3).map(lambda v: {"tensor": v, "shape": [len(v)], "dtype": "float64"}),
)
"""What is not plain in torch, as an argument of a node."""


@st.composite
def nodes(draw, num):
    """Operators in order; each may take the results of those before, whole or by item."""
    chosen = []
    for number in range(num):
        one = plain_arguments | spelled
        if number:
            at = st.integers(0, number - 1)
            one |= at.map(lambda at: {"node": at}) | st.builds(lambda at, item: {"node": at, "item": item}, at, at)
        one |= st.lists(one, max_size=2)
        op = draw(st.sampled_from(["arange.start_step", "full", "div.Tensor", "unbind.int", "_to_copy", "alias"]))
        chosen.append(Node(op, draw(st.lists(one, max_size=3)), draw(st.dictionaries(words, one, max_size=2))))
    return chosen


@st.composite
def constants(draw):
    """A constant, with its values or without."""
    shape = draw(st.lists(st.integers(0, 3), max_size=2))
    values = st.lists(numbers.map(to_plain), min_size=prod(shape), max_size=prod(shape))
    return Constant(shape, draw(dtypes), draw(nodes(draw(st.integers(1, 3)))), draw(st.none() | values))


@st.composite
def maps(draw):
    """A pointwise operator; some of its arguments are constants."""
    given = tuple(draw(st.lists(constants(), max_size=2)))
    one = plain_arguments | (st.integers(0, len(given) - 1).map(lambda at: {"node": at}) if given else st.nothing())
    op = draw(st.sampled_from(["mul_.Tensor", "clamp_", "pow_.Scalar", "masked_fill_.Scalar"]))
    return Map(op, draw(st.lists(one, max_size=2)), draw(st.dictionaries(words, one, max_size=2)), given)


@st.composite
def boxes(draw):
    """A part of a tensor: a row, rows, every other one, all."""
    spans = st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(1, 3)).map(lambda i: (i[0], i[0] + i[1], i[2]))
    return tuple(draw(st.lists(st.none() | spans, max_size=3)))


whats = draws | st.builds(Fill, numbers) | maps() | st.builds(Set, constants())
operations = st.builds(Operation, whats, st.none() | boxes())
programs = st.builds(InitProgram, st.lists(operations, min_size=1, max_size=3), st.booleans())

calls = st.one_of(
    st.builds(ModuleCall, paths, st.sampled_from(get_args(CodeKind)), functions, paths, st.booleans()),
    st.builds(TensorCall, paths, functions, st.booleans()),
)
many_calls = st.lists(calls, min_size=1, max_size=2).map(tuple)
causes = st.sampled_from(["", "its code looks at values that are drawn"])
others = st.sampled_from([ModuleValues(), OwnValues(), Materialised("3f" * 32), Uninitialised(), Unknown()])
stored = st.builds(
    StoredTensor,
    st.sampled_from(["model.safetensors", "model-00001-of-00002.safetensors"]),
    words,
    st.integers(0),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    dtypes,
    st.none() | st.integers(0, 2**64 - 1),
)
loaded = st.builds(Loaded, st.lists(stored.map(Part.whole), min_size=1, max_size=2).map(tuple))
sources = programs | st.builds(Made, many_calls, causes) | loaded | others


@st.composite
def meshes(draw, max_size=3):
    """A mesh; on some the experts are spread over all that see different batches, or over some of them."""
    pipe, data, tensor = (draw(st.integers(1, max_size)) for _ in range(3))
    data = draw(st.sampled_from([data, max_size + 1]))
    return Mesh(pipe, data, tensor, draw(st.sampled_from([n for n in range(1, data + 1) if data % n == 0])))


@st.composite
def coordinates(draw, mesh=None):
    mesh = mesh or draw(meshes())
    places = (draw(st.integers(0, num - 1)) for num in (mesh.pipe, mesh.data, mesh.tensor))
    return Coordinate(*places, mesh=mesh)


@st.composite
def fitting_shards(draw, mesh, axis=0, mesh_axis="tensor"):  # noqa: PLR0911  one a kind
    """A split, and the size of an axis that can be split so on the mesh: of each kind, also several at once."""
    num, part = mesh.num(mesh_axis), draw(st.integers(0, 3))
    granule = draw(st.sampled_from([1, 1, 2, 3]))
    kind = draw(st.sampled_from(["even", "blocks", "replicate", "uneven", "groups", "few_groups", *["pad"] * (axis == 0)]))
    some = st.lists(st.integers(1, 3), min_size=1, max_size=3)
    match kind:
        case "blocks":
            blocks = [count * num * granule for count in draw(some)]
            return Shard(axis, mesh_axis, blocks, granule=granule, replicate=draw(st.booleans())), sum(blocks)
        case "replicate":
            fewer = st.sampled_from([n for n in range(1, num + 1) if num % n == 0])
            blocks = [count * granule for count in draw(st.lists(fewer | st.just(num * 2), min_size=1, max_size=3))]
            given = blocks if len(blocks) > 1 or draw(st.booleans()) else ()
            return Shard(axis, mesh_axis, given, granule=granule, replicate=True), sum(blocks)
        case "uneven":
            blocks = [count * granule for count in draw(st.lists(st.integers(1, 3 * num), min_size=1, max_size=2))]
            given = blocks if len(blocks) > 1 or draw(st.booleans()) else ()
            return Shard(axis, mesh_axis, given, granule=granule, uneven=True, allow_empty=True), sum(blocks)
        case "groups":
            blocks, groups = draw(some), num * draw(st.integers(1, 2))
            given = blocks if draw(st.booleans()) else ()
            return Shard(axis, mesh_axis, given, interleaved=groups, granule=granule), sum(blocks) * groups
        case "few_groups":
            groups = draw(st.sampled_from([n for n in range(1, num + 1) if num % n == 0]))
            sharing = num // groups
            replicate = draw(st.booleans())
            counts = [draw(st.sampled_from([1, sharing])) if replicate else count * sharing for count in draw(some)]
            blocks = [count * granule for count in counts]
            given = blocks if len(blocks) > 1 or draw(st.booleans()) else ()
            split = Shard(axis, mesh_axis, given, interleaved=groups, granule=granule, replicate=replicate)
            return split, sum(blocks) * groups
        case "pad":
            return Shard(axis, mesh_axis, pad_to_multiple=num * draw(st.integers(1, 3))), draw(st.integers(0, 9))
        case _:
            return Shard(axis, mesh_axis, granule=granule), part * num * granule


@st.composite
def param_specs(draw, mesh, path=None, tie=()):
    """A tensor whose split axes fit the mesh; some have no elements, some no axes."""
    mesh_axes = draw(st.lists(st.sampled_from([draw(st.sampled_from(["data", "expert"])), "tensor"]), unique=True))
    sizes = draw(st.lists(st.integers(0, 3), min_size=len(mesh_axes), max_size=3))
    axes = draw(st.permutations(range(len(sizes))))
    shards = []
    for axis, mesh_axis in zip(axes, mesh_axes, strict=False):
        shard, sizes[axis] = draw(fitting_shards(mesh, axis, mesh_axis))
        shards.append(shard)
    stages = draw(st.lists(st.integers(0, mesh.pipe - 1), min_size=1, max_size=2, unique=True))
    return ParamSpec(
        path=path or draw(paths),
        orig_shape=tuple(sizes),
        dtype=draw(dtypes),
        kind=draw(st.sampled_from(get_args(Kind))),
        shards=shards,
        stage=stages[0],
        also_on=tuple(stages[1:]),
        tags=draw(json_objects),
        tie=tie,
        requires_grad=draw(st.booleans()),
        source=draw(sources),
        origin=draw(origins),
    )


@st.composite
def trees(draw, mesh):
    """Up to four tensors that fit the mesh, some under two paths."""
    left = draw(st.lists(paths, unique=True, max_size=6))
    specs = []
    while left and len(specs) < 4:
        count = draw(st.integers(1, min(2, len(left))))
        (path, *tie), left = left[:count], left[count:]
        specs.append(draw(param_specs(mesh, path, tuple(tie))))
    return SpecTree(specs)


_MOVES = (EvaluateWhole, EvaluateShard, TakeWhole, TakeShard, LoadOwn, Allocate, Slice, Place)


def steps(mesh, tree):
    """One step of any kind, about tensors of the tree."""
    stage = st.integers(0, mesh.pipe - 1)
    places = st.lists(stage, max_size=3).map(tuple)
    one = st.sampled_from(list(tree.all_paths) or ["none"])
    some = st.lists(one, max_size=3, unique=True).map(tuple) if tree else st.just(())
    op, when, axis = st.sampled_from(get_args(SyncOp)) | functions, st.sampled_from(get_args(When)), st.integers(-2, 2)
    few = st.integers(0, 9)
    pairs = st.tuples(few, few)
    optional, many_pairs = st.none() | pairs, st.lists(pairs, max_size=2).map(tuple)
    sharing = st.lists(st.tuples(st.sampled_from(["data", "tensor"]), few), max_size=2).map(tuple)
    kinds = [
        st.builds(Agree, st.sampled_from(["opening", "closing"])),
        st.builds(MakeGroups, st.lists(stage_axes, max_size=2).map(tuple), sharing),
        st.builds(MakeTieGroups, st.lists(places, max_size=2).map(tuple)),
        st.builds(Generate, stage, some, many_calls, some),
        st.builds(Generate, stage, some, many_calls, some, paths),
        *(st.builds(kind, stage, some) for kind in _MOVES),
        *(st.builds(kind, stage, some, stage_axes) for kind in (Scatter, Broadcast)),
        st.builds(LoadShard, stage, some, dtypes, stage_axes),
        st.just(CheckLoaded()),
        st.builds(SendCopy, stage, stage, some),
        st.builds(SetAttributes, paths, json_objects),
        *(st.builds(kind, paths) for kind in (AddBiasAfterSync, ForkRng)),
        st.builds(ShareRng, paths, st.booleans()),
        *(st.builds(kind, paths, few) for kind in (VocabParallel, DispatchTokens)),
        st.builds(Sync, paths, when, op, st.none() | axis, st.sampled_from(["data", "tensor"]), few, optional, optional),
        st.builds(SetToLocalSize, paths, words, words, few),
        st.builds(SumGradient, paths, words, st.sampled_from(["tensor", "expert_data"]), few, many_pairs, few),
        st.builds(SumProducts, paths, words, st.sampled_from(["outputs", "gradients"])),
        st.builds(MaskPadding, paths, pairs),
        st.just(TakeStages()),
        st.builds(AsDTensors, stage_axes),
        st.just(MakeOptimizer()),
        st.builds(Wrap, st.none() | words),
    ]
    return st.one_of(*kinds, *([st.builds(Tie, stage, one, some), st.builds(SumTied, one, places)] if tree else []))


some_paths = st.lists(paths, max_size=2).map(tuple)
axis_sizes = st.integers(0, 9) | st.sampled_from(["batch", "2*sequence + 1", "-batch"])
activations = st.builds(
    Activation, words, st.lists(axis_sizes, max_size=3).map(tuple), dtypes, st.integers(0, 99), st.booleans()
)
many_activations = st.lists(activations, max_size=2).map(tuple)
examples = st.one_of(
    st.builds(TensorInput, words, st.lists(st.integers(0, 9), max_size=3).map(tuple), dtypes),
    st.builds(PlainInput, words, json_values),
)
variable_sizes = st.builds(VariableSize, words, st.integers(0, 9), st.integers(0, 3), st.none() | st.integers(0, 9))


@st.composite
def pipelines(draw, mesh):
    """As many stages as the mesh has places along ``pipe``, or twice as many."""
    digests = st.sampled_from(["0" * 64, "3f" * 32])
    stages = st.builds(Stage, some_paths, many_activations, many_activations, digests)
    num_stages = mesh.pipe * draw(st.integers(1, 2))
    return Pipeline(
        stages=tuple(draw(st.lists(stages, min_size=num_stages, max_size=num_stages))),
        cuts=draw(some_paths),
        chain=draw(st.lists(some_paths, max_size=2).map(tuple)),
        leaves=draw(some_paths),
        example=draw(st.lists(examples, max_size=2).map(tuple)),
        sizes=draw(st.lists(variable_sizes, max_size=2).map(tuple)),
    )


microbatches = st.builds(
    Microbatch,
    calls=st.lists(
        st.builds(
            SyncCall,
            words,
            st.sampled_from(["forward", "backward"]),
            st.sampled_from(["all_reduce", "all_gather", "reduce_scatter"]),
            st.sampled_from(get_args(MeshAxis)),
            st.integers(0, 9),
            st.integers(0),
            st.sampled_from(get_args(Cargo)),
        ),
        max_size=2,
    ).map(tuple),
    saved=st.lists(st.builds(Saved, words, st.integers(0), st.integers(0), st.booleans()), max_size=2).map(tuple),
    without_gradient=st.lists(words, max_size=2).map(tuple),
)
silences = st.lists(st.builds(Silence, st.sampled_from(["SP010", "SP021"]), words, words), max_size=2)
split_trusts = st.builds(Trust, words, words, st.just("split"), st.integers())
trusts = st.lists(st.builds(Trust, words, words) | split_trusts, max_size=2)


def folder_of(tree):
    """The files that a tree's tensors are read from."""
    parts = [part for spec in tree.values() if isinstance(spec.source, Loaded) for part in spec.source.parts]
    return Folder("weights", tuple(StoredFile(name, 9000, "3f" * 32) for name in sorted({p.stored.file for p in parts})))


@st.composite
def plans(draw):
    mesh = draw(meshes())
    tree = draw(trees(mesh))
    return Plan(
        mesh=mesh,
        tree=tree,
        steps=draw(st.lists(steps(mesh, tree), max_size=5)),
        target=draw(st.none() | words),
        config=draw(st.none() | json_objects),
        seed=draw(st.integers()),
        random_scheme=draw(st.integers(0, 3)),
        pipeline=draw(st.none() | pipelines(mesh)),
        microbatch=draw(st.none() | microbatches),
        folder=folder_of(tree),
        silences=draw(silences),
        trusts=draw(trusts),
    )
