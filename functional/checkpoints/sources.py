"""Match a checkpoint with a model: the tensors that it fills, and every mismatch as a problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from ...specs.dtypes import num_bytes, short_name
from ...specs.errors import PlanError, Problem
from ...specs.pattern import closest, compile_pattern
from ...specs.source import Loaded, Unknown
from .assembly import Assembly, miscovered
from .detect import read_contents
from .key_mapping import MappedCheckpoint, family, map_checkpoint, may_be_missing
from .quantised import quantised

if TYPE_CHECKING:
    from torch import nn

    from ...specs.checkpoint import Checkpoint
    from ...specs.param import ParamSpec
    from ...specs.stored import Contents, Folder, StoredTensor
    from ...specs.tree import SpecTree

_PROBE_BYTES = 65536


def checkpoint_sources(
    model: nn.Module, tree: SpecTree, checkpoint: Checkpoint
) -> tuple[SpecTree, Folder | None, list[Problem]]:
    """Return the tree with sources in a checkpoint, the files that are read, and the problems found.

    A tensor that has another source keeps it. A tensor that the checkpoint lacks stays without a source, for init code to
    make, if the user's ``init`` or transformers itself says that it may be missing.
    """
    try:
        contents = read_contents(checkpoint.folder)
        mapped = map_checkpoint(model, tree, contents)
        wrong = [*_wrong_patterns(checkpoint), *quantised(tree, mapped, contents)]
    except PlanError as error:
        return tree, None, list(error.problems)
    if wrong:
        return tree, None, wrong
    return _Match(model, tree, checkpoint, contents, mapped).result()


@frozen
class _Match:
    """A model and the checkpoint that is to fill it."""

    model: nn.Module
    tree: SpecTree
    checkpoint: Checkpoint
    contents: Contents
    mapped: MappedCheckpoint

    def result(self) -> tuple[SpecTree, Folder | None, list[Problem]]:
        """Return the result of ``checkpoint_sources``."""
        ignored = _matching(self.checkpoint.ignore)
        wanted = [
            spec
            for spec in self.tree.values()
            if spec.kind != "non_persistent_buffer" and isinstance(spec.source, Unknown) and spec.num_elements
        ]
        loaded: dict[str, ParamSpec] = {}
        missing: list[ParamSpec] = []
        unfit: list[tuple[ParamSpec, Assembly, str]] = []
        apart: list[tuple[ParamSpec, Assembly, Assembly]] = []
        spare = set(self.mapped.extra)
        names: set[str] = set()
        for spec in wanted:
            stored = [self.mapped.tensors[path] for path in spec.paths if path in self.mapped.tensors]
            if len(stored) > 1:
                spare.update(key for one in stored for key in one.keys)
                stored = [one for one in stored if not all(map(ignored, one.keys))] or stored[:1]
            if not stored:
                missing.append(spec)
                continue
            found, *others = stored
            apart += [(spec, found, one) for one in others if _differ(self.contents.folder.path, found, one)]
            if cause := _misfit(spec, found):
                spare.update(found.keys)
                if all(map(ignored, found.keys)):
                    missing.append(spec)
                else:
                    unfit.append((spec, found, cause))
            else:
                assert miscovered(spec.orig_shape, found.parts) is None, f"{spec.path}: its parts are not the whole of it"
                loaded[spec.path] = evolve(spec, source=Loaded(found.parts))
                names.update(part.stored.file for part in found.parts)
        problems = [
            *self.mapped.problems,
            *self._unfit(unfit),
            *_untied(apart),
            *self._missing([spec for spec in missing if not self.mapped.failed & set(spec.paths)]),
            *self._extra(),
            *self._idle(missing, spare),
        ]
        if wanted and not loaded and not problems:
            cause = f"nothing of {self.checkpoint.folder} is read: of {len(wanted)} tensors without values it has none"
            problems.append(Problem("", cause, "Leave out init_weights=Checkpoint(...)"))
        if not wanted:
            cause = f"nothing of {self.checkpoint.folder} is read: all tensors have values or a source of their own"
            problems.append(Problem("", cause, 'Build the model without values: with torch.device("meta")'))
        files = tuple(file for file in self.contents.folder.files if file.name in names)
        return self.tree.replace(loaded), evolve(self.contents.folder, files=files), problems

    def _missing(self, missing: Sequence[ParamSpec]) -> Iterator[Problem]:
        """Iterate over problems with tensors that the checkpoint lacks and may not lack."""
        asked, allowed = _matching(self.checkpoint.init), may_be_missing(self.model)
        spare = dict.fromkeys(family(key) for key in self.mapped.extra)
        near: dict[str, list[str]] = {}
        for spec in missing:
            if any(asked(path) or allowed(path) for path in spec.paths):
                continue
            of = family(spec.path)
            if of not in near:
                near[of] = closest(of, spare)
            other = f"; of the keys that serve no tensor the closest is {near[of][0]}" if near[of] else ""
            fix = f"To let init code make it: Checkpoint(..., init=({spec.path!r},))"
            yield Problem(spec.path, f"the checkpoint has no tensor for it{other}", fix, spec.type)

    def _unfit(self, unfit: Sequence[tuple[ParamSpec, Assembly, str]]) -> Iterator[Problem]:
        """Iterate over problems with stored tensors of another type; the files of a family of tensors are named once."""
        files: dict[tuple[str, str], dict[str, None]] = {}
        for spec, found, cause in unfit:
            names = files.setdefault((family(spec.path), cause), {})
            names.update(dict.fromkeys(part.stored.file for part in found.parts))
        for spec, found, cause in unfit:
            first, *others = files[family(spec.path), cause]
            more = f" and {len(others)} other files" if len(others) > 1 else f" and {others[0]}" if others else ""
            keys = found.keys if len(found.keys) == 1 else dict.fromkeys(map(family, found.keys))
            ignore = ", ".join(map(repr, keys))
            anew = f"Checkpoint(..., ignore=({ignore},), init=({spec.path!r},))"
            fix = f"Build the model of this checkpoint; or to let init code make it: {anew}"
            yield Problem(spec.path, f"in {first}{more} {cause}", fix, spec.type)

    def _extra(self) -> Iterator[Problem]:
        """Iterate over problems with keys that no tensor uses."""
        ignored = _matching(self.checkpoint.ignore)
        for key, cause in self.mapped.extra.items():
            if not ignored(key):
                yield Problem(
                    key, f"the checkpoint has it, and {cause}", f"To leave it out: Checkpoint(..., ignore=({key!r},))"
                )

    def _idle(self, missing: Iterable[ParamSpec], spare: Iterable[str]) -> Iterator[Problem]:
        """Iterate over problems with the user's patterns that match nothing."""
        lacking = [path for spec in missing for path in spec.paths]
        spare = list(spare)
        for kind, patterns, names, known in (
            ("no tensor that the checkpoint lacks", self.checkpoint.init, lacking, list(self.tree.all_paths)),
            ("no key that serves no tensor", self.checkpoint.ignore, spare, list(self.contents.tensors)),
        ):
            for pattern in patterns:
                if not any(map(compile_pattern(pattern).fullmatch, names)):
                    near = closest(pattern, dict.fromkeys(map(family, names))) or closest(
                        pattern, dict.fromkeys(map(family, known))
                    )
                    fix = f"The closest are {', '.join(near)}" if near else "Leave it out"
                    yield Problem(pattern, f"it matches {kind}", fix)


def _untied(apart: Iterable[tuple[ParamSpec, Assembly, Assembly]]) -> Iterator[Problem]:
    """Iterate over problems with tied tensors that the checkpoint has twice, with different values."""
    for spec, one, other in apart:
        cause = f"in the model it is one tensor, and the checkpoint has {one.keys[0]} and {other.keys[0]}, which differ"
        fix = (
            f"Untie them (config.tie_word_embeddings=False); or leave one out: Checkpoint(..., ignore=({other.keys[0]!r},))"
        )
        yield Problem(spec.path, cause, fix, spec.type)


def _differ(folder: str, first: Assembly, second: Assembly) -> bool:
    """Tell whether two stored tensors visibly differ: in shape, dtype, or bytes at their beginning, middle or end.

    Weights that were trained apart differ nearly everywhere, so that a few probes suffice. Tensors assembled from several
    parts are compared by shape and dtype only.
    """
    if first.shape != second.shape or len({part.stored.dtype for part in (*first.parts, *second.parts)}) > 1:
        return True
    match (*first.parts, *second.parts):
        case (one, other) if one.box == other.box:
            return _probes(folder, one.stored) != _probes(folder, other.stored)
        case _:
            return False


def _probes(folder: str, stored: StoredTensor) -> list[bytes]:
    """Read bytes at the beginning, the middle and the end of a stored tensor."""
    size = prod(stored.shape) * stored.item_bytes
    found: list[bytes] = []
    with (Path(folder) / stored.file).open("rb") as file:
        for start in (0, size // 2, max(0, size - _PROBE_BYTES)):
            file.seek(stored.offset + start)
            found.append(file.read(min(_PROBE_BYTES, size - start)))
    return found


def _misfit(spec: ParamSpec, found: Assembly) -> str:
    """Return why a stored tensor cannot fill a model's tensor; "" if it can."""
    dtypes = list(dict.fromkeys(part.stored.dtype for part in found.parts))
    if found.shape != spec.orig_shape:
        of = "it is" if len(found.keys) == 1 else f"its {len(found.keys)} tensors make"
        return f"{of} {short_name(dtypes[0])}{list(found.shape)}, and in the model {list(spec.orig_shape)}"
    if len(dtypes) > 1:
        return f"it is made of tensors of {' and '.join(dtypes)}, which one step cannot convert"
    if not _converts(dtypes[0], spec.dtype):
        return f"it is {dtypes[0]}, which is not converted to {spec.dtype}"
    return ""


def _converts(stored: str, wanted: str) -> bool:
    """Tell whether a stored dtype is converted to the wanted dtype: any float to any float, integers if all of them fit.

    >>> _converts("float32", "bfloat16"), _converts("int32", "int64"), _converts("uint8", "int8"), _converts("bool", "uint8")
    (True, True, False, False)
    """
    if stored == wanted or any(kind in stored and kind in wanted for kind in ("float", "complex")):
        return True
    integers = "int" in stored and "int" in wanted
    return integers and num_bytes(stored) < num_bytes(wanted) and not wanted.startswith("u")


def _wrong_patterns(checkpoint: Checkpoint) -> Iterator[Problem]:
    for pattern in (*checkpoint.init, *checkpoint.ignore):
        try:
            compile_pattern(pattern)
        except ValueError as error:
            yield Problem(pattern, str(error), "Close it, or write ? for a bracket that belongs to a name")


def _matching(patterns: Iterable[str]) -> Callable[[str], bool]:
    matches = [compile_pattern(pattern).fullmatch for pattern in patterns]
    return lambda name: any(match(name) for match in matches)
