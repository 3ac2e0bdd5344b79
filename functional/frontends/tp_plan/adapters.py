"""Adapters of peft on a model that declares a plan: their parts follow the layers that they are on.

Read from the modules alone, so that peft need not be installed: a wrapper keeps the layer in ``base_layer``, and its own
parts by the adapter's name. LoRA's A and B multiply over the layer's inputs and outputs (Hu et al. 2021, arXiv:2106.09685),
DoRA's magnitudes are of outputs (Liu et al. 2024, arXiv:2402.09353), and IA3's factors of inputs or outputs (Liu et al.
2022, arXiv:2205.05638).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ....specs.errors import Problem
from ....specs.paths import join, module_of, name_of
from ....specs.verb_call import VerbCall
from ...model.copy import copy_module, on_meta

Said = VerbCall | Problem


def is_adapted(model: nn.Module) -> bool:
    """Tell whether adapters are on a model, or it is within a model of peft's."""
    return hasattr(model, "get_base_model") or any(map(_is_wrapper, model.modules()))


def without_adapters(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the path of the model that adapters are on, and a copy of it on the meta device without them."""
    outer: Any = model
    inner: nn.Module = outer.get_base_model() if hasattr(model, "get_base_model") else model
    path = next(path for path, module in model.named_modules() if module is inner)
    bare = copy_module(inner, on_meta, for_planning=True)
    for at, module in list(bare.named_modules()):
        if _is_wrapper(module):
            setattr(bare.get_submodule(module_of(at)), name_of(at), _within(module))
    return path, bare


def with_adapters(said: Said, model: nn.Module, inner: str) -> Iterator[Said]:
    """Iterate over what a call for the model without adapters is for the model with them.

    Args:
        said: A call of a verb, or a problem.
        model: The model with adapters.
        inner: Path of the model that they are on.
    """
    path = join(inner, said.path)
    if isinstance(said, Problem):
        yield Problem(path, said.cause, said.fix, said.type)
        return
    owner = path if _has_module(model, path) else module_of(path)
    wrapper = model.get_submodule(owner)
    below = path.removeprefix(owner)
    if not _is_wrapper(wrapper):
        yield VerbCall(path, said.verb, said.args, said.options)
    elif hasattr(wrapper, "base_layer"):
        yield VerbCall(f"{owner}.base_layer{below}", said.verb, said.args, said.options)
        yield from _beside(said, owner, wrapper)
    else:  # a copy is trained, and the original, which stays whole, is not called
        for name in _parts(wrapper, "modules_to_save"):
            yield VerbCall(f"{owner}.modules_to_save.{name}{below}", said.verb, said.args, said.options)


def _beside(said: VerbCall, owner: str, wrapper: nn.Module) -> Iterator[Said]:
    """Iterate over the calls for what an adapter adds to a layer that is split."""
    is_before = bool(getattr(wrapper, "is_feedforward", False))
    if said.verb == "colwise":
        yield from (VerbCall(f"{owner}.lora_B.{name}", "colwise", (), said.options) for name in _parts(wrapper, "lora_B"))
        for name in _parts(wrapper, "lora_magnitude_vector"):
            yield VerbCall(f"{owner}.lora_magnitude_vector.{name}.weight", "shard", (), (("axis", 0),))
        if not is_before:
            yield from (VerbCall(f"{owner}.ia3_l.{name}", "shard", (), (("axis", 0),)) for name in _parts(wrapper, "ia3_l"))
    elif said.verb == "rowwise":
        is_split = not dict(said.options).get("split_input")
        for name in _parts(wrapper, "lora_A"):
            yield VerbCall(f"{owner}.lora_A.{name}", "rowwise", (), said.options)
            if is_split and isinstance(wrapper.get_submodule(f"lora_dropout.{name}"), nn.Dropout):
                yield VerbCall(f"{owner}.lora_dropout.{name}", "fork_rng")
        for _ in _parts(wrapper, "lora_magnitude_vector"):
            cause = "its inputs are split, and DoRA takes norms of its weight over all of them"
            yield Problem(owner, cause, "Leave it out of target_modules, or use_dora=False for it")
        if is_before:
            yield from (VerbCall(f"{owner}.ia3_l.{name}", "shard", (), (("axis", 1),)) for name in _parts(wrapper, "ia3_l"))


def _is_wrapper(module: nn.Module) -> bool:
    return any(isinstance(getattr(module, name, None), nn.Module) for name in ("base_layer", "original_module"))


def _within(wrapper: Any) -> nn.Module:
    """Return the layer that a wrapper is around, or around another wrapper."""
    while _is_wrapper(wrapper):
        wrapper = wrapper.base_layer if hasattr(wrapper, "base_layer") else wrapper.original_module
    return wrapper


def _parts(wrapper: nn.Module, name: str) -> list[str]:
    """Return the names of the adapters that have a part of a kind."""
    held = getattr(wrapper, name, None)
    return list(held.keys()) if isinstance(held, (nn.ModuleDict, nn.ParameterDict)) else []


def _has_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
