"""Splits with which each rank computes its part: a rank is exported, and its types of activations are followed.

Regions and tables with which it would compute something else stay whole, and the same ones of all repeated layers with them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from attrs import evolve, field, frozen
from frozendict import frozendict

from ....specs.errors import Problem
from ....specs.paths import join, module_of
from ....specs.verb_call import VerbCall
from ...layout.local_model import LocalModel
from ...planning.layout_steps import layout_steps
from ...schedule import Schedule
from ...types.check import check_types
from ..verb_calls import apply_all
from .dropouts import random_number_calls
from .export import ExportFailure, RankGraph, export_rank
from .local_sizes import SizeAttributes, first_difference, kind_to_change, local_shapes, size_attributes
from .propagate import ModelAxes
from .regions import Outcome, RefusedRegion, Region
from .vocabularies import Vocabulary

_MOST_TRIED = 64
"""Limit of the exports that are tried before the remaining regions stay whole."""


@frozen(eq=False)
class Inference:
    """The axes of a model, before any split.

    Args:
        schedule: A schedule without declarations.
        found: The axes of the model.
        training: Whether the model was exported as it runs in training.
        inputs: The inputs of the export.
    """

    schedule: Schedule
    found: ModelAxes
    training: bool
    inputs: Mapping[str, Any]


@frozen(eq=False)
class Choice:
    """What is split, and what stays whole.

    Args:
        outcomes: Regions that are split, and regions that stay whole.
        tables: Tables whose rows are split.
        small: For each other table or its head, why it stays whole.
    """

    outcomes: tuple[Outcome, ...] = field(default=(), converter=tuple)
    tables: tuple[Vocabulary, ...] = field(default=(), converter=tuple)
    small: Mapping[str, str] = frozendict()

    @property
    def regions(self) -> list[Region]:
        """The regions that are split."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, Region)]

    @property
    def is_empty(self) -> bool:
        """Whether all stays whole."""
        return not self.regions and not self.tables

    def near(self, paths: Collection[str]) -> tuple[list[Region], list[Vocabulary]]:
        """Return the regions and tables that modules or tensors belong to, or that are in these modules; all if none are."""
        regions = [region for region in self.regions if not _members(region).isdisjoint(paths)]
        tables = [table for table in self.tables if not _members_of_table(table).isdisjoint(paths)]
        if not regions and not tables:
            within = tuple(f"{path}." for path in paths if path)
            regions = [region for region in self.regions if any(m.startswith(within) for m in region.modules)]
            tables = [table for table in self.tables if any(m.startswith(within) for m in _members_of_table(table))]
        return (regions, tables) if regions or tables else (self.regions, list(self.tables))

    def without(self, regions: Collection[Region], tables: Collection[Vocabulary], reason: str) -> Choice:
        """Return the choice that leaves some regions and tables whole."""
        small = {path: reason for table in tables for path in _tensors_of_table(table)}
        return Choice(
            (RefusedRegion(o.modules, reason) if isinstance(o, Region) and o in regions else o for o in self.outcomes),
            (table for table in self.tables if table not in tables),
            {**self.small, **small},
        )


@frozen(eq=False)
class Fitted:
    """Splits with which each rank computes its part.

    Args:
        schedule: The schedule with these splits.
        choice: What is split.
    """

    schedule: Schedule
    choice: Choice


def fit(known: Inference, choice: Choice) -> Fitted:
    """Return the splits of a choice with which ranks compute what the whole model computes, as far as it can be followed.

    What is refused for the whole model as well says nothing of its splits.
    """
    fitted = _at_local_sizes(known, choice)
    if fitted.choice.is_empty or not (wrong := _refused(known, fitted.schedule)):
        return fitted
    always = {problem.path for problem in _refused(known, known.schedule)}
    while not fitted.choice.is_empty and (wrong := [problem for problem in wrong if problem.path not in always]):
        first = wrong[0]
        regions, tables = fitted.choice.near(_owners(known, first.path))
        reason = f"split, it would not compute what the whole model does: {first.path or 'the model'}: {first.cause}"
        fitted = _at_local_sizes(known, fitted.choice.without(_alike(regions, fitted.choice.regions), tables, reason))
        wrong = [] if fitted.choice.is_empty else _refused(known, fitted.schedule)
    return fitted


def _refused(known: Inference, sch: Schedule) -> list[Problem]:
    """Return where a split model computes something else than the whole model."""
    subject = LocalModel(sch.runtime.model, sch.mesh, sch.tree, example_inputs=known.inputs, leaves=sch.leaves)
    layout, problems = layout_steps(subject, sch.layout)
    return problems or list(check_types(evolve(subject, layout=layout)).problems)


def _owners(known: Inference, path: str) -> set[str]:
    """Return a module, by its canonical path, or a tensor and the module that holds it."""
    return {path, module_of(path)} if path in known.found.tree else {known.found.names.get(path, path)}


def _alike(some: Iterable[Region], regions: Iterable[Region]) -> list[Region]:
    """Return regions, and the same ones of other layers: they differ in the numbers of layers alone."""
    kinds = list(map(_kind, some))
    return [region for region in regions if _kind(region) in kinds]


def _kind(region: Region) -> tuple[frozenset[str], tuple[str, ...]]:
    names = frozenset(re.sub(r"\d+", "", path) for path in region.modules)
    return names, tuple(op.name for op in region.operations)


def _members(region: Region) -> set[str]:
    tensors = {*region.tensors, *region.sums.parameters, *(path for path, _ in region.sums.outputs)}
    return {*region.modules, *tensors, *(op.module for op in region.operations)}


def _members_of_table(table: Vocabulary) -> set[str]:
    return {table.table, *table.embeddings, *table.heads}


def _tensors_of_table(table: Vocabulary) -> Iterator[str]:
    yield table.table
    yield from (join(head, name) for head in table.heads for name in ("weight", "bias"))


def _at_local_sizes(known: Inference, choice: Choice) -> Fitted:
    """Return splits and local sizes of attributes with which a rank's graph is the model's graph at local shapes."""
    mesh = known.schedule.mesh
    tried = 0
    while True:
        regions = choice.regions
        shapes = local_shapes(regions, mesh.tensor)
        kinds = size_attributes(known.found, regions, shapes)
        changed = {path for region in regions for path in region.modules}
        changed |= {path for table in choice.tables for path in (*table.embeddings, *table.heads)}
        while True:
            sch = apply_all(known.schedule, _verb_calls(choice, kinds))
            if choice.is_empty:
                return Fitted(sch, choice)
            tried += 1
            if sch.problems:
                rank = ExportFailure(sch.problems[0].path, sch.problems[0].cause)
            else:
                split = LocalModel(sch.runtime.model, mesh, sch.tree, sch.layout, example_inputs=known.inputs)
                rank = export_rank(split, training=known.training)
            wrong = first_difference(known.found, rank, shapes, changed)
            if wrong is None:
                return Fitted(apply_all(sch, random_number_calls(known.found, choice.outcomes)), choice)
            kind = kind_to_change(kinds, wrong)
            if kind is None or tried > _MOST_TRIED:
                break
            kind.at += 1
        choice = _without_region_of(choice, wrong, rank)


def _without_region_of(choice: Choice, path: str, rank: RankGraph | ExportFailure) -> Choice:
    """Return the choice that leaves the regions of a module whole; all of them, and then tables, if it belongs to none."""
    told = f": {rank.cause}" if isinstance(rank, ExportFailure) else ""
    reason = f"no local sizes were found with which {path or 'the model'} would compute its part{told}"
    near = [region for region in choice.regions if path in region.modules | {op.module for op in region.operations}]
    return choice.without(near or choice.regions, [] if choice.regions else choice.tables, reason)


def _verb_calls(choice: Choice, kinds: Iterable[SizeAttributes]) -> Iterator[VerbCall]:
    for table in choice.tables:
        yield from (VerbCall(path, "vocab_parallel") for path in table.embeddings)
        yield from (VerbCall(path, "colwise", (), (("gather_output", True),)) for path in table.heads)
    for region in choice.regions:
        yield from (VerbCall(path, "colwise", (), tuple(split.items())) for path, split in region.columns.items())
        yield from (VerbCall(path, "rowwise", (), tuple(split.items())) for path, split in region.rows.items())
        for path, (axis, split) in region.tensors.items():
            yield VerbCall(path, "shard", (), (("axis", axis), *split.items()))
        yield from (VerbCall(path, "sum_gradient") for path in region.sums.parameters)
        for path, features in region.sums.outputs:
            some = (("features", features),) if any(features) else ()
            yield VerbCall(path, "sync", ("backward_pre", "all_reduce"), some)
    for kind in kinds:
        if kind.values:
            yield from (VerbCall(path, "set", (), tuple(kind.values.items())) for path in kind.modules)
