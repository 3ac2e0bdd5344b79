"""Init code run on real tensors, which are lent to the module meanwhile."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ...specs.paths import module_of
from ...specs.source import ModuleCall
from ..init.calls import run_call
from ..init.constants import one_thread
from ..model.copy import get_tensor, like, put_tensor, tied
from ..model.rng_state import derive_seed, own_generators

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor, nn

    from ...specs.source import Call
    from . import work


def generate(
    task: work.Generate,
    whole: Iterable[Tensor],
    scratch: Iterable[Tensor],
    module: nn.Module,
    callables: Mapping[str, Any],
    *,
    seed: int,
    device: torch.device,
) -> list[Tensor]:
    """Run init code on whole tensors; return the tensors that it leaves at ``task.paths``, in their order.

    Args:
        task: The calls and the pieces that they touch.
        whole: A tensor for each of ``task.pieces``, allocated as it is lent; opaque code finds NaN in it.
        scratch: A tensor for each of ``task.scratch``, allocated as it is lent.
        module: The module whose code runs; its tensors are as before afterwards.
        callables: The user's functions by name.
        seed: The plan's seed; the generator is keyed by it and ``task.key``.
        device: The device of the generator and the tensors.

    Raises:
        ValueError: If the code replaces a tensor by one of another shape or dtype, or leaves elements without values.
    """
    is_opaque = any(call.opaque for call in task.calls)
    lent = [path for piece in (*task.pieces, *task.scratch) for path in piece.spec.paths]
    placeholders = {path: get_tensor(module, path) for path in lent}
    try:
        for piece, tensor in zip(task.pieces, whole, strict=True):
            _lend(module, piece, tensor.fill_(torch.nan) if is_opaque and tensor.is_floating_point() else tensor)
        for piece, tensor in zip(task.scratch, scratch, strict=True):
            _lend(module, piece, tensor)
        with torch.no_grad(), one_thread(), own_generators(derive_seed(seed, task.key), device):
            for call in task.calls:
                with _tied_elsewhere_hidden(module, task, call, placeholders):
                    run_call(module, call, callables)
        made = [_taken_back(module, path, piece, device) for path, piece in zip(task.paths, task.pieces, strict=True)]
    finally:
        for path, placeholder in placeholders.items():
            put_tensor(module, path, placeholder)
    gc.collect(1)  # execute has paused garbage collection, and the user's code may leave cycles that hold whole tensors
    for piece, tensor in zip(task.pieces, made if is_opaque else [], strict=False):
        if tensor.is_floating_point() and torch.isnan(tensor).any():
            msg = f"{piece.spec}: its init code gave no values to {int(torch.isnan(tensor).sum())} of its elements"
            raise ValueError(msg)
    return made


def _lend(module: nn.Module, piece: work.Piece, tensor: Tensor) -> None:
    first = like(get_tensor(module, piece.path), tensor)
    for path in piece.spec.paths:
        put_tensor(module, path, tied(get_tensor(module, path), first))


@contextmanager
def _tied_elsewhere_hidden(
    module: nn.Module, task: work.Generate, call: Call, placeholders: Mapping[str, Tensor]
) -> Iterator[None]:
    """Hide a tied tensor from the code of a module that holds it at another path than the path that is made."""
    hidden: dict[str, Tensor] = {}
    caller = call.module if isinstance(call, ModuleCall) else None
    for made_at, piece in zip(task.paths, task.pieces, strict=True):
        home = module.get_submodule(module_of(made_at))
        for path in piece.spec.tie and piece.spec.paths:
            holder = module.get_submodule(module_of(path))
            if module_of(path) == caller and holder is not home:
                hidden[path] = get_tensor(module, path)
                put_tensor(module, path, placeholders[path])
    yield
    for path, tensor in hidden.items():
        put_tensor(module, path, tensor)


def _taken_back(module: nn.Module, path: str, piece: work.Piece, device: torch.device) -> Tensor:
    tensor = get_tensor(module, path).detach()
    if tuple(tensor.shape) != piece.shape or tensor.dtype != getattr(torch, piece.spec.dtype):
        msg = f"{piece.spec}: its init code left a tensor of shape {list(tensor.shape)} and dtype {tensor.dtype}"
        raise ValueError(msg)
    tensor = tensor.to(device).contiguous()
    # init code may have put a view of something larger in place
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
