"""A module copied with other tensors: its structure, never its values."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..specs.errors import PlanError, Problem

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


def copy_module(model: nn.Module, replace: Callable[[Tensor], Tensor], *, keep_scripted: bool) -> nn.Module:
    """Return a copy of a module in which every parameter and buffer is ``replace(tensor)``.

    Scripted modules cannot be given other tensors: their copies share them (``keep_scripted``), or have copies of them.
    Attributes that code has put on a parameter stay.

    Args:
        model: What is copied; it is not changed.
        replace: Gives the new tensor; what it gives for a parameter becomes a parameter.
        keep_scripted: Whether scripted modules stand in the copy themselves.

    Raises:
        PlanError: If a hook or attribute is a function that holds on to a module of the original, which the copy would
            then call, or if an attribute cannot be copied.
    """
    modules = {id(module): path for path, module in model.named_modules()}
    scripted = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    problems = [problem for path, module in model.named_modules() for problem in _closures(path, module, modules)]
    if problems:
        raise PlanError(problems)
    memo: dict[int, Any] = {id(module): module for module in scripted} if keep_scripted else {}
    inside = {id(part) for module in scripted for part in module.modules()}
    for module in model.modules():
        if id(module) not in inside:
            for tensor in (*module._parameters.values(), *module._buffers.values()):  # noqa: SLF001
                if tensor is not None and id(tensor) not in memo:
                    memo[id(tensor)] = _replacement(tensor, replace)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        problems = list(_uncopyable(model, memo))
        if not problems:
            raise
        raise PlanError(problems) from error


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


def like(old: Tensor, new: Tensor) -> Tensor:
    """Return ``new`` as what ``old`` is: a parameter with its attributes and requires_grad, or a plain tensor."""
    if not isinstance(old, nn.Parameter):
        return new
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    for name, value in vars(old).items():
        if name != "_is_hf_initialized":  # what transformers notes of values that the new tensor has not
            setattr(parameter, name, value)
    return parameter


def _replacement(tensor: Tensor, replace: Callable[[Tensor], Tensor]) -> Tensor:
    return like(tensor, replace(tensor))


def _closures(path: str, module: nn.Module, modules: dict[int, str]) -> Iterator[Problem]:
    if isinstance(module, torch.jit.ScriptModule):
        return
    for name, value in vars(module).items():
        functions = value.values() if name in _HOOKS else [value]
        for function in functions:
            for held in _held_modules(function, modules):
                what = f"a hook in {name}" if name in _HOOKS else f"its attribute {name!r}"
                label = getattr(_function(function), "__qualname__", repr(function))
                cause = (
                    f"{what}, {label}, holds on to the original module {held or '(the model)'!r}, which a copy would call"
                )
                fix = "Use the module that the hook is given, or make it a method of the module"
                yield Problem(path, cause, fix)


def _function(value: Any) -> Any:
    while isinstance(value, (partial, MethodType)):
        value = value.func if isinstance(value, partial) else value.__func__
    return value


def _held_modules(value: Any, modules: dict[int, str]) -> Iterator[str]:
    """Modules that a function refers to by its closure, globals or defaults: where deepcopy does not follow."""
    function = _function(value)
    if not isinstance(function, FunctionType):
        return
    names = inspect.getclosurevars(function)
    for item in (
        *names.nonlocals.values(),
        *names.globals.values(),
        *(function.__defaults__ or ()),
        *(function.__kwdefaults__ or {}).values(),
    ):
        for candidate in item if isinstance(item, (list, tuple)) else [item]:
            owner = candidate.__self__ if isinstance(candidate, MethodType) else candidate
            if id(owner) in modules:
                yield modules[id(owner)]
            elif isinstance(candidate, FunctionType) and candidate is not function:
                yield from _held_modules(candidate, modules)


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
