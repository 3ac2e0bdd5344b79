"""Mends of a split model's problems, each tried before it is offered."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from attrs import Factory, define, evolve, field

from ...specs.errors import Problem
from ...specs.layout_steps import LayoutStep
from ...specs.verb_call import VerbCall, patterns, wildcard
from ..layout.local_model import LocalModel
from .check import Checked
from .mend_candidates import Mend, candidates

_MOST_TRIALS = 16
"""Limit of the changes that are tried for all problems together."""

_MOST_IN_TURN = 8
"""Limit of the changes that follow each other: behind a mended place, code that was not followed is."""

NONE = "Nothing that was tried mends it: split what meets here alike, or keep it whole"

Try = Callable[[Sequence[Mend]], Checked | None]
"""Follows the split model with changes of its layout; None where they cannot be made."""

Kind = tuple[str, str]
"""Path and cause of problems that differ only in the numbers of layers."""


def mended(problems: Iterable[Problem], subject: LocalModel, attempt: Try) -> list[Problem]:
    """Return problems with mends: with all of them, in order, the problems that have one are gone, and no other has come.

    Problems that differ only in the number of a layer have one mend.

    Args:
        problems: The problems of the split model, some of them with a fault that was found.
        subject: The split model.
        attempt: Follows the split model with changes.
    """
    return _Mending(subject, attempt).run(list(problems))


@define(eq=False)
class _Mending:
    subject: LocalModel
    attempt: Try
    accepted: list[Mend] = Factory(list)
    num_trials: int = 0
    places: dict[str, object] = field(init=False)
    """What stands at each path: the class of a module, the shape of a tensor."""

    def __attrs_post_init__(self) -> None:
        modules = self.subject.model.named_modules(remove_duplicate=False)
        self.places = {path: type(module) for path, module in modules}
        self.places |= {path: self.subject.tree[path].orig_shape for path in self.subject.tree.all_paths}

    def run(self, problems: list[Problem]) -> list[Problem]:
        now = self.attempt(())
        if now is None:
            return problems
        fixes: dict[Kind, str] = {}
        kinds = {kind: problem for problem in reversed(problems) if (kind := _kind(problem)) in _kinds(now)}
        for kind, problem in reversed(kinds.items()):
            found = self._search(kind, now) if kind not in fixes else None
            if found:
                place = wildcard(problem.path)
                fixes |= dict.fromkeys(_kinds(now) - _kinds(found[1]), f"Gone with the mend of {place!r}")
                fixes[kind] = _told(found[0])
                self.accepted += found[0]
                now = found[1]
        fixes = {**{_kind(problem): NONE for problem in now.found}, **fixes}
        return [evolve(problem, fix=fixes.get(_kind(problem)) or problem.fix) for problem in problems]

    def _search(self, kind: Kind, now: Checked) -> tuple[list[Mend], Checked] | None:
        """Return changes after which problems of a kind are gone, and no new ones are there."""
        old, further = _kinds(now), list[tuple[Mend, Checked]]()
        for mend in self._candidates(kind, now):
            checked = self._tried([mend])
            if checked is None or kind in _kinds(checked) or not set(checked.unfollowed) <= set(now.unfollowed):
                continue
            if _kinds(checked) <= old:
                return [mend], checked
            further.append((mend, checked))
        for mend, checked in further:
            found = self._behind(mend, checked, old)
            if found:
                return found
        return None

    def _behind(self, mend: Mend, checked: Checked, old: set[Kind]) -> tuple[list[Mend], Checked] | None:
        """Return a change, and changes that mend what is wrong behind it."""
        made, before = [mend], list(self.accepted)
        self.accepted.append(mend)
        try:
            while new := [kind for kind in _kinds_in_order(checked) if kind not in old]:
                found = self._search(new[0], checked) if len(made) < _MOST_IN_TURN else None
                if found is None:
                    return None
                made += found[0]
                self.accepted += found[0]
                checked = found[1]
        finally:
            self.accepted = before
        return made, checked

    def _tried(self, mends: Sequence[Mend]) -> Checked | None:
        if self.num_trials == _MOST_TRIALS:
            return None
        self.num_trials += 1
        return self.attempt([*self.accepted, *mends])

    def _candidates(self, kind: Kind, now: Checked) -> list[Mend]:
        """Return changes for all problems of a kind at once."""
        made: dict[object, list[Mend]] = {}
        layout = next((found.layout for found in now.found.values()), ())
        for problem, found in now.found.items():
            if _kind(problem) == kind:
                for mend in candidates(found, self.subject.tree):
                    made.setdefault((*map(_pattern, mend.calls), *map(_anywhere, mend.without)), []).append(mend)
        return [self._of_all_layers(mends, layout) for mends in made.values()]

    def _of_all_layers(self, mends: Sequence[Mend], layout: Sequence[LayoutStep]) -> Mend:
        """Return changes that differ in the numbers of layers as one, for all layers whose modules are alike."""
        calls: list[VerbCall] = []
        for column in zip(*(mend.calls for mend in mends), strict=True):
            paths = self._alike(dict.fromkeys(call.path for call in column))
            calls += [evolve(column[0], path=pattern) for pattern in patterns(paths, list(self.places))]
        left = {_anywhere(step) for mend in mends for step in mend.without}
        modules = set(self._alike(dict.fromkeys(step.module for mend in mends for step in mend.without)))
        without = [step for step in layout if step.module in modules and _anywhere(step) in left]
        return Mend(tuple(calls), tuple(without))

    def _alike(self, paths: Iterable[str]) -> list[str]:
        """Return paths, and with them those of other layers if all that differ in numbers only are alike."""
        found = dict.fromkeys(paths)
        for path in list(found):
            same = [other for other in self.places if wildcard(other) == wildcard(path)]
            if len({self.places[other] for other in same}) == 1:
                found |= dict.fromkeys(same)
        return list(found)


def _kind(problem: Problem) -> Kind:
    return wildcard(problem.path), re.sub(r"\.\d+(?=[.'\s])", ".*", problem.cause)


def _kinds(checked: Checked) -> set[Kind]:
    return set(map(_kind, checked.problems))


def _kinds_in_order(checked: Checked) -> list[Kind]:
    return list(dict.fromkeys(map(_kind, checked.problems)))


def _pattern(call: VerbCall) -> VerbCall:
    return evolve(call, path=wildcard(call.path))


def _anywhere(step: LayoutStep) -> LayoutStep:
    return evolve(step, module=wildcard(step.module))


def _told(mends: Sequence[Mend]) -> str:
    calls: list[VerbCall] = []
    for call in (call for mend in mends for call in mend.calls):
        last = calls[-1] if calls else None
        if last and evolve(last, path="") == evolve(call, path="") and (path := _together(last.path, call.path)):
            calls[-1] = evolve(call, path=path)
        else:
            calls.append(call)
    return str(Mend(tuple(calls), tuple(step for mend in mends for step in mend.without)))


def _together(first: str, second: str) -> str:
    """Return a pattern for two paths that differ in their last name; empty if they differ elsewhere.

    >>> _together("layers.*.{q,k}", "layers.*.v"), _together("a.b", "c.b")
    ('layers.*.{q,k,v}', '')
    """
    (outer, dot, name), (other, _, second_name) = first.rpartition("."), second.rpartition(".")
    if not dot or outer != other or "*" in second_name:
        return ""
    return f"{outer}.{{{name.strip('{}')},{second_name}}}"
