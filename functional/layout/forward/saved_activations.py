"""Count the bytes that autograd saves of a forward pass for the backward pass, block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ....specs.microbatch import Saved
from ....specs.paths import join
from ...model.open_modules import OpenModules
from ...model.read import storage_id

if TYPE_CHECKING:
    from types import TracebackType


class SavedActivations:
    """Count the tensors that autograd saves of a model within the block: each storage once, where it is saved first.

    Args:
        model: A model that is going to run once; its parameters and buffers are not counted.

    Attributes:
        blocks: Paths of its repeated layers.
        order: Paths of blocks in the order in which they are called, with ``""`` where a tensor is saved between them.
    """

    def __init__(self, model: nn.Module) -> None:
        held = (tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.layout == torch.strided)
        self._alive = {storage_id(tensor): tensor.untyped_storage() for tensor in held}
        self._own = frozenset(self._alive)
        self._saved: list[tuple[str, int]] = []
        self._inputs: list[tuple[str, int]] = []
        self._running = OpenModules()
        self.order = [""]
        self.blocks = tuple(blocks(model))
        self._paths = tuple(_outside(model, self.blocks))
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)
        for path in self.blocks:
            model.get_submodule(path).register_forward_pre_hook(self._enter_block, with_kwargs=True, prepend=True)
        # a checkpoint leaves a block by an error once it has recomputed the tensors that it needs
        self._running.follow(model, self._paths, close_on_errors=True)

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.__exit__(kind, error, trace)

    def found(self, representative_of: Mapping[str, str]) -> Iterator[Saved]:
        """Iterate over the saved activations, in the order of the model's modules.

        Args:
            representative_of: For each block that was skipped, the block that ran for it.
        """
        saved, inputs = self._bytes(self._saved, representative_of), self._bytes(self._inputs, representative_of)
        for path in self._paths:
            ran = representative_of.get(path, path)
            if ran in saved or ran in inputs:
                yield Saved(path, saved[ran], inputs[ran], is_block=path in self.blocks)

    def _bytes(self, seen: Iterable[tuple[str, int]], skipped: Mapping[str, str]) -> Counter[str]:
        """Return the bytes of storages by the module where they were seen first, except at skipped blocks."""
        first: dict[int, str] = {}
        for path, storage in seen:
            if path not in skipped and storage not in self._own:
                first.setdefault(storage, path)
        num_bytes: Counter[str] = Counter()
        for storage, path in first.items():
            num_bytes[path] += self._alive[storage].nbytes()
        return num_bytes

    def _note(self, tensor: Tensor, seen: list[tuple[str, int]]) -> None:
        if tensor.layout == torch.strided:
            self._alive[storage_id(tensor)] = tensor.untyped_storage()  # else its identity would be reused
            seen.append((self._running.innermost, storage_id(tensor)))

    def _save(self, tensor: Tensor) -> Tensor:
        self._note(tensor, self._saved)
        if self._running.innermost not in self.blocks:
            self.order.append("")
        return tensor

    def _enter_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.order.append(self._running.innermost)
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._note(value, self._inputs)


def blocks(model: nn.Module) -> Iterator[str]:
    """Iterate over the paths of repeated layers: members of the outermost lists in which a class occurs more than once.

    >>> list(blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))))
    ['0', '1', '2']
    """
    inside: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or f"{path}.".startswith(tuple(inside)):
            continue
        members = [(join(path, name), member) for name, member in module.named_children()]
        if _has_repetitions(member for _, member in members):
            inside += (f"{member}." for member, _ in members)
            yield from (member for member, _ in members)


def _outside(model: nn.Module, blocks: Iterable[str]) -> Iterator[str]:
    """Iterate over the paths of blocks, and of modules outside of blocks, in the order of the model."""
    inside = tuple(f"{path}." for path in blocks)
    return (path for path, _ in model.named_modules() if not path.startswith(inside))


def _has_repetitions(members: Iterable[nn.Module]) -> bool:
    kinds = [type(member) for member in members]
    is_called = not any(issubclass(kind, (nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule)) for kind in kinds)
    return is_called and len(set(kinds)) < len(kinds)
