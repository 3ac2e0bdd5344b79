"""Bytes that a rank keeps for training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from .local_parameters import local_parameters, total_bytes
from .training import UNKNOWN, Optimizer

if TYPE_CHECKING:
    from ....specs.mesh import Coordinate
    from ....specs.plan import Plan


@frozen
class State:
    """Bytes that a runtime keeps for training, on one rank.

    Temporaries of a single operation are not counted; a step of the optimizer is a single operation, with the copies of
    gradients that it makes.

    Args:
        parameter_bytes: Parameters as they stay while training: under ZeRO 1 and 2 with the padding of the flat buffer,
            under ZeRO 3 this rank's partitions and the parameters that stay whole.
        gradient_bytes: Gradients of all micro-batches, when the last backward pass has ended; under ZeRO 1 before they are
            reduced.
        optimizer_bytes: States of the optimizer, and its step counters where these are tensors, on whichever device.
        master_bytes: Copies of the parameters that the optimizer works on; ZeRO 1, 2 and 3 make them of float32 too.
        bucket_bytes: Buffers into which gradients are copied to be sent, at one time.
        boundary_bytes: Buffers for tensors that cross between stages, and outputs of stages kept until their backward pass,
            at the sizes of the example inputs. The inputs of a stage are among them; autograd may keep the same tensors.
            Batches and targets are not counted.
    """

    parameter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    master_bytes: int = 0
    bucket_bytes: int = 0
    boundary_bytes: int = 0


def whole_state(plan: Plan, coordinate: Coordinate, optimizer: Optimizer = UNKNOWN) -> State:
    """Return the state of a rank that keeps its parameters, their gradients and the optimizer's states whole.

    An optimizer of torch's has states for parameters with a gradient alone (``_init_group`` in torch/optim/adam.py and
    sgd.py of torch 2.13).
    """
    parameters = local_parameters(plan, coordinate)
    reached = [parameter for parameter in parameters if parameter.has_gradient]
    return State(
        parameter_bytes=total_bytes(parameters),
        gradient_bytes=total_bytes(reached),
        optimizer_bytes=optimizer.state_bytes(total_bytes(reached), len(reached)),
    )
