"""The selection of a verb: ``sch.at[pattern]``, and the modules and tensors that the pattern selects."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Generic

from attrs import evolve, frozen

from ...specs.declaration import D, Declaration
from ...specs.errors import Problem
from ...specs.module import ModuleSpec
from ...specs.param import ParamSpec
from ...specs.paths import module_of
from ...specs.pattern import closest, compile_pattern

if TYPE_CHECKING:
    from torch import nn

_PACKAGE = str(Path(__file__).parent.parent)
_FEW = 3


@frozen
class At(Generic[D]):
    """``sch.at``: waits for a pattern in brackets."""

    schedule: D

    def __getitem__(self, pattern: str) -> D:
        if not isinstance(pattern, str):
            msg = f"sch.at[pattern] takes one string, not {pattern!r}; several names are written {{a,b}}"
            raise TypeError(msg)
        try:
            compile_pattern(pattern)
        except ValueError as error:
            problem = Problem(pattern, str(error), "Close it, or write ? for a bracket that belongs to a name")
            return evolve(self.schedule, problems=(*self.schedule.problems, problem), pattern=pattern)
        return evolve(self.schedule, pattern=pattern)


def selected_modules(sch: Declaration) -> tuple[ModuleSpec, ...]:
    """Return the modules that the pattern selects."""
    if is_known_wrong(sch):
        return ()
    matches = compile_pattern(sch.selected).fullmatch
    return tuple(m for m in sch.modules if any(map(matches, (m.path, *m.aliases))))


def selected_tensors(sch: Declaration) -> tuple[ParamSpec, ...]:
    """Return the tensors that the pattern itself selects."""
    return () if is_known_wrong(sch) else sch.tree.select(sch.selected)


def tensors_below(sch: Declaration) -> Iterator[ParamSpec]:
    """Iterate over the selected tensors and all tensors of selected modules, also of their submodules."""
    prefixes = tuple(f"{m.path}." if m.path else "" for m in selected_modules(sch))
    chosen = {spec.path for spec in selected_tensors(sch)}
    return (s for s in sch.tree.values() if s.path in chosen or any(p.startswith(prefixes) for p in s.paths if prefixes))


def own_specs(sch: Declaration, module: ModuleSpec) -> tuple[ParamSpec, ...]:
    """Return the tensors that a module holds itself, under any path."""
    return tuple(s for s in sch.tree.values() if any(module_of(path) == module.path for path in s.paths))


def module_at(sch: Declaration, module: ModuleSpec) -> nn.Module:
    """Return a module of the model; it is looked at, never changed."""
    return sch.runtime.model.get_submodule(module.path)


def of_kind(
    sch: D, is_kind: Callable[[nn.Module], object], verb: str, kind: str, instead: str
) -> tuple[D, list[ModuleSpec]]:
    """Return the selected modules of a kind, and the schedule with a problem for each of another kind."""
    sch, found = or_unmatched(sch, modules=True), []
    for module in selected_modules(sch):
        if is_kind(module_at(sch, module)):
            found.append(module)
        else:
            cause = f".{verb}() is for {kind}, and this is a {module.type.partition(':')[2]}"
            sch = wrong(sch, Problem(module.path, cause, f"Spell it out: {instead}"))
    return sch, found


def expect(sch: D, num: int) -> D:
    """Check how many modules and tensors the pattern selects."""
    paths = [*(module.path for module in selected_modules(sch)), *(spec.path for spec in selected_tensors(sch))]
    if not paths or (len(paths) == num and not isinstance(num, bool)):
        return or_unmatched(sch)
    named = f"{', '.join(paths[:_FEW])}{', ...' if len(paths) > _FEW else ''}"
    cause = f"{num!r} expected, {len(paths)} selected: {named}"
    return wrong(sch, Problem(sch.selected, cause, f"Write .expect({len(paths)}) if that is meant, or mend the pattern"))


def or_unmatched(sch: D, *, modules: bool = False) -> D:
    """Return the schedule, with a problem if the pattern selects nothing that the verb is for."""
    pattern = sch.selected
    if is_known_wrong(sch) or selected_modules(sch) or (not modules and selected_tensors(sch)):
        return sch
    if modules and selected_tensors(sch):
        return wrong(sch, Problem(pattern, "it selects tensors, and this verb is for modules", "Drop the tensor's name"))
    near = closest(pattern, [*(m.path for m in sch.modules), *sch.tree.all_paths])
    fix = f"The closest are {', '.join(near)}" if near else "print(model) shows its paths"
    return wrong(sch, Problem(pattern, "no module and no tensor has a path like this", fix))


def wrong(sch: D, *problems: Problem) -> D:
    """Return the schedule with further problems."""
    return evolve(sch, problems=(*sch.problems, *problems))


def is_known_wrong(sch: Declaration) -> bool:
    """Tell whether the pattern itself is a problem already: it selects nothing, which is said once."""
    return any(problem.path == sch.selected and not _is_path(sch, problem.path) for problem in sch.problems)


def _is_path(sch: Declaration, pattern: str) -> bool:
    return pattern in sch.tree or any(pattern in (m.path, *m.aliases) for m in sch.modules)


def caller() -> str:
    """Return the file and line outside this package that called a verb."""
    frame = sys._getframe(1)  # noqa: SLF001  inspect.stack would read source files
    while frame.f_back and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
