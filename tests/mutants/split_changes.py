"""Changes of splits: dropped, on another axis or mesh axis, without blocks, with another granule, order or padding."""

from __future__ import annotations

from attrs import evolve

from shardplan.specs import Shard, SpecTree
from shardplan.specs.mesh import SPLIT_AXES, factors
from shardplan.specs.paths import module_of
from tests.mutants.edits import change_specs, chosen, finished, kind


def _is_split(spec):
    return bool(spec.shards)


def _one(spec, **changes):
    """Return the splits of a tensor with its last split changed, None if there is no such split."""
    try:
        return (*spec.shards[:-1], evolve(spec.shards[-1], **changes))
    except ValueError:  # the options contradict each other
        return None


@kind("split dropped")
def _(sch, rng):
    return change_specs(sch, rng, _is_split, lambda spec: spec.shards[:-1])


@kind("split along another axis")
def _(sch, rng):
    def turn(spec):
        free = [axis for axis in range(len(spec.orig_shape)) if all(shard.axis != axis for shard in spec.shards)]
        return _one(spec, axis=free[-1], blocks=(), interleaved=1, granule=1, replicate=False) if free else None

    return change_specs(sch, rng, lambda spec: _is_split(spec) and turn(spec) is not None, turn)


@kind("split over another mesh axis")
def _(sch, rng):
    def turn(spec):
        used = {factor for shard in spec.shards for factor in factors(shard.mesh_axis)}
        free = [m for m in SPLIT_AXES if sch.mesh.num(m) > 1 and not used & {*factors(m)}]
        return _one(spec, mesh_axis=free[-1]) if free else None

    return change_specs(sch, rng, lambda spec: _is_split(spec) and turn(spec) is not None, turn)


@kind("split without blocks")
def _(sch, rng):
    is_fused = lambda spec: any(shard.blocks or shard.interleaved > 1 for shard in spec.shards)  # noqa: E731
    return change_specs(sch, rng, is_fused, lambda spec: _one(spec, blocks=(), interleaved=1))


@kind("split with another granule")
def _(sch, rng):
    times = rng.choice((0, 0.5, 2, 3))

    def regrain(spec):
        old = spec.shards[-1].granule
        return None if int(old * times) == old else _one(spec, granule=max(1, int(old * times)))

    return change_specs(sch, rng, _is_split, regrain)


@kind("split in another order")
def _(sch, rng):
    order, num = rng.choice(("blocks", "interleaved", "uneven blocks")), rng.choice((2, 2, 4))

    def reorder(spec):
        shard = spec.shards[-1]
        size = spec.orig_shape[shard.axis]
        if shard.blocks or shard.interleaved > 1:
            blocks = (*shard.blocks[1:], *shard.blocks[:1])
            is_turned = order == "uneven blocks" and blocks != shard.blocks
            return _one(spec, blocks=blocks) if is_turned else _one(spec, blocks=(), interleaved=num)
        if size % num:
            return None
        part = size // num
        if order == "interleaved":
            return _one(spec, interleaved=num)
        if order == "blocks":
            return _one(spec, blocks=(part,) * num)
        return _one(spec, blocks=(part // 2, size - part // 2)) if part > 1 else None

    return change_specs(sch, rng, _is_split, reorder)


@kind("split with other padding or repeats")
def _(sch, rng):
    times, num, is_repeated = rng.choice((0, 0.5, 2)), rng.choice((1, 2)), rng.random() < 0.5

    def relax(spec):
        shard = spec.shards[-1]
        if shard.pad_to_multiple > 1:
            return _one(spec, pad_to_multiple=max(1, int(shard.pad_to_multiple * times)))
        if shard.uneven or shard.replicate:
            return _one(spec, uneven=False, allow_empty=False, replicate=False)
        size = min(shard.blocks, default=spec.orig_shape[shard.axis] // shard.interleaved)
        if is_repeated or shard.axis or shard.blocks or shard.granule > 1:
            return _one(spec, replicate=True, granule=max(1, size // num)) if size % num == 0 else None
        return _one(spec, pad_to_multiple=5 * num * sch.mesh.tensor)

    return change_specs(sch, rng, lambda spec: _is_split(spec) and relax(spec) is not None, relax)


@kind("norm or bias split")
def _(sch, rng):
    free = [m for m in ("tensor", "data") if sch.mesh.num(m) > 1]
    mesh_axis = chosen(rng, free)
    is_whole = lambda spec: len(spec.orig_shape) == 1 and not spec.shards and spec.kind == "parameter"  # noqa: E731
    return change_specs(sch, rng, is_whole, lambda _: (Shard(0, mesh_axis),)) if mesh_axis else None


@kind("bias left whole")
def _(sch, rng):
    is_bias = lambda spec: len(spec.orig_shape) == 1 and _is_split(spec)  # noqa: E731
    return change_specs(sch, rng, is_bias, lambda _: (), together=False)


@kind("split moved from a norm or bias to another")
def _(sch, rng):
    flat = [spec for spec in sch.tree.values() if len(spec.orig_shape) == 1 and spec.kind == "parameter"]
    first, second = chosen(rng, filter(_is_split, flat)), chosen(rng, (s for s in flat if not s.shards))
    if first is None or second is None:
        return None
    moved = [evolve(shard, blocks=()) for shard in first.shards]
    changed = {first.path: evolve(first, shards=()), second.path: evolve(second, shards=moved)}
    told = f"the split of {first} → {changed[second.path]}"
    return finished(sch, evolve(sch, tree=sch.tree.replace(changed)), [*first.paths, *second.paths], told)


@kind("tie broken")
def _(sch, rng):
    spec = chosen(rng, (spec for spec in sch.tree.values() if spec.tie))
    if spec is None:
        return None
    apart, is_whole = rng.choice(spec.paths), rng.random() < 0.5
    rest = tuple(path for path in spec.paths if path != apart)
    kept = evolve(spec, path=rest[0], tie=rest[1:])
    alone = evolve(spec, path=apart, tie=(), shards=() if is_whole else spec.shards)
    specs = [new for old in sch.tree.values() for new in ((kept, alone) if old is spec else (old,))]
    told = f"{apart} is no longer tied to {', '.join(rest)}{', and whole' if is_whole and spec.shards else ''}"
    return finished(sch, evolve(sch, tree=SpecTree(specs)), spec.paths, told)


@kind("one place of a tie left whole")
def _(sch, rng):
    spec = chosen(rng, (spec for spec in sch.tree.values() if spec.tie))
    if spec is None:
        return None
    place = rng.choice(spec.paths)
    module = module_of(place)
    layout = tuple(step for step in sch.layout if step.module != module)
    told = f"{module}: its layout is dropped, and {place} stays tied to {', '.join(p for p in spec.paths if p != place)}"
    return finished(sch, evolve(sch, layout=layout), [module, *spec.paths], told)
