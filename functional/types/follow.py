"""Follow what ranks hold of every value, through a rank's run beside the whole model's run: the types of activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attrs import Factory, define, evolve, field

from ...specs.equality import Trust
from ...specs.layout_steps import LayoutStep, VocabParallel
from ...specs.mesh import Mesh
from ...specs.tree import SpecTree
from ..layout.local_model import LocalModel
from .alignment import Alignment, Pair
from .axes import parts_in, whole
from .ends import wrong_ends
from .entering import tensor_of
from .grouped import GROUPS, relate_groups
from .held import UNKNOWN, Held, lost, same, whole_of
from .macros import GIVEN, TRUSTED
from .memory import written
from .numbers import fill_of, kept_fill, other_number, ratio_of
from .paired_call import Call, Misuse
from .relate import relate
from .relation import Filled, Rule
from .rules import rule_of
from .steps import after_step, are_rows, given
from .tape import BackwardCode, RecordedCall, Tape, operator_call, references
from .typed_run import Fault, Types


def follow(local: Tape, model: Tape, subject: LocalModel, trusts: Iterable[Trust] = (), rank: int = 0) -> Types:
    """Return what ranks along ``tensor`` hold of each value of a rank's run, and where it is not what the whole model has.

    Args:
        local: The rank's run.
        model: The whole model's run.
        subject: The split model, on a mesh with ranks along ``tensor`` alone; calls of the rank's run name its layout steps
            by place.
        trusts: Modules of which the user's word is taken.
        rank: The rank.
    """
    trusted = {trust.module: trust for trust in trusts}
    return _Follower(local, model, subject.tree, subject.layout, subject.mesh, rank, trusted).run()


def follow_backward(
    code: BackwardCode,
    other: BackwardCode,
    local: Tape,
    model: Tape,
    subject: LocalModel,
    types: Types,
    *,
    taken: Sequence[Held],
    rank: int,
) -> Types:
    """Return what ranks hold of each value, with those of code of the user's own that runs in the backward pass.

    Args:
        code: The code, in the rank's run.
        other: The same code, in the whole model's run.
        local: The rank's run.
        model: The whole model's run.
        subject: As for :func:`follow`.
        types: What ranks hold of the values of the forward pass; it stays as it is.
        taken: What ranks hold of the gradients that the code takes.
        rank: The rank.
    """
    mine = evolve(local, calls=code.calls, inputs={}, outputs=[value for value in code.gives if value is not None])
    theirs = evolve(model, calls=other.calls, inputs={}, outputs=[value for value in other.gives if value is not None])
    known = Types(dict(types.held), dict(types.counterparts), {}, dict(types.copies))
    follower = _Follower(mine, theirs, subject.tree, subject.layout, subject.mesh, rank, {}, known)
    return follower.run_backward({value: (held, at) for value, held, at in zip(code.takes, taken, other.takes, strict=True)})


@define(eq=False)
class _Follower:
    local: Tape
    model: Tape
    tree: SpecTree
    layout: Sequence[LayoutStep]
    mesh: Mesh
    rank: int
    trusts: Mapping[str, Trust]
    types: Types = Factory(Types)
    alignment: Alignment = field(init=False)
    embeddings: dict[str, VocabParallel] = field(init=False)
    """The steps of embeddings that look up their own rows, by module."""
    places: dict[str, int] = field(init=False)
    """The value of the whole model's run that each tensor of the model is, by path."""

    def __attrs_post_init__(self) -> None:
        self.alignment = Alignment(self.local, self.model, self.layout, self.types)
        self.embeddings = {step.module: step for step in self.layout if isinstance(step, VocabParallel)}
        self.places = {value.path: at for at, value in enumerate(self.model.values) if value.path}

    def run(self) -> Types:
        for name, value in self.local.inputs.items():
            self._enter(value, self.model.inputs.get(name, -1))
        self.walk()
        ends = zip(self.local.outputs, self.model.outputs, strict=False)
        changed = ((mine, self.model.changed.get(path, -1)) for path, mine in self.local.changed.items())
        for mine, theirs in (*ends, *changed):
            if mine not in self.types.held:
                self._enter(mine, theirs)
        if self.local.outputs:
            self.types.faults += wrong_ends(self.alignment, self.tree, self.mesh)
        self._without_dead_code()
        return self.types

    def run_backward(self, taken: Mapping[int, tuple[Held, int]]) -> Types:
        for value, (held, counterpart) in taken.items():
            self.types.held[value], self.types.counterparts[value] = held, counterpart
        self.walk()
        self._without_dead_code()
        return self.types

    def walk(self) -> None:
        """Follow the calls."""
        for pair in self.alignment.pairs():
            if pair.number >= 0:
                self.types.producers |= dict.fromkeys(pair.call.results, pair.number)
            if pair.cause:
                self._fault(pair, pair.cause, kind="forward" if pair.is_wrong else "unfollowed")
            match pair.kind:
                case "step":
                    self._step(pair)
                case "copy":
                    self._copy(pair.call)
                case "both":
                    self._both(pair)
                case "written":
                    self._written(pair)
                case _:
                    self._is(pair, UNKNOWN)

    def _without_dead_code(self) -> None:
        """Leave out what was found of calls whose results nothing depends on."""
        if not self.local.outputs:  # it stopped
            return
        live = {*self.local.outputs, *self.local.changed.values()}
        kept = {value.storage for value in self.local.values if value.path}
        for call in reversed(self.local.calls):
            is_kept = any(self.local.values[result].storage in kept for result in call.results)
            if is_kept or call.step is not None or not live.isdisjoint(call.results):
                live |= {ref.value for ref in references(call)} | set(call.results)
        calls = self.local.calls
        found = [f for f in self.types.faults if f.call < 0 or not live.isdisjoint(calls[f.call].results)]
        first = {fault.value: fault for fault in reversed(found) if fault.kind == "unfollowed" and fault.value is not None}
        self.types.faults[:] = [f for f in found if f.kind != "unfollowed" or f.value is None or first[f.value] is f]
        if not found:
            lost = (n for n, call in enumerate(calls) for r in call.results if r in live and self._is_unknown(r))
            self.types.faults += [Fault(n, calls[n].module, "its type is not known", kind="unfollowed") for n in lost][:1]

    def _is_unknown(self, value: int) -> bool:
        return self.types.held.get(value, UNKNOWN).kind == "unknown"

    def _is(self, pair: Pair, *held: Held) -> None:
        """Note what ranks hold of the results of a call: one type for all, or one for each."""
        results = pair.call.results
        for result, each in zip(results, held * len(results) if len(held) == 1 else held, strict=True):
            self.types.held[result] = each
            self.types.counterparts.setdefault(result, -1)

    def _fault(self, pair: Pair, cause: str, path: str | None = None, **known: Any) -> None:
        told = f" ({pair.call.line})" if pair.call.line else ""
        where = pair.call.module if path is None else path
        self.types.faults.append(Fault(pair.number, where, f"{cause}{told}", **known))

    def _enter(self, value: int, counterpart: int) -> None:
        """Note a value that no call has made: a tensor of the model, an input, a constant."""
        mine, theirs = self.local.values[value], self.model.values[counterpart] if counterpart >= 0 else None
        if mine.path:
            counterpart = self.places.get(mine.path, counterpart)
            held = tensor_of(self.tree[mine.path], self.mesh)
        elif theirs is not None and mine.shape == theirs.shape:
            held = whole_of(mine.shape)
        else:
            held = lost("nobody knows where it comes from")
        self.types.held[value] = held
        self.types.counterparts[value] = counterpart

    def _copy(self, call: RecordedCall) -> None:
        operand = references(call)[0].value
        if operand not in self.types.held:
            self._enter(operand, -1)
        for result in call.results:
            self.types.held[result] = self.types.held[operand]
            self.types.counterparts[result] = self.types.counterparts[operand]

    def _operands(self, pair: Pair) -> tuple[Held, ...]:
        """Return what ranks hold of the operands; note those that nobody could follow, once they are used."""
        found = [self.types.held.get(ref.value, UNKNOWN) for ref in references(pair.call)]
        for ref, held in zip(references(pair.call), found, strict=True):
            if held.kind == "unknown" and held.origin:
                cause = f"{pair.call.name} takes {self._text(ref.value)}: {held.origin}"
                self._fault(pair, cause, value=ref.value, kind="forward" if held.is_wrong else "unfollowed")
        return tuple(found)

    def _step(self, pair: Pair) -> None:
        """Follow a call of a layout step's own code."""
        call = pair.call
        assert call.step is not None, "the pair says so"
        refs = references(call)
        for ref in refs:
            if ref.value not in self.types.held:
                self._enter(ref.value, -1)
        found = after_step(call, self.layout[call.step], self._operands(pair), self.mesh.tensor)
        own = [ref.value for ref in refs if self.types.held[ref.value].kind != "rows"] or [ref.value for ref in refs]
        counterpart = self.types.counterparts.get(own[0], -1) if own else -1
        self.types.counterparts |= dict.fromkeys(call.results, counterpart)
        if isinstance(found, Misuse):
            self._misuse(pair, found, found.cause)
        else:
            shape = self.local.values[call.results[0]].shape
            if call.name == GIVEN and found.kind != "unknown" and found.local_shape(self.rank) != shape:
                told = f"{self.layout[call.step]} is said to give {found.activation_type('')}"
                self._fault(pair, f"{told}, and would give {list(shape)} on a rank: say the axis that it joins or cuts")
                found = UNKNOWN
            self._is(pair, found)

    def _misuse(self, pair: Pair, misuse: Misuse, cause: str) -> None:
        refs = references(pair.call)
        value, kind = refs[misuse.operand].value if refs else None, "unfollowed" if misuse.is_open else "forward"
        self._fault(pair, cause, misuse.path, value=value, needs=misuse.needs, kind=kind)
        self._is(pair, UNKNOWN)

    def _both(self, pair: Pair) -> None:
        """Follow a call that the whole model runs too."""
        assert pair.other is not None, "the pair says so"
        call, other = pair.call, pair.other
        self.types.counterparts |= dict(zip(call.results, other.results, strict=False))
        if not self._takes_the_same(call, other):
            self._fault(pair, f"{call.name} takes other tensors than in the whole model", kind="unfollowed")
            self._is(pair, UNKNOWN)
            return
        if call.name == TRUSTED:
            self._trusted(pair)
            return
        operands = self._operands(pair)
        is_own_size = call.name in _PICKING and all(held.is_plain for held in operands)
        if (call.is_guessed or other.is_guessed) and not is_own_size:
            cause = f"{call.name} depends on the values of tensors, which are not known while planning"
            self._fault(pair, cause, kind="unfollowed")
        if any(held.kind == "unknown" for held in operands):
            self._is(pair, UNKNOWN)
        elif any(held.kind == "rows" for held in operands):
            self._rows(pair, operands)
        elif call.name == "written":
            self._written(pair)
        else:
            self._typed(pair, call, other, operands)

    def _written(self, pair: Pair) -> None:
        """Follow a view of memory that was changed through another view of it."""
        old, changed = references(pair.call)
        self.types.counterparts.setdefault(pair.call.results[0], self.types.counterparts.get(changed.value, -1))
        if self._is_kept(pair):
            self._is(pair, self.types.held[old.value])
        else:
            self._is(pair, written(self.types.held[old.value], self.types.held[changed.value], self.rank))

    def _is_kept(self, pair: Pair) -> bool:
        """Tell whether what was written into a view is shared out as the view was."""
        changed = references(pair.call)[1].value
        before = references(self.local.calls[self.types.producers[changed]])[0].value
        held, old = self.types.held.get(before, UNKNOWN), self.types.held[references(pair.call)[0].value]
        return held.kind == "parts" and old.kind == "parts" and same(held, self.types.held[changed])

    def _trusted(self, pair: Pair) -> None:
        """Take the user's word for what a module gives."""
        call, other = pair.call, pair.other
        assert other is not None, "the caller has both"
        trust = self.trusts[call.module]
        for mine, theirs in zip(call.results, other.results, strict=True):
            value, shape = self.local.values[mine], self.model.values[theirs].shape
            is_number = value.dtype.startswith(("int", "bool", "uint"))
            held = whole_of(shape) if is_number else given(trust.gives, trust.axis, shape, self.mesh.tensor)
            if held.kind != "unknown" and held.local_shape(self.rank) != value.shape:
                cause = f"it is trusted to give {held.activation_type(value.dtype)}, and gives {list(value.shape)} on a rank"
                self._fault(pair, cause)
                held = UNKNOWN
            self.types.held[mine] = held

    def _takes_the_same(self, call: RecordedCall, other: RecordedCall) -> bool:
        """Tell whether a call's operands stand for those of the whole model's call; note operands that are seen first."""
        mine, theirs = references(call), references(other)
        if len(mine) != len(theirs) or len(call.results) != len(other.results):
            return False
        for ref, their in zip(mine, theirs, strict=True):
            counterpart = self.alignment.theirs(their.value)
            if ref.value not in self.types.held:
                self._enter(ref.value, counterpart)
            known = self.alignment.theirs(self.types.counterparts[ref.value])
            if self.types.held[ref.value].kind != "unknown" and known != counterpart:
                return False
        return True

    def _typed(self, pair: Pair, call: RecordedCall, other: RecordedCall, operands: tuple[Held, ...]) -> None:
        rule = rule_of(operator_call(self.model, other))
        numbers = other_number(call, other, rule, own_rows=self._own_rows(call) is not None)
        ratio = ratio_of(call, numbers)
        shapes, local_shapes = _shapes(self.model, other), _shapes(self.local, call)
        is_plain = all(held.is_plain for held in operands)
        if numbers and ratio is None:
            cause = f"{call.name} computes with {numbers[0]} where the whole model computes with {numbers[1]}"
            self._fault(pair, cause)
            self._is(pair, UNKNOWN)
        elif is_plain and shapes == local_shapes and not pair.lacks and ratio is None:
            fill = fill_of(call) if isinstance(rule, Filled) else kept_fill(call, operands)
            self._is(pair, *self._drawn(pair, tuple(evolve(whole_of(shape), fill=fill) for shape in shapes)))
        else:
            found = self._related(pair, rule, operands, shapes, local_shapes)
            if isinstance(found, Misuse):
                told = ", ".join(self._text(ref.value) for ref in references(call))
                self._misuse(pair, found, f"{call.name} of {told}: {found.cause}")
            elif found and (cause := self._not_additive(call, operands, found)):
                self._misuse(pair, Misuse(cause, needs="whole"), cause)
            elif found:
                fill = fill_of(call) if isinstance(rule, Filled) else kept_fill(call, operands)
                made = (self._completed(pair, evolve(h, fill=fill), ratio) for h in self._drawn(pair, found))
                self._is(pair, *made)

    def _not_additive(self, call: RecordedCall, operands: Sequence[Held], found: Sequence[Held]) -> str:
        """Say that numbers of summands are rounded to integers, which do not add up, if they are."""
        of_reals = any(
            held.kind == "summand" and self.local.values[ref.value].is_real
            for ref, held in zip(references(call), operands, strict=True)
        )
        to_integers = (
            held.kind == "summand" and not self.local.values[result].is_real
            for result, held in zip(call.results, found, strict=True)
        )
        is_rounded = of_reals and any(to_integers)
        return f"{call.name} makes integers of what is still to be summed over ranks" if is_rounded else ""

    def _related(
        self, pair: Pair, rule: Rule | None, operands: tuple[Held, ...], shapes: Any, local_shapes: Any
    ) -> tuple[Held, ...] | Misuse:
        call, other = pair.call, pair.other
        assert other is not None, "the caller has both"
        groups = other.arguments.get(GROUPS.get(call.name, ""), 1)
        if rule is None and groups == 1:
            told = ", ".join(self._text(ref.value) for ref in references(call)) or f"{list(local_shapes[0])}"
            self._fault(pair, f"no rule is known for {call.name} of {told}", kind="unfollowed")
            self._is(pair, UNKNOWN)
            return ()
        local_rule = rule_of(operator_call(self.local, call))
        rule = rule or Filled()
        both = Call(call.name, rule, local_rule or rule, operands, shapes, local_shapes, self.mesh.tensor, self.rank)
        return relate_groups(both, groups, call.arguments[GROUPS[call.name]]) if groups != 1 else relate(both)

    def _completed(self, pair: Pair, held: Held, ratio: Any) -> Held:
        """Return what ranks hold of a result, with what is still due."""
        if ratio is not None:
            held = evolve(held, scale=held.scale * ratio, origin=pair.call.module)
        return evolve(held, lacks=pair.lacks, origin=pair.call.module) if pair.lacks else held

    def _drawn(self, pair: Pair, found: tuple[Held, ...]) -> tuple[Held, ...]:
        """Return what ranks hold of random numbers: each its own where they work on parts, else the same."""
        call = pair.call
        if not (call.is_random or call.arguments.get("dropout_p")):
            return found
        is_split = any(held.kind == "parts" or (held.kind == "whole" and not held.is_plain) for held in found)
        if is_split == call.is_forked:
            return tuple(evolve(held, is_drawn=is_split and held.kind == "whole", fill=None) for held in found)
        told = "the same random numbers on all ranks, and each has other entries"
        told = f"{call.name} draws {told if is_split else 'other random numbers on each rank, for what all have'}"
        self._fault(pair, told)
        return tuple(UNKNOWN for _ in found)

    def _text(self, value: int) -> str:
        held, local = self.types.held.get(value, UNKNOWN), self.local.values[value]
        return str(held.activation_type(local.dtype)) if held.kind not in {"unknown", "rows"} else f"{list(local.shape)}"

    def _own_rows(self, call: RecordedCall) -> VocabParallel | None:
        return self.embeddings.get(call.module)

    def _rows(self, pair: Pair, operands: tuple[Held, ...]) -> None:
        """Follow an embedding that looks up the rows that each rank has."""
        step, call, weight = self._own_rows(pair.call), pair.call, operands[0]
        assert pair.other is not None, "the caller has both"
        if step is None or call.name != "embedding" or weight.kind != "parts" or len(operands) != 2:  # noqa: PLR2004
            self._fault(pair, f"{call.name} takes the numbers of rows that each rank counts from its own first row")
            self._is(pair, UNKNOWN)
        elif parts_in(weight.axes[0]) is None or not are_rows(weight.axes[0], step.num_rows):
            self._fault(pair, f"rows are looked up as if each rank had {step.num_rows}, one rank after the other")
            self._is(pair, UNKNOWN)
        else:
            shape = self.model.values[pair.other.results[0]].shape
            self._is(pair, Held("summand", tuple(map(whole, shape)), unmasked=len(shape) - 1, origin=call.module))


_PICKING = frozenset({"index", "masked_select"})
"""Operators that give the entries that a mask says: as many on all ranks, where all have the same."""


def _shapes(tape: Tape, call: RecordedCall) -> tuple[tuple[int, ...], ...]:
    return tuple(tape.values[result].shape for result in call.results)
