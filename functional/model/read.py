"""What a schedule needs to know of a module: its tensors, their ties, its submodules. Values are never read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...specs.dtypes import is_known
from ...specs.errors import Problem
from ...specs.module import ModuleSpec
from ...specs.param import Kind, ParamSpec
from ...specs.source import ModuleValues, Unknown
from ...specs.tree import SpecTree


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
    """Return the tensors of a model, tied ones once, and what cannot be planned.

    A tensor's source is ``ModuleValues`` if it has values, ``Unknown`` if it is on the meta device.
    """
    problems: list[Problem] = []
    specs: dict[object, ParamSpec] = {}
    storages: dict[int, str] = {}
    for path, kind, tensor in named_tensors(model):
        if problem := _unplannable(path, tensor):
            problems.append(problem)
            continue
        identity = _identity(tensor)
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
            other = storages.setdefault(tensor.untyped_storage()._cdata, path)  # noqa: SLF001  the only identity of a storage on meta
            if other != path:
                cause = f"it shares memory with {other}, but is another view of it"
                problems.append(Problem(path, cause, "Make them one parameter (a tie), or clone one", spec.type))
    problems += _plain_attributes(model)
    return SpecTree(specs.values()), problems


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Kind, Tensor]]:
    """Iterate over all paths of parameters and buffers, aliases too, module by module, with what they are."""
    for module_path, module in model.named_modules(remove_duplicate=False):
        yield from own_tensors(module_path, module)


def own_tensors(module_path: str, module: nn.Module) -> Iterator[tuple[str, Kind, Tensor]]:
    """Iterate over what one module holds itself, with what it is."""
    prefix = f"{module_path}." if module_path else ""
    for name, parameter in module._parameters.items():  # noqa: SLF001  named_parameters() hides aliases within a module
        if parameter is not None:
            yield prefix + name, "parameter", parameter
    for name, buffer in module._buffers.items():  # noqa: SLF001
        if buffer is not None:
            transient = name in module._non_persistent_buffers_set  # noqa: SLF001
            yield prefix + name, "non_persistent_buffer" if transient else "buffer", buffer


def _identity(tensor: Tensor) -> object:
    if not tensor.numel():
        return id(tensor)
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())  # noqa: SLF001


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
            kept_twice = isinstance(module, nn.RNNBase) and name == "_flat_weights"  # which torch itself keeps right
            if name in ("_parameters", "_buffers", "_modules") or kept_twice:
                continue
            at = f"{path}.{name}" if path else name
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
    """Iterate over the tensors in an attribute: itself, or the items of a list, tuple, set or dictionary."""
    match value:
        case Tensor():
            yield value
        case dict():
            yield from (item for item in value.values() if isinstance(item, Tensor))
        case list() | tuple() | set():
            yield from (item for item in value if isinstance(item, Tensor))
        case _:
            pass
