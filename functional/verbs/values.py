"""Values given to tensors and attributes, and remarks: the verbs ``init``, ``set``, ``tag``, ``silence`` and ``trust``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from attrs import evolve
from torch import Tensor, nn

from ...specs.declaration import D
from ...specs.equality import Trust
from ...specs.errors import Problem
from ...specs.finding import CODES, LOUD, Silence
from ...specs.json_values import is_plain
from ...specs.layout_steps import Gives, SetAttributes
from ...specs.module import ModuleSpec
from ...specs.param import Origin, ParamSpec
from ...specs.paths import join, module_of, name_of
from ...specs.pattern import closest
from ...specs.program import Fill, InitProgram, Operation
from ...specs.source import Made, TensorCall
from ..model.callables import register
from .selection import caller, is_known_wrong, module_at, or_unmatched, selected_modules, tensors_below, wrong
from .syncs import with_layout, wrong_gives


def init(sch: D, value: float | Callable[..., object]) -> D:
    """Fill the selected tensors with a number, or let a function write them."""
    if isinstance(value, float) and not is_plain(value):
        return wrong(sch, Problem(sch.selected, f"a plan holds finite numbers, not {value}", "Fill by a function"))
    if isinstance(value, (bool, int, float)):
        misfits = [_wrong_fill(spec, value) for spec in tensors_below(sch)]
        sch = wrong(sch, *(problem for problem in misfits if problem))
        program = InitProgram([Operation(Fill(value))], replaces=True)
        return _edited(sch, "init", tensors_below(sch), lambda spec: evolve(spec, source=program))
    if not callable(value):
        fix = "nn.init.ones_, or a function of your own with def"
        return wrong(sch, Problem(sch.selected, f".init takes a number or a function, not {value!r}", fix))
    name, callables = register(sch.runtime.callables, value)
    sch = evolve(sch, runtime=evolve(sch.runtime, callables=callables))
    return _edited(sch, "init", tensors_below(sch), lambda spec: evolve(spec, source=Made((TensorCall(spec.path, name),))))


def _wrong_fill(spec: ParamSpec, value: float) -> Problem | None:
    """Return a problem if the dtype of a tensor cannot hold a number."""
    is_whole = spec.dtype.startswith(("int", "uint"))
    bits = int(spec.dtype.lstrip("uint")) if is_whole else 0
    low, high = (0, 2**bits) if spec.dtype.startswith("u") else (-(2**bits) // 2, 2**bits // 2)
    if (is_whole and not (value == int(value) and low <= value < high)) or (spec.dtype == "bool" and value not in (0, 1)):
        return Problem(spec.path, f"a {spec.dtype} cannot be {value!r}", "Fill it with a number that it can hold", spec.type)
    return None


def set_attributes(sch: D, attributes: Mapping[str, object]) -> D:
    """Set attributes of the selected modules to their local values."""
    sch = or_unmatched(sch, modules=True)
    modules = selected_modules(sch)
    earlier = {(s.module, name): v for s in sch.layout if isinstance(s, SetAttributes) for name, v in s.values.items()}
    checks = [
        _wrong_attribute(module, module_at(sch, module), name, value, earlier.get((module.path, name), value))
        for module in modules
        for name, value in attributes.items()
    ]
    problems = [problem for problem in checks if problem]
    if not attributes:
        problems = [Problem(sch.selected, ".set() names no attribute", ".set(num_heads=8)")]
    if problems:
        return wrong(sch, *problems)
    return with_layout(sch, (SetAttributes(module.path, attributes) for module in modules))


def _wrong_attribute(  # noqa: PLR0911  a return for each mistake
    module: ModuleSpec, found: nn.Module, name: str, value: object, earlier: object
) -> Problem | None:
    """Return why an attribute of a module cannot be set to a value, if it cannot."""
    holder, last = module_of(name), name_of(name)
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


def tag(sch: D, tags: Mapping[str, object]) -> D:
    """Note plain values on the selected tensors."""
    if not is_plain(tags):
        cause = f"a plan holds plain values, and {tags!r} has others"
        return wrong(sch, Problem(sch.selected, cause, "Note numbers, strings, booleans, or lists of them"))
    return _edited(sch, "tag", tensors_below(sch), lambda spec: evolve(spec, tags={**spec.tags, **tags}))


def _edited(sch: D, verb: str, specs: Iterable[ParamSpec], change: Callable[[ParamSpec], ParamSpec]) -> D:
    """Change some tensors; none at all is a problem."""
    origin = Origin(verb, sch.selected, caller())
    changed = {s.path: change(s if s.origin else evolve(s, origin=origin)) for s in specs}
    matched = or_unmatched(sch)
    if not changed and matched is sch and not is_known_wrong(sch):
        matched = wrong(sch, Problem(sch.selected, f"no tensor is there for .{verb}()", "Select a module that holds some"))
    return evolve(matched, tree=sch.tree.replace(changed))


def silence(sch: D, code: str, reason: str) -> D:
    """Note that findings with a code are known and meant."""
    if problem := _wrong_silence(sch.selected, code, reason):
        return wrong(sch, problem)
    silences = dict.fromkeys((*sch.silences, Silence(code, sch.selected, reason)))
    return evolve(or_unmatched(sch), silences=tuple(silences))


def _wrong_silence(pattern: str, code: object, reason: object) -> Problem | None:
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


def trust(sch: D, reason: str, gives: Gives, axis: int | None) -> D:
    """Note that the selected modules give what they should, where nobody can follow their code."""
    sch = or_unmatched(sch, modules=True)
    if problem := _wrong_trust(sch.selected, reason, gives, axis):
        return wrong(sch, problem)
    before = {trust.module: trust for trust in sch.trusts}
    for module in selected_modules(sch):
        trusted = Trust(module.path, reason, gives, axis)
        earlier = before.setdefault(module.path, trusted)
        if earlier != trusted:
            cause = f"it is trusted twice: {earlier}, and {trusted}"
            sch = wrong(sch, Problem(module.path, cause, "Keep one of them"))
    return evolve(sch, trusts=tuple(before.values()))


def _wrong_trust(pattern: str, reason: object, gives: object, axis: object) -> Problem | None:
    """Return why modules cannot be trusted, if they cannot."""
    if not isinstance(reason, str) or not reason.strip():
        return Problem(pattern, "it is trusted without a reason", '.trust("why its outputs are right")')
    if axis is not None and gives != "split":
        return Problem(pattern, f"axis={axis!r} is for what is split, and gives={gives!r}", "gives='split', axis=-1")
    return wrong_gives(pattern, gives, axis)
