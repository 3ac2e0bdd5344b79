"""Messages and saved activations of a micro-batch, as followed on fake tensors while planning."""

from __future__ import annotations

from typing import Literal

from attrs import frozen

from .mesh import MeshAxis
from .traffic import Cargo


@frozen
class SyncCall:
    """Collectives of a kind that the operators around a module issue for a micro-batch.

    Args:
        module: Path of the module.
        direction: In the forward pass, or in the backward pass.
        op: ``all_reduce``, ``all_gather`` or ``reduce_scatter``.
        mesh_axis: Mesh axis along which they go.
        num_calls: How many.
        num_bytes: Bytes of the tensors, all calls together: of an all-reduce the tensor, of a gather or a reduce-scatter the
            whole.
        cargo: ``activations``, or ``gradients`` where the gradient of a tensor is summed.
    """

    module: str
    direction: Literal["forward", "backward"]
    op: str
    mesh_axis: MeshAxis
    num_calls: int
    num_bytes: int
    cargo: Cargo = "activations"


@frozen
class Saved:
    """Bytes that autograd saves in a module: in a block (a repeated layer) as a whole, else without its submodules.

    Args:
        module: Its path.
        saved_bytes: Bytes of all that is kept for the backward pass, parameters left out, each storage once.
        input_bytes: Bytes of the tensors that a block is called with, which a checkpoint of it keeps.
        is_block: Whether the module is a block.
    """

    module: str
    saved_bytes: int
    input_bytes: int = 0
    is_block: bool = False


@frozen
class Microbatch:
    """A forward and backward pass of the first rank along ``data`` and ``tensor``, with the example inputs.

    Args:
        calls: Collectives of the synchronisations.
        saved: Activations that autograd saves.
        without_gradient: Trained tensors that no gradient reaches, by canonical path.
    """

    calls: tuple[SyncCall, ...] = ()
    saved: tuple[Saved, ...] = ()
    without_gradient: tuple[str, ...] = ()
