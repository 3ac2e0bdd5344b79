"""The instructions of a plan: a single list for all ranks.

A step names stages, mesh axes and paths, never ranks, groups or intervals. What it asks of one rank is computed by
``shardplan.functional.interpreter.resolve``. Its ``stage`` is the place along ``pipe`` of the ranks that it is for:
where each place has one stage, the stage.
"""

from __future__ import annotations

from typing import Literal

from attrs import Factory, field, frozen

from .layout_steps import LayoutStep
from .mesh import MeshAxis
from .source import Call


@frozen
class Agree:
    """All ranks tell each other whether they can go on; the first failure is raised on every rank."""

    moment: Literal["opening", "closing"]


@frozen
class MakeGroups:
    """Every rank takes part in making process groups.

    Args:
        over: Sets of mesh axes, in mesh order: the ranks that differ along them are a group.
        sharing: Mesh axes and numbers of neighbours along them that are a group, as they hold a part in common.
    """

    over: tuple[tuple[MeshAxis, ...], ...]
    sharing: tuple[tuple[MeshAxis, int], ...] = ()


@frozen
class MakeTieGroups:
    """Every rank takes part in making the groups of ranks that hold a tensor in common across stages.

    Args:
        between: For each group its places along ``pipe``; there is one such group at each place along the other mesh axes.
    """

    between: tuple[tuple[int, ...], ...]


@frozen
class Generate:
    """The first rank of a stage makes some whole tensors by running init code that no init program stands for.

    Args:
        stage: Pipeline stage.
        paths: Tensors that are kept, each under the path at which the code writes it.
        calls: The code, in the order in which it runs.
        scratch: Other tensors that the code touches: lent to it whole, then dropped.
        key: Its generator is keyed by (seed, key): the first tensor that the code makes, on whichever stage.
    """

    stage: int
    paths: tuple[str, ...]
    calls: tuple[Call, ...]
    scratch: tuple[str, ...] = ()
    key: str = field(default=Factory(lambda self: next(iter(self.paths), ""), takes_self=True))


@frozen
class EvaluateWhole:
    """The first rank of a stage evaluates the init programs of some tensors, whole."""

    stage: int
    paths: tuple[str, ...]


@frozen
class EvaluateShard:
    """Every rank of a stage evaluates the init programs of some tensors, for its own part alone."""

    stage: int
    paths: tuple[str, ...]


@frozen
class TakeWhole:
    """The first rank of a stage takes the whole values that its module already has."""

    stage: int
    paths: tuple[str, ...]


@frozen
class TakeShard:
    """Every rank of a stage takes its own part of the values that its own module already has."""

    stage: int
    paths: tuple[str, ...]


@frozen
class LoadShard:
    """Ranks of a stage read their own parts of tensors from the plan's folder, in the order in which they lie there.

    Args:
        stage: Pipeline stage.
        paths: The tensors.
        stored_dtype: Their element type in the files; they are converted if the tensors have another.
        over: Of these mesh axes only place 0 reads.
    """

    stage: int
    paths: tuple[str, ...]
    stored_dtype: str
    over: tuple[MeshAxis, ...] = ()


@frozen
class LoadOwn:
    """Every rank of a stage reads tensors from the file in the plan's folder that was written for it alone."""

    stage: int
    paths: tuple[str, ...]


@frozen
class CheckLoaded:
    """All ranks add up the position sums of the values that they read, and compare them with the recorded sums."""


@frozen
class Allocate:
    """Every rank of a stage allocates its parts and leaves them uninitialised."""

    stage: int
    paths: tuple[str, ...]


@frozen
class Scatter:
    """The first rank of each group sends every member its own part of whole tensors, in a single message.

    ``over`` are the mesh axes that split the tensors; of the other axes of the stage only place 0 takes part.
    """

    stage: int
    paths: tuple[str, ...]
    over: tuple[MeshAxis, ...]


@frozen
class Broadcast:
    """The first rank of each group sends every member its tensors, in a single message.

    The whole tensor travels where ``over`` holds an axis that splits it, else the part that the group shares.
    """

    stage: int
    paths: tuple[str, ...]
    over: tuple[MeshAxis, ...]


@frozen
class SendCopy:
    """The ranks of a stage send their parts of tensors to the ranks at the same place of another stage that holds them.

    ``stage`` and ``to`` are places along ``pipe``.
    """

    stage: int
    to: int
    paths: tuple[str, ...]


@frozen
class Slice:
    """Every rank of a stage keeps its part of whole tensors, and drops the rest."""

    stage: int
    paths: tuple[str, ...]


@frozen
class Place:
    """A rank's parts become the tensors of its module, under their canonical paths."""

    stage: int
    paths: tuple[str, ...]


@frozen
class Tie:
    """The aliases of a tensor become the same object again."""

    stage: int
    path: str
    aliases: tuple[str, ...]


@frozen
class SumTied:
    """The gradients of a tensor are summed over the stages that hold it, before each step of the optimizer.

    Args:
        path: The tensor.
        between: Their places along ``pipe``; the first belongs to the stage that owns it.
    """

    path: str
    between: tuple[int, ...]


@frozen
class TakeStages:
    """Of the whole module each rank keeps the stages that it runs; tensors of further stages were never filled."""


@frozen
class AsDTensors:
    """All tensors of the module become DTensors of torch; modules still compute with local tensors.

    Args:
        mesh_axes: Dimensions of the device mesh, in mesh order; there is a group along each.
    """

    mesh_axes: tuple[MeshAxis, ...]


@frozen
class MakeOptimizer:
    """The user's function, if given, makes an optimizer over the trained parameters."""


@frozen
class Wrap:
    """The module is handed to the plan's target."""

    target: str | None


Step = (
    Agree
    | MakeGroups
    | MakeTieGroups
    | Generate
    | EvaluateWhole
    | EvaluateShard
    | TakeWhole
    | TakeShard
    | LoadShard
    | LoadOwn
    | CheckLoaded
    | Allocate
    | Scatter
    | Broadcast
    | SendCopy
    | Slice
    | Place
    | Tie
    | LayoutStep
    | TakeStages
    | SumTied
    | AsDTensors
    | MakeOptimizer
    | Wrap
)
