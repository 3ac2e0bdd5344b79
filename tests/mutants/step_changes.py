"""Changes of all other steps: attributes, sums of gradients, random numbers, masks, experts; and of whole modules."""

from __future__ import annotations

from attrs import evolve

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
from shardplan.specs.paths import join, module_of, name_of
from tests.mutants.edits import change_steps, chosen, elsewhere, finished, kind

SIZES = {"in_features", "out_features", "nf", "nx", "num_embeddings"}
"""Attributes that modules of torch and transformers do not compute with."""


def _is(*types):
    return lambda step: isinstance(step, types)


def _is_set(rng):
    """Return what tells the steps that set attributes; with even chances those alone that modules compute with."""
    is_read = rng.random() < 0.5
    return lambda step: isinstance(step, (SetAttributes, SetToLocalSize)) and not (is_read and _named(step) <= SIZES)


def _named(step):
    return {step.attribute} if isinstance(step, SetToLocalSize) else {*step.values}


@kind("attribute not set")
def _(sch, rng):
    place = rng.randrange(8)

    def drop(step):
        if isinstance(step, SetToLocalSize):
            return []
        dropped = sorted(step.values)[place % len(step.values)]
        rest = {name: value for name, value in step.values.items() if name != dropped}
        return [evolve(step, values=rest)] if rest else []

    return change_steps(sch, rng, _is_set(rng), drop)


@kind("attribute set to another number")
def _(sch, rng):
    place, times = rng.randrange(8), rng.choice((0.5, 2, 3))

    def renumber(step):
        if isinstance(step, SetToLocalSize):
            return [evolve(step, axis=1 - step.axis)]
        name = sorted(step.values)[place % len(step.values)]
        value = step.values[name]
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return [evolve(step, values={**step.values, name: max(1, int(value * times))})] if is_number else None

    return change_steps(sch, rng, _is_set(rng), renumber)


@kind("sum of a gradient dropped")
def _(sch, rng):
    return change_steps(sch, rng, _is(SumGradient), lambda _: [])


@kind("sum of a gradient declared twice")
def _(sch, rng):
    return change_steps(sch, rng, _is(SumGradient), lambda step: [step, step])


@kind("sum of a gradient moved to another tensor")
def _(sch, rng):
    step = chosen(rng, (step for step in sch.layout if isinstance(step, SumGradient)))
    path = chosen(rng, _trained(sch))
    if step is None or path is None:
        return None
    moved = evolve(step, module=module_of(path), name=name_of(path))
    layout = tuple(moved if s == step else s for s in sch.layout)
    told = f"{join(step.module, step.name)} → {path}: {step.describe()}"
    return finished(sch, evolve(sch, layout=layout), [join(step.module, step.name), path], told)


@kind("sum of a gradient added")
def _(sch, rng):
    path, mesh_axis = chosen(rng, _trained(sch)), rng.choice(("tensor", "tensor", "data"))
    if path is None or sch.mesh.num(mesh_axis) == 1:
        return None
    step = SumGradient(module_of(path), name_of(path), mesh_axis)
    return finished(sch, evolve(sch, layout=(*sch.layout, step)), [path], f"{path}: {step.describe()}")


@kind("fork of random numbers dropped")
def _(sch, rng):
    return change_steps(sch, rng, _is(ForkRng), lambda _: [])


@kind("sharing of random numbers dropped")
def _(sch, rng):
    return change_steps(sch, rng, _is(ShareRng), lambda _: [])


@kind("random numbers shared for forked, or forked for shared")
def _(sch, rng):
    def exchange(step):
        return [(ForkRng if isinstance(step, ShareRng) else ShareRng)(step.module)]

    return change_steps(sch, rng, _is(ForkRng, ShareRng), exchange)


@kind("fork of random numbers moved to another module")
def _(sch, rng):
    near, known = {}, {module.path for module in sch.modules}

    def move(step):
        found = near.setdefault("map", elsewhere(sch, rng, step.module))
        return [evolve(step, module=found(step.module))] if found and found(step.module) in known else None

    return change_steps(sch, rng, _is(ForkRng), move)


@kind("fork of random numbers added")
def _(sch, rng):
    is_dropping = any(getattr(module, "p", 0) > 0 for module in sch.runtime.model.modules())
    module = chosen(rng, (module.path for module in sch.modules if module.path)) if is_dropping else None
    return module and finished(sch, evolve(sch, layout=(*sch.layout, ForkRng(module))), [module], f"{module}: forked")


@kind("padding not masked, or other entries")
def _(sch, rng):
    sizes = rng.choice((None, (1, 0), (0, 2), (0, -1)))  # what is added to the parts and to the whole

    def mask(step):
        return [] if sizes is None else [evolve(step, sizes=tuple(map(sum, zip(step.sizes, sizes, strict=True))))]

    return change_steps(sch, rng, _is(MaskPadding), mask)


@kind("rows of other ranks not masked")
def _(sch, rng):
    return change_steps(sch, rng, _is(VocabParallel), lambda _: [])


@kind("rows counted from another row")
def _(sch, rng):
    num = rng.choice((-2, -1, 1, 2))
    return change_steps(sch, rng, _is(VocabParallel), lambda step: [evolve(step, num_rows=step.num_rows + num)])


@kind("tokens not sent to experts")
def _(sch, rng):
    return change_steps(sch, rng, _is(DispatchTokens), lambda _: [])


@kind("tokens sent to other experts")
def _(sch, rng):
    num = rng.choice((1, 4))
    return change_steps(sch, rng, _is(DispatchTokens), lambda step: [evolve(step, num_experts=num)])


@kind("module left whole")
def _(sch, rng):
    module = chosen(rng, _split_linears(sch))
    if module is None:
        return None
    after = _stripped(sch, module)
    return finished(sch, after, [module, *_held(sch, module)], f"{module}: its splits and steps are dropped")


@kind("columns for rows, or rows for columns")
def _(sch, rng):
    module = chosen(rng, _split_linears(sch))
    if module is None:
        return None
    is_rows = any(step.module == module and step.when == "forward_post" for step in sch.layout if isinstance(step, Sync))
    selected = _stripped(sch, module).at[module]
    after = selected.colwise() if is_rows else selected.rowwise()
    told = f"{module}: {'colwise' if is_rows else 'rowwise'} in place of its splits and steps"
    return None if len(after.problems) > len(sch.problems) else finished(sch, after, [module, *_held(sch, module)], told)


def _trained(sch):
    return [spec.path for spec in sch.tree.values() if spec.requires_grad and spec.kind == "parameter"]


def _held(sch, module):
    return [path for path in sch.tree.all_paths if module_of(path) == module]


def _split_linears(sch):
    """Return the modules that hold a split matrix."""
    matrices = (spec for spec in sch.tree.values() if len(spec.orig_shape) == 2 and spec.shards)
    return sorted({module_of(path) for spec in matrices for path in spec.paths})


def _stripped(sch, module):
    """Return a schedule with all that is declared of a module dropped."""
    whole = {sch.tree[path].path: evolve(sch.tree[path], shards=()) for path in _held(sch, module)}
    layout = tuple(step for step in sch.layout if step.module != module)
    return evolve(sch, tree=sch.tree.replace(whole), layout=layout)
