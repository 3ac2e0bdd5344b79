"""States and settings of an optimizer: read on this rank, exchanged between ranks, and restored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import Factory, evolve, frozen
from torch import Tensor

from ...specs.errors import PlanError, Problem
from ...specs.json_values import is_plain
from ..checkpoints.optimizer_states import ParamGroup
from ..dialects import dialect_of
from ..dialects.holding import MASTER, like_before
from .held_tensors import local_part
from .messages import all_texts

if TYPE_CHECKING:
    from ...specs.param import ParamSpec
    from ...specs.plan import Plan


@frozen
class TensorState:
    """An optimizer state of a tensor: of the tensor's shape and split as it is, or a number.

    Args:
        name: The state's name in the optimizer, e.g. ``exp_avg``.
        spec: The tensor's spec, with the state's shape and dtype.
    """

    name: str
    spec: ParamSpec

    @property
    def key(self) -> str:
        """The state's key in a file."""
        return f"{self.name}/{self.spec.path}"


@frozen
class LocalStates:
    """The optimizer states on this rank.

    Args:
        tensors: The states by key: of the local shape of their tensor, or without axes.
        groups: The optimizer's groups, with the paths of the tensors that this rank holds.
        types: Dtype and number of axes of each state, by key.
    """

    tensors: Mapping[str, Tensor]
    groups: tuple[ParamGroup, ...]
    types: Mapping[str, tuple[str, int]] = Factory(lambda self: _types(self.tensors), takes_self=True)


def local_states(plan: Plan, held: Mapping[str, Tensor], optimizer: Any) -> LocalStates:
    """Return an optimizer's states of the tensors that a rank holds.

    Raises:
        PlanError: If the optimizer trains tensors that the plan does not know, or a state is neither a number nor of its
            tensor's shape.
    """
    groups = groups_of(plan, held, optimizer)
    if (own := dialect_of(plan.target).holding().own_optimizer(optimizer)) is not None:
        states, types = own.states(held)
        return LocalStates(states, groups, types)
    paths = {id(tensor): path for path, tensor in held.items()}
    tensors: dict[str, Tensor] = {}
    problems: list[Problem] = []
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            own = local_part(parameter)
            if id(own) not in paths:
                cause = f"group {number} of the optimizer trains a tensor of {list(parameter.shape)} that the model has not"
                problems.append(Problem("optimizer", cause, "Give the optimizer that execute returned with this model"))
                continue
            path = paths[id(own)]
            for name, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, (Tensor, float, int)):
                    cause = f"{name} is a {type(value).__name__}, neither a tensor nor a number"
                    problems.append(Problem(path, cause, "Save without optimizer=", plan.tree[path].type))
                    continue
                tensor = local_part(value) if isinstance(value, Tensor) else torch.tensor(value)
                if tensor.dim() and tensor.shape != own.shape:
                    cause = f"{name} is {list(tensor.shape)}, and the tensor on this rank {list(own.shape)}"
                    problems.append(Problem(path, cause, "Save without optimizer=", plan.tree[path].type))
                tensors[f"{name}/{path}"] = tensor
    if problems:
        raise PlanError(problems)
    return LocalStates(tensors, groups)


def groups_of(plan: Plan, held: Mapping[str, Tensor], optimizer: Any) -> tuple[ParamGroup, ...]:
    """Return an optimizer's groups, with the paths of the tensors that this rank holds.

    Raises:
        PlanError: If ``optimizer`` is no optimizer, or a setting is no plain value.
    """
    if not hasattr(optimizer, "param_groups"):
        inner = hasattr(optimizer, "optimizer")
        cause = f"it is a {type(optimizer).__name__}, not an optimizer"
        fix = "Give engine.optimizer" if inner else "Give the optimizer that execute returned"
        raise PlanError([Problem("optimizer", cause, fix)])
    paths = {id(tensor): path for path, tensor in held.items()}
    own = dialect_of(plan.target).holding().own_optimizer(optimizer)
    inner = own.inner if own is not None else optimizer
    trained = own.trained if own is not None else [group["params"] for group in optimizer.param_groups]
    found: list[ParamGroup] = []
    problems: list[Problem] = []
    for number, (group, tensors) in enumerate(zip(inner.param_groups, trained, strict=True)):
        settings = {name: _plain(value) for name, value in group.items() if name != "params"}
        for name, value in settings.items():
            if not is_plain(value):
                cause = f"setting {name!r} of group {number} is a {type(value).__name__}, which cannot be written down"
                problems.append(Problem("optimizer", cause, "Leave it out of the group"))
        known = (paths.get(id(local_part(tensor))) for tensor in tensors)
        found.append(ParamGroup(settings, tuple(path for path in known if path is not None)))
    if problems:
        raise PlanError(problems)
    return tuple(found)


def _plain(value: Any) -> Any:
    """Convert a tensor of a single element, such as a learning rate for captured graphs, to a number."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def give_states(
    plan: Plan,
    held: Mapping[str, Tensor],
    optimizer: Any,
    states: Mapping[str, Mapping[str, Tensor]],
    settings: Sequence[Mapping[str, Any]],
) -> None:
    """Restore an optimizer's states, in their own dtypes, and its settings."""
    if (own := dialect_of(plan.target).holding().own_optimizer(optimizer)) is not None:
        own.give(held, states, settings)
        return
    paths = {id(tensor): path for path, tensor in held.items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    known = {
        number: {name: _like(p, name, state) for name, state in states[paths[id(local_part(p))]].items() if name != MASTER}
        for number, p in enumerate(parameters)
        if paths.get(id(local_part(p))) in states
    }
    saved = optimizer.state_dict()["param_groups"]
    for group, given in zip(saved, settings, strict=True):
        group.update({name: like_before(group.get(name), value) for name, value in given.items()})
    optimizer.load_state_dict({"state": known, "param_groups": saved})
    for number, given in known.items():  # load_state_dict has cast them to the dtype of the parameter
        kept = optimizer.state[parameters[number]]
        kept.update({name: state.to(kept[name].device) for name, state in given.items() if state.dtype != kept[name].dtype})


def _like(parameter: Tensor, name: str, state: Tensor) -> Tensor:
    """Return a state as the optimizer would make it: for a DTensor parameter, a DTensor split alike."""
    if local_part(parameter) is parameter or name == "step" or state.shape != local_part(parameter).shape:
        return state
    from ..layout.dtensor import dtensor_like  # importing torch's DTensor takes a second

    return dtensor_like(parameter, state)  # type: ignore[arg-type]  it has a local part


def all_states(plan: Plan, local: LocalStates) -> tuple[TensorState, ...]:
    """Return the states of all ranks, in the same order on every rank; every rank calls it."""
    known: dict[str, list[Any]] = {}
    for text in all_texts(json.dumps(dict(local.types))):
        known |= json.loads(text)
    return tuple(_in_order_of_plan(plan, known))


def all_groups(local: LocalStates) -> tuple[ParamGroup, ...]:
    """Return the groups with the tensors of all ranks and the settings of rank 0; every rank calls it."""
    found: list[ParamGroup] = []
    for text in all_texts(json.dumps([[dict(group.settings), list(group.paths)] for group in local.groups])):
        for number, (settings, paths) in enumerate(json.loads(text)):
            if number == len(found):
                found.append(ParamGroup(settings, ()))
            found[number] = evolve(found[number], paths=tuple(dict.fromkeys((*found[number].paths, *paths))))
    return tuple(found)


def _in_order_of_plan(plan: Plan, known: Mapping[str, list[Any]]) -> Iterator[TensorState]:
    by_path: dict[str, list[tuple[str, str, int]]] = {}
    for key, (dtype, num_axes) in known.items():
        name, _, path = key.partition("/")
        by_path.setdefault(path, []).append((name, dtype, num_axes))
    for spec in plan.tree.values():
        for name, dtype, num_axes in sorted(by_path.get(spec.path, [])):
            like = evolve(spec, dtype=dtype)
            yield TensorState(name, like if num_axes or not spec.orig_shape else evolve(like, orig_shape=(), shards=()))


def _types(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, int]]:
    return {key: (str(tensor.dtype).removeprefix("torch."), tensor.dim()) for key, tensor in tensors.items()}
