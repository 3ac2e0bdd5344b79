"""How DeepSpeed keeps parameters and optimizer states: ZeRO 3 parameters in pieces, states of ZeRO 1 and 2 in flat buffers.

States are found by DeepSpeed's links from parameters to fragments of those buffers (``deepspeed.utils.tensor_fragment``), by
which its universal checkpoints are written too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....specs.errors import PlanError, Problem
from ..holding import MASTER, Holding, like_before

if TYPE_CHECKING:
    from collections.abc import Sequence

_FIX = 'Take "zero_optimization": {"stage": 1} or 2'


class DeepSpeedHolding(Holding):
    """Parameters in pieces under ZeRO 3, and optimizers of DeepSpeed's own around torch's."""

    def in_pieces(self, tensor: Any) -> str:
        return "ZeRO 3 keeps it in pieces" if hasattr(tensor, "ds_id") else ""

    def whole_shape(self, tensor: Any) -> tuple[int, ...]:
        return tuple(getattr(tensor, "ds_shape", tensor.shape))

    def gathered(self, tensor: Any) -> AbstractContextManager[Any]:
        if not self.in_pieces(tensor):
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([tensor])

    def own_optimizer(self, optimizer: Any) -> ZeroOptimizer | None:
        is_own = type(optimizer).__module__.startswith("deepspeed.") and not isinstance(optimizer, torch.optim.Optimizer)
        return ZeroOptimizer(optimizer) if is_own else None


class ZeroOptimizer:
    """The optimizer of ZeRO 1 or 2, which keeps states in flat buffers, partitioned over ``data``.

    Args:
        optimizer: DeepSpeed's optimizer.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @property
    def inner(self) -> Any:
        return self._optimizer.optimizer

    @property
    def trained(self) -> Sequence[Sequence[Tensor]]:
        return self._optimizer.bit16_groups

    def states(self, held: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Mapping[str, tuple[str, int]]]:
        states = _ZeroStates(held, self._checked())
        return states, states.types

    def give(
        self, held: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]], settings: Sequence[Mapping[str, Any]]
    ) -> None:
        from deepspeed.utils.tensor_fragment import map_to_flat_opt_states

        optimizer = self._checked()
        paths = {id(tensor): path for path, tensor in held.items()}
        for number, (group, given) in enumerate(zip(optimizer.optimizer.param_groups, settings, strict=True)):
            flat, tensors = optimizer.single_partition_of_fp32_groups[number], optimizer.bit16_groups[number]
            names: dict[str, None] = {}
            for tensor in tensors:
                known = states.get(paths.get(id(tensor), ""), {})
                numbers = {name: state for name, state in known.items() if not state.dim() and name != MASTER}
                link = tensor._hp_mapping  # noqa: SLF001  None on ranks without a fragment of the tensor
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
            if names:  # else DeepSpeed makes and links the states at the first step
                map_to_flat_opt_states(flat, tensors, optimizer.optimizer.state, list(names))
                optimizer._hp_optimizer_states_linked = True  # noqa: SLF001  as after a step
            group.update({name: like_before(group.get(name), value) for name, value in given.items()})

    def _checked(self) -> Any:
        """Return the optimizer; raise PlanError if it does not keep its states as ZeRO 1 and 2 do."""
        if not hasattr(self._optimizer, "single_partition_of_fp32_groups"):
            cause = f"it is DeepSpeed's {type(self._optimizer).__name__}, whose states are not read"
            raise PlanError([Problem("optimizer", cause, _FIX)])
        return self._optimizer


class _ZeroStates(Mapping[str, Tensor]):
    """States of whole tensors, by ``name/path``: assembled when they are asked for, by all ranks along ``data`` together.

    Args:
        held: The tensors that this rank holds, by path.
        optimizer: DeepSpeed's optimizer.
    """

    def __init__(self, held: Mapping[str, Tensor], optimizer: Any) -> None:
        trained = {path: tensor for path, tensor in held.items() if tensor.requires_grad}
        names, self._numbers = _names(optimizer)
        self._keys: dict[str, tuple[str, Any]] = {}
        for path, tensor in trained.items():
            several = [*names, *self._numbers, *([MASTER] if tensor.dtype != torch.float32 else [])]
            self._keys.update({f"{name}/{path}": (name, tensor) for name in several})

    @property
    def types(self) -> dict[str, tuple[str, int]]:
        """Dtype and number of axes of each state, by key, without assembling any."""
        return {
            key: (str(self._numbers[name].dtype).removeprefix("torch."), 0)
            if name in self._numbers
            else ("float32", t.dim())
            for key, (name, t) in self._keys.items()
        }

    def __getitem__(self, key: str) -> Tensor:
        """Assemble a state, of the shape of the tensor on this rank."""
        name, tensor = self._keys[key]
        if name in self._numbers:
            return self._numbers[name]
        return tensor.get_full_hp_param(None if name == MASTER else name)

    def __contains__(self, key: object) -> bool:
        """Tell whether there is such a state, without assembling it."""
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys."""
        return iter(self._keys)

    def __len__(self) -> int:
        """Return the number of states."""
        return len(self._keys)


def _names(optimizer: Any) -> tuple[list[str], dict[str, Tensor]]:
    """Return the names of states that are flat buffers too, and the states that are numbers, by name."""
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
