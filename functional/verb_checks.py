"""What a verb can be asked, and what it cannot: problems instead of specs and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from torch import Tensor, nn

from ..specs.errors import Problem
from ..specs.mesh import MESH_AXES, MeshAxis
from ..specs.param import Origin, ParamSpec, Shard
from ..specs.pattern import closest
from ..specs.plain import is_plain
from ..specs.steps import SyncOp, When
from .layout import first_argument

if TYPE_CHECKING:
    from .skeleton import ModuleSpec


def sharded(spec: ParamSpec, axis: int, mesh_axis: MeshAxis, origin: Origin) -> ParamSpec | Problem:
    """Return a tensor's spec with one more split, or why it cannot have it; saying a split twice changes nothing."""
    rank = len(spec.orig_shape)
    if not _is_integer(axis) or not -rank <= axis < rank:
        fix = f"Its axes are 0 to {rank - 1}" if rank else "It is a scalar"
        return Problem(spec.path, f"it has no axis {axis!r}", fix, spec.type)
    if mesh_axis not in MESH_AXES:
        return Problem(spec.path, f"mesh axis {mesh_axis!r} is unknown", f"There are {', '.join(MESH_AXES)}", spec.type)
    shard = Shard(axis % rank, mesh_axis)
    if shard in spec.shards:
        return spec
    if spec.shards:
        first = spec.shards[0]
        cause = (
            f"it is split twice: along axis {first.axis} over {first.mesh_axis!r} ({spec.origin}),"
            f" and along axis {shard.axis} over {shard.mesh_axis!r} ({origin})"
        )
        tied = f" It is one tensor with {', '.join(spec.tie)}." if spec.tie else ""
        return Problem(spec.path, cause, f"Keep one of them.{tied}", spec.type)
    return spec.shard(shard, origin)


def wrong_sync(pattern: str, when: object, op: object, axis: object, mesh_axis: object) -> Problem | None:  # noqa: PLR0911  one a mistake
    """Return what is wrong with a synchronisation, if anything."""
    if when not in get_args(When):
        return Problem(pattern, f"a sync cannot stand at {when!r}", f"It stands at {', '.join(get_args(When))}")
    if not callable(op) and op not in get_args(SyncOp):
        return Problem(
            pattern, f"sync operator {op!r} is unknown", f"There are {', '.join(get_args(SyncOp))}, or a function"
        )
    if axis is not None and not _is_integer(axis):
        return Problem(
            pattern, f"the axis of an activation is an integer, not {axis!r}", f".sync({when!r}, {op!r}, axis=-1)"
        )
    if op in ("all_gather", "reduce_scatter") and axis is None:
        return Problem(pattern, f"{op} needs the axis of the activation", f'.sync({when!r}, "{op}", axis=-1)')
    if op == "all_reduce" and axis is not None:
        return Problem(pattern, f"all_reduce has no axis, and axis={axis} was given", f'.sync({when!r}, "all_reduce")')
    if mesh_axis not in ("data", "tensor"):
        return Problem(pattern, f"a sync cannot run along mesh axis {mesh_axis!r}", "It runs along data or tensor")
    return None


def wrong_attribute(module: ModuleSpec, found: nn.Module, name: str, value: object, earlier: object) -> Problem | None:
    """Return why an attribute of a module cannot be set to a value, if it cannot."""
    if not hasattr(found, name):
        near = closest(name, (attribute for attribute in vars(found) if not attribute.startswith("_")))
        fix = f"The closest are {', '.join(near)}" if near else ""
        return Problem(module.path, f"it has no attribute {name!r} to set", fix)
    now = getattr(found, name)
    if isinstance(now, (Tensor, nn.Module)) or callable(now):
        return Problem(module.path, f"its {name!r} is no plain attribute", "Tensors are split by .shard")
    if not is_plain(value):
        cause = f"a plan holds plain values, and {name}={value!r} is a {type(value).__name__}"
        fix = "Numbers, strings, booleans, None, and lists and dictionaries of them can be saved"
        return Problem(module.path, cause, fix)
    if value != earlier:
        return Problem(module.path, f"{name} is set twice, to {earlier!r} and to {value!r}", "Keep one of them")
    if isinstance(now, (int, float)) and not isinstance(value, (int, float)):
        return Problem(module.path, f"{name} is {now!r}, and would become {value!r}", "Give it a number")
    return None


def wrong_fill(spec: ParamSpec, value: float) -> Problem | None:
    """Return why a tensor cannot be filled with a number, if its dtype has not that number."""
    is_whole = spec.dtype.startswith(("int", "uint"))
    bits = int(spec.dtype.lstrip("uint")) if is_whole else 0
    low, high = (0, 2**bits) if spec.dtype.startswith("u") else (-(2**bits) // 2, 2**bits // 2)
    if (is_whole and not (value == int(value) and low <= value < high)) or (spec.dtype == "bool" and value not in (0, 1)):
        return Problem(spec.path, f"a {spec.dtype} cannot be {value!r}", "Fill it with a number that it can hold", spec.type)
    return None


def wrong_embedding(module: ModuleSpec, found: nn.Module) -> Problem | None:
    """Return why the rows of an embedding cannot be split, if they cannot."""
    if getattr(found, "max_norm", None) is not None or getattr(found, "scale_grad_by_freq", False):
        cause = "max_norm and scale_grad_by_freq look at all rows, and each rank has some"
        return Problem(module.path, cause, "Leave it whole, or do without them")
    name = first_argument(found)
    if name not in ("input", "input_ids", "ids"):
        cause = f"the forward of {type(found).__name__} takes {name!r} first, and not the ids of rows"
        return Problem(module.path, cause, "Leave it whole")
    return None


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
