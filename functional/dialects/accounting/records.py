"""What is said of one rank: the bytes that it keeps, and the messages that it sends."""

from __future__ import annotations

from attrs import frozen

from ....specs.mesh import MeshAxis
from ....specs.traffic import Cargo


@frozen
class State:
    """Bytes that a runtime keeps for training, on one rank.

    What only exists within one operation is in none of these; a step of the optimizer is one, with the copies of gradients
    that it makes.

    Args:
        parameter_bytes: Parameters as they stay while training: under ZeRO 1 and 2 with the padding of the flat buffer,
            under ZeRO 3 this rank's parts and what stays whole.
        gradient_bytes: Gradients of all micro-batches, when the last backward pass has ended; under ZeRO 1 before they are
            reduced.
        optimizer_bytes: States of the optimizer, and the steps that it counts in tensors, on whichever device.
        master_bytes: Copies of the parameters that the optimizer works on; ZeRO 1, 2 and 3 make them of float32 too.
        bucket_bytes: What the runtime copies gradients into to send them, at one time.
    """

    parameter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    master_bytes: int = 0
    bucket_bytes: int = 0


@frozen
class Reduction:
    """Messages of one kind in a training step of one rank.

    Args:
        mesh_axis: Mesh axis along which they go.
        cargo: ``gradients``, ``parameters`` or ``boundary``.
        op: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``broadcast`` or ``send``.
        num_calls: Messages; one for each tensor or buffer where the runtime cuts them by the order of its hooks.
        num_bytes: Bytes of the tensors, all messages together: of an all-reduce the tensor, of a gather or a reduce-scatter
            the whole.
        to: Of messages from rank to rank the place along the mesh axis that they go to; None for a collective.
    """

    mesh_axis: MeshAxis
    cargo: Cargo
    op: str
    num_calls: int
    num_bytes: int
    to: int | None = None
