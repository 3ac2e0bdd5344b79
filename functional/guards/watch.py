"""Watch an executed module: checks before its calls and before the steps of optimizers."""

from __future__ import annotations

import inspect
import weakref
from types import MethodType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from attrs import define
from torch import nn
from torch._guards import detect_fake_mode
from torch.utils._pytree import tree_leaves

from ...specs.mesh import Coordinate
from ...specs.plan import Plan
from .batches import check_alike
from .error import TrainingError
from .parameters import PlacedParameters, without_scripted
from .steps import StepCheck, check_steps
from .wrappers import check_fsdp, refuse_foreign_ddp


def watch(
    module: nn.Module, plan: Plan, rank: Coordinate, group: dist.ProcessGroup | None, device: torch.device, num_checked: int
) -> None:
    """Let misuse of an executed module raise; copies of the module are not watched.

    Args:
        module: The module, whole but for its split tensors.
        plan: Its plan.
        rank: This rank.
        group: The group along ``tensor``; None if nothing is sent there.
        device: Where the module's tensors are.
        num_checked: Calls, and steps of optimizers, of which the ranks along ``tensor`` compare what must be alike.
    """
    if plan.mesh.num_ranks == 1 or isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
        return
    steps = None
    if group is not None and num_checked:
        split = {path for spec in plan.tree.values() if "tensor" in spec.mesh_axes(rank) for path in spec.paths}
        whole = {path: weakref.ref(p) for path, p in module.named_parameters() if path not in split}
        steps = StepCheck(whole, group, device, num_checked)
        check_steps(steps)
    _Watch(PlacedParameters(weakref.ref(module)), plan, group, device, num_checked, steps).begin(module)
    refuse_foreign_ddp(module, plan)
    if hasattr(module, "save_pretrained") and any(spec.mesh_axes(rank) for spec in plan.tree.values()):
        setattr(module, "save_pretrained", MethodType(_refuse_to_save, module))  # noqa: B010


def _refuse_to_save(_: nn.Module, *__: Any, **___: Any) -> NoReturn:
    """Refuse to write one rank's parts under the configuration of the whole model."""
    msg = (
        "save_pretrained would write this rank's parts as if they were the whole model. On all ranks: "
        "save_checkpoint(plan, model, folder), whose folder from_pretrained reads"
    )
    raise TrainingError(msg)


@define(eq=False)
class _Watch:
    """The checks before a module's calls; a copy of it, as of a module that is copied or pickled, checks nothing.

    Args:
        placed: The parameters that the module was given; None for a copy.
        plan: Its plan.
        group: The group along ``tensor``.
        device: Where the module's tensors are.
        num_left: Calls whose inputs are still to be compared.
        steps: The check before steps of optimizers, kept alive with the module.
        is_inside: Whether the whole module is being called.
    """

    placed: PlacedParameters | None = None
    plan: Plan | None = None
    group: dist.ProcessGroup | None = None
    device: torch.device | None = None
    num_left: int = 0
    steps: StepCheck | None = None
    is_inside: bool = False

    def __reduce__(self) -> tuple[type[_Watch], tuple[()]]:
        return _Watch, ()

    def begin(self, module: nn.Module) -> None:
        """Look at each call of a module, and at those of its children by code that calls its ``forward`` alone."""
        module.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True)
        module.register_forward_hook(self.after, always_call=True)
        for child in without_scripted(module.children()):
            child.register_forward_pre_hook(self.before_child, prepend=True)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the module's parameters, and at what it is called with."""
        if torch.compiler.is_compiling() or self.placed is None or detect_fake_mode(tree_leaves((args, kwargs))) is not None:
            return
        self._look()
        self.is_inside = True
        if self.group is not None and self.device is not None and self.num_left > 0:
            self.num_left -= 1
            check_alike(_named(module, args, kwargs), self.group, self.device)

    def before_child(self, _: nn.Module, __: tuple[Any, ...]) -> None:
        """Look at the module's parameters, if it was not called itself."""
        if not torch.compiler.is_compiling() and not self.is_inside and self.placed is not None:
            self._look()

    def after(self, _: nn.Module, __: tuple[Any, ...], ___: Any) -> None:
        """Note that the call has ended, also by an error."""
        self.is_inside = False

    def _look(self) -> None:
        assert self.placed is not None, "the caller asks"
        assert self.plan is not None, "it was given with them"
        if self.placed.check():
            check_fsdp(self.placed.module, self.plan)


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    names = list(inspect.signature(module.forward).parameters)
    return {**{names[at] if at < len(names) else f"argument {at}": value for at, value in enumerate(args)}, **kwargs}
