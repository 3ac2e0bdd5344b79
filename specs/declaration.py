"""The data of a schedule; ``Schedule`` adds the verbs."""

from __future__ import annotations

from typing import TypeVar

from attrs import field, frozen
from attrs.validators import instance_of

from .equality import Trust
from .errors import Problem
from .finding import Silence
from .layout_steps import LayoutStep
from .listing import declared
from .mesh import Mesh
from .module import ModuleSpec
from .pipeline import Even
from .plan import Runtime
from .tree import SpecTree


@frozen
class Declaration:
    """How a model is to be split, as far as it has been said.

    Args:
        mesh: The ranks.
        tree: Every tensor with its declared splits, tags and source.
        modules: Every module.
        layout: Changes of how modules compute, in order.
        cuts: Modules after which a pipeline stage ends.
        leaves: Modules that an export does not look into.
        handed: The modules of each stage, where the user gave them.
        even: The wish for balanced stages, if any.
        silences: Findings of the audit that are known and meant.
        trusts: Modules that nobody can follow, and the user's word for what they give.
        problems: Everything that is wrong so far.
        pattern: The selection that the next verb applies to.
        runtime: Model and callables; outside equality.
    """

    mesh: Mesh = field(validator=instance_of(Mesh))
    tree: SpecTree = field(repr=False)
    modules: tuple[ModuleSpec, ...] = field(repr=False)
    layout: tuple[LayoutStep, ...] = field(default=(), repr=False)
    cuts: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    handed: tuple[tuple[str, ...], ...] = ()
    even: Even | None = None
    silences: tuple[Silence, ...] = ()
    trusts: tuple[Trust, ...] = ()
    problems: tuple[Problem, ...] = field(default=(), converter=tuple, repr=False)
    pattern: str | None = field(default=None, eq=False)
    runtime: Runtime = field(factory=Runtime, eq=False, repr=False)

    def __str__(self) -> str:
        return declared(self.mesh, self.tree, self.layout, self.cuts, self.silences, self.trusts)

    @property
    def selected(self) -> str:
        """The pattern in force.

        Raises:
            ValueError: If there is none.
        """
        if self.pattern is None:
            msg = "a verb needs a selection: sch.at[pattern].verb(...)"
            raise ValueError(msg)
        return self.pattern


D = TypeVar("D", bound=Declaration)
"""A declaration or a schedule: an edit returns the kind that it was given."""
