"""What DeepSpeed's optimizers note of each tensor, out of the flat pieces in which ZeRO 1 and 2 keep it, and back.

It goes by the links from parameters to fragments of those pieces (``deepspeed.utils.tensor_fragment``), on which DeepSpeed's
own universal checkpoint stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....specs.errors import PlanError, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

MASTER = "fp32"
"""The name of the float32 copy among the states of a tensor of fewer bits."""

_FIX = 'Take "zero_optimization": {"stage": 1} or 2'


class WholeStates(Mapping[str, Tensor]):
    """States of whole tensors, by ``name/path``: each is put together when it is asked for, by all ranks along ``data``.

    Args:
        held: The tensors that this rank holds, by path.
        optimizer: DeepSpeed's optimizer.
    """

    def __init__(self, held: Mapping[str, Tensor], optimizer: Any) -> None:
        check_optimizer(optimizer)
        trained = {path: tensor for path, tensor in held.items() if tensor.requires_grad}
        names, self._numbers = _names(optimizer)
        self._keys: dict[str, tuple[str, Any]] = {}
        for path, tensor in trained.items():
            several = [*names, *self._numbers, *([MASTER] if tensor.dtype != torch.float32 else [])]
            self._keys.update({f"{name}/{path}": (name, tensor) for name in several})

    @property
    def types(self) -> dict[str, tuple[str, int]]:
        """Dtype and number of axes of each state, without putting any together."""
        return {
            key: (str(self._numbers[name].dtype).removeprefix("torch."), 0)
            if name in self._numbers
            else ("float32", t.dim())
            for key, (name, t) in self._keys.items()
        }

    def __getitem__(self, key: str) -> Tensor:
        """Return a state, as large as the tensor on this rank."""
        name, tensor = self._keys[key]
        if name in self._numbers:
            return self._numbers[name]
        return tensor.get_full_hp_param(None if name == MASTER else name)

    def __contains__(self, key: object) -> bool:
        """Tell whether there is such a state, without putting it together."""
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._keys)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._keys)


def is_deepspeed(optimizer: object) -> bool:
    """Tell whether an optimizer is one of DeepSpeed's around another."""
    return type(optimizer).__module__.startswith("deepspeed.") and not isinstance(optimizer, torch.optim.Optimizer)


def check_optimizer(optimizer: Any) -> None:
    """Raise PlanError if an optimizer keeps its states otherwise than ZeRO 1 and 2 do."""
    if not hasattr(optimizer, "single_partition_of_fp32_groups"):
        cause = f"it is DeepSpeed's {type(optimizer).__name__}, whose states are not read"
        raise PlanError([Problem("optimizer", cause, _FIX)])


def give_whole_states(
    held: Mapping[str, Tensor],
    optimizer: Any,
    states: Mapping[str, Mapping[str, Tensor]],
    settings: Sequence[Mapping[str, Any]],
) -> None:
    """Give ZeRO 1 or 2 its fragments of states.

    Args:
        held: The tensors that this rank holds, by path.
        optimizer: DeepSpeed's optimizer.
        states: By path and name, as large as the tensors on this rank.
        settings: Those of its groups, in their order.
    """
    from deepspeed.utils.tensor_fragment import map_to_flat_opt_states

    paths = {id(tensor): path for path, tensor in held.items()}
    for number, (group, given) in enumerate(zip(optimizer.optimizer.param_groups, settings, strict=True)):
        flat, tensors = optimizer.single_partition_of_fp32_groups[number], optimizer.bit16_groups[number]
        names: dict[str, None] = {}
        for tensor in tensors:
            known = states.get(paths.get(id(tensor), ""), {})
            numbers = {name: state for name, state in known.items() if not state.dim() and name != MASTER}
            link = tensor._hp_mapping  # noqa: SLF001  DeepSpeed's own name, on the ranks that have a piece of the tensor
            optimizer.optimizer.state[flat].update({name: state.clone() for name, state in numbers.items()})
            if link is None:
                continue
            taken = link.lp_fragment_address
            pieces = {
                name: state.to(flat.device, torch.float32).flatten().narrow(0, taken.start, taken.numel)
                for name, state in known.items()
                if name not in numbers
            }
            if MASTER in pieces:
                link.hp_fragment.data.copy_(pieces.pop(MASTER))
            if pieces:
                link.optim_fragment = pieces
            names.update(dict.fromkeys(pieces))
        if names:  # else DeepSpeed makes the states at the first step, and links them then
            map_to_flat_opt_states(flat, tensors, optimizer.optimizer.state, list(names))
            optimizer._hp_optimizer_states_linked = True  # noqa: SLF001  as after a step
        group.update({name: like_before(group.get(name), value) for name, value in given.items()})


def like_before(before: Any, value: Any) -> Any:
    """Return a setting as the kind of thing that it was: JSON has neither tuples nor tensors."""
    if isinstance(before, Tensor):
        return torch.full_like(before, value)
    return tuple(value) if isinstance(before, tuple) else value


def _names(optimizer: Any) -> tuple[list[str], dict[str, Tensor]]:
    """Return the states of the optimizer's flat pieces that are as large as they, and those that are numbers."""
    names: dict[str, None] = {}
    numbers: dict[str, Tensor] = {}
    for flat in optimizer.single_partition_of_fp32_groups:
        for name, value in optimizer.optimizer.state.get(flat, {}).items():
            state = value if isinstance(value, Tensor) else torch.tensor(value)
            if state.shape == flat.shape:
                names[name] = None
            elif not state.dim():
                numbers[name] = state
    return list(names), numbers
