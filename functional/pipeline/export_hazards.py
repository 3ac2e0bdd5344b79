"""What code does while it is exported that no graph of operations says: noticed, and refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...specs.errors import Problem
from ..model.rng_state import python_state

_LEAF = "Mark the module as a leaf, which runs as it is: sch.at[{path!r}].leaf()"


@contextmanager
def noticing(open_modules: Sequence[str], leaves: Sequence[str]) -> Iterator[list[Problem]]:
    """Collect what an export within the block would lose: gradients of the user's own, numbers from Python's generators.

    Args:
        open_modules: Paths of the modules that are running, innermost last.
        leaves: Modules that run as they are, and lose nothing.
    """
    found: list[Problem] = []

    def note(cause: str) -> None:
        path = open_modules[-1] if open_modules else ""
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
    """Iterate over the paths of modules with hooks on their backward, which no graph keeps."""
    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule) and (module._backward_hooks or module._backward_pre_hooks):  # noqa: SLF001
            yield path


@contextmanager
def _replaced(owner: type, name: str, note: Callable[[], None]) -> Iterator[None]:
    original = vars(owner)[name]

    def noted(*args: Any, **kwargs: Any) -> Any:
        if not getattr(args[0], "__module__", "").startswith("torch."):  # torch's own operators use it too
            note()
        return original.__func__(*args, **kwargs) if isinstance(original, classmethod) else original(*args, **kwargs)

    setattr(owner, name, classmethod(noted) if isinstance(original, classmethod) else noted)
    try:
        yield
    finally:
        setattr(owner, name, original)
