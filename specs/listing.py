"""A plan as a person reads it: the mesh once, then a line a tensor, repeated layers folded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .dtypes import human_bytes, short_name
from .equality import in_words
from .fold_layers import fold
from .layout_steps import LayoutStep
from .source import Loaded, Made
from .steps import SumTied
from .text_table import table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .equality import Equality, Trust
    from .finding import Silence
    from .mesh import Mesh
    from .param import ParamSpec
    from .pipeline import Pipeline, VariableSize
    from .steps import Step
    from .tree import SpecTree


_FEW = 5


def listing(
    mesh: Mesh,
    tree: SpecTree,
    steps: Iterable[Step],
    pipeline: Pipeline | None,
    silences: Iterable[Silence],
    trusts: Iterable[Trust],
) -> list[str]:
    """Return the lines of a plan that a person reads: its tensors, its stages, and the changes of layout."""
    first, steps = mesh.coordinate(0), tuple(steps)
    rows = [
        (
            spec.path,
            (
                f"stage {spec.stage}",
                spec.type,
                source_words(spec),
                f"{human_bytes(spec.local_bytes(first))}/rank",
                *_notes(spec),
            ),
        )
        for spec in tree.values()
    ]
    lines = table((cells[0], path, *cells[1:]) for path, cells in fold(rows))
    if pipeline:
        lines += ["", *_stages(pipeline)]
        lines += [_tied(tree[step.path]) for step in steps if isinstance(step, SumTied)]
    return [*lines, *changes(steps), *_silenced(silences), *trusted(trusts)]


def declared(
    mesh: Mesh,
    tree: SpecTree,
    layout: Iterable[LayoutStep],
    cuts: Iterable[str],
    silences: Iterable[Silence],
    trusts: Iterable[Trust],
) -> str:
    """Return the text of ``print(schedule)``: the declarations so far, by tensor and module."""
    rows = ((spec.path, (spec.type, *_notes(spec))) for spec in tree.values())
    lines = [f"schedule for {mesh}", *table((path, *cells) for path, cells in fold(rows)), *changes(layout)]
    return "\n".join([*lines, *(f"cut after {path}" for path in cuts), *_silenced(silences), *trusted(trusts)])


def changes(steps: Iterable[Step]) -> list[str]:
    """Write the changes of how modules compute, a line a module, after an empty line."""
    rows = fold((module, ("; ".join(words),)) for module, words in layout_words(steps).items())
    return ["", *table((module or "(model)", *cells) for module, cells in rows)] if rows else []


def layout_words(steps: Iterable[Step]) -> dict[str, list[str]]:
    """Return in words how each module computes otherwise than before, by its path."""
    layout: dict[str, list[str]] = {}
    for step in steps:
        if isinstance(step, LayoutStep):
            layout.setdefault(step.module, []).append(step.describe())
    return layout


def trusted(trusts: Iterable[Trust]) -> list[str]:
    """Write which modules are trusted to give what, and why, after an empty line."""
    rows = fold((trust.module, (str(trust),)) for trust in trusts)
    lines = [f"trusted   {path or '(model)'} {told}" for path, (told,) in rows]
    return ["", *lines] if lines else []


def types(evidence: Equality | None) -> list[str]:
    """Write the types of activations where modules begin and end, and what nobody could follow, after an empty line."""
    if evidence is None:
        return []
    paths = ((m, path) for m in evidence.modules for path in (m.path, *evidence.repeats_of(m.path)))
    rows = ((path, (str(module),)) for module, path in paths)
    lines = table((path or "(model)", *cells) for path, cells in fold(rows))
    unfollowed = (f"not followed  {case}" for case in in_words(evidence.unfollowed))
    return ["", types_head(evidence), *lines, *unfollowed]


def types_head(evidence: Equality) -> str:
    """Return in words how the types were found."""
    made = ", from inputs made from the configuration" if evidence.inputs == "made" else ""
    return f"types of activations{made}, by torch {evidence.torch}"


def source_words(spec: ParamSpec) -> str:
    """Return in words where the values of a tensor come from."""
    match spec.source:
        case Made(calls=calls):
            return "; ".join(dict.fromkeys(map(str, calls)))
        case Loaded() as source if source.dtype != spec.dtype:
            return f"{source}, {short_name(source.dtype)} there"
        case _:
            return str(spec.source)


def _silenced(silences: Iterable[Silence]) -> list[str]:
    """Write which findings are meant, and why."""
    lines = [f"silenced  {silence.code} {silence.pattern or '(plan)'}: {silence.reason}" for silence in silences]
    return ["", *lines] if lines else []


def _stages(pipeline: Pipeline) -> Iterator[str]:
    """Write the modules, inputs and outputs of each stage."""
    for number, stage in enumerate(pipeline.stages):
        modules = ", ".join(path for path, _ in fold((path, ()) for path in stage.modules))
        yield f"stage {number}  runs   {modules}"
        yield f"         takes  {', '.join(map(str, stage.inputs))}"
        is_last = number == len(pipeline.stages) - 1
        sent = "" if is_last else f"  ({human_bytes(stage.output_bytes)} a micro-batch)"
        yield f"         gives  {', '.join(map(str, stage.outputs))}{sent}"
    if pipeline.sizes:
        yield f"in the example {', '.join(f'{size.name} is {size.example}{_bounds(size)}' for size in pipeline.sizes)}"
    yield from _conditions(pipeline)


def _conditions(pipeline: Pipeline) -> Iterator[str]:
    yield from (f"only where     {condition}" for condition in pipeline.conditions[:_FEW])
    if len(pipeline.conditions) > _FEW:
        yield f"               and {len(pipeline.conditions) - _FEW} conditions more"


def _bounds(size: VariableSize) -> str:
    least = [f"{size.least} or more"] if size.least else []
    most = [f"at most {size.most}"] if size.most is not None else []
    return f" ({', '.join(least + most)})" if least or most else ""


def _tied(spec: ParamSpec) -> str:
    copies = ", ".join(map(str, spec.also_on))
    return f"tied     {' = '.join(spec.paths)}: stage {spec.stage} owns it, copies on {copies}, gradients summed"


def _notes(spec: ParamSpec) -> tuple[str, ...]:
    notes = [spec.kind.replace("_", " ")] if spec.kind != "parameter" else []
    notes += ["frozen"] if spec.kind == "parameter" and not spec.requires_grad else []
    notes += [f"= {', '.join(spec.tie)}"] if spec.tie else []
    notes += [f"also on stage {', '.join(map(str, spec.also_on))}"] if spec.also_on else []
    notes += [f"{name}={value!r}" for name, value in spec.tags.items()]
    return (", ".join(notes),)
