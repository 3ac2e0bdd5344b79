"""Copy a module with new tensors, and exchange tensors at paths of a module."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ...specs.errors import PlanError, Problem
from ...specs.paths import module_of, name_of
from .read import named_tensors, tensors_in

_VALUES = frozenset([int, float, bool, complex, str, bytes, type(None), torch.dtype])
_SHARED = _VALUES | {type, FunctionType}  # types whose objects a copy shares with the original
_COPY_PROTOCOL = frozenset(
    [
        *("__copy__", "__deepcopy__", "__getnewargs__", "__getnewargs_ex__", "__getstate__", "__new__"),
        *("__reduce__", "__reduce_ex__", "__setstate__", "__slots__"),
    ]
)
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def copy_module(model: nn.Module, replace: Callable[[Tensor], Tensor], *, for_planning: bool) -> nn.Module:
    """Return a copy of a module in which every parameter and buffer is ``replace(tensor)``.

    Attributes that code has put on a parameter are kept. Scripted modules keep their tensors.

    Args:
        model: The module; it is not changed.
        replace: Returns the new tensor, which becomes a parameter if the old tensor is a parameter.
        for_planning: Whether the copy shares scripted modules and tensors in plain attributes with the model, as nobody
            will write them; else they are copied.

    Raises:
        PlanError: If a hook or attribute is a function that refers to a module of the original, which the copy would then
            call; if a tensor has a hook; or if an attribute cannot be copied.
    """
    names = {id(module): path for path, module in model.named_modules()}
    names |= {id(tensor): path for path, _, tensor in named_tensors(model)}
    scripted = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    problems = [problem for path, module in model.named_modules() for problem in _closures(path, module, names)]
    problems += _hooked_tensors(model)
    if problems:
        raise PlanError(problems)
    memo: dict[int, Any] = {}
    if for_planning:
        plain = [tensor for module in model.modules() for value in _attributes(module) for tensor in tensors_in(value)]
        memo = {id(shared): shared for shared in (*scripted, *plain) if id(shared) not in names}
    inside = {id(part) for module in scripted for part in module.modules()}
    for module in model.modules():
        if id(module) not in inside:
            for tensor in (*module._parameters.values(), *module._buffers.values()):  # noqa: SLF001
                if tensor is not None and id(tensor) not in memo:
                    memo[id(tensor)] = like(tensor, replace(tensor))
    try:
        _copy_plain(model, memo)
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        problems = list(_uncopyable(model, memo))
        if not problems:
            raise
        raise PlanError(problems) from error
    shared = [path for path, module in copied.named_modules() if id(module) in names and id(module) not in inside]
    if shared:
        cause = "its copy is the module itself, so that the original would be filled"
        raise PlanError([Problem(path, cause, "Let its __deepcopy__ give a new module") for path in shared])
    return copied


def _copy_plain(model: nn.Module, memo: dict[int, Any]) -> None:
    """Copy modules without a copy protocol of their own into the memo, as deepcopy would, but many times faster."""
    plain = [module for module in model.modules() if id(module) not in memo and _is_plainly_copied(type(module))]
    for module in plain:
        memo[id(module)] = type(module).__new__(type(module))
    for module in plain:
        memo[id(module)].__dict__.update({name: _copied(value, memo) for name, value in module.__dict__.items()})


@cache
def _is_plainly_copied(cls: type) -> bool:
    own = {name for base in cls.__mro__ if base not in (nn.Module, object) for name in vars(base)}
    return not own & _COPY_PROTOCOL


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _SHARED or (kind is tuple and all(type(item) in _SHARED for item in value)):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind not in (dict, OrderedDict):
        return copy.deepcopy(value, memo)
    memo[id(value)] = copied = kind()
    for key, item in value.items():
        copied[_copied(key, memo)] = _copied(item, memo)
    return copied


def on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor on meta with the shape and dtype of another tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def put_tensor(model: nn.Module, path: str, tensor: Tensor) -> None:
    """Replace the tensor at a path of a model by another tensor of its kind: parameter or buffer."""
    # setattr, not the dictionaries: recurrent modules keep a second list of their parameters
    setattr(model.get_submodule(module_of(path)), name_of(path), tensor)


def get_tensor(model: nn.Module, path: str) -> Tensor:
    """Return the tensor at a path of a model."""
    return getattr(model.get_submodule(module_of(path)), name_of(path))


def tied(old: Tensor, first: Tensor) -> Tensor:
    """Return ``first`` for another path of its tie: the parameter itself, or a buffer that shares its memory.

    Args:
        old: The tensor at that path until now.
        first: The tensor at the first path of the tie.
    """
    if isinstance(old, nn.Parameter) == isinstance(first, nn.Parameter):
        return first
    return like(old, first.detach())


def like(old: Tensor, new: Tensor) -> Tensor:
    """Return ``new`` as a parameter with the attributes and requires_grad of ``old``, or as it is if that is a buffer."""
    if not isinstance(old, nn.Parameter):
        return new
    if type(new) is Tensor:
        parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    else:  # as nn.Parameter does for a fake tensor, without a detach that is dispatched
        parameter = new.requires_grad_(old.requires_grad)
        parameter._is_param = True  # noqa: SLF001
    for name, value in vars(old).items():
        if name != "_is_hf_initialized":  # transformers' mark of a tensor with values, which the new tensor lacks
            setattr(parameter, name, value)
    return parameter


def _attributes(module: nn.Module) -> list[Any]:
    if isinstance(module, torch.jit.ScriptModule):
        return []
    return [value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")]


def _hooked_tensors(model: nn.Module) -> Iterator[Problem]:
    for path, _, tensor in named_tensors(model):
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):  # noqa: SLF001
            cause = "the tensor has a hook, which would stay on the original"
            yield Problem(path, cause, "Register it after execute, on the parameter of built.module")


def _closures(path: str, module: nn.Module, names: dict[int, str]) -> Iterator[Problem]:
    if isinstance(module, torch.jit.ScriptModule):
        return
    for name, value in vars(module).items():
        if type(value) in _VALUES or (name in _HOOKS and not value):
            continue
        functions = value.values() if name in _HOOKS else [value]
        for function in functions:
            for held in _held(function, names):
                what = f"a hook in {name}" if name in _HOOKS else f"its attribute {name!r}"
                label = getattr(_function(function), "__qualname__", repr(function))
                cause = f"{what}, {label}, holds on to the original {held or 'model'!r}, which a copy would use"
                fix = "Use the module that the hook is given, or make it a method of the module"
                yield Problem(path, cause, fix)


def _function(value: Any) -> Any:
    while isinstance(value, (partial, MethodType)):
        value = value.func if isinstance(value, partial) else value.__func__
    return value


def _held(value: Any, names: dict[int, str], depth: int = 4) -> Iterator[str]:
    """Iterate over modules and tensors that a function refers to by closure, globals or defaults, which deepcopy keeps."""
    function = _function(value)
    if not isinstance(function, FunctionType) or not depth:
        return
    enclosed = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    used = [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]
    for item in (*enclosed, *used, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        candidates = item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else [item]
        for candidate in candidates:
            owner = candidate.__self__ if isinstance(candidate, MethodType) else candidate
            if id(owner) in names:
                yield names[id(owner)]
            elif isinstance(candidate, FunctionType) and candidate is not function:
                yield from _held(candidate, names, depth - 1)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not _is_filled
    except ValueError:  # a variable that is not assigned yet
        return False


def _uncopyable(model: nn.Module, memo: dict[int, Any]) -> Iterator[Problem]:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception as error:  # noqa: BLE001  the user's attribute may raise anything
                cause = f"its attribute {name!r}, a {type(value).__name__}, cannot be copied: {error}"
                yield Problem(path, cause, "Make it when it is needed, or give it a __deepcopy__")
