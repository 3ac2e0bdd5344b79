"""What autograd keeps of a forward pass until the backward pass, block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ....specs.microbatch import Saved

if TYPE_CHECKING:
    from types import TracebackType


class Kept:
    """Counts, within the block, what autograd keeps of a model: each storage once, where it is kept first.

    Args:
        model: A model that is going to run once; its parameters and buffers are left out, as they are there in any case.
    """

    def __init__(self, model: nn.Module) -> None:
        held = (tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.layout == torch.strided)
        self._alive = {_identity(tensor): tensor.untyped_storage() for tensor in held}
        self._own = frozenset(self._alive)
        self._saved: list[tuple[str, int]] = []
        self._given: list[tuple[str, int]] = []
        self._open = [""]
        self.order = [""]  # as blocks are called, and again where something outside of them is kept
        self.blocks = tuple(blocks(model))
        self._paths = tuple(_outside(model, self.blocks))
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)
        for path in self._paths:
            if not isinstance(module := model.get_submodule(path), torch.jit.ScriptModule):
                self._follow(path, module, is_block=path in self.blocks)

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.__exit__(kind, error, trace)

    def found(self, alike: Mapping[str, str]) -> Iterator[Saved]:
        """Iterate over what is kept, in the order of the model's modules.

        Args:
            alike: Blocks that did not run, and those that stand for them.
        """
        saved, given = self._bytes(self._saved, alike), self._bytes(self._given, alike)
        for path in self._paths:
            told = alike.get(path, path)
            if told in saved or told in given:
                yield Saved(path, saved[told], given[told], is_block=path in self.blocks)

    def _bytes(self, seen: Iterable[tuple[str, int]], alike: Mapping[str, str]) -> Counter[str]:
        """Return the bytes of storages by where they were seen first, other than before a block that did not run."""
        first: dict[int, str] = {}
        for path, storage in seen:
            if path not in alike and storage not in self._own:
                first.setdefault(storage, path)
        found: Counter[str] = Counter()
        for storage, path in first.items():
            found[path] += self._alive[storage].nbytes()
        return found

    def _note(self, tensor: Tensor, seen: list[tuple[str, int]]) -> None:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            self._alive[_identity(tensor)] = storage  # else its identity would be given to another one
            seen.append((self._open[-1], _identity(tensor)))

    def _save(self, tensor: Tensor) -> Tensor:
        self._note(tensor, self._saved)
        if self._open[-1] not in self.blocks:
            self.order.append("")
        return tensor

    def _follow(self, path: str, module: nn.Module, *, is_block: bool) -> None:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._open.append(path)
            if not is_block:
                return
            self.order.append(path)
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor):
                    self._note(value, self._given)

        def leave(*_: object) -> None:
            self._open.pop()

        module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        module.register_forward_hook(leave, always_call=True)  # a checkpoint that has all it needs ends a block by an error


def blocks(model: nn.Module) -> Iterator[str]:
    """Iterate over the paths of repeated layers: members of a list in which one class comes more than once, outermost ones.

    >>> list(blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))))
    ['0', '1', '2']
    """
    inside: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or f"{path}.".startswith(tuple(inside)):
            continue
        members = [(f"{path}.{name}" if path else name, member) for name, member in module.named_children()]
        if _has_repetitions(member for _, member in members):
            inside += (f"{member}." for member, _ in members)
            yield from (member for member, _ in members)


def _outside(model: nn.Module, blocks: Iterable[str]) -> Iterator[str]:
    """Iterate over the paths of blocks, and of modules that are in none, in the order of the model."""
    inside = tuple(f"{path}." for path in blocks)
    return (path for path, _ in model.named_modules() if not path.startswith(inside))


def _has_repetitions(members: Iterable[nn.Module]) -> bool:
    kinds = [type(member) for member in members]
    is_called = not any(issubclass(kind, (nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule)) for kind in kinds)
    return is_called and len(set(kinds)) < len(kinds)


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # noqa: SLF001  views have one storage
