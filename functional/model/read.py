"""Read a model: its modules, tensors and ties, never values; and tell whether it is the model that a plan was made for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...specs.dtypes import is_known
from ...specs.errors import Problem
from ...specs.module import ModuleSpec
from ...specs.param import Kind, ParamSpec
from ...specs.paths import join
from ...specs.program import InitProgram
from ...specs.source import Made, ModuleCall, ModuleValues, OwnValues, Uninitialised, Unknown
from ...specs.tree import SpecTree

if TYPE_CHECKING:
    from ...specs.plan import Plan

_LOST = "init code is planned to make it, and the model has values that would be lost"
_COMPARED = ("path", "orig_shape", "dtype", "kind", "tie", "requires_grad")


def read_modules(model: nn.Module) -> tuple[ModuleSpec, ...]:
    """Return the modules of a model, each once, parents before children."""
    found: dict[int, ModuleSpec] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        known = found.get(id(module))
        if known is None:
            cls = type(module)
            found[id(module)] = ModuleSpec(path, f"{cls.__module__}:{cls.__qualname__}")
        else:
            found[id(module)] = evolve(known, aliases=(*known.aliases, path))
    return tuple(found.values())


def read_tensors(model: nn.Module) -> tuple[SpecTree, list[Problem]]:
    """Return the tensors of a model, each tie once, and the problems of tensors that cannot be planned.

    A tensor's source is ``ModuleValues`` if it has values, ``Unknown`` if it is on the meta device.
    """
    problems: list[Problem] = []
    specs: dict[object, ParamSpec] = {}
    storages: dict[int, str] = {}
    for path, kind, tensor in named_tensors(model):
        if problem := _unplannable(path, tensor):
            problems.append(problem)
            continue
        identity = view_id(tensor) if tensor.numel() else id(tensor)
        if identity in specs:
            specs[identity] = evolve(specs[identity], tie=(*specs[identity].tie, path))
            continue
        specs[identity] = spec = ParamSpec(
            path=path,
            orig_shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            kind=kind,
            requires_grad=tensor.requires_grad,
            source=Unknown() if tensor.is_meta else ModuleValues(),
        )
        if kind == "parameter" and tensor.numel():
            first = storages.setdefault(storage_id(tensor), path)
            if first != path:
                cause = f"it shares memory with {first}, but is another view of it"
                problems.append(Problem(path, cause, "Make them one parameter (a tie), or clone one", spec.type))
    problems += _plain_attributes(model)
    return SpecTree(specs.values()), problems


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Kind, Tensor]]:
    """Iterate over all paths of parameters and buffers, aliases too, module by module: path, kind, tensor."""
    for module_path, module in model.named_modules(remove_duplicate=False):
        yield from own_tensors(module_path, module)


def own_tensors(module_path: str, module: nn.Module) -> Iterator[tuple[str, Kind, Tensor]]:
    """Iterate over the parameters and buffers that one module holds itself: path, kind, tensor."""
    for name, parameter in module._parameters.items():  # noqa: SLF001  named_parameters() hides aliases within a module
        if parameter is not None:
            yield join(module_path, name), "parameter", parameter
    for name, buffer in module._buffers.items():  # noqa: SLF001
        if buffer is not None:
            transient = name in module._non_persistent_buffers_set  # noqa: SLF001
            yield join(module_path, name), "non_persistent_buffer" if transient else "buffer", buffer


def storage_id(tensor: Tensor) -> int:
    """Return the identity of a tensor's memory, equal for views of each other; also on meta, and of fake tensors.

    It is only unique among storages that are alive.
    """
    return tensor.untyped_storage()._cdata  # noqa: SLF001  torch has no public name for it


def view_id(tensor: Tensor) -> tuple[object, ...]:
    """Return the identity of a view: memory, offset, shape, stride."""
    return storage_id(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def has_forward(module: nn.Module) -> bool:
    """Tell whether a module's class has a forward: containers such as ``nn.ParameterList`` have none."""
    return type(module).forward is not nn.Module.forward


def first_argument(module: nn.Module) -> str:
    """Return the name of the first argument of a module's forward.

    >>> first_argument(nn.Embedding(2, 2))
    'input'
    """
    return next(iter(inspect.signature(module.forward).parameters), "")


def _unplannable(path: str, tensor: Tensor) -> Problem | None:
    if is_lazy(tensor):
        return Problem(path, "it is lazy and has no shape yet", "Run one forward pass of the model on a small input first")
    if isinstance(tensor, nn.Parameter) and type(tensor) is not nn.Parameter:
        kind = type(tensor).__name__
        return Problem(path, f"it is a {kind}, and a plan makes plain parameters", "Plan the model before it is converted")
    name = str(tensor.dtype).removeprefix("torch.")
    if not is_known(name) or tensor.layout != torch.strided:
        return Problem(path, f"a plan cannot hold a tensor of dtype {name} and layout {tensor.layout}", "Convert it first")
    return None


def _plain_attributes(model: nn.Module) -> Iterator[Problem]:
    planned = {id(tensor): path for path, _, tensor in named_tensors(model)}
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, value in vars(module).items():
            if not isinstance(value, Tensor) and (not value or not isinstance(value, (dict, list, tuple, set))):
                continue
            kept_twice = isinstance(module, nn.RNNBase) and name == "_flat_weights"  # torch itself keeps the list right
            if name in ("_parameters", "_buffers", "_modules") or kept_twice:
                continue
            at = join(path, name)
            for tensor in tensors_in(value):
                if id(tensor) in planned:
                    cause = f"a plain attribute keeps {planned[id(tensor)]}, and would go on keeping the tensor of before"
                    yield Problem(at, cause, "Look it up when it is needed, in a property")
                    break
                if tensor.is_meta:
                    cause = "a tensor on meta is kept as a plain attribute, so that nothing would ever give it values"
                    yield Problem(
                        at, cause, f"Use self.register_buffer({name!r}, ..., persistent=False), or make it on the CPU"
                    )
                    break


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors of an attribute: a tensor, or the items of a list, tuple, set or dictionary."""
    match value:
        case Tensor():
            yield value
        case dict():
            yield from (item for item in value.values() if isinstance(item, Tensor))
        case list() | tuple() | set():
            yield from (item for item in value if isinstance(item, Tensor))
        case _:
            pass


def differences(plan: Plan, model: nn.Module, *, with_values: bool = True) -> Iterator[Problem]:
    """Iterate over the differences of a model from the planned one: paths, shapes, dtypes, kinds, ties, missing values.

    Args:
        plan: The plan.
        model: The model.
        with_values: Whether the model must have values where the plan takes them from it, and only there.
    """
    tree, problems = read_tensors(model)
    yield from problems
    for spec in plan.tree.values():
        if spec.path not in tree:
            yield Problem(spec.path, "the plan has this tensor, and the model has not", "Build the planned model", spec.type)
            continue
        found = tree[spec.path]
        differing = [name for name in _COMPARED if getattr(found, name) != getattr(spec, name)]
        if differing:
            words = "; ".join(f"{name} {getattr(found, name)!r} instead of {getattr(spec, name)!r}" for name in differing)
            yield Problem(spec.path, f"the model is not the planned one: {words}", "Plan again", spec.type)
        if with_values and (cause := _wrong_values(spec, has_values=isinstance(found.source, ModuleValues))):
            yield Problem(spec.path, cause, "Plan again with this model", spec.type)
    for path in tree:
        if path not in plan.tree:
            yield Problem(path, "the model has this tensor, and the plan has not", "Plan again", tree[path].type)


def _wrong_values(spec: ParamSpec, *, has_values: bool) -> str | None:
    match spec.source:
        case ModuleValues() | OwnValues() if not has_values and spec.num_elements:
            return "its planned source is the module's own values, and it is on meta"
        case Uninitialised() if has_values:
            return "it is planned without values, and the model has values"
        case InitProgram(replaces=False) if has_values:
            return _LOST
        case Made(calls=calls) if has_values and all(isinstance(call, ModuleCall) for call in calls):
            return _LOST
        case _:
            return None
