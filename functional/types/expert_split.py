"""Experts that are shared out over ``expert``: their module's contract, checked by its tensors, and the model without them.

Ranks along ``data`` and ``expert`` have samples of their own. A module of experts gets the tokens of all ranks
(``DispatchTokens``) and computes for each token the weighted sum of the experts that were chosen for it, so that the sums of
all ranks' experts add up. Each rank must therefore hold whole experts, one after another, as many as the step says. That the
code of transformers' experts keeps the contract is measured over all its models (``docs/coverage.md``); of other code it is
the user's word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attrs import evolve
from frozendict import frozendict

from ...specs.equality import Trust, Unfollowed
from ...specs.errors import Problem
from ...specs.layout_steps import DispatchTokens, LayoutStep, SetAttributes, SumGradient, Sync
from ...specs.mesh import BATCH_AXES, MODEL_AXES, SPLIT_AXES, STAGE_AXES, Mesh
from ...specs.param import ParamSpec
from ...specs.paths import module_of
from ..layout.local_model import LocalModel

_OTHERS = tuple(mesh_axis for mesh_axis in MODEL_AXES if mesh_axis != "tensor")
"""Mesh axes whose ranks share the work on a batch, beside ``tensor``: types do not follow them."""

_WITH_SAMPLES = tuple(mesh_axis for mesh_axis in SPLIT_AXES if mesh_axis not in MODEL_AXES)
"""Mesh axes whose ranks have samples of their own, and may share out tensors."""


def without_experts(subject: LocalModel) -> LocalModel:
    """Return the model as ranks along ``tensor`` alone have it, all other mesh axes with a single rank."""
    mesh = Mesh(tensor=subject.mesh.tensor)
    dispatching = {step.module for step in subject.layout if isinstance(step, DispatchTokens)}
    return evolve(subject, mesh=mesh, layout=tuple(_others(subject, dispatching)))


def _others(subject: LocalModel, dispatching: set[str]) -> Iterator[LayoutStep]:
    for step in subject.layout:
        match step:
            case DispatchTokens():
                pass
            case SetAttributes(module=module, values=values) if module in dispatching:
                rest = {name: value for name, value in values.items() if name != "num_experts"}
                if rest:
                    yield evolve(step, values=frozendict(rest))
            case SumGradient(mesh_axis=mesh_axis) if mesh_axis not in STAGE_AXES:
                pass
            case Sync(mesh_axis=mesh_axis) | SumGradient(mesh_axis=mesh_axis) if mesh_axis in _OTHERS:
                pass
            case _:
                yield step


def unfollowed_axes(subject: LocalModel) -> Iterator[Unfollowed]:
    """Iterate over mesh axes that share work on a batch as ``tensor`` does, and that types do not follow."""
    for mesh_axis in _OTHERS:
        is_split = any(spec.on(mesh_axis) for spec in subject.tree.values())
        is_used = is_split or any(getattr(step, "mesh_axis", None) == mesh_axis for step in subject.layout)
        if is_used and subject.mesh.num(mesh_axis) > 1:
            yield Unfollowed("", "", f"types follow what ranks along tensor hold, and not along {mesh_axis}")


def unfollowed_experts(subject: LocalModel, trusts: Sequence[Trust] = ()) -> Iterator[Unfollowed]:
    """Iterate over modules of experts whose code nobody has held against the contract: others than those of transformers.

    Args:
        subject: The split model.
        trusts: Modules of which the user's word is taken.
    """
    trusted = {trust.module for trust in trusts}
    for step in subject.layout:
        if isinstance(step, DispatchTokens) and step.module not in trusted:
            kind = type(subject.model.get_submodule(step.module))
            if kind.__module__.partition(".")[0] != "transformers":
                cause = f"nobody follows that {kind.__name__} gives for each token the weighted sum of what its experts give"
                yield Unfollowed(step.module, "", cause)


def wrong_experts(subject: LocalModel) -> Iterator[Problem]:
    """Iterate over tensors that are shared out over ranks with samples of their own, against the contract of experts."""
    steps = {step.module: step for step in subject.layout if isinstance(step, DispatchTokens)}
    for spec in subject.tree.values():
        for mesh_axis in _WITH_SAMPLES:
            shard = spec.on(mesh_axis)
            if shard is None or subject.mesh.num(mesh_axis) == 1:
                continue
            modules = {module_of(path) for path in spec.paths}
            step = next((steps[module] for module in modules if module in steps), None)
            if mesh_axis in BATCH_AXES or step is None:
                cause = (
                    f"each rank along {mesh_axis} has a part of it, and samples of its own, with which it needs all of it"
                )
                fix = "Split it over tensor" if mesh_axis in BATCH_AXES else "Send tokens to the experts: .expert_parallel()"
                yield Problem(spec.path, cause, fix, spec.type)
            else:
                yield from _wrong_part(subject, spec, step)
    for path, step in steps.items():
        yield from _whole_beside(subject, path)
        yield from _wrong_number(subject, path, step)


def _wrong_part(subject: LocalModel, spec: ParamSpec, step: DispatchTokens) -> Iterator[Problem]:
    shard = spec.on("expert")
    assert shard is not None, "the caller has asked"
    size, num = spec.orig_shape[shard.axis], subject.mesh.expert
    wanted = [((rank * step.num_experts, (rank + 1) * step.num_experts),) for rank in range(num)]
    found = [shard.intervals(size, subject.mesh.at(expert=rank)) for rank in range(num)]
    if shard.axis or found != wanted:
        cause = (
            f"ranks along expert take themselves to have {step.num_experts} experts each, one after another, and have others"
        )
        yield Problem(spec.path, cause, "Declare it with .expert_parallel() alone", spec.type)


def _whole_beside(subject: LocalModel, path: str) -> Iterator[Problem]:
    own = [spec for spec in subject.tree.values() if path in {module_of(p) for p in spec.paths}]
    for spec in own:
        if spec.on("expert") is None:
            cause = "its module has some of the experts, and it is whole"
            yield Problem(spec.path, cause, "Declare its module with .expert_parallel() alone", spec.type)


def _wrong_number(subject: LocalModel, path: str, step: DispatchTokens) -> Iterator[Problem]:
    number = getattr(subject.model.get_submodule(path), "num_experts", None)
    for change in subject.layout:
        if isinstance(change, SetAttributes) and change.module == path:
            number = change.values.get("num_experts", number)
    if number != step.num_experts:
        cause = f"its num_experts is {number}, and each rank along expert has {step.num_experts}"
        yield Problem(path, cause, f".set(num_experts={step.num_experts})")
