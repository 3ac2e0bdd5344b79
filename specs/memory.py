"""Memory of a rank, while the plan is executed and while it trains."""

from __future__ import annotations

from attrs import fields, frozen

from .mesh import Coordinate


@frozen
class Memory:
    """Bytes on the device of a rank.

    The dialect of the plan's target counts the bytes of training, by its config. If the config names no optimizer, states of
    an optimizer are not counted, and the audit says so. Temporary tensors within an operation are not counted.

    Args:
        parameter_bytes: Parameters as they stay while training: the local shapes, or under ZeRO 3 this rank's part of them.
        buffer_bytes: Buffers.
        gradient_bytes: Gradients, as they stand before a step of the optimizer.
        optimizer_bytes: States of the optimizer.
        master_bytes: Copies of the parameters that the optimizer works on, where the model computes in another dtype.
        bucket_bytes: Buffers into which the runtime copies gradients to send them.
        boundary_bytes: Tensors that cross between stages, for all micro-batches in flight.
        activation_bytes: Estimate of the activations that autograd keeps for all micro-batches in flight; None if no
            micro-batch was followed.
        checkpointed_bytes: The same estimate with activation checkpointing: each block keeps only its inputs, and a single
            block at a time is recomputed; None if no micro-batch was followed.
        executing_bytes: Peak of allocated bytes while the plan is executed: shards, and staging beside them.
        host_bytes: Bytes of host memory, in each process, of the values that the user's model has.
        replicated_bytes: Bytes among parameters and buffers that every rank of the stage holds alike.
    """

    parameter_bytes: int = 0
    buffer_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    master_bytes: int = 0
    bucket_bytes: int = 0
    boundary_bytes: int = 0
    activation_bytes: int | None = None
    checkpointed_bytes: int | None = None
    executing_bytes: int = 0
    host_bytes: int = 0
    replicated_bytes: int = 0

    @property
    def held_bytes(self) -> int:
        """Parameters and buffers."""
        return self.parameter_bytes + self.buffer_bytes

    @property
    def training_bytes(self) -> int:
        """All that stays while training, activations left out.

        >>> Memory(parameter_bytes=8, gradient_bytes=8, optimizer_bytes=16, activation_bytes=100).training_bytes
        32
        """
        names = ("parameter", "buffer", "gradient", "optimizer", "master", "bucket", "boundary")
        return sum(getattr(self, f"{name}_bytes") for name in names)

    @property
    def peak_bytes(self) -> int:
        """Peak of executing, or of training with activations where these are known."""
        return max(self.executing_bytes, self.training_bytes + (self.activation_bytes or 0))

    @property
    def checkpointed_peak_bytes(self) -> int:
        """Peak where each block is checkpointed."""
        return max(self.executing_bytes, self.training_bytes + (self.checkpointed_bytes or 0))


assert all(field.name.endswith("_bytes") for field in fields(Memory))


@frozen
class Share:
    """Memory of the ranks of a distinct coordinate, which are alike.

    Args:
        coordinate: Where the first of them stands.
        num_ranks: How many they are.
        memory: Memory of each; where ZeRO 2 leaves them different gradients, of the rank with the most.
    """

    coordinate: Coordinate
    num_ranks: int
    memory: Memory
