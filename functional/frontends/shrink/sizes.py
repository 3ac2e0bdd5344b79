"""Small numbers that take the place of large ones: as alike to each other and to the mesh as the large ones are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import count
from math import gcd, lcm
from typing import TYPE_CHECKING, Any, get_args

from ...model.config_fields import Changes, Field, Role, role_of

if TYPE_CHECKING:
    from ....specs.mesh import Mesh

_VOCABULARY = 70
_POSITIONS = 64
_WINDOW = 4
_MERGES = (1, 2, 4)


def by_role(fields: Iterable[Field]) -> dict[Role, list[Field]]:
    """Return the fields that hold numbers, by role; each role is there."""
    found: dict[Role, list[Field]] = {role: [] for role in get_args(Role)}
    for of in fields:
        if (role := role_of(of)) and (of.number or of.numbers):
            found[role].append(of)
    return found


def small_counts(fields: Sequence[Field], mesh: Mesh) -> dict[str, Changes]:
    """Return new values of the fields that are no widths or heads, by what they count."""
    found = by_role(fields)
    vocabularies = _vocabularies(found["vocabulary"], mesh.tensor)
    return {
        "positions": {of: _POSITIONS for of in found["position"] if of.number > _POSITIONS},
        "windows": {of: _WINDOW for of in found["window"] if of.number > _WINDOW},
        "images": _images(fields),
        "experts": _experts(found, mesh),
        "vocabularies": vocabularies | _special_tokens(found["id"], vocabularies),
    }


def alike(value: int, num: int, *, least: int, step: int = 1, taken: Iterable[int] = ()) -> int:
    """Return a multiple of ``step`` from ``least`` on that ranks divide as they divide a larger value.

    Args:
        value: The larger value; it is returned where no smaller number is found.
        num: Number of ranks.
        least: The smallest number that is good enough.
        step: What divides the number.
        taken: Numbers that stand for other values already.

    >>> alike(50257, 4, least=70), alike(50256, 4, least=70), alike(28, 8, least=2)
    (71, 72, 4)
    """
    start = -(-least // step) * step
    return min(value, next(n for n in count(start, step) if gcd(n, num) == gcd(value, num) and n not in taken))


def fewer(values: Iterable[int], num: int) -> dict[int, int]:
    """Return a smaller number for each of some numbers: the order, what divides what, and what ranks divide stay.

    >>> fewer([32, 8], 2), fewer([28, 4], 8), fewer([32, 1], 4)
    ({8: 2, 32: 4}, {4: 4, 28: 12}, {1: 1, 32: 4})
    """
    made: dict[int, int] = {}
    for value in sorted(set(values)):
        step = reduce(lcm, (new for old, new in made.items() if value % old == 0), 1)
        made[value] = alike(value, num, least=max(2, *made.values(), 1) + bool(made), step=step) if value > 1 else value
    return made


def _vocabularies(fields: Iterable[Field], num: int) -> dict[Field, Any]:
    made: dict[int, int] = {}
    for value in sorted({of.number for of in fields if of.number > _VOCABULARY}):
        made[value] = alike(value, 2 * num, least=_VOCABULARY, taken=made.values())
    return {of: made[of.number] for of in fields if of.number in made}


def _special_tokens(fields: Iterable[Field], vocabularies: Changes) -> dict[Field, Any]:
    """Return new numbers of tokens, where the vocabulary has become too small for them."""
    rows = min(vocabularies.values(), default=0)
    old = sorted({number for of in fields for number in (of.number, *of.numbers)})
    free = iter(number for number in range(rows - 1, 0, -1) if number not in old)
    made = {number: next(free, 0) if number >= rows else number for number in old} if rows else {}
    changes: dict[Field, Any] = {}
    for of in fields:
        if rows and of.numbers:
            changes[of] = type(of.value)(made[number] for number in of.numbers)
        elif rows:
            changes[of] = made[of.number]
    return changes


def _experts(found: Mapping[Role, Sequence[Field]], mesh: Mesh) -> dict[Field, Any]:
    """Return fewer experts, of which fewer are chosen; in two groups where there are groups."""
    num = lcm(mesh.tensor, mesh.expert)
    groups = [of for of in found["group"] if of.number > 1]
    total = max((of.number for of in groups if "topk" not in of.name), default=1)
    changes: dict[Field, Any] = {of: 1 if "topk" in of.name and of.number < total else 2 for of in groups}
    for of in found["expert"]:
        changes[of] = alike(of.number, num, least=8 if total > 1 else 4, step=2 if total > 1 else 1)
    if any(of.number > 1 for of in found["expert"]):
        changes |= {of: min(of.number, 2) for of in found["top_k"]}
    return changes


def _images(fields: Sequence[Field]) -> dict[Field, Any]:
    """Return small images of small patches, and the numbers of patches and of their tokens."""
    changes: dict[Field, Any] = {}
    sides: dict[int, int] = {}
    for patch in (of for of in fields if of.name == "patch_size" and min(_axes(of), default=0) > _WINDOW):
        new = _WINDOW - _axes(patch)[0] % 2
        changes[patch] = _with_axes(patch, [new] * len(_axes(patch)))
        for image in (of for of in fields if of.name == "image_size" and of.config == patch.config and _axes(of)):
            old = [side // _axes(patch)[0] for side in _axes(image)]
            sides |= {side: min(side, _WINDOW - side % 2) for side in old}
            changes[image] = _with_axes(image, [sides[side] * new for side in old])
    for of in by_role(fields)["image"]:
        tokens = [(side // merge, new // merge) for side, new in sides.items() for merge in _MERGES if new % merge == 0]
        found = next((new**2 for side, new in tokens if of.number == side**2), 0)
        if of.number > _WINDOW and of.name not in {"image_size", "patch_size"}:
            if found:
                changes[of] = found
            elif of.name.startswith("num_position") and round(of.number**0.5) ** 2 == of.number:
                changes[of] = _WINDOW**2
    return changes


def _axes(of: Field) -> Sequence[int]:
    """Return the height and width of an image or patch, or the one number for both."""
    return of.numbers or ((of.number,) if of.number else ())


def _with_axes(of: Field, sides: Sequence[int]) -> Any:
    return sides[0] if of.number else type(of.value)(sides)
