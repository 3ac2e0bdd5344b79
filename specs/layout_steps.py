"""The steps of a plan that change how a module computes, and leave its tensors alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import field, frozen
from frozendict import deepfreeze, frozendict

from .json_values import WRITTEN_IF_SET, check_plain
from .mesh import MeshAxis

if TYPE_CHECKING:
    from .mesh import Mesh

When = Literal["forward_pre", "forward_post", "backward_pre", "backward_post"]
"""Where a synchronisation stands: before a module (its input), after it (its output), before its backward pass (the gradient
of its output), or after that (the gradient of its input)."""

SyncOp = Literal["all_reduce", "all_gather", "reduce_scatter", "divide"]
"""The operator of a synchronisation along its mesh axis; ``divide`` sends nothing, and divides by the number of ranks."""

Gives = Literal["whole", "split", "summand"]
"""What the user's word is that code gives on ranks along a mesh axis, where nobody can follow it: the tensor that the whole
model has, parts of it along an axis, or summands of it."""

RING_PASSES: Mapping[str, int] = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""How often the ring algorithm of a collective sends (n - 1) / n of the bytes along n ranks."""


@frozen
class _LayoutStep:
    """A change of how a module computes.

    Args:
        module: Path of the module.
    """

    module: str

    def describe(self) -> str:
        """Return the change in words, as listings show it."""
        raise NotImplementedError

    def matters(self, mesh: Mesh) -> bool:  # noqa: ARG002
        """Tell whether it changes anything on a mesh."""
        return True

    def groups(self) -> tuple[tuple[MeshAxis, ...], ...]:
        """Return the sets of mesh axes along which it needs process groups."""
        return ()

    def neighbours(self) -> tuple[tuple[MeshAxis, int], ...]:
        """Return the mesh axes, and numbers of neighbours along them, of which it needs process groups."""
        return ()


@frozen
class _Along(_LayoutStep):
    """A change along a mesh axis: without effect where the axis has a single rank."""

    mesh_axis: ClassVar[MeshAxis]

    def matters(self, mesh: Mesh) -> bool:
        return mesh.num(self.mesh_axis) > 1

    def groups(self) -> tuple[tuple[MeshAxis, ...], ...]:
        return ((self.mesh_axis,),)


@frozen
class SetAttributes(_LayoutStep):
    """A module's attributes take their local values."""

    values: frozendict[str, Any] = field(converter=deepfreeze, validator=check_plain)

    def describe(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.values.items())


@frozen
class SetToLocalSize(_LayoutStep):
    """A module's attribute takes the local size of a tensor's axis."""

    attribute: str
    tensor: str
    axis: int

    def describe(self) -> str:
        return f"{self.attribute} = size of axis {self.axis} of {self.tensor}"


@frozen
class VocabParallel(_Along):
    """An embedding whose rows are split looks up its own rows, and returns zeros for rows of other ranks.

    Args:
        module: Path of the embedding.
        num_rows: Rows of the first rank: the n-th begins with row n times this.
    """

    mesh_axis: ClassVar[MeshAxis] = "tensor"
    num_rows: int

    def describe(self) -> str:
        return "looks up its own rows, zeros for others"


@frozen
class AddBiasAfterSync(_LayoutStep):
    """A linear module whose input axis is split adds its bias once, after the outputs are summed."""

    def describe(self) -> str:
        return "adds its bias after the sum"


@frozen
class Sync(_Along):
    """A module's input or output passes through a collective operator, with its own autograd formula.

    Args:
        module: Path of the module.
        when: Where it stands.
        op: A collective, or ``module:qualname`` of a function of the user's, called as ``function(tensor, group)``.
        axis: Axis of the activation that is gathered or scattered, or along which a function of the user's gives parts.
        mesh_axis: Mesh axis along which it communicates.
        which: Which of the floating-point tensors among the arguments, or of the result, from 0.
        features: Entries of the last axis of a gradient that are summed, as an interval; None for all.
        sizes: Entries of the gathered axis on the first rank and in all; None if all ranks have equally many.
        gives: What a function of the user's returns; None for a collective, and where the user does not say.
    """

    when: When
    op: str
    axis: int | None = None
    mesh_axis: MeshAxis = "tensor"  # pyright: ignore[reportIncompatibleVariableOverride]  it is said of each
    which: int = 0
    features: tuple[int, int] | None = None
    sizes: tuple[int, int] | None = None
    gives: Gives | None = field(default=None, metadata=WRITTEN_IF_SET)

    def describe(self) -> str:
        told = [] if self.axis is None else [f"axis={self.axis}"]
        told += [f"which={self.which}"] if self.which else []
        told += [f"features={list(self.features)}"] if self.features else []
        told += [f"size={self.sizes[1]}"] if self.sizes else []
        told += [f"gives={self.gives}"] if self.gives else []
        how = f"({', '.join(told)})" if told else ""
        return f"{self.when} {self.op}{how}@{self.mesh_axis}"

    def __str__(self) -> str:
        return self.describe()


@frozen
class SumGradient(_Along):
    """Before its module computes with it, a tensor passes an operator: its gradient is summed over ranks that hold it too.

    Args:
        module: Path of the module.
        name: The tensor's name in it.
        mesh_axis: Mesh axis along which the gradient is summed.
        axis: Axis of the tensor whose parts are held by different numbers of ranks.
        sharing: For each part of that axis, in order, how many entries it has and how many neighbours hold them; empty if
            all ranks along the mesh axis hold the whole tensor.
        divide: Divisor of the sum.
    """

    name: str
    mesh_axis: MeshAxis = "tensor"  # pyright: ignore[reportIncompatibleVariableOverride]  it is said of each
    axis: int = 0
    sharing: tuple[tuple[int, int], ...] = ()
    divide: int = 1

    def describe(self) -> str:
        parts = ", ".join(f"{size} over {num}" for size, num in self.sharing if num > 1)
        over = f" ({parts} neighbours)" if parts else ""
        mean = f" / {self.divide}" if self.divide > 1 else ""
        return f"gradient of {self.name} summed@{self.mesh_axis}{over}{mean}"

    def __str__(self) -> str:
        return self.describe()

    def groups(self) -> tuple[tuple[MeshAxis, ...], ...]:
        return () if self.sharing else ((self.mesh_axis,),)

    def neighbours(self) -> tuple[tuple[MeshAxis, int], ...]:
        return tuple((self.mesh_axis, num) for _, num in self.sharing if num > 1)


@frozen
class SumProducts(_Along):
    """Products with a tensor that no module of its own computes are summed, or the gradients of what they take.

    Args:
        module: Path of the module that holds it.
        name: The tensor's name in it.
        what: ``outputs`` (the products, where each rank has some of the entries that are summed over), or ``gradients`` (of
            the other factors, which are whole, where each rank has some of the entries of the products).
    """

    mesh_axis: ClassVar[MeshAxis] = "tensor"
    name: str
    what: Literal["outputs", "gradients"]

    def describe(self) -> str:
        what = "products" if self.what == "outputs" else "gradients of factors"
        return f"{what} of {self.name} summed@{self.mesh_axis}"


@frozen
class DispatchTokens(_Along):
    """Experts split over ``expert``: each rank computes with its own for the tokens of all; the results are summed.

    Args:
        module: Path of a module that is called with tokens, the experts chosen for each, and their weights.
        num_experts: How many experts each rank has.
    """

    mesh_axis: ClassVar[MeshAxis] = "expert"
    num_experts: int

    def describe(self) -> str:
        return f"tokens gathered@{self.mesh_axis}, {self.num_experts} experts each, outputs summed and scattered"


@frozen
class ForkRng(_Along):
    """Random numbers drawn within a module differ along ``tensor``; outside it they stay the same along it."""

    mesh_axis: ClassVar[MeshAxis] = "tensor"

    def describe(self) -> str:
        return f"random numbers of its own@{self.mesh_axis}"

    def groups(self) -> tuple[tuple[MeshAxis, ...], ...]:
        return ()


@frozen
class ShareRng(_Along):
    """Random numbers drawn within a module are the same along ``tensor``, also where those around it differ.

    Args:
        module: Path of the module.
        onwards: Whether they stay the same after it, until the module around it ends whose numbers differ.
    """

    mesh_axis: ClassVar[MeshAxis] = "tensor"
    onwards: bool = False

    def describe(self) -> str:
        return f"random numbers shared@{self.mesh_axis}{', and after it' if self.onwards else ''}"

    def groups(self) -> tuple[tuple[MeshAxis, ...], ...]:
        return ()


@frozen
class MaskPadding(_Along):
    """Outputs that stand for padded rows are the lowest number of their dtype, so that no softmax sees them.

    Args:
        module: Path of the module whose output features are split.
        sizes: Output features of each rank, and of all without padding.
    """

    mesh_axis: ClassVar[MeshAxis] = "tensor"
    sizes: tuple[int, int]

    def describe(self) -> str:
        return "outputs of padding masked"


LayoutStep = (
    SetAttributes
    | SetToLocalSize
    | VocabParallel
    | AddBiasAfterSync
    | Sync
    | SumGradient
    | SumProducts
    | DispatchTokens
    | ForkRng
    | ShareRng
    | MaskPadding
)
"""Steps that change how a module computes, and leave its tensors alone."""


def needed_neighbours(steps: Iterable[LayoutStep]) -> tuple[tuple[MeshAxis, int], ...]:
    """Return the mesh axes, and numbers of neighbours along them, of which steps need process groups, without repeats."""
    return tuple(dict.fromkeys(pair for step in steps for pair in step.neighbours()))
