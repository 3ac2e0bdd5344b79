"""Modules that are alike and called alike: so that what is found out of one is known of all.

What the code of the first of a family reads of it is noted while it runs. The next ones do what that one did, if they agree
with it in all that was read and in what they are called with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from attrs import Factory, define, evolve, frozen
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from .attribute_reads import own_attributes, reading, unwatched
from .likeness import Likeness

if TYPE_CHECKING:
    from ...specs.steps import LayoutStep
    from ...specs.tree import SpecTree

_FEW = 3
"""Fewer members of a family are not worth it."""

_LIBRARIES = ("torch", "transformers")
"""Whose layers are known to leave nothing behind but what they return; those of others are exported one by one."""

_CLASS = "of the class"
"""Stands for the value of an attribute that a module has not of its own."""


@frozen(eq=False)
class First:
    """The first of a family, in one way of calling it.

    Args:
        path: Its path.
        read: What its code has read, by the module in it and the name.
        given: What it gave, flat.
        spec: How that is put together.
        num_calls: How often each module in it was called.
        is_second: Whether it is the second of its family.
    """

    path: str
    read: dict[tuple[str, str], Hashable]
    given: Sequence[Any]
    spec: TreeSpec
    num_calls: dict[str, int]
    is_second: bool = False

    def as_second(self) -> First:
        """Return the same as the second of its family."""
        return evolve(self, is_second=True)


@frozen(eq=False)
class Call:
    """One call of a module that may be one of a family."""

    path: str
    module: nn.Module
    forward: Callable[..., Any]
    key: Hashable


@define
class Families(ABC):
    """The families of one run of a model.

    Args:
        layout: What changes how modules compute.
        tree: The model's tensors.
        num_calls: How often each module was called, by path; kept by whoever runs the model.
        firsts: The first of each family, by how it is called.
        num_hooks: Hooks in each module that is watched, before the model runs.
        likeness: What tells values apart.
    """

    layout: Sequence[LayoutStep]
    tree: SpecTree
    num_calls: dict[str, int]
    firsts: dict[Hashable, list[First]] = Factory(dict)
    num_hooks: dict[str, int] = Factory(dict)
    likeness: Likeness = Factory(Likeness)

    def watch(self, model: nn.Module, local: nn.Module, leaves: Sequence[str] = ()) -> None:
        """Look out for repeated modules in a copy that is going to run.

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
            key = (self._kind(path, module), str(spec), tuple(map(self.told_apart, leaves)))
            for first in self.firsts.get(key, []):
                if first.read == self._now(module, first.read):
                    return self.repeat(Call(path, module, forward, key), first, leaves, spec)
            return self.first(Call(path, module, forward, key), leaves, spec)

        return stand_in

    @abstractmethod
    def first(self, call: Call, leaves: list[Any], spec: TreeSpec) -> Any:
        """Run a module that no other one stands for, and return what it returns."""

    @abstractmethod
    def repeat(self, call: Call, first: First, leaves: list[Any], spec: TreeSpec) -> Any:
        """Return what a module returns that does what the first of its family did."""

    def run(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, First | None]:
        """Run a module; return what it returns, and what others must agree with, if it leaves nothing else behind."""
        before, values = dict(self.num_calls), self._now(call.module, own_attributes(call.module))
        with reading(call.module) as read:
            returned = call.forward(*args, **kwargs)
        given, returns = tree_flatten(returned)
        now = self._now(call.module, read.names)
        is_changed = any(values.get(name, _CLASS) != value for name, value in now.items())
        if is_changed or read.is_written or not _is_simple(returned) or not any(isinstance(leaf, Tensor) for leaf in given):
            return returned, None
        made = {path: num - before.get(path, 0) for path, num in self.num_calls.items() if path.startswith(f"{call.path}.")}
        return returned, First(call.path, now, given, returns, made)

    def count(self, path: str, first: First) -> None:
        """Count the modules in one as called, as often as in the first of its family."""
        for inside, num in first.num_calls.items():
            name = path + inside.removeprefix(first.path)
            self.num_calls[name] = self.num_calls.get(name, 0) + num

    def told_apart(self, leaf: Any) -> Hashable:
        """Return what must be the same of what modules are called with."""
        if isinstance(leaf, Tensor):
            sizes = (*map(_size, leaf.shape), *map(_size, leaf.stride()))
            return Tensor, sizes, leaf.dtype, leaf.device, leaf.requires_grad
        return type(leaf), _size(leaf) if isinstance(leaf, torch.SymInt) else leaf

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


def _size(size: Any) -> Hashable:
    return size.node.expr if isinstance(size, torch.SymInt) else size
