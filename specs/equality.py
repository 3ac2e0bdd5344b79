"""The evidence that the split model computes what the whole one does: types of activations, and what nobody could follow."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from attrs import Attribute, field, frozen

from .canonical import canonical_fields, canonical_json
from .dtypes import is_known, short_name
from .fold_layers import fold
from .layout_steps import Gives, LayoutStep
from .mesh import Mesh
from .shard import Shard

if TYPE_CHECKING:
    from .param import ParamSpec

TypeKind = Literal["whole", "split", "summand", "own", "unknown"]
"""What ranks along ``tensor`` hold of an activation: the same values, parts along an axis, summands of it, values of their
own that no other rank needs; or nobody knows."""

_MARKS: Mapping[TypeKind, str] = {"whole": "", "split": "", "summand": "{+tensor}", "own": "{own tensor}", "unknown": "{?}"}


def _check_split(record: ActivationType, _: Attribute[TypeKind], kind: TypeKind) -> None:
    if kind == "split" and not any("@" in axis for axis in record.axes):
        msg = f"a split activation names the axis that is split, such as '4096@tensor', not {record.axes}"
        raise ValueError(msg)


@frozen
class ActivationType:
    """What ranks along ``tensor`` hold of an activation or gradient.

    Args:
        dtype: torch's name of its element type.
        axes: Its whole size along each axis, as printed: ``4096``, or ``4096@tensor`` where it is split.
        kind: Whether it is whole, split, a summand, each rank's own, or not known.

    >>> print(ActivationType("float32", ("2", "16", "4096@tensor"), "split"), ActivationType("float32", ("2",), "summand"))
    f32[2, 16, 4096@tensor] f32[2]{+tensor}
    """

    dtype: str
    axes: tuple[str, ...] = field(converter=tuple)
    kind: TypeKind = field(default="whole", validator=_check_split)

    def __str__(self) -> str:
        dtype = short_name(self.dtype) if is_known(self.dtype) else self.dtype
        return f"{dtype}[{', '.join(self.axes)}]{_MARKS[self.kind]}"


@frozen
class ModuleTypes:
    """The types of activations where a module begins and ends.

    Args:
        path: The module.
        inputs: Types of the tensors that it is called with.
        outputs: Types of the tensors that it returns.
        repeats: Paths of the repeated layers that it stands for, if it is such a layer itself.
    """

    path: str
    inputs: tuple[ActivationType, ...] = field(converter=tuple)
    outputs: tuple[ActivationType, ...] = field(converter=tuple)
    repeats: tuple[str, ...] = field(default=(), converter=tuple)

    def __str__(self) -> str:
        return f"{_told(self.inputs)} -> {_told(self.outputs)}"


@frozen
class CallType:
    """The type of what an operator returns.

    Args:
        module: Path of the innermost module that calls it.
        operator: Its name, without its overload.
        line: The line of the model's code, as ``modeling_llama.py:123``.
        result: The type of its result.
    """

    module: str
    operator: str
    line: str
    result: ActivationType


@frozen
class Unfollowed:
    """An operator, or a part of the model, that nobody could follow.

    Args:
        path: The module that calls it; empty for the model.
        operator: Its name; empty if no operator is the cause.
        cause: Why it is not followed.
    """

    path: str
    operator: str
    cause: str

    def __str__(self) -> str:
        if not self.path and not self.operator:
            return self.cause
        return f"{self.path or '(model)'}{f' ({self.operator})' if self.operator else ''}: {self.cause}"


@frozen
class Trust:
    """The user's word for a module that nobody can follow: what it gives is right, if what it takes is.

    Args:
        module: Its path.
        reason: Why it can be trusted.
        gives: What ranks along ``tensor`` hold of each floating-point tensor that it returns: the tensor that the whole
            module returns, parts of it along an axis, or summands of it.
        axis: Axis along which these are parts, negative from the end; None if they are none.

    Raises:
        ValueError: If no reason is given, or an axis without a split, or a split without an axis.
    """

    module: str
    reason: str
    gives: Gives = "whole"
    axis: int | None = None

    def __attrs_post_init__(self) -> None:
        if not self.reason.strip():
            msg = f"{self.module or '(model)'} is trusted without a reason"
            raise ValueError(msg)
        if (self.gives == "split") != (self.axis is not None):
            msg = f"axis is for what is split: gives={self.gives!r} has axis={self.axis}"
            raise ValueError(msg)

    def __str__(self) -> str:
        along = "" if self.axis is None else f" along axis {self.axis}"
        return f"gives {self.gives}{along}: {self.reason}"


@frozen
class Equality:
    """The evidence that the split model computes what the whole one does, forward and backward.

    It stands beside the plan, outside its fingerprint. A plan that is found to compute anything else is refused, so that
    evidence never says so.

    Args:
        modules: Types where modules begin and end; a repeated layer, and all within it, stands for the layers that it names.
        calls: Types of all that is computed within modules.
        unfollowed: What nobody could follow.
        trusted: Modules of which the user's word was taken.
        inputs: Whether the user gave the example inputs, or they were made from the model's configuration.
        torch: Version of torch that followed the model.
        layout: Digest of the layout that was followed: ``layout_digest(...)``.
    """

    modules: tuple[ModuleTypes, ...] = field(default=(), converter=tuple)
    calls: tuple[CallType, ...] = field(default=(), converter=tuple)
    unfollowed: tuple[Unfollowed, ...] = field(default=(), converter=tuple)
    trusted: tuple[Trust, ...] = field(default=(), converter=tuple)
    inputs: Literal["given", "made"] = "given"
    torch: str = ""
    layout: str = ""

    @property
    def answer(self) -> Literal["holds", "not followed"]:
        """Whether all of the model was followed."""
        return "not followed" if self.unfollowed else "holds"

    @cached_property
    def families(self) -> dict[str, tuple[str, ...]]:
        """The repeated layers that were followed, each with the layers that it stands for."""
        return {module.path: module.repeats for module in self.modules if module.repeats}

    def repeats_of(self, path: str) -> Iterator[str]:
        """Map a path in a layer that was followed to the same path in each layer that it stands for."""
        for layer, repeats in self.families.items():
            if f"{path}.".startswith(f"{layer}."):
                yield from (repeat + path.removeprefix(layer) for repeat in repeats)

    def followed(self, path: str) -> str:
        """Map a path in a repeated layer to the same path in the layer that was followed for it; other paths stay."""
        for layer, repeats in self.families.items():
            for repeat in repeats:
                if f"{path}.".startswith(f"{repeat}."):
                    return layer + path.removeprefix(repeat)
        return path


def in_words(unfollowed: Iterable[Unfollowed]) -> list[str]:
    """Return in words what nobody could follow, repeated layers folded.

    >>> in_words([Unfollowed(f"layers.{number}.mlp", "topk", "it has no rule") for number in range(32)])
    ['layers.{0..31}.mlp (topk): it has no rule']
    """
    rows = fold((case.path, (case.operator, case.cause)) for case in unfollowed)
    return [str(Unfollowed(path, operator, cause)) for path, (operator, cause) in rows]


def layout_digest(mesh: Mesh, tree: Mapping[str, ParamSpec], steps: Iterable[object]) -> str:
    """Return a digest of what decides how a split model computes: evidence of one layout is none of another.

    Args:
        mesh: The ranks.
        tree: The tensors with their splits.
        steps: The steps of a plan, or its layout steps alone.

    >>> layout_digest(Mesh(tensor=2), {}, ()) == layout_digest(Mesh(tensor=4), {}, ())
    False
    """
    tensors = tuple((s.path, s.orig_shape, s.dtype, s.requires_grad, s.shards) for s in tree.values())
    layout = _Layout(mesh, tensors, tuple(step for step in steps if isinstance(step, LayoutStep)))
    return hashlib.sha256(canonical_json(canonical_fields(layout)).encode()).hexdigest()


@frozen
class _Layout:
    mesh: Mesh
    tensors: tuple[tuple[str, tuple[int, ...], str, bool, tuple[Shard, ...]], ...]
    steps: tuple[LayoutStep, ...]


def _told(types: tuple[ActivationType, ...]) -> str:
    return ", ".join(map(str, types)) or "nothing"
