"""The protocol of a runtime's dialect, and how the dialect of a target is found."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

from attrs import frozen

from ...specs.errors import Problem
from ...specs.finding import Finding
from ...specs.pattern import closest
from .plain import PlainDialect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ...specs.layout_steps import LayoutStep
    from ...specs.mesh import Coordinate, Mesh, MeshAxis
    from ...specs.pipeline import Pipeline
    from ...specs.plan import Plan
    from ...specs.tree import SpecTree
    from .accounting.messages import Messages
    from .accounting.state import State
    from .accounting.training import Training
    from .handover import Handover, Wrapped
    from .holding import Holding

ENTRY_POINTS = "shardplan.dialects"
"""Entry point group under which a package offers a dialect: a class without arguments."""

_LATER = ("pipeline_options", "wrong_numbers", "training", "in_flight", "state", "messages", "findings", "holding")
"""Names that a dialect needs after planning."""


class Dialect(Protocol):
    """An adapter to a runtime.

    All methods but ``check_installed``, ``wrap`` and ``holding`` read records alone: they import neither the runtime nor
    torch, so that a saved plan is audited anywhere.

    Attributes:
        pipeline_options: Names of options in the runtime's configuration that are for a pipeline alone.
    """

    pipeline_options: Sequence[str]

    # while planning

    def check(
        self, mesh: Mesh, tree: SpecTree, layout: Sequence[LayoutStep], config: Mapping[str, Any] | None
    ) -> list[Problem]:
        """Return problems that the runtime would refuse at launch, or get wrong without a word."""
        ...

    def check_pipeline(
        self, mesh: Mesh, tree: SpecTree, pipeline: Pipeline | None, config: Mapping[str, Any] | None
    ) -> list[Problem]:
        """Return the same of a model's stages; ``pipeline`` is None for a model that is not cut."""
        ...

    def groups(self, mesh: Mesh) -> tuple[tuple[MeshAxis, ...], ...]:
        """Return the sets of mesh axes along which the runtime needs process groups."""
        ...

    # accounting, for the audit

    def wrong_numbers(self, config: Mapping[str, Any]) -> Iterable[Problem]:
        """Iterate over values in a saved configuration that accounting would fail on; without any it may be called."""
        ...

    def training(self, plan: Plan) -> Training:
        """Return the facts of a training step that are the same on all ranks: micro-batches, the optimizer, casts."""
        ...

    def in_flight(self, plan: Plan, stage: int) -> int:
        """Return the largest number of micro-batches whose activations a stage keeps at one time; 1 without a pipeline."""
        ...

    def state(self, plan: Plan, coordinate: Coordinate, alike: range | None = None) -> State:
        """Return the bytes that a rank keeps for training.

        Args:
            plan: The plan; its steps are not read.
            coordinate: The rank's.
            alike: Places along ``data`` at which ranks hold the same tensors; if given, the state of the fullest of them.
        """
        ...

    def messages(self, plan: Plan, coordinate: Coordinate) -> Iterable[Messages]:
        """Iterate over the messages that a rank sends in a training step.

        Messages of activations within modules, and sums of the gradients of split experts, are the plan's own, and are
        counted without the dialect.
        """
        ...

    def findings(self, plan: Plan) -> Iterable[Finding]:
        """Iterate over findings of a plan that are particular to the runtime."""
        ...

    # while executing

    def check_installed(self) -> list[Problem]:
        """Return why the runtime cannot be used on this machine, with the command that mends it."""
        ...

    def check_loss(self, plan: Plan, loss_fn: Callable[..., Any] | None) -> list[Problem]:
        """Return why the runtime cannot train with a loss; None stands for no loss."""
        ...

    def wrap(self, handover: Handover) -> Wrapped:
        """Hand a filled module to the runtime."""
        ...

    def holding(self) -> Holding:
        """Return how the runtime keeps parameters and optimizer states, for saving and loading."""
        ...


def find_dialect(target: str | None) -> tuple[Dialect | None, list[Problem]]:
    """Return the dialect of a target; None, and a problem that lists the known targets, if there is none."""
    if target is None:
        return PlainDialect(), []
    known = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if target not in known:
        near = closest(str(target), known)
        fix = f"There are None, {', '.join(sorted(known))}" + (f"; the closest is {near[0]}" if near else "")
        return None, [Problem("target", f"{target!r} is unknown", fix)]
    try:
        return known[target].load()(), []
    except Exception as error:  # noqa: BLE001  another package's code may raise anything
        cause = f"{target!r} cannot be loaded from {known[target].value}: {type(error).__name__}: {error}"
        return None, [Problem("target", cause, "Install its package anew, or plan for another target")]


def dialect_of(target: str | None) -> Dialect:
    """Return the dialect of a target, for all that comes after planning.

    Where the target is unknown, or its dialect lacks methods, the dialect of no runtime takes its place, with an error among
    its findings.

    >>> [finding.cause.partition(":")[0] for finding in dialect_of("fsdp2").findings(plan=None)]
    ["target 'fsdp2' is unknown"]
    """
    dialect, problems = find_dialect(target)
    if dialect is None:
        return Unaccounted(f"target {problems[0].cause}", problems[0].fix)
    lacking = [name for name in _LATER if not hasattr(dialect, name)]
    if not lacking:
        return dialect
    cause = f"{type(dialect).__name__}, the dialect of target {target!r}, does not account for itself: it has no"
    return Unaccounted(f"{cause} {', '.join(lacking)}", "Write what the protocol of dialects asks for (CONTRIBUTING.md)")


@frozen
class Unaccounted(PlainDialect):
    """Accounts for a runtime that nobody accounts for: as for no runtime, and the audit has an error that says so.

    Args:
        cause: Why nobody accounts for it.
        fix: The nearest mend.
    """

    cause: str
    fix: str

    def findings(self, plan: Plan) -> Iterable[Finding]:
        cause = f"{self.cause}: memory and messages of training are counted as if there were no runtime"
        yield Finding("SP033", "error", "", cause, self.fix)
