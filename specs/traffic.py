"""Messages of ranks, while the plan is executed and in each step of training."""

from __future__ import annotations

from typing import Literal

from attrs import frozen

from .mesh import Coordinate, MeshAxis

Cargo = Literal["activations", "gradients", "parameters", "boundary"]
"""Tensors that are sent in a training step: activations along ``tensor`` or ``expert``, gradients that are averaged or
summed, parameters that are gathered, and activations and gradients at the boundary of stages."""


@frozen
class Traffic:
    """Messages of a kind while the plan is executed, on the ranks of a distinct coordinate.

    Args:
        coordinate: Where the first of these ranks stands.
        op: ``all_gather``, ``broadcast`` or ``scatter``.
        mesh_axes: Mesh axes that the groups span; empty for all ranks.
        num_calls: Messages.
        num_bytes: Bytes that each member of a group gets, all messages together.
    """

    coordinate: Coordinate
    op: str
    mesh_axes: tuple[MeshAxis, ...]
    num_calls: int
    num_bytes: int


@frozen
class StepTraffic:
    """Messages of a kind in a training step, on the rank of a stage that sends the most.

    Args:
        stage: Pipeline stage.
        mesh_axis: Mesh axis along which they go.
        cargo: Kind of the tensors that are sent.
        op: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``broadcast`` or ``send``.
        num_calls: Messages in a step; where the runtime cuts them in buckets of its own, counted by tensors or buffers.
        num_bytes: Bytes of the tensors that are sent: of an all-reduce the tensor, of a gather or a reduce-scatter the
            whole that is gathered or scattered, of a message from rank to rank the message.
        wire_bytes: Bytes that this rank puts on the wire, by the ring algorithms (Patarasu and Yuan 2009): of n ranks an
            all-reduce sends 2 (n - 1) / n of the bytes, a gather or a reduce-scatter (n - 1) / n, a broadcast and a message
            all of them.
        between_bytes: Bytes of these that leave the node, a mean over the group: 0 where all ranks share a node.
    """

    stage: int
    mesh_axis: MeshAxis
    cargo: Cargo
    op: str
    num_calls: int
    num_bytes: int
    wire_bytes: int
    between_bytes: int = 0

    @property
    def inside_bytes(self) -> int:
        """Bytes that stay within the node."""
        return self.wire_bytes - self.between_bytes


@frozen
class Boundary:
    """Tensors that cross from a pipeline stage to the next, for a micro-batch of the size of the example inputs.

    Args:
        stage: The stage that sends; the next stage receives.
        num_tensors: Tensors.
        num_bytes: Bytes of all of them, on one rank.
        gradient_bytes: Bytes of the gradients that come back.
    """

    stage: int
    num_tensors: int
    num_bytes: int
    gradient_bytes: int
