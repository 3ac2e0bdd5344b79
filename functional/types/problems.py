"""Faults as problems: where, what met, and what would mend it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ...specs.errors import Problem
from ...specs.paths import module_of
from ..layout.local_model import LocalModel
from ..model.fake_values import DependsOnValuesError
from .held import UNKNOWN
from .record import Stopped
from .tape import Tape
from .typed_run import Fault, Types


def problems_of(faults: Sequence[Fault], local: Tape, types: Types, subject: LocalModel) -> list[Problem]:
    """Return the problems of a rank's run, each path once for each cause."""
    found = [_problem(fault, local, types, subject) for fault in faults]
    return list(dict.fromkeys(found))


def _problem(fault: Fault, local: Tape, types: Types, subject: LocalModel) -> Problem:
    if fault.kind == "gradient":
        return _of_gradient(fault, local, subject)
    if fault.needs == "whole" and fault.value is not None:
        maker = _maker(fault.value, local, types)
        kind = types.held.get(fault.value, UNKNOWN).kind
        if kind == "summand" and maker is not None:
            fix = f"Add it up where it is made: sch.at[{maker!r}].sync('forward_post', 'all_reduce')"
            return Problem(fault.path, fault.cause, fix)
        if kind == "parts" and maker is not None:
            axis = types.held[fault.value].split_axis
            fix = f"Join it where it is made: sch.at[{maker!r}].sync('forward_post', 'all_gather', axis={axis})"
            return Problem(fault.path, fault.cause, fix)
    return Problem(fault.path, fault.cause, "Split what meets here alike, or keep it whole")


def _maker(value: int, local: Tape, types: Types) -> str | None:
    producer = types.producers.get(value)
    return local.calls[producer].module if producer is not None else None


def _of_gradient(fault: Fault, local: Tape, subject: LocalModel) -> Problem:
    tree = subject.tree
    path = local.values[fault.value].path if fault.value is not None else ""
    if fault.cause == "summand" and path:
        spec = tree[path]
        where = "its module" if module_of(path) == fault.path else repr(fault.path or "the model")
        cause = f"it is whole, and meets parts of an activation in {where}: each rank would have a part of its gradient"
        fix = f"Sum its gradient: sch.at[{spec.path!r}].sum_gradient(); or split it alike, or freeze it"
        return Problem(spec.path, cause, fix, spec.type)
    if fault.cause == "summand":
        cause = "a whole activation meets parts here, and nothing adds up its gradient: each rank has a part of it"
        return Problem(fault.path, cause, f"sch.at[{fault.path!r}].sync('backward_post', 'all_reduce')")
    if path:
        spec = tree[path]
        return Problem(
            spec.path, f"{fault.cause}, since {fault.path or 'the model'} sums it", "Leave out one sum", spec.type
        )
    return Problem(fault.path, fault.cause, "Leave out one sum")


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
