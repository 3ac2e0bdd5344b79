"""What an optimizer has noted of the tensors that this rank holds, and its settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from attrs import Factory, evolve, frozen
from torch import Tensor

from ..specs.errors import PlanError, Problem
from ..specs.plain import is_plain
from .dialects.deepspeed_states import MASTER, WholeStates, give_whole_states, is_deepspeed
from .held_tensors import own_part

if TYPE_CHECKING:
    from ..specs.param import ParamSpec
    from ..specs.plan import Plan


@frozen
class State:
    """One thing that an optimizer notes of a tensor: as large as it, and split as it is, or a number.

    Args:
        name: Its name in the optimizer, e.g. ``exp_avg``.
        spec: The tensor, with the state's shape and dtype.
    """

    name: str
    spec: ParamSpec

    @property
    def key(self) -> str:
        """Its name in a file."""
        return f"{self.name}/{self.spec.path}"


@frozen
class LocalStates:
    """What this rank has of an optimizer's states.

    Args:
        tensors: By key, what it holds: of the tensor's local shape, or without axes.
        groups: Settings of the optimizer's groups of parameters, such as ``lr``; plain values.
        types: Dtype and number of axes of each, by key.
    """

    tensors: Mapping[str, Tensor]
    groups: tuple[Mapping[str, Any], ...]
    types: Mapping[str, tuple[str, int]] = Factory(lambda self: _types(self.tensors), takes_self=True)


def local_states(plan: Plan, held: Mapping[str, Tensor], optimizer: Any) -> LocalStates:
    """Return what an optimizer has noted of the tensors that a rank holds.

    Args:
        plan: What was executed.
        held: The tensors that the rank holds, by path.
        optimizer: A torch optimizer, or DeepSpeed's.

    Raises:
        PlanError: If it trains tensors that the plan does not know, or notes what is neither a number nor like its tensor.
    """
    if is_deepspeed(optimizer):
        whole = WholeStates(held, optimizer)
        return LocalStates(whole, settings_of(optimizer), whole.types)
    paths = {id(tensor): path for path, tensor in held.items()}
    tensors: dict[str, Tensor] = {}
    problems: list[Problem] = []
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            own = own_part(parameter)
            if id(own) not in paths:
                cause = f"group {number} of the optimizer trains a tensor of {list(parameter.shape)} that the model has not"
                problems.append(Problem("optimizer", cause, "Give the optimizer that execute returned with this model"))
                continue
            path = paths[id(own)]
            for name, value in optimizer.state.get(parameter, {}).items():
                tensor = own_part(value) if isinstance(value, Tensor) else torch.tensor(value)
                if tensor.dim() and tensor.shape != own.shape:
                    cause = f"{name} is {list(tensor.shape)}, and the tensor on this rank {list(own.shape)}"
                    problems.append(Problem(path, cause, "Save without optimizer=", plan.tree[path].type))
                tensors[f"{name}/{path}"] = tensor
    if problems:
        raise PlanError(problems)
    return LocalStates(tensors, settings_of(optimizer))


def settings_of(optimizer: Any) -> tuple[Mapping[str, Any], ...]:
    """Return the settings of an optimizer's groups of parameters that are plain values."""
    optimizer = optimizer.optimizer if is_deepspeed(optimizer) else optimizer
    return tuple(
        {name: value for name, value in group.items() if name != "params" and is_plain(value)}
        for group in optimizer.param_groups
    )


def give_states(
    held: Mapping[str, Tensor],
    optimizer: Any,
    states: Mapping[str, Mapping[str, Tensor]],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Give an optimizer its states and settings.

    Args:
        held: The tensors that this rank holds, by path.
        optimizer: The optimizer, of which this rank's tensors are a part.
        states: By path and name.
        groups: Settings of its groups, in their order.
    """
    if is_deepspeed(optimizer):
        give_whole_states(held, optimizer, states, groups)
        return
    paths = {id(tensor): path for path, tensor in held.items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    known = {
        number: {name: _like(p, name, state) for name, state in states[paths[id(own_part(p))]].items() if name != MASTER}
        for number, p in enumerate(parameters)
        if paths.get(id(own_part(p))) in states
    }
    saved = optimizer.state_dict()["param_groups"]
    for group, settings in zip(saved, groups, strict=True):
        group.update({name: tuple(v) if isinstance(group[name], tuple) else v for name, v in settings.items()})
    optimizer.load_state_dict({"state": known, "param_groups": saved})


def _like(parameter: Tensor, name: str, state: Tensor) -> Tensor:
    """Return a state as what an optimizer makes of a parameter: of a DTensor one that is split as it is."""
    if own_part(parameter) is parameter or name == "step" or state.shape != own_part(parameter).shape:
        return state
    from .local_calls import part_like  # importing torch's DTensor takes a second

    return part_like(parameter, state)  # type: ignore[arg-type]  it has a local part


def all_states(plan: Plan, local: LocalStates) -> tuple[State, ...]:
    """Return the states of all ranks, in one order on all of them; every rank calls it."""
    known: dict[str, list[Any]] = {}
    for text in _exchanged(json.dumps(dict(local.types))):
        known |= json.loads(text)
    return tuple(_ordered(plan, known))


def first_groups(local: LocalStates) -> tuple[Mapping[str, Any], ...]:
    """Return the settings that the first rank with any has; every rank calls it."""
    texts = _exchanged(json.dumps(list(local.groups)))
    return tuple(next((found for text in texts if (found := json.loads(text))), ()))


def _ordered(plan: Plan, known: Mapping[str, list[Any]]) -> Iterator[State]:
    by_path: dict[str, list[tuple[str, str, int]]] = {}
    for key, (dtype, num_axes) in known.items():
        name, _, path = key.partition("/")
        by_path.setdefault(path, []).append((name, dtype, num_axes))
    for spec in plan.tree.values():
        for name, dtype, num_axes in sorted(by_path.get(spec.path, [])):
            like = evolve(spec, dtype=dtype)
            yield State(name, like if num_axes or not spec.orig_shape else evolve(like, orig_shape=(), shards=()))


def _types(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, int]]:
    return {key: (str(tensor.dtype).removeprefix("torch."), tensor.dim()) for key, tensor in tensors.items()}


def _exchanged(text: str) -> list[str]:
    """Return the texts of all processes of the group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [text]
    num_ranks = dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    mine = text.encode()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(num_ranks)]
    dist.all_gather(sizes, torch.tensor([len(mine)], device=device))
    room = max(int(size) for size in sizes)
    sent = torch.zeros(room, dtype=torch.uint8)
    sent[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if mine else sent[:0]
    texts = [torch.zeros(room, dtype=torch.uint8, device=device) for _ in range(num_ranks)]
    dist.all_gather(texts, sent.to(device))
    return [bytes(t.cpu().numpy())[: int(size)].decode() for t, size in zip(texts, sizes, strict=True)]
