"""Everything a plan says about one module: how it computes on each rank, and the type of every activation within it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from ...specs.equality import CallType, ModuleTypes, Trust, Unfollowed, in_words
from ...specs.finding import Finding, folded
from ...specs.fold_layers import fold
from ...specs.layout_steps import LayoutStep
from ...specs.listing import changes
from ...specs.paths import module_of
from ...specs.text_table import table
from ..audit import audit
from .output import labelled

if TYPE_CHECKING:
    from ...specs.equality import Equality
    from ...specs.plan import Plan


@frozen
class ModuleExplanation:
    """Everything a plan says about one module, and about the modules within it.

    Args:
        path: Its path; empty for the model.
        holds: Types of its tensors in printed form, by path.
        changes: The changes of how it computes, a line for each module.
        types: Types where it begins and ends; None if its activations were not followed.
        followed: Path of the repeated layer's module that was followed for it: its own path, unless it repeats another.
        calls: Types of all that is computed in it, in order.
        stands_for: The repeated layers within it that were not followed themselves, by the layer that was.
        unfollowed: What nobody could follow.
        trusted: The modules that the user trusts.
        findings: The audit's findings.
    """

    path: str
    holds: Mapping[str, str]
    changes: tuple[str, ...]
    types: ModuleTypes | None
    followed: str
    calls: tuple[CallType, ...]
    stands_for: Mapping[str, tuple[str, ...]]
    unfollowed: tuple[Unfollowed, ...]
    trusted: tuple[Trust, ...]
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        head = f"{self.path or '(model)'}  {self.types or ''}".rstrip()
        lines = [
            head,
            "",
            *labelled("holds", _folded(self.holds.items())),
            *labelled("changes", self.changes),
            *labelled("types", self._calls()),
            *labelled("lost", in_words(self.unfollowed)),
            *labelled("trusted", _folded((trust.module, str(trust)) for trust in self.trusted)),
            *labelled("audit", [line for finding in folded(self.findings) for line in str(finding).splitlines()]),
        ]
        return "\n".join(lines)

    def _calls(self) -> Iterator[str]:
        if not self.calls:
            yield "not known: no call within it was followed"
            return
        if self.followed != self.path:
            yield f"as in {self.followed}, which was followed for it"
        rows = [(call.module or "(model)", call.operator, str(call.result), call.line) for call in self.calls]
        yield from table([("module", "operator", "result", "line"), *rows])
        for layer, repeats in self.stands_for.items():
            yield f"{', '.join(path for path, _ in fold((path, ()) for path in repeats))}: as in {layer}"


def _folded(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Write a line for each path, repeated layers folded."""
    return table((path or "(model)", *cells) for path, cells in fold((path, (cell,)) for path, cell in rows))


def module_paths(plan: Plan) -> tuple[str, ...]:
    """Return the paths of all modules of a plan that are known: they hold tensors, compute otherwise, or were followed."""
    evidence = plan.equality
    known: dict[str, None] = {"": None}
    for path in (*map(module_of, plan.tree.all_paths), *(s.module for s in plan.steps if isinstance(s, LayoutStep))):
        known |= dict.fromkeys(_around(path))
    for module in evidence.modules if evidence else ():
        known |= dict.fromkeys((module.path, *evidence.repeats_of(module.path))) if evidence else {}
    return tuple(known)


def explain_module(plan: Plan, path: str) -> ModuleExplanation:
    """Collect everything a plan says about a module.

    Args:
        plan: The plan.
        path: A path of ``module_paths(plan)``.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, Shard, SpecTree
    >>> tree = SpecTree([ParamSpec("mlp.up.weight", (8, 4), "float32", shards=(Shard(0),))])
    >>> found = explain_module(Plan(Mesh(tensor=2), tree, steps=()), "mlp")
    >>> found.holds, found.types, [finding.code for finding in found.findings]
    ({'mlp.up.weight': 'f32[8@tensor, 4]'}, None, ['SP001', 'SP010'])
    """
    evidence = plan.equality
    followed = evidence.followed(path) if evidence else path
    changed = [step for step in plan.steps if isinstance(step, LayoutStep) and is_within(step.module, path)]
    return ModuleExplanation(
        path=path,
        holds={spec.path: spec.type for spec in plan.tree.values() if any(is_within(p, path) for p in spec.paths)},
        changes=tuple(changes(changed)[1:]),
        types=_types(evidence, followed, path),
        followed=followed,
        calls=tuple(call for call in evidence.calls if is_within(call.module, followed)) if evidence else (),
        stands_for={p: r for p, r in evidence.families.items() if is_within(p, path)} if evidence else {},
        unfollowed=tuple(case for case in evidence.unfollowed if is_within(case.path, followed)) if evidence else (),
        trusted=tuple(trust for trust in plan.trusts if is_within(trust.module, path)),
        findings=tuple(finding for finding in audit(plan).findings if is_within(finding.path, path)),
    )


def is_within(path: str, module: str) -> bool:
    """Tell whether a path is a module's own, or lies within it; everything lies within the model."""
    return not module or f"{path}.".startswith(f"{module}.")


def _types(evidence: Equality | None, followed: str, path: str) -> ModuleTypes | None:
    found = (module for module in evidence.modules if module.path == followed) if evidence else iter(())
    types = next(found, None)
    return evolve(types, path=path, repeats=()) if types else None


def _around(path: str) -> Iterator[str]:
    """Iterate over a path and the modules around it."""
    while path:
        yield path
        path = module_of(path)
