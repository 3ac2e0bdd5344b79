"""What a run leaves behind: what the model returns, and the tensors of the model that it has changed."""

from __future__ import annotations

from collections.abc import Iterator

from ...specs.mesh import Mesh
from ...specs.tree import SpecTree
from .alignment import Alignment
from .entering import tensor_of
from .held import Held, same, whole_of
from .tape import references
from .typed_run import Fault


def wrong_ends(alignment: Alignment, tree: SpecTree, mesh: Mesh) -> Iterator[Fault]:
    """Iterate over what ranks return, or keep, otherwise than the whole model.

    Args:
        alignment: The runs, followed to their ends; each value that is left behind has a type.
        tree: The model's tensors.
        mesh: The mesh, with ranks along ``tensor`` alone.
    """
    local, model = alignment.local, alignment.model
    if len(local.outputs) != len(model.outputs):
        cause = f"it returns {len(local.outputs)} tensors, and {len(model.outputs)} in the whole model"
        yield Fault(-1, "", cause)
    else:
        for at, (mine, theirs) in enumerate(zip(local.outputs, model.outputs, strict=True)):
            which = f"output {at}" if len(local.outputs) > 1 else "its output"
            yield from _wrong_output(alignment, which, mine, theirs)
    if local.numbers != model.numbers:
        cause = f"it returns the numbers {local.numbers} on a rank, and {model.numbers} in the whole model"
        yield Fault(-1, "", cause)
    for path in sorted({*local.changed, *model.changed}):
        yield from _wrongly_changed(alignment, path, tree, mesh)


def _wrong_output(alignment: Alignment, which: str, mine: int, theirs: int) -> Iterator[Fault]:
    held, path = alignment.types.held[mine], _maker(alignment, mine)
    if held.kind == "unknown":
        yield from _of_unknown(held, path, f"the model returns it as {which}")
    elif not held.is_plain:
        text = held.activation_type(alignment.local.values[mine].dtype)
        cause = f"the model returns {text} as {which}, and each rank is to return it whole"
        if held.is_due:
            path, cause = held.origin or path, f"the model returns as {which} what is not complete: {held.due}"
        yield Fault(-1, path, cause, mine, "whole" if held.kind in {"parts", "summand"} else "")
    elif not _is_counterpart(alignment, mine, theirs):
        yield Fault(-1, path, f"{which} is another value than in the whole model", kind="unfollowed")


def _wrongly_changed(alignment: Alignment, path: str, tree: SpecTree, mesh: Mesh) -> Iterator[Fault]:
    mine, theirs = alignment.local.changed.get(path), alignment.model.changed.get(path)
    if mine is None or theirs is None:
        yield Fault(-1, path, "ranks change it, or the whole model does, and not both", kind="unfollowed")
        return
    held, shape = alignment.types.held[mine], alignment.model.values[theirs].shape
    wanted = tensor_of(tree[path], mesh) if path in tree else whole_of(shape)
    if held.kind == "unknown":
        yield from _of_unknown(held, path, "the model changes it")
    elif not same(held, wanted):
        dtype = alignment.local.values[mine].dtype
        texts = [str(each.activation_type(dtype)) for each in (held, wanted)]
        cause = f"ranks hold it as {texts[1]}, and the model leaves {texts[0]} in it"
        yield Fault(-1, path, f"{cause}: {held.due}" if held.is_due else cause, mine, "whole" if wanted.is_plain else "")
    elif not _is_counterpart(alignment, mine, theirs):
        yield Fault(-1, path, "it is left with another value than in the whole model", kind="unfollowed")


def _of_unknown(held: Held, path: str, use: str) -> Iterator[Fault]:
    if held.origin:
        yield Fault(-1, path, f"{use}: {held.origin}", kind="forward" if held.is_wrong else "unfollowed")


def _is_counterpart(alignment: Alignment, mine: int, theirs: int) -> bool:
    return alignment.theirs(alignment.types.counterparts[mine]) == alignment.theirs(theirs)


def _maker(alignment: Alignment, value: int) -> str:
    """Return the module that makes a value; for code between modules, the one that makes what it is split like."""
    types, calls, producer = alignment.types, alignment.local.calls, alignment.types.producers.get(value)
    while producer is not None and not calls[producer].module:
        split = next((ref.value for ref in references(calls[producer]) if types.is_split(ref.value)), None)
        producer = None if split is None else types.producers.get(split)
    return "" if producer is None else calls[producer].module
