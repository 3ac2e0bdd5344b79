"""Attributes of modules that hold global sizes: found by value, and confirmed by exporting a rank with local sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, frozen
from torch import Tensor, fx

from .export import ExportFailure, RankGraph, module_path, operations, operator_name
from .factors import Axis, Factor, segments, size_of, spell
from .regions import is_in

if TYPE_CHECKING:
    from .propagate import ModelAxes
    from .regions import Region
    from .related_axes import Axes

_MOST_TRIED = 32
"""Limit of the choices of attributes that are tried for a kind of module."""

_MOST_COMBINED = 4096
"""Limit of the combinations of values from which these choices are taken."""

_COPIES = ("contiguous", "clone", "alias", "detach")
"""Operators that an export leaves out where they change nothing, as with a single head."""

_MOVES = ("view", "reshape", "flatten", "unsqueeze", "squeeze", "expand", "transpose", "permute", "repeat_interleave")
"""Operators that code may leave out where a local size is 1, as with a single query head for each key head."""

Values = Mapping[str, int]
"""Local values of attributes by name."""


@define(eq=False)
class SizeAttributes:
    """Modules of a kind whose code works on parts of activations; the same attributes are set on each.

    Args:
        modules: Their paths.
        regions: The regions in which they work.
        choices: Possible local values of their attributes, likeliest first.
        at: Number of the choice that is tried.
    """

    modules: list[str]
    regions: list[Region]
    choices: Sequence[Values]
    at: int = 0

    @property
    def values(self) -> Values:
        """The choice that is tried."""
        return self.choices[self.at]


@frozen
class LocalShapes:
    """The shapes that each rank should see.

    Args:
        sizes: Entries of a rank, for each factor that is split.
    """

    sizes: Mapping[Factor, int]

    def of(self, axes: Axes) -> tuple[int, ...]:
        """Return the local shape of a tensor."""
        return tuple(self.size(axis) for axis in axes)

    def size(self, axis: Iterable[Factor]) -> int:
        """Return the local size of an axis."""
        total = 1
        for factor in spell(axis):
            inner = sum(self.size((f,)) for f in segments(factor)) if factor.kind == "sum" else factor.size
            total *= self.sizes.get(factor, inner)
        return total


def local_shapes(regions: Iterable[Region], num_ranks: int) -> LocalShapes:
    """Return the shapes that each rank should see."""
    sizes: dict[Factor, int] = {}
    for region in regions:
        sizes |= region.local_sizes(num_ranks)
    return LocalShapes(sizes)


def size_attributes(found: ModelAxes, regions: Sequence[Region], shapes: LocalShapes) -> list[SizeAttributes]:
    """Return the modules whose code works on parts, by kind, with possible local values of their attributes."""
    made: dict[object, SizeAttributes] = {}
    for region in regions:
        for path in dict.fromkeys(op.module for op in region.operations):
            if path in region.modules:
                continue
            module = found.model.get_submodule(path)
            known, counts = _sizes(region, path, shapes)
            kept = {name: sorted(known[value]) for name, value in _integers(module) if value in known}
            config = {
                f"config.{name}": sorted(known[value])
                for name, value in _integers(getattr(module, "config", None))
                if value in known
            }
            key = type(module), *((name, getattr(module, name), tuple(local)) for name, local in kept.items())
            if key not in made:
                first = {name: kept[name][-1] for name, value in _integers(module) if value in counts and name in kept}
                made[key] = SizeAttributes([], [], _choices(kept, config, first))
            made[key].modules.append(path)
            made[key].regions.append(region)
    return list(made.values())


def _integers(holder: object) -> Iterator[tuple[str, int]]:
    for name, value in vars(holder).items() if hasattr(holder, "__dict__") else ():
        if isinstance(value, int) and not isinstance(value, bool) and value > 1 and not name.startswith("_"):
            yield name, value


def _sizes(region: Region, path: str, shapes: LocalShapes) -> tuple[dict[int, set[int]], set[int]]:
    """Return the local sizes by each global size that a module's code meets; and the global sizes that count heads."""
    known: dict[int, set[int]] = {}
    counts: set[int] = set()
    for op in region.operations:
        if op.module == path:
            for tensor in (*op.inputs, *op.outputs):
                for run in itertools.chain.from_iterable(map(_runs, tensor.axes)) if is_in(tensor.axes, region) else ():
                    size, local = size_of(run), shapes.size(run)
                    if size != local:
                        known.setdefault(size, set()).add(local)
                        if region.is_attention and all(factor in shapes.sizes for factor in run):
                            counts.add(size)
    return known, counts


def _runs(axis: Axis) -> Iterator[Axis]:
    """Iterate over neighbouring factors of an axis, also within its blocks."""
    factors = tuple(spell(axis))
    for start, stop in itertools.combinations(range(len(factors) + 1), 2):
        yield factors[start:stop]
    for factor in factors:
        if factor.kind == "sum":
            for inner in segments(factor):
                yield from _runs((inner,))


def _choices(kept: Mapping[str, list[int]], config: Mapping[str, list[int]], first: Values) -> list[Values]:
    """Return choices of values: those nearest to ``first``, which sets the counts of heads, come first."""
    options = {**kept, **config}
    each = ([None, *local] for local in options.values())
    made: list[Values] = [
        {name: value for name, value in zip(options, values, strict=True) if value is not None}
        for values in itertools.islice(itertools.product(*each), _MOST_COMBINED)
    ]

    def distance(values: Values) -> tuple[int, int, int]:
        differing = sum(values.get(name) != first.get(name) for name in options)
        return differing, sum(name in config for name in values), len(values)

    return sorted(made, key=distance)[:_MOST_TRIED]


def kind_to_change(kinds: Sequence[SizeAttributes], path: str) -> SizeAttributes | None:
    """Return the kind of module that should get its next choice, after a rank's graph went wrong at a path."""
    left = [kind for kind in kinds if kind.at + 1 < len(kind.choices)]
    near = [kind for kind in left if path in kind.modules]
    near += [kind for kind in left if any(path in region.modules for region in kind.regions)]
    near += [kind for kind in left if any(path in (op.module for op in r.operations) for r in kind.regions)]
    return next(iter(near or left), None)


def first_difference(
    found: ModelAxes, local: RankGraph | ExportFailure, shapes: LocalShapes, changed: Iterable[str]
) -> str | None:
    """Return the first module in which a rank does not compute its part of the model; None if there is none.

    Both graphs should have the same operators and numbers, with local shapes on the rank.

    Args:
        found: The whole model.
        local: The graph of a rank.
        shapes: The shapes that the rank should see.
        changed: Modules that are left out, as layout steps change them.
    """
    if isinstance(local, ExportFailure):
        return local.path
    skipped = (*_COPIES, *_MOVES) if 1 in shapes.sizes.values() else _COPIES
    left_out = frozenset(changed)
    theirs = [node for node in operations(local.root.graph) if _counts(node, found, left_out, skipped)]
    ours = [op for op in found.operations if op.module not in left_out and op.name not in skipped]
    for op, node in itertools.zip_longest(ours, theirs):
        if op is None or node is None:
            return op.module if op else _path(node, found) if node else ""
        same = op.node.target is node.target and op.module == _path(node, found) and _numbers(op.node) == _numbers(node)
        taken = [shapes.of(tensor.axes) for tensor in op.inputs]
        given = [shape for argument in node.all_input_nodes for shape in _shapes(argument)]
        made = [shapes.of(tensor.axes) for tensor in op.outputs]
        if not same or made != _shapes(node) or set(taken) != set(given):
            return op.module
    return None


def _path(node: fx.Node, found: ModelAxes) -> str:
    path = module_path(node)
    return found.names.get(path, path)


def _counts(node: fx.Node, found: ModelAxes, left_out: frozenset[str], skipped: Sequence[str]) -> bool:
    left = str(node.target).startswith("shardplan") or operator_name(node) in ("getitem", *skipped)
    return bool(_shapes(node)) and not left and _path(node, found) not in left_out


def _shapes(node: fx.Node) -> list[tuple[int, ...]]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return [tuple(v.shape) if isinstance(v, Tensor) else () for v in values]


def _numbers(node: fx.Node) -> list[Any]:
    """Return the numbers among the arguments; integers only of pointwise operators, as of others they may be sizes."""
    kinds = (bool, int, float) if torch.Tag.pointwise in getattr(node.target, "tags", ()) else (bool, float)
    return [a for a in (*node.args, *node.kwargs.values()) if type(a) in kinds]
