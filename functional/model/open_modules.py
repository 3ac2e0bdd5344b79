"""Follow which modules of a model are running, and how often each is called."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from attrs import Factory, define
from torch import nn


@define
class OpenModules:
    """The modules that are running.

    Args:
        paths: Paths of the modules that are running, innermost last.
        num_calls: How often each module has been called, by path.

    >>> model, running = nn.Sequential(nn.Linear(2, 2)), OpenModules()
    >>> running.follow(model)
    >>> _ = model(torch.ones(1, 2))
    >>> running.num_calls
    {'': 1, '0': 1}
    """

    paths: list[str] = Factory(list)
    num_calls: dict[str, int] = Factory(dict)

    @property
    def innermost(self) -> str:
        """Path of the innermost running module; after an error, of the module that raised it."""
        return self.paths[-1] if self.paths else ""

    def follow(self, model: nn.Module, paths: Iterable[str] | None = None, *, close_on_errors: bool = False) -> None:
        """Hook the modules of a model, except scripted ones, which take no hooks.

        Args:
            model: The model, which is going to run.
            paths: The modules to follow; None for all.
            close_on_errors: Whether a module that raises counts as left; else ``innermost`` tells where it was raised.
        """
        modules = dict(model.named_modules())
        for path in modules if paths is None else paths:
            if not isinstance(modules[path], torch.jit.ScriptModule):
                self._hook(path, modules[path], close_on_errors=close_on_errors)

    def _hook(self, path: str, module: nn.Module, *, close_on_errors: bool) -> None:
        def enter(*_: object) -> None:
            self.paths.append(path)
            self.num_calls[path] = self.num_calls.get(path, 0) + 1

        def leave(*_: object) -> None:
            self.paths.pop()

        module.register_forward_pre_hook(enter, prepend=True)
        module.register_forward_hook(leave, always_call=close_on_errors)
