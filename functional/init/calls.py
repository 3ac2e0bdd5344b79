"""List the calls of init code that a model has, in the order in which its libraries would make them, and run a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from ...specs.paths import join, module_of
from ...specs.source import Call, ModuleCall, TensorCall
from ..model.callables import find_callable
from ..model.copy import get_tensor
from ..model.read import named_tensors

Owner = Literal["user", "transformers", "reset"]
"""Owner of a piece of init code; ``reset`` stands for the module's own ``reset_parameters``."""

OWNERS: tuple[Owner, ...] = ("user", "transformers", "reset")
"""Owners by precedence: the code of a later owner only counts for tensors that earlier owners leave unwritten."""


def run_call(model: nn.Module, call: Call, callables: Mapping[str, Any]) -> None:
    """Run a piece of init code on a model; the tensors that it touches must be allocated."""
    match call:
        case ModuleCall(kind="init_weights", module=path, code=code):
            function = find_callable(code, callables)
            module = model.get_submodule(path)
            function(module, path) if takes_path(function) else function(module)
        case ModuleCall(kind="_init_weights", module=path, owner=owner):
            code: Any = model.get_submodule(owner)
            code._init_weights(model.get_submodule(path))  # noqa: SLF001  transformers' hook for init code
        case ModuleCall(kind=kind, module=path):
            getattr(model.get_submodule(path), kind)()
        case TensorCall(path=path, function=name):
            find_callable(name, callables)(get_tensor(model, path))


def takes_path(function: Callable[..., Any]) -> bool:
    """Tell whether the user's init code is ``(module, path)`` rather than ``(module)``.

    >>> takes_path(lambda module: None), takes_path(lambda module, path: None), takes_path(lambda module, std=0.02: None)
    (False, True, False)
    """
    return len(names := _positional(function)) > 1 and names[1] in ("path", "name")


def wrong_signature(function: Callable[..., Any]) -> str:
    """Return the signature of the user's init code if it can be called neither as ``(module)`` nor ``(module, path)``.

    >>> wrong_signature(lambda module, std: None), wrong_signature(lambda module, path: None)
    ('(module, std)', '')
    """
    arguments = ("module", "path") if takes_path(function) else ("module",)
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return str(inspect.signature(function))
    except ValueError:  # a builtin without a signature
        pass
    return ""


def _positional(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def calls_of(model: nn.Module, owner: Owner, init_weights: str | None) -> Iterator[ModuleCall]:
    """Iterate over the calls of one owner's init code, each module once, children before parents."""
    holding = {module_of(path) for path, _, _ in named_tensors(model)}
    for path, module, pretrained in _children_first(model):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        match owner:
            case "user" if init_weights and path in holding:
                yield ModuleCall(path, "init_weights", init_weights)
            case "transformers" if pretrained is not None:
                code = model.get_submodule(pretrained)._init_weights  # noqa: SLF001
                yield ModuleCall(path, "_init_weights", _code_name(code), pretrained)
            case "reset":
                for kind in ("reset_parameters", "_reset_parameters"):
                    if callable(code := getattr(module, kind, None)):
                        yield ModuleCall(path, kind, _code_name(code))
                        break
            case _:
                pass


def _children_first(
    module: nn.Module, path: str = "", pretrained: str | None = None, seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Iterate over modules, each once, children before parents, with the path of the enclosing Hugging Face model."""
    seen = set() if seen is None else seen
    seen.add(id(module))
    if any(
        c.__name__ == "PreTrainedModel" and c.__module__.partition(".")[0] == "transformers" for c in type(module).__mro__
    ):
        pretrained = path
    for name, child in module.named_children():
        if id(child) not in seen:
            yield from _children_first(child, join(path, name), pretrained, seen)
    yield path, module, pretrained


def _code_name(code: Any) -> str:
    return f"{code.__module__}:{code.__qualname__}"
