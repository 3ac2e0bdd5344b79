"""Faults as problems: where, and what met."""

from __future__ import annotations

from collections.abc import Iterator

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ...specs.errors import Problem
from ...specs.paths import module_of
from ...specs.tree import SpecTree
from ..layout.local_model import LocalModel
from ..model.fake_values import DependsOnValuesError
from .record import Stopped
from .tape import Tape
from .typed_run import Fault


def problem_of(fault: Fault, local: Tape, tree: SpecTree) -> Problem:
    """Return the problem of a fault that was found in a rank's run, without a mend."""
    path = local.values[fault.value].path if fault.value is not None else ""
    if fault.kind != "gradient":
        return Problem(fault.path, fault.cause)
    if fault.cause == "summand" and path:
        where = "its module" if module_of(path) == fault.path else repr(fault.path or "the model")
        cause = f"it is whole, and meets parts of an activation in {where}: each rank would have a part of its gradient"
        return Problem(tree[path].path, cause, type=tree[path].type)
    if fault.cause == "summand":
        cause = "a whole activation meets parts here, and nothing adds up its gradient: each rank has a part of it"
        return Problem(fault.path, cause)
    if path:
        if fault.path and module_of(path) != fault.path:
            return Problem(fault.path, f"{fault.cause}, by what is summed or divided here")
        return Problem(tree[path].path, f"{fault.cause}, by what its module sums or divides", type=tree[path].type)
    return Problem(fault.path, fault.cause)


def cannot_run(error: Exception) -> bool:
    """Tell whether code stops since fake tensors have no values, or since it has no backward pass."""
    if isinstance(error, (DependsOnValuesError, DataDependentOutputException, DynamicOutputShapeException)):
        return True
    return isinstance(error, (GuardOnDataDependentSymNode, ZeroDivisionError)) or "requires grad is being used in" in str(
        error
    )


def stopped(subject: LocalModel, found: Stopped, *, is_whole: bool) -> Iterator[Problem]:
    """Iterate over the problem of a forward pass at local shapes that stops."""
    path, error = found.path, found.error
    module = subject.model.get_submodule(path)
    prefix = f"{path}." if path else ""
    near = [
        f"{s.path.removeprefix(prefix)} {s.type}" for s in subject.tree.values() if s.path.startswith(prefix) and s.shards
    ]
    what = f"{type(module).__name__} with {', '.join(near[:4])}" if near else type(module).__name__
    text = str(error).strip().splitlines()
    where = "a forward pass" if is_whole else "a forward pass at local shapes"
    cause = f"{where} stops in this {what}: {type(error).__name__}: {text[0] if text else ''}"
    fix = "Its inputs and tensors do not meet: split both sides alike, add a .sync, or .set the sizes that it keeps"
    if is_whole:
        fix = "The whole model stops there too: give other example_inputs"
    yield Problem(path, cause, fix)
