"""Whether a module still has the parameters that ``execute`` placed."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from attrs import define, field

from .error import TrainingError

if TYPE_CHECKING:
    from torch import nn

_TOLD = 3


@define(eq=False)
class PlacedParameters:
    """The parameters of a module when it was executed.

    Neither the module nor its parameters are kept alive by it.

    Args:
        of: The module.
    """

    of: weakref.ref[nn.Module]
    placed: dict[int, tuple[str, weakref.ref[nn.Parameter]]] = field(init=False)
    seen: list[tuple[weakref.ref[nn.Module], dict[str, int]]] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.placed = {id(p): (name, weakref.ref(p)) for name, p in self.module.named_parameters()}
        self._look()

    @property
    def module(self) -> nn.Module:
        """The module."""
        module = self.of()
        assert module is not None, "it is being called"
        return module

    def _look(self) -> None:
        """Note the tree of modules, so that a later look at it is quick."""
        modules = without_scripted(self.module.modules())
        self.seen = [(weakref.ref(module), _parts(module)) for module in modules]

    def check(self) -> bool:
        """Look at the module before a call; return whether something has changed that may be right.

        Raises:
            TrainingError: If it has other parameters than those that were placed.
        """
        if self._is_as_seen():
            return False
        if not any(map(is_fsdp, self.module.modules())):  # they hold shards in their place
            self._compare()
        self._look()
        return True

    def _is_as_seen(self) -> bool:
        return all((module := known()) is not None and _parts(module) == parts for known, parts in self.seen)

    def _compare(self) -> None:
        now = {id(parameter): name for name, parameter in self.module.named_parameters()}
        alive = {key: name for key, (name, known) in self.placed.items() if known() is not None}
        added = [name for key, name in now.items() if key not in alive]
        gone = [name for key, (name, _) in self.placed.items() if key not in now or key not in alive]
        if not added and not gone:
            return
        if sorted(added) == sorted(gone):
            added, gone, told = [], [], [f"{len(added)} are other tensors ({_some(added)})"]
        else:
            told = []
        told += [f"{len(names)} {what} ({_some(names)})" for names, what in ((added, "new"), (gone, "gone")) if names]
        msg = (
            f"the module's parameters are not those that execute placed: {', '.join(told)}. Ranks would train parameters "
            "that nobody shares out or keeps alike. Adapters, resized embeddings, quantisation and replaced modules come "
            "before planning: change the model, make a schedule of it, plan_build and execute that"
        )
        raise TrainingError(msg)


def _parts(module: nn.Module) -> dict[str, int]:
    """Return which objects a module has for parameters and children."""
    return {name: id(part) for parts in (module._parameters, module._modules) for name, part in parts.items()}  # noqa: SLF001


def without_scripted(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Leave out scripted modules, which nothing can be put on."""
    return (module for module in modules if not isinstance(module, torch.jit.ScriptModule))


def is_fsdp(module: nn.Module) -> bool:
    """Tell whether FSDP2 shares out a module's parameters; its import takes long, and is the user's to make."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:_TOLD])}{', ...' if len(names) > _TOLD else ''}"
