"""Messages that a rank sends in a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from attrs import frozen

from ....specs.dtypes import num_bytes
from ....specs.mesh import MeshAxis
from ....specs.steps import SumTied
from ....specs.traffic import Cargo
from .local_parameters import local_parameters

if TYPE_CHECKING:
    from ....specs.mesh import Coordinate
    from ....specs.pipeline import Activation
    from ....specs.plan import Plan


@frozen
class Messages:
    """Messages of one kind that one rank sends in a training step.

    Args:
        mesh_axis: Mesh axis along which they go.
        cargo: ``gradients``, ``parameters`` or ``boundary``.
        op: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``broadcast`` or ``send``.
        num_calls: Number of messages; a message for each tensor or buffer where the runtime cuts them by its order of hooks.
        num_bytes: Bytes of all messages together; of an all-gather or a reduce-scatter the bytes of whole tensors.
        to: Receiver of messages from rank to rank, by its place along the mesh axis; None for a collective.
    """

    mesh_axis: MeshAxis
    cargo: Cargo
    op: str
    num_calls: int
    num_bytes: int
    to: int | None = None


def whole(tensors: Sequence[Activation]) -> list[int]:
    """Return the bytes of the messages that send tensors over a boundary, each tensor whole in a message of its own."""
    return [tensor.num_bytes for tensor in tensors]


def crossings(
    plan: Plan, place: int, num_microbatches: int, sizes: Callable[[Sequence[Activation]], list[int]] = whole
) -> Iterator[Messages]:
    """Iterate over the messages between stages: activations to the next stage, gradients to the stage before.

    Sizes are of the example inputs. Messages to different places along ``pipe`` are counted apart. Where each place has
    several stages, the last place sends to the first, and back.

    Args:
        plan: The plan.
        place: The sender's place along ``pipe``.
        num_microbatches: Micro-batches of a step.
        sizes: Function from the tensors that cross a boundary to the bytes of each message.
    """
    last = len(plan.stages) - 1
    sent: dict[int, list[int]] = {}
    for number in range(place, len(plan.stages), plan.mesh.pipe):
        outputs = plan.stages[number].outputs if number < last else ()
        gradients = with_gradient(plan.stages[number - 1].outputs) if number else []
        sent.setdefault((number + 1) % plan.mesh.pipe, []).extend(sizes(outputs))
        sent.setdefault((number - 1) % plan.mesh.pipe, []).extend(sizes(gradients))
    for to, each in sent.items():
        if each:
            yield Messages("pipe", "boundary", "send", num_microbatches * len(each), num_microbatches * sum(each), to=to)


def with_gradient(tensors: Sequence[Activation]) -> list[Activation]:
    """Return the tensors that a gradient comes back for."""
    return [tensor for tensor in tensors if tensor.requires_grad]


def tied_sums(
    plan: Plan, coordinate: Coordinate, *, cast_to: str | None = None, item_bytes: int | None = None
) -> Iterator[Messages]:
    """Iterate over the sums of gradients of tensors that several stages hold: a message for each tensor in a step.

    Args:
        plan: The plan.
        coordinate: The rank's.
        cast_to: Dtype to which the runtime casts floating-point parameters; None if they are left as they are.
        item_bytes: Bytes of an element of a gradient; None for the bytes of an element of the parameter.
    """
    paths = {step.path for step in plan.steps if isinstance(step, SumTied) and coordinate.pipe in step.between}
    held = [parameter for parameter in local_parameters(plan, coordinate, cast_to) if parameter.spec.path in paths]
    if held:
        total = sum(parameter.numel * (item_bytes or num_bytes(parameter.dtype)) for parameter in held)
        yield Messages("pipe", "gradients", "all_reduce", len(held), total)
