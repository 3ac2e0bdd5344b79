"""Repeated modules, exported once: a module that is like one before, and is called alike, does what that one did.

While the model is exported, the first of a family runs between two markers, and what its code reads of it is noted. For
the next ones one placeholder stands in the graph, if they agree with the first in all that was read and in what they are
called with. ``functional/written_out.py`` puts the first one's operations in the place of each placeholder.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from attrs import Factory, define, evolve, frozen
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .alike import Likeness
from .opaque import stand_ins
from .reading import own_attributes, reading, unwatched

if TYPE_CHECKING:
    from ..specs.steps import LayoutStep
    from ..specs.tree import SpecTree

_FEW = 3
"""Fewer members of a family are not worth it."""

_LIBRARIES = ("torch", "transformers")
"""Whose layers are known to leave nothing behind but what they return; those of others are exported one by one."""

_CLASS = "of the class"
"""Stands for the value of an attribute that a module has not of its own."""


@torch.library.custom_op("shardplan::marker", mutates_args=())
def marker(tensors: Sequence[Tensor], number: int) -> list[Tensor]:  # noqa: ARG001  its schema
    """Stand where the first of a family begins or ends; it never runs."""
    msg = "a marker of an export was run"
    raise AssertionError(msg)


@torch.library.custom_op("shardplan::repeat", mutates_args=())
def repeat(tensors: Sequence[Tensor], number: int) -> list[Tensor]:  # noqa: ARG001  its schema
    """Stand for a module that does what the first of its family did; it never runs."""
    msg = "a placeholder of an export was run"
    raise AssertionError(msg)


_SHAPES: dict[int, Sequence[Tensor]] = {}
"""What the placeholder that runs now will give, by its number."""


marker.register_fake(lambda tensors, number: stand_ins(tensors))  # noqa: ARG005  its schema
repeat.register_fake(lambda tensors, number: stand_ins(_SHAPES[number]))  # noqa: ARG005  its schema


@frozen(eq=False)
class First:
    """The first of a family, in one way of calling it.

    Args:
        path: Its path.
        read: What its code has read, by the module in it and the name.
        begin: Number of the marker where it begins.
        end: Number of the marker where it ends.
        given: What it gave, flat.
        spec: How that is put together.
        num_calls: How often each module in it was called.
    """

    path: str
    read: dict[tuple[str, str], Hashable]
    begin: int
    end: int
    given: Sequence[Any]
    spec: TreeSpec
    num_calls: dict[str, int]


@define
class Repeats:
    """The families of one export.

    Args:
        layout: What changes how modules compute.
        tree: The model's tensors.
        num_calls: How often each module was called, by path; kept by the export.
        firsts: The first of each family, by how it is called.
        repeated: For each placeholder, by number, the module that it stands for and the first of its family.
        num_markers: Markers so far.
        num_hooks: Hooks in each module that is watched, before the model runs.
    """

    layout: Sequence[LayoutStep]
    tree: SpecTree
    num_calls: dict[str, int]
    firsts: dict[Hashable, list[First]] = Factory(dict)
    repeated: list[tuple[str, First]] = Factory(list)
    num_markers: int = 0
    num_hooks: dict[str, int] = Factory(dict)
    likeness: Likeness = Factory(Likeness)

    def watch(self, model: nn.Module, local: nn.Module, leaves: Sequence[str]) -> None:
        """Look out for repeated modules in a copy that is going to be exported.

        Args:
            model: The user's model, whose own hooks nobody knows.
            local: The copy.
            leaves: Modules that are hidden already.
        """
        if any(True for paths in _paths(model) if len(paths) > 1):
            return  # torch tells the paths of such a module by proxies, which end where another forward stands in
        for paths in _families(model):
            if not any(path == leaf or path.startswith(f"{leaf}.") for path in paths for leaf in leaves):
                for path in paths:
                    module = local.get_submodule(path)
                    module.forward = self._stand_in(path, module, module.forward)

    def settle(self, local: nn.Module) -> None:
        """Note the hooks that are there; modules that get others while the model runs are not repeated."""
        self.num_hooks |= {path: sum(map(_num_hooks, module.modules())) for path, module in local.named_modules()}

    def _stand_in(self, path: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            is_hooked = sum(map(_num_hooks, module.modules())) != self.num_hooks[path]  # code may do so while it runs
            if is_hooked or not _is_simple((args, *kwargs.values())):
                return forward(*args, **kwargs)
            leaves, spec = tree_flatten((args, kwargs))
            key = (self._kind(path, module), str(spec), tuple(map(_called_with, leaves)))
            for first in self.firsts.get(key, []):
                if first.read == self._now(module, first.read):
                    return self._repeat(path, first, leaves)
            return self._first(_Call(path, module, forward, key), leaves, spec)

        return stand_in

    def _first(self, call: _Call, leaves: list[Any], spec: TreeSpec) -> Any:
        begin, inside = self._mark(leaves)
        args, kwargs = tree_unflatten(inside, spec)
        before, values = dict(self.num_calls), self._now(call.module, own_attributes(call.module))
        with reading(call.module) as read:
            returned = call.forward(*args, **kwargs)
        given, returns = tree_flatten(returned)
        now = self._now(call.module, read.names)
        is_changed = any(values.get(name, _CLASS) != value for name, value in now.items())
        if is_changed or read.is_written or not _is_simple(returned) or not any(isinstance(leaf, Tensor) for leaf in given):
            return returned
        end, marked = self._mark(given)
        made = {path: num - before.get(path, 0) for path, num in self.num_calls.items() if path.startswith(f"{call.path}.")}
        self.firsts.setdefault(call.key, []).append(First(call.path, now, begin, end, given, returns, made))
        return tree_unflatten(marked, returns)

    def _mark(self, leaves: list[Any]) -> tuple[int, list[Any]]:
        number, self.num_markers = self.num_markers, self.num_markers + 1
        return number, _with(leaves, marker([leaf for leaf in leaves if isinstance(leaf, Tensor)], number))

    def _repeat(self, path: str, first: First, leaves: list[Any]) -> Any:
        number = len(self.repeated)
        self.repeated.append((path, first))
        for inside, num in first.num_calls.items():
            name = path + inside.removeprefix(first.path)
            self.num_calls[name] = self.num_calls.get(name, 0) + num
        _SHAPES[number] = [leaf for leaf in first.given if isinstance(leaf, Tensor)]
        try:
            outputs = repeat([leaf for leaf in leaves if isinstance(leaf, Tensor)], number)
        finally:
            del _SHAPES[number]
        return tree_unflatten(_with(first.given, outputs), first.spec)

    def _kind(self, path: str, module: nn.Module) -> Hashable:
        """Return what modules of one family have in common before they are called: classes, tensors, ties, layout."""
        inside = tuple(
            (name, unwatched(type(part)), part.training, tuple(_tensors(part))) for name, part in module.named_modules()
        )
        ties = tuple(
            tuple(other.removeprefix(path) if other.startswith(f"{path}.") else f"/{other}" for other in spec.paths)
            for name, _ in module.named_parameters()
            if len((spec := self.tree[f"{path}.{name}"]).paths) > 1
        )
        changes = tuple(
            evolve(step, module=step.module.removeprefix(path))
            for step in self.layout
            if step.module == path or step.module.startswith(f"{path}.")
        )
        return inside, ties, changes

    def _now(self, module: nn.Module, read: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Hashable]:
        parts = dict(module.named_modules())
        inside = {id(part): name for name, part in parts.items()}
        return {
            (part, name): self._value(vars(parts[part])[name], inside) if name in vars(parts[part]) else _CLASS
            for part, name in read
        }

    def _value(self, value: Any, inside: dict[int, str]) -> Hashable:
        if isinstance(value, nn.Module):
            return inside.get(id(value), id(value))  # what is read of it is noted there
        if isinstance(value, Tensor):
            return id(value)
        state = vars(value) if hasattr(value, "__dict__") and not isinstance(value, (type, FunctionType)) else {}
        return self.likeness.key(value), self.likeness.key(dict(state))


@frozen(eq=False)
class _Call:
    """One call of a module that is the first of its kind."""

    path: str
    module: nn.Module
    forward: Callable[..., Any]
    key: Hashable


def _paths(model: nn.Module) -> Iterable[list[str]]:
    """Return all paths of each module."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    return paths.values()


def _families(model: nn.Module) -> Iterator[list[str]]:
    """Iterate over the paths of modules of one class in one container, without hooks of the user's; outermost ones only."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or f"{path}.".startswith(tuple(inside)):
            continue
        kinds: dict[type, list[str]] = {}
        for name, child in module.named_children():
            if not any(_is_special(part) for part in child.modules()):
                kinds.setdefault(type(child), []).append(f"{path}.{name}" if path else name)
        for paths in kinds.values():
            if len(paths) >= _FEW:
                inside += (f"{member}." for member in paths)
                yield paths


def _num_hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)  # noqa: SLF001


def _is_special(module: nn.Module) -> bool:
    is_foreign = type(module).__module__.partition(".")[0] not in _LIBRARIES
    is_scripted = isinstance(module, torch.jit.ScriptModule)
    return is_foreign or is_scripted or bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001


def _tensors(module: nn.Module) -> Iterator[Hashable]:
    """Iterate over what tensors a module holds itself: names, kinds, shapes, dtypes."""
    for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):  # noqa: SLF001
        for name, tensor in tensors.items():
            yield kind, name, None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


def _is_simple(value: Any) -> bool:
    """Tell whether nothing but a tuple holds the tensors and plain values: nothing that code could write into."""
    if type(value) is tuple:
        return all(map(_is_simple, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device, torch.SymInt))


def _called_with(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        sizes = (*map(_size, leaf.shape), *map(_size, leaf.stride()))
        return Tensor, sizes, leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), _size(leaf) if isinstance(leaf, torch.SymInt) else leaf


def _size(size: Any) -> Hashable:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _with(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """Return leaves with other tensors."""
    found = iter(tensors)
    return [next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
