"""Whether a module still has the parameters that ``execute`` placed."""

from __future__ import annotations

import sys
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

    Args:
        module: The module.
    """

    module: nn.Module
    placed: dict[int, tuple[str, nn.Parameter]] = field(init=False)
    owners: list[tuple[nn.Module, int]] = field(init=False)
    children: list[tuple[nn.Module, str, nn.Module]] = field(init=False)
    held: list[tuple[nn.Module, str, nn.Parameter | None]] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.placed = {id(parameter): (name, parameter) for name, parameter in self.module.named_parameters()}
        self._look()

    def _look(self) -> None:
        """Note the tree of modules, so that a later look at it is quick."""
        modules = list(without_scripted(self.module.modules()))
        self.owners = [(module, len(module._modules) + len(module._parameters)) for module in modules]  # noqa: SLF001
        self.children = [(m, name, child) for m in modules for name, child in m._modules.items() if child is not None]  # noqa: SLF001
        self.held = [(module, name, p) for module in modules for name, p in module._parameters.items()]  # noqa: SLF001

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
        return (
            all(len(module._modules) + len(module._parameters) == num for module, num in self.owners)  # noqa: SLF001
            and all(module._modules.get(name) is child for module, name, child in self.children)  # noqa: SLF001
            and all(module._parameters.get(name) is parameter for module, name, parameter in self.held)  # noqa: SLF001
        )

    def _compare(self) -> None:
        now = {id(parameter): name for name, parameter in self.module.named_parameters()}
        added = [name for key, name in now.items() if key not in self.placed]
        gone = [name for key, (name, _) in self.placed.items() if key not in now]
        if not added and not gone:
            return
        told = [f"{len(names)} {what} ({_some(names)})" for names, what in ((added, "new"), (gone, "gone")) if names]
        msg = (
            f"the module's parameters are not those that execute placed: {', '.join(told)}. Ranks would train parameters "
            "that nobody shares out or keeps alike. Adapters, resized embeddings, quantisation and replaced modules come "
            "before planning: change the model, make a schedule of it, plan_build and execute that"
        )
        raise TrainingError(msg)


def without_scripted(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Leave out scripted modules, which nothing can be put on."""
    return (module for module in modules if not isinstance(module, torch.jit.ScriptModule))


def is_fsdp(module: nn.Module) -> bool:
    """Tell whether FSDP2 shares out a module's parameters; its import takes long, and is the user's to make."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:_TOLD])}{', ...' if len(names) > _TOLD else ''}"
