"""What a verb can be asked, and what it cannot: problems instead of specs and steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard, get_args

from torch import Tensor, nn

from ...specs.errors import Problem
from ...specs.finding import CODES, LOUD
from ...specs.json_values import is_plain
from ...specs.layout_steps import SyncOp, When
from ...specs.mesh import SPLIT_AXES, STAGE_AXES, MeshAxis, factors, whole_of
from ...specs.module import ModuleSpec
from ...specs.param import Origin, ParamSpec
from ...specs.paths import join
from ...specs.pattern import closest
from ...specs.pipeline import By
from ...specs.shard import Shard, Split
from ..layout.apply import first_argument

_OPTIONS = "Options are blocks=(n, ...), interleaved=n, granule=n, replicate, uneven, allow_empty, pad_to_multiple=n"


def sharded(  # noqa: PLR0911  one a mistake
    spec: ParamSpec, axis: int, mesh_axis: MeshAxis, origin: Origin, split: Split
) -> ParamSpec | Problem:
    """Return a tensor's spec with one more split, or why it cannot have it; saying a split twice changes nothing."""
    rank = len(spec.orig_shape)
    if not _is_integer(axis) or not -rank <= axis < rank:
        fix = f"Its axes are 0 to {rank - 1}" if rank else "It is a scalar"
        return Problem(spec.path, f"it has no axis {axis!r}", fix, spec.type)
    if mesh_axis not in ("pipe", *SPLIT_AXES):
        return Problem(spec.path, f"mesh axis {mesh_axis!r} is unknown", f"There are {', '.join(SPLIT_AXES)}", spec.type)
    if unknown := sorted(set(split) - set(Split.__annotations__)):
        fix = f"There are {', '.join(Split.__annotations__)}"
        return Problem(spec.path, f"a split has no {', '.join(map(repr, unknown))}", fix, spec.type)
    try:
        shard = Shard(axis % rank, mesh_axis, **split)
    except (TypeError, ValueError) as error:
        text = str(error.args[0]) if error.args else str(error)
        return Problem(spec.path, f"it cannot be split so: {text}", _OPTIONS, spec.type)
    if shard in spec.shards:
        return spec
    first = next((s for s in spec.shards if s.axis == shard.axis or s.mesh_axis == mesh_axis), None)
    if first is None:
        first = next((s for s in spec.shards if set(factors(s.mesh_axis)) & set(factors(mesh_axis))), None)
    if first is not None:
        cause = (
            f"it is split twice: along axis {first.axis} over {first.mesh_axis!r} ({spec.origin}),"
            f" and along axis {shard.axis} over {shard.mesh_axis!r} ({origin})"
        )
        tied = f" It is one tensor with {', '.join(spec.tie)}." if spec.tie else ""
        return Problem(spec.path, cause, f"{_keep(first, shard)}.{tied}", spec.type)
    return spec.shard(shard, origin)


def _keep(first: Shard, second: Shard) -> str:
    for part, whole in ((first.mesh_axis, second.mesh_axis), (second.mesh_axis, first.mesh_axis)):
        if part != whole == whole_of(part):
            return f"Keep one of them: {part!r} is a part of {whole!r}"
    return "Keep one of them"


def wrong_sync(  # noqa: C901, PLR0911, PLR0917  one a mistake
    pattern: str, when: object, op: object, axis: object, mesh_axis: object, which: object, features: object
) -> Problem | None:
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
    if op in ("all_reduce", "divide") and axis is not None:
        return Problem(pattern, f"{op} has no axis, and axis={axis} was given", f'.sync({when!r}, "{op}")')
    if op == "divide" and when not in ("forward_pre", "forward_post"):
        return Problem(
            pattern, f"divide is said of an activation, not of a gradient ({when})", '.sync("forward_pre", "divide")'
        )
    if not _is_integer(which) or which < 0:
        return Problem(pattern, f"which is a number from 0, not {which!r}", "which=0 is the first floating-point tensor")
    if features is not None:
        if op != "all_reduce" or when not in ("backward_pre", "backward_post"):
            fix = '.sync("backward_pre", "all_reduce", features=(start, stop))'
            return Problem(pattern, "features is for the sum of a gradient", fix)
        if not _is_pair(features) or not 0 <= features[0] < features[1]:
            cause = f"features are the first entry and the one after the last, not {features!r}"
            return Problem(pattern, cause, "features=(512, 576)")
    if mesh_axis not in STAGE_AXES:
        cause = f"a sync cannot run along mesh axis {mesh_axis!r}"
        return Problem(pattern, cause, f"It runs along {' or '.join(STAGE_AXES)}")
    return None


def wrong_attribute(  # noqa: PLR0911  one a mistake
    module: ModuleSpec, found: nn.Module, name: str, value: object, earlier: object
) -> Problem | None:
    """Return why an attribute of a module cannot be set to a value, if it cannot."""
    holder, _, last = name.rpartition(".")
    keeper = getattr(found, holder, None) if holder else found
    if "." in holder or keeper is None or not hasattr(keeper, last):
        near = closest(last, (attribute for attribute in vars(keeper or found) if not attribute.startswith("_")))
        fix = f"The closest are {', '.join(f'{holder}.{n}' if holder and keeper else n for n in near)}" if near else ""
        return Problem(module.path, f"it has no attribute {name!r} to set", fix)
    if isinstance(keeper, nn.Module) and holder:
        return Problem(module.path, f"its {holder!r} is a module", f"Select it: sch.at[{join(module.path, holder)!r}]")
    now = getattr(keeper, last)
    is_of_torch = isinstance(keeper, nn.Module) and last in vars(nn.Module()) and last != "training"
    if isinstance(now, (Tensor, nn.Module)) or callable(now) or is_of_torch:
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


def wrong_silence(pattern: str, code: object, reason: object) -> Problem | None:
    """Return why findings cannot be silenced, if they cannot."""
    if code not in CODES:
        near = closest(str(code), CODES)
        named = " or ".join(f"{known} ({CODES[known]})" for known in near) or "one of those in docs/findings.md"
        return Problem(pattern, f"no finding has the code {code!r}", f"Write {named}")
    if code in LOUD:
        what = "a silence is dropped" if code == "SP032" else "the plan would not be what it says"
        return Problem(pattern, f"{code} ({CODES[str(code)]}) cannot be silenced: {what}", "Mend it")
    if not isinstance(reason, str) or not reason.strip():
        cause = f"{code} is silenced without a reason"
        return Problem(pattern, cause, f'.silence("{code}", reason="why it is meant")')
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


def _is_pair(value: object) -> TypeGuard[tuple[int, int]]:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_integer, value))  # noqa: PLR2004  two of them


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def wrong_even(num_stages: object, by: object) -> Problem | None:
    """Return what is wrong with a wish for balanced stages, if anything."""
    if isinstance(num_stages, bool) or not isinstance(num_stages, int) or num_stages < 1:
        return Problem("cut_evenly", f"num_stages is a positive integer, not {num_stages!r}", "sch.cut_evenly(4)")
    if by not in get_args(By):
        return Problem("cut_evenly", f"stages cannot be balanced by {by!r}", f"There are {', '.join(get_args(By))}")
    return None


def wrong_handed(stages: object, names: Mapping[int, str]) -> Problem | None:
    """Return what is wrong with stages that were handed over, if anything.

    Args:
        stages: What was given.
        names: The paths of the model's modules, by their identities.
    """
    fix = "sch.with_stages([model.first, model.second])"
    if not isinstance(stages, (list, tuple)) or not stages:
        what = "an empty one" if isinstance(stages, (list, tuple)) else f"a {type(stages).__name__}"
        return Problem("with_stages", f"it takes a list of modules, not {what}", fix)
    for stage in stages:
        if id(stage) not in names:
            what = repr(stage) if isinstance(stage, str) else f"a {type(stage).__name__}"
            get = f"Give the module itself: model.get_submodule({stage!r})" if isinstance(stage, str) else fix
            return Problem("with_stages", f"a stage is a module of the model, and this is none: {what}", get)
    paths = [names[id(stage)] for stage in stages]
    for path in paths:
        around = [other for other in paths if other != path and f"{path}.".startswith(f"{other}." if other else "")]
        if around or paths.count(path) > 1:
            other = f"inside {around[0] or '(model)'!r}" if around else "given twice"
            cause = f"a module belongs to one stage, and {path or '(model)'!r} is {other}"
            return Problem("with_stages", cause, "Give each part of the model once")
    return None
