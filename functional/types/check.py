"""Prove that a split model computes what the whole model computes, or say where it does not, or where nobody can tell."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence

from attrs import evolve, field, frozen
from frozendict import frozendict

from ...specs.equality import Trust, Unfollowed
from ...specs.errors import Problem
from ...specs.layout_steps import ForkRng, SetAttributes, SetToLocalSize, ShareRng, SumProducts
from ...specs.paths import join
from ..layout.local_model import LocalModel
from ..model.read import named_tensors
from .expert_split import unfollowed_axes, unfollowed_experts, without_experts, wrong_experts
from .follow import follow
from .gradients import wrong_gradients
from .macros import with_macros
from .problems import cannot_run, problem_of, stopped
from .record import Stopped, record_local, record_whole
from .skips import is_sound
from .steps import unsaid
from .tape import Tape
from .typed_backward import TypedBackward
from .typed_run import Fault, Found, Types
from .unreached import Reach, is_unreached, unreached


@frozen(eq=False)
class Checked:
    """What is known of a split model.

    Args:
        problems: Where it computes something else than the whole model.
        unfollowed: What nobody could follow.
        local: The run of a rank; None where it stopped.
        types: What ranks hold of its values; None where there is no run of both models.
        found: The fault that each problem of a run is about.
    """

    problems: tuple[Problem, ...] = field(default=(), converter=tuple)
    unfollowed: tuple[Unfollowed, ...] = field(default=(), converter=tuple)
    local: Tape | None = None
    types: Types | None = None
    found: Mapping[Problem, Found] = frozendict()


def check_types(
    subject: LocalModel,
    trusts: Sequence[Trust] = (),
    chain: Sequence[Sequence[str]] = (),
    *,
    wholes: list[Tape] | None = None,
) -> Checked:
    """Follow a split model beside the whole model, forward and backward; nothing of a model that is trusted as a whole.

    Ranks that hold tensors of other sizes are followed too.

    Args:
        subject: The model, with example inputs.
        trusts: Modules of which the user's word is taken.
        chain: Paths of the modules of each stage, where the user gave stages that call modules in sequence.
        wholes: Runs of the whole model that are known, to which further ones are added. With it repeated layers are skipped
            also where faults are found: quicker, and less sure.
    """
    wrong = list(wrong_inputs(subject))
    if wrong or any(not trust.module for trust in trusts):
        return Checked(wrong)
    structural = [*wrong_experts(subject), *_broken_ties(subject)]
    alone = without_experts(subject)
    ranks = _distinct_ranks(alone)
    found = [
        _followed(alone, rank, trusts, chain, skip=True, wholes=wholes)
        or _followed(alone, rank, trusts, chain, skip=False, wholes=wholes)
        for rank in ranks
    ]
    checked = [each for each in found if each is not None]
    problems = dict.fromkeys([*structural, *(problem for each in checked for problem in each.problems)])
    unfollowed = dict.fromkeys(lost for each in checked for lost in each.unfollowed)
    if local := checked[0].local:
        unfollowed |= dict.fromkeys(unreached(alone, local, trusts))
    unfollowed |= dict.fromkeys([*unfollowed_experts(subject, trusts), *unfollowed_axes(subject)])
    faults = {problem: found for each in reversed(checked) for problem, found in each.found.items()}
    return evolve(checked[0], problems=problems, unfollowed=unfollowed, found=faults)


def _distinct_ranks(subject: LocalModel) -> list[int]:
    """Return the first rank along ``tensor`` of each kind: ranks of a kind hold tensors of the same sizes."""
    kinds: dict[tuple[tuple[int, ...], ...], int] = {}
    for rank in range(subject.mesh.tensor):
        here = subject.mesh.coordinate(rank)
        kinds.setdefault(tuple(spec.local_shape(here) for spec in subject.tree.values()), rank)
    return list(kinds.values())


def _followed(
    subject: LocalModel,
    rank: int,
    trusts: Sequence[Trust],
    chain: Sequence[Sequence[str]],
    *,
    skip: bool,
    wholes: list[Tape] | None,
) -> Checked | None:
    """Return what is known of a rank; None with ``skip`` where skipped layers leave something open."""
    anyway = wholes is not None or not skip
    local = record_local(subject, skip=skip, coordinate=subject.mesh.coordinate(rank), chain=chain)
    if isinstance(local, Stopped) and not anyway:
        return None
    whole = _whole_run(subject, local, wholes, skip=skip)
    if isinstance(whole, Stopped) and cannot_run(whole.error):
        return Checked((), [Unfollowed(whole.path, "", f"it cannot run without values: {_told(whole.error)}")])
    if isinstance(local, Stopped):
        lost = [Unfollowed(step.module, step.op, unsaid(step)) for step in dict.fromkeys(local.unsaid)]
        is_refused_later = bool(chain)  # stages that do not fit together are refused where they are cut
        return Checked((), lost) if lost or is_refused_later else _of_stopped(subject, rank, trusts, local, whole)
    silent = list(_never_called(subject, local))
    if isinstance(whole, Stopped):
        cause = f"the whole model stops there: {_told(whole.error)}"
        return Checked(silent, [Unfollowed(whole.path, "", cause)], local)
    local, whole = with_macros(local, subject.layout, trusts), with_macros(whole, (), trusts)
    types = follow(local, whole, subject, trusts, rank)
    backward = TypedBackward(local, whole, subject, types, rank)
    faults = [*types.faults, *wrong_gradients(local, types, subject.tree, subject.layout, subject.mesh.tensor, backward)]
    is_wrong = bool(faults or silent)
    if skip and local.skipped and (not anyway if is_wrong else not is_sound(local, whole, types)):
        return None
    if chain:
        faults = [_of_chain(fault) for fault in faults]
    wrong = [fault for fault in faults if fault.kind != "unfollowed"]
    lost = [Unfollowed(f.path, _operator(local, f), f.cause) for f in faults if f.kind == "unfollowed"]
    found = {problem_of(fault, local, subject.tree): Found(fault, local, types, subject.layout) for fault in reversed(wrong)}
    return Checked([*silent, *reversed(found)], lost, local, types, found)


def _whole_run(subject: LocalModel, local: Tape | Stopped, known: list[Tape] | None, *, skip: bool) -> Tape | Stopped:
    """Return the run of the whole model: a known one if it skips the layers that the rank's run skips."""
    skipped = [] if isinstance(local, Stopped) else _skipped(local)
    for whole in known or ():
        if _skipped(whole) == skipped:
            return whole
    whole = record_whole(subject, skip=skip)
    if known is not None and isinstance(whole, Tape):
        known.append(whole)
    return whole


def _skipped(tape: Tape) -> list[tuple[str, str]]:
    return [(skipped.path, skipped.representative) for skipped in tape.skipped]


def _of_stopped(subject: LocalModel, rank: int, trusts: Sequence[Trust], local: Stopped, whole: Tape | Stopped) -> Checked:
    """Return the problems of a rank's run that stops: there, and before."""
    there = list(stopped(subject, local, is_whole=isinstance(whole, Stopped)))
    if isinstance(whole, Stopped):
        return Checked(there)
    begun = with_macros(local.tape, subject.layout, trusts)
    types = follow(begun, with_macros(whole, (), trusts), subject, trusts, rank)
    wrong = [fault for fault in types.faults if fault.kind == "forward" and fault.call >= 0]
    split = [number for number, call in enumerate(begun.calls) if any(map(types.is_split, call.results))]
    if split and not wrong and (module := begun.calls[split[-1]].module) != local.path:
        result = next(filter(types.is_split, begun.calls[split[-1]].results))
        given = types.held[result].activation_type(begun.values[result].dtype)
        cause = f"it gives {given}, the last before {local.path or 'the model'} stops"
        wrong.append(Fault(split[-1], module, cause, result, "whole"))
    found = {problem_of(fault, begun, subject.tree): Found(fault, begun, types, subject.layout) for fault in reversed(wrong)}
    return Checked([*there, *reversed(found)], found=found)


def _of_chain(fault: Fault) -> Fault:
    """Return a fault of stages that do not run what the model's own forward runs."""
    if fault.kind != "unfollowed":
        return fault
    return evolve(fault, kind="forward", cause=f"the stages do not run what the model's forward runs: {fault.cause}")


def _broken_ties(subject: LocalModel) -> Iterator[Problem]:
    """Iterate over tensors that are one tensor in the model, and several in the plan."""
    paths: dict[int, str] = {}
    for path, _, tensor in named_tensors(subject.model):
        if path in subject.tree:
            spec, other = subject.tree[path], subject.tree[paths.setdefault(id(tensor), path)]
            if spec.path != other.path:
                cause = (
                    f"it is one tensor with {other.path} in the model, and the plan has two: each would get its own gradient"
                )
                yield Problem(spec.path, cause, "Plan the schedule's own tensors, where they are tied", spec.type)


def wrong_inputs(subject: LocalModel) -> Iterator[Problem]:
    """Iterate over problems of the example inputs."""
    forward, example_inputs = subject.model.forward, subject.example_inputs
    if not isinstance(example_inputs, Mapping):
        yield Problem("example_inputs", "they are tensors by the names of the model's arguments", "{'input_ids': tensor}")
        return
    try:
        inspect.signature(forward).bind(**example_inputs)
    except TypeError as error:
        fix = f"forward takes {inspect.signature(forward)}"
        yield Problem("example_inputs", f"the model cannot be called with them: {error}", fix)


def _never_called(subject: LocalModel, local: Tape) -> Iterator[Problem]:
    changing = {step.module for step in subject.layout if not isinstance(step, _FOUND_OTHERWISE)}
    uncalled, reach = sorted(changing - local.num_calls.keys()), Reach.of(local)
    for path in (path for path in uncalled if not is_unreached(path, subject, reach)):
        cause = "it is not called in this forward pass, so that nothing is synchronised there"
        fix = "Synchronise a module that is called; code that uses its weight directly goes past it"
        yield Problem(path, cause, fix)
    ran = {call.step for call in local.calls}
    for place, step in enumerate(subject.layout):
        is_skipped = any(f"{step.module}.".startswith(f"{skipped.path}.") for skipped in local.skipped)
        if isinstance(step, SumProducts) and place not in ran and not is_skipped:
            cause = "no product with it is computed in this forward pass, so that nothing is summed there"
            yield Problem(join(step.module, step.name), cause, "Products are those of @, *, linear, einsum and their kind")


_FOUND_OTHERWISE = (SetAttributes, SetToLocalSize, SumProducts, ForkRng, ShareRng)
"""Steps at a module that is not called, which change nothing, or of which what lacks is found where it is needed."""


def _operator(local: Tape, fault: Fault) -> str:
    return local.calls[fault.call].name if fault.call >= 0 else ""


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
