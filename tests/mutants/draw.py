"""Mutants drawn at random: as many of each kind of change as there are, spread over all subjects, no schedule twice."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

from attrs import frozen

from tests.mutants import split_changes, step_changes, sync_changes
from tests.mutants.edits import KINDS, Mutation
from tests.mutants.subjects import SUBJECTS, Subject

MODULES = (sync_changes, split_changes, step_changes)
"""The files of kinds, in the order of the table."""

MAX_TRIES = 12


@frozen
class Mutant:
    """A mutant.

    Args:
        number: Its place in the draw, from 0.
        kind: The kind of its change.
        subject: The right schedule.
        mutation: The changed schedule.
    """

    number: int
    kind: str
    subject: Subject
    mutation: Mutation


@cache
def schedule(subject):
    """Return the right schedule of a subject, made once."""
    return subject.schedule()


def draw(num, seed):
    """Return mutants: the kinds take turns, and each goes on to the subject that it has changed least, then to the rarest.

    The same seed gives the same mutants, and a larger number begins with those of a smaller. There are fewer than were asked
    for if no kind finds a schedule that was not drawn before.
    """
    rng = random.Random(f"mutants {seed}")
    kinds, mutants, seen, counts = list(KINDS), [], set(), Counter()
    while kinds and len(mutants) < num:
        for kind in list(kinds):
            found = _next(kind, rng, counts, seen)
            if found is None:
                kinds.remove(kind)
            elif len(mutants) < num:
                mutants.append(Mutant(len(mutants), kind, *found))
    return mutants


def _next(kind, rng, counts, seen):
    """Return the subject and a new mutation of a kind, None if many tries have found none."""
    order = sorted(range(len(SUBJECTS)), key=lambda number: (counts[kind, number], counts[number], rng.random()))
    for number in order:
        subject = SUBJECTS[number]
        for _ in range(MAX_TRIES):
            mutation = KINDS[kind](schedule(subject), rng)
            key = mutation and (number, mutation.schedule.tree.specs, mutation.schedule.layout)
            if mutation is not None and key not in seen:
                seen.add(key)
                counts.update([number, (kind, number)])
                return subject, mutation
    return None
