"""Find layers that repeat each other while a model runs, so that a result for the representative holds for all.

A family is the layers of one class in one container. While its first layer runs, every attribute that its code reads is
recorded. A later layer repeats it if it agrees in all attributes that were read, and in its arguments.
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

from ...specs.paths import join
from .attribute_reads import original_class, own_attributes, record_reads
from .likeness import Likeness

if TYPE_CHECKING:
    from ...specs.layout_steps import LayoutStep
    from ...specs.tree import SpecTree

_MIN_FAMILY = 3
"""Fewest layers of a family for which looking for repetitions pays."""

_LIBRARIES = ("torch", "transformers")
"""Libraries whose layers are known to have no effect but their return value; any other layer runs each time."""

_ON_CLASS = "of the class"
"""Stands for the value of an attribute that a module does not have of its own."""


@frozen(eq=False)
class Representative:
    """A layer that ran, and that later layers called alike may repeat.

    Args:
        path: Path of the layer.
        reads: The attributes that its code read and their values, by (submodule, name).
        returned: The leaves of its return value.
        structure: The pytree structure of its return value.
        num_calls: How often each of its submodules was called.
        is_second: Whether it is the second layer of its family.
    """

    path: str
    reads: dict[tuple[str, str], Hashable]
    returned: Sequence[Any]
    structure: TreeSpec
    num_calls: dict[str, int]
    is_second: bool = False

    def as_second(self) -> Representative:
        """Return a copy marked as the second layer of its family."""
        return evolve(self, is_second=True)


@frozen(eq=False)
class LayerCall:
    """One call of a layer that may repeat another layer.

    Args:
        path: Path of the layer.
        module: The layer.
        forward: Its own forward.
        key: Equal for calls of layers of one family with alike arguments.
    """

    path: str
    module: nn.Module
    forward: Callable[..., Any]
    key: Hashable


@define
class RepeatedLayers(ABC):
    """The families of repeated layers in one run of a model.

    Args:
        layout: The steps that change how modules compute.
        tree: The model's tensors.
        num_calls: How often each module was called, by path; the caller counts while the model runs.
        representatives: The layers that ran, by the key of their call.
        num_hooks: Number of hooks in each module, before the model runs.
        likeness: Tells values apart.
    """

    layout: Sequence[LayoutStep]
    tree: SpecTree
    num_calls: dict[str, int]
    representatives: dict[Hashable, list[Representative]] = Factory(dict)
    num_hooks: dict[str, int] = Factory(dict)
    likeness: Likeness = Factory(Likeness)

    def watch(self, model: nn.Module, local: nn.Module, leaves: Sequence[str] = ()) -> None:
        """Replace the forward of repeated layers in a copy that is going to run.

        Args:
            model: The user's model; a layer on which the user has put hooks is not replaced.
            local: The copy.
            leaves: Modules that are hidden already.
        """
        if any(True for paths in _paths(model) if len(paths) > 1):
            return  # torch exports the paths of such a module by proxies, which do not survive a replaced forward
        for paths in _families(model):
            if not any(path == leaf or path.startswith(f"{leaf}.") for path in paths for leaf in leaves):
                for path in paths:
                    module = local.get_submodule(path)
                    module.forward = self._watched_forward(path, module, module.forward)

    def settle(self, local: nn.Module) -> None:
        """Count the hooks before the run; a layer that gets further hooks while the model runs is not repeated."""
        self.num_hooks |= {path: sum(map(_num_hooks, module.modules())) for path, module in local.named_modules()}

    def _watched_forward(self, path: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            is_hooked = sum(map(_num_hooks, module.modules())) != self.num_hooks[path]
            if is_hooked or not _is_simple((args, *kwargs.values())):
                return forward(*args, **kwargs)
            leaves, structure = tree_flatten((args, kwargs))
            key = (self._family(path, module), str(structure), tuple(map(self.argument_key, leaves)))
            call = LayerCall(path, module, forward, key)
            for representative in self.representatives.get(key, []):
                if representative.reads == self._values(module, representative.reads):
                    return self.repeat(call, representative, leaves, structure)
            return self.first(call, leaves, structure)

        return watched

    @abstractmethod
    def first(self, call: LayerCall, leaves: list[Any], structure: TreeSpec) -> Any:
        """Run a layer that repeats none, and return its return value."""

    @abstractmethod
    def repeat(self, call: LayerCall, representative: Representative, leaves: list[Any], structure: TreeSpec) -> Any:
        """Return the return value of a layer that repeats its representative."""

    def run(self, call: LayerCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Representative | None]:
        """Run a layer; return its return value, and its record if it had no other effect, so that it may be repeated."""
        before, values = dict(self.num_calls), self._values(call.module, own_attributes(call.module))
        with record_reads(call.module) as reads:
            result = call.forward(*args, **kwargs)
        returned, structure = tree_flatten(result)
        after = self._values(call.module, reads.names)
        is_changed = any(values.get(name, _ON_CLASS) != value for name, value in after.items())
        has_tensors = any(isinstance(leaf, Tensor) for leaf in returned)
        if is_changed or reads.is_written or not _is_simple(result) or not has_tensors:
            return result, None
        calls = {path: num - before.get(path, 0) for path, num in self.num_calls.items() if path.startswith(f"{call.path}.")}
        return result, Representative(call.path, after, returned, structure, calls)

    def count(self, path: str, representative: Representative) -> None:
        """Count the submodules of a layer that did not run as called, as often as in its representative."""
        for inside, num in representative.num_calls.items():
            name = path + inside.removeprefix(representative.path)
            self.num_calls[name] = self.num_calls.get(name, 0) + num

    def argument_key(self, leaf: Any) -> Hashable:
        """Return a key that is equal for arguments that are alike."""
        if isinstance(leaf, Tensor):
            sizes = (*map(_size, leaf.shape), *map(_size, leaf.stride()))
            return Tensor, sizes, leaf.dtype, leaf.device, leaf.requires_grad
        return type(leaf), _size(leaf) if isinstance(leaf, torch.SymInt) else leaf

    def _family(self, path: str, module: nn.Module) -> Hashable:
        """Return a key that is equal for layers of one family: classes, tensors, ties and layout."""
        inside = tuple(
            (name, original_class(type(part)), part.training, tuple(_tensors(part))) for name, part in module.named_modules()
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

    def _values(self, module: nn.Module, attributes: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Hashable]:
        """Return a key of the value that each attribute has now."""
        parts = dict(module.named_modules())
        inside = {id(part): name for name, part in parts.items()}
        return {
            (part, name): self._value_key(vars(parts[part])[name], inside) if name in vars(parts[part]) else _ON_CLASS
            for part, name in attributes
        }

    def _value_key(self, value: Any, inside: dict[int, str]) -> Hashable:
        if isinstance(value, nn.Module):
            return inside.get(id(value), id(value))  # reads of a submodule are recorded under its own name
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
    """Iterate over the families: paths of layers of one class in one container, without hooks; outermost containers only."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or f"{path}.".startswith(tuple(inside)):
            continue
        kinds: dict[type, list[str]] = {}
        for name, child in module.named_children():
            if not any(_is_special(part) for part in child.modules()):
                kinds.setdefault(type(child), []).append(join(path, name))
        for paths in kinds.values():
            if len(paths) >= _MIN_FAMILY:
                inside += (f"{member}." for member in paths)
                yield paths


def _num_hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)  # noqa: SLF001


def _is_special(module: nn.Module) -> bool:
    is_foreign = type(module).__module__.partition(".")[0] not in _LIBRARIES
    is_scripted = isinstance(module, torch.jit.ScriptModule)
    return is_foreign or is_scripted or bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001


def _tensors(module: nn.Module) -> Iterator[Hashable]:
    """Iterate over the tensors that a module holds itself: kind, name, shape, dtype."""
    for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):  # noqa: SLF001
        for name, tensor in tensors.items():
            yield kind, name, None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


def _is_simple(value: Any) -> bool:
    """Tell whether a value is a tensor, a plain value, or a tuple of them: no container that code could write into."""
    if type(value) is tuple:
        return all(map(_is_simple, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device, torch.SymInt))


def _size(size: Any) -> Hashable:
    return size.node.expr if isinstance(size, torch.SymInt) else size
