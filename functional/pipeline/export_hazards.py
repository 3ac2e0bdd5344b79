"""Refuse to export code with effects that a graph of operations does not keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...specs.errors import Problem
from ..model.rng_state import python_state

if TYPE_CHECKING:
    from ..model.open_modules import OpenModules

_LEAF = "Mark the module as a leaf, which runs as it is: sch.at[{path!r}].leaf()"


@contextmanager
def collect_hazards(running: OpenModules, leaves: Sequence[str]) -> Iterator[list[Problem]]:
    """Collect the effects that an export within the block would lose: custom gradients, numbers from Python's generators.

    Args:
        running: The modules that are running.
        leaves: Modules that are not exported, and so lose nothing.
    """
    found: list[Problem] = []

    def note(cause: str) -> None:
        path = running.innermost
        if not any(f"{path}.".startswith(f"{leaf}.") for leaf in leaves) and path not in {p.path for p in found}:
            fix = "Do it in a module of its own, and mark that as a leaf: sch.at[module].leaf()"
            found.append(Problem(path, cause, _LEAF.format(path=path) if path else fix))

    before = python_state()
    with (
        _replaced(torch.autograd.Function, "apply", lambda: note("it has a backward of its own, which the export ignores")),
        _replaced(Tensor, "register_hook", lambda: note("it registers a hook on a tensor, which the export ignores")),
    ):
        yield found
    if python_state() != before and not leaves:
        cause = "its code draws from Python's or NumPy's generator, and the export would fix what it drew"
        found.append(Problem("", cause, "Draw from torch's: torch.rand"))


def backward_hooks(model: nn.Module) -> Iterator[str]:
    """Iterate over the paths of modules with hooks on their backward pass, which an export loses."""
    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule) and (module._backward_hooks or module._backward_pre_hooks):  # noqa: SLF001
            yield path


@contextmanager
def _replaced(owner: type, name: str, note: Callable[[], None]) -> Iterator[None]:
    original = vars(owner)[name]

    def noted(*args: Any, **kwargs: Any) -> Any:
        code = args[0] if isinstance(args[0], type) else args[1]  # the function's class, or the hook of a tensor
        if not (getattr(code, "__module__", None) or "").startswith("torch."):  # torch's own operators use it too
            note()
        return original.__func__(*args, **kwargs) if isinstance(original, classmethod) else original(*args, **kwargs)

    setattr(owner, name, classmethod(noted) if isinstance(original, classmethod) else noted)
    try:
        yield
    finally:
        setattr(owner, name, original)
