"""A module copied with other tensors: its structure, never its values."""

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
from .read import named_tensors, tensors_in

_VALUES = frozenset([int, float, bool, complex, str, bytes, type(None), torch.dtype])
_ATOMS = _VALUES | {type, FunctionType}  # what a copy shares with the original
_SAYS_HOW_IT_IS_COPIED = frozenset(
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

    Attributes that code has put on a parameter stay. Scripted modules cannot be given other tensors.

    Args:
        model: What is copied; it is not changed.
        replace: Gives the new tensor; what it gives for a parameter becomes a parameter.
        for_planning: Whether scripted modules and tensors in plain attributes stand in the copy themselves, as nobody will
            write them; else the copy has copies of them.

    Raises:
        PlanError: If a hook or attribute is a function that holds on to a module of the original, which the copy would
            then call; if a tensor has a hook; or if something cannot be copied.
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
        memo = {id(kept): kept for kept in (*scripted, *plain) if id(kept) not in names}
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
    """Do what deepcopy does with modules that say nothing about copying: many times faster, where there are thousands."""
    plain = [module for module in model.modules() if id(module) not in memo and _is_plainly_copied(type(module))]
    for module in plain:
        memo[id(module)] = type(module).__new__(type(module))
    for module in plain:
        memo[id(module)].__dict__.update({name: _copied(value, memo) for name, value in module.__dict__.items()})


@cache
def _is_plainly_copied(cls: type) -> bool:
    own = {name for base in cls.__mro__ if base not in (nn.Module, object) for name in vars(base)}
    return not own & _SAYS_HOW_IT_IS_COPIED


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMS or (kind is tuple and all(type(item) in _ATOMS for item in value)):
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
    """Return a tensor like another one, without values."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def put_tensor(model: nn.Module, path: str, tensor: Tensor) -> None:
    """Make a tensor stand at a path of a module, as what stands there now: a parameter or a buffer."""
    module_path, _, name = path.rpartition(".")
    module = model.get_submodule(module_path)
    # setattr, not the dictionaries: recurrent modules keep a second list of their parameters
    setattr(module, name, tensor)


def get_tensor(model: nn.Module, path: str) -> Tensor:
    """Return the tensor that stands at a path of a module."""
    module_path, _, name = path.rpartition(".")
    return getattr(model.get_submodule(module_path), name)


def module_of(path: str) -> str:
    """Return the path of the module that holds a tensor.

    >>> module_of("model.norm.weight")
    'model.norm'
    """
    return path.rpartition(".")[0]


def tied(old: Tensor, first: Tensor) -> Tensor:
    """Return a tied tensor as what stood there before: the same parameter, or a buffer that shares its memory."""
    if isinstance(old, nn.Parameter) == isinstance(first, nn.Parameter):
        return first
    return like(old, first.detach())


def like(old: Tensor, new: Tensor) -> Tensor:
    """Return ``new`` as what ``old`` is: a parameter with its attributes and requires_grad, or a plain tensor."""
    if not isinstance(old, nn.Parameter):
        return new
    if type(new) is Tensor:
        parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    else:  # what nn.Parameter makes of a fake tensor, without a detach that is dispatched
        parameter = new.requires_grad_(old.requires_grad)
        parameter._is_param = True  # noqa: SLF001
    for name, value in vars(old).items():
        if name != "_is_hf_initialized":  # what transformers notes of values that the new tensor has not
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
    """Modules and tensors that a function refers to by its closure, globals or defaults: where deepcopy does not follow."""
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
            except Exception as error:  # noqa: BLE001  anything may be wrong with what a user keeps on a module
                cause = f"its attribute {name!r}, a {type(value).__name__}, cannot be copied: {error}"
                yield Problem(path, cause, "Make it when it is needed, or give it a __deepcopy__")
