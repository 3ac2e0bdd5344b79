"""Follow the gradients of every value backwards through a rank's run, and find those that stay summands.

If ranks compute parts of what the whole model computes, for all values of the operands, then their vector-Jacobian products
follow, and no operator needs a rule of its own: the gradient of parts is parts, of summands whole, and of a whole operand
that meets parts a summand. Collectives have their own backward passes (``layout/collectives.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import get_args

from attrs import Factory, define, evolve

from ...specs.layout_steps import LayoutStep, Sync, SyncOp
from ...specs.paths import module_of
from ...specs.tree import SpecTree
from .axes import holders, parts_in
from .gradient import UNKNOWN_GRADIENT, Gradient, Kind, Met, collapsed_pieces, flat_pieces, merged_pieces
from .held import UNKNOWN, Held
from .macros import TRUSTED
from .relation import Taken
from .rules import rule_of
from .tape import RecordedCall, Tape, ValueRef, operator_call, references
from .typed_backward import TypedBackward
from .typed_run import Fault, Types


def wrong_gradients(
    local: Tape, types: Types, tree: SpecTree, layout: Sequence[LayoutStep], num: int, backward: TypedBackward
) -> list[Fault]:
    """Return where gradients stay summands, or count several times, that reach whole values or trained tensors.

    Args:
        local: The rank's run.
        types: What ranks hold of its values.
        tree: The model's tensors.
        layout: The layout steps, by place.
        num: Ranks along ``tensor``.
        backward: Code of the user's own that runs in the backward pass.
    """
    walk = _Walk(local, types, tree, layout, num, backward)
    walk.run()
    if not (types.faults or walk.faults or backward.faults):  # else it was said where that began
        walk.faults += _lost(list(dict.fromkeys(walk.lost_tensors)))
    return list(dict.fromkeys([*walk.faults, *backward.faults]))


def _lost(paths: list[str]) -> Iterator[Fault]:
    """Yield that gradients of trained tensors are not known, if some are not."""
    if paths:
        more = f", nor those of {len(paths) - 1} more tensors" if len(paths) > 1 else ""
        yield Fault(-1, paths[0], f"nobody could follow its gradient{more}", kind="unfollowed")


@define(eq=False)
class _Walk:
    local: Tape
    types: Types
    tree: SpecTree
    layout: Sequence[LayoutStep]
    num: int
    backward: TypedBackward
    applied: set[int] = Factory(set)
    gradients: dict[int, list[Gradient]] = Factory(dict)
    totals: dict[int, Gradient] = Factory(dict)
    faults: list[Fault] = Factory(list)
    lost_tensors: list[str] = Factory(list)
    scaled: dict[tuple[str, Fraction], list[int]] = Factory(dict)

    def run(self) -> None:
        for value in self.local.outputs:
            if self._held(value).kind == "whole":
                self._add(value, Gradient("whole"))
        for number in range(len(self.local.calls) - 1, -1, -1):
            call = self.local.calls[number]
            totals = [self._total(result) for result in call.results]
            if any(total is not None for total in totals):
                self._backward(number, call, totals)
        for value, info in enumerate(self.local.values):
            if info.path and (total := self._total(value)) is not None:
                self._at_tensor(value, info.path, total)
        self.lost_tensors += sorted(self._unmet())
        for (module, scale), values in self.scaled.items():
            self.faults.append(Fault(-1, module, self._counts(module, scale, values), value=values[0], kind="gradient"))

    def _unmet(self) -> set[str]:
        """Return the paths of trained tensors that have a gradient by torch's own backward pass, and met none here."""
        values = self.local.values
        taken = {values[ref.value].path for call in self.local.calls for ref in references(call) if values[ref.value].path}
        met = {values[value].path for value, total in self.totals.items() if total is not None}
        return (self.local.reached & taken) - met

    def _held(self, value: int) -> Held:
        return self.types.held.get(value, UNKNOWN)

    def _add(self, value: int, gradient: Gradient) -> None:
        self.gradients.setdefault(value, []).append(gradient)

    def _total(self, value: int) -> Gradient | None:
        if value not in self.totals:
            found = self.gradients.get(value)
            if not found:
                return None
            self.totals[value] = self.backward.hooked(value, self._combined(value, found))
        return self.totals[value]

    def _combined(self, value: int, found: list[Gradient]) -> Gradient:
        """Return the sum of the gradients that a value's uses give."""
        if any(gradient.kind == "unknown" for gradient in found):
            return UNKNOWN_GRADIENT
        if any(gradient.pieces for gradient in found):
            merged = merged_pieces(found)
            if merged is not None:
                return merged
            flat = [inner for gradient in found for inner in flat_pieces(gradient)]
        else:
            flat = found
        return self._sum(value, flat)

    def _sum(self, value: int, flat: list[Gradient]) -> Gradient:
        if any(gradient.kind == "summand" for gradient in flat):  # each rank's share of a whole one is a summand too
            share = Fraction(1, self.num)
            flat = [
                evolve(gradient, kind="summand", scale=Fraction(1))
                if (gradient.kind, gradient.scale) == ("whole", share)
                else gradient
                for gradient in flat
            ]
        kinds, scales = {gradient.kind for gradient in flat}, {gradient.scale for gradient in flat}
        if "unknown" in kinds:
            return UNKNOWN_GRADIENT
        if len(kinds) == 1 and len(scales) == 1:
            return evolve(flat[0], met=frozenset().union(*(gradient.met for gradient in flat)), pieces=None)
        if kinds == {"parts", "shared"} and len(scales) == 1:
            self._report_shared(value)
            return Gradient("parts")
        if "summand" in kinds:
            self._report(gradient for gradient in flat if gradient.kind == "summand")
        else:
            self._report_scale(value, next(gradient for gradient in flat if gradient.scale != 1))
        return Gradient("whole")  # as it is once it is mended

    def _backward(self, number: int, call: RecordedCall, totals: list[Gradient | None]) -> None:
        refs = references(call)
        step = None if call.step is None else self.layout[call.step]
        if step is not None and self._is_collective(call, step):
            for ref in refs[:1]:
                if ref.requires_grad and totals[0] is not None:
                    self._add(ref.value, self._through(call, step, self._held(ref.value), totals[0]))
            return
        if call.name == TRUSTED:
            self._trusted(refs, totals)
            return
        if call.function:
            self._function(number, call)
            return
        is_opaque = call.name != "detach" and not any(ref.requires_grad for ref in refs)  # it has a derivative of its own
        for place, ref in enumerate(refs):
            if ref.requires_grad or (is_opaque and self.local.values[ref.value].is_real):
                for at, total in enumerate(totals):
                    if total is not None and not self._is_nothing(call, at):
                        self._add(ref.value, self._contribution(number, call, place, at, total))

    def _is_nothing(self, call: RecordedCall, at: int) -> bool:
        """Tell whether a result is a piece of no features, which are as many in every example."""
        shape = self.local.values[call.results[at]].shape
        is_of_features = call.name == "split_with_sizes" and call.arguments.get("dim") in {-1, len(shape) - 1}
        return is_of_features and shape[-1] == 0

    def _function(self, number: int, call: RecordedCall) -> None:
        """Follow the backward pass of a user's function, at the last call of its forward pass."""
        code = self.backward.function_of(call.results[0])
        assert code is not None, "its calls were noted"
        if id(code) in self.applied:
            return
        self.applied.add(id(code))
        totals: dict[int, Gradient] = {}
        for place, value in code.outputs.items():
            if (total := self._total(value)) is not None:
                total = self._sum(value, list(flat_pieces(total))) if total.pieces else total
                totals[place] = self._needing_whole(total) if self._held(value).kind == "summand" else total
        if totals:
            for value, gradient in self.backward.through(code, number, totals).items():
                self._add(value, gradient)

    def _trusted(self, refs: Sequence[ValueRef], totals: Sequence[Gradient | None]) -> None:
        """Take the user's word: gradients of what a module takes are right, if gradients of what it gives are."""
        for total in totals:
            if total is not None:
                self._needing_whole(total)
        for ref in refs:
            kind = self._held(ref.value).kind
            self._add(ref.value, Gradient("parts" if kind == "parts" else "whole" if kind != "unknown" else "unknown"))

    def _contribution(self, number: int, call: RecordedCall, place: int, at: int, total: Gradient) -> Gradient:
        """Return what a result's gradient gives for an operand."""
        value = references(call)[place].value
        operand, result = self._held(value), self._held(call.results[at])
        if "unknown" in {operand.kind, result.kind, total.kind}:
            return UNKNOWN_GRADIENT
        if operand.kind == "whole" and result.kind == "whole" and _is_pieced(call):
            return self._piece(call, place, value, at, total)
        total = self._sum(value, list(flat_pieces(total))) if total.pieces else total
        if result.kind == "summand":
            total = self._needing_whole(total)
        is_share = operand.kind == "whole" and result.kind == "summand" and operand.scale == Fraction(1, self.num)
        if total.kind == "unknown" or is_share:  # each rank adds its share
            return total
        total = evolve(total, scale=total.scale * result.scale / operand.scale)
        if operand.kind == "whole" and result.kind in {"parts", "summand"}:
            if 0 in self.local.values[value].shape:  # right as it is, and perhaps empty in this example alone
                return UNKNOWN_GRADIENT
            return Gradient("summand", total.scale, frozenset({Met(number, value)}), total.scaled_by)
        if operand.kind == "parts":
            is_fewer = result.kind == "parts" and _num_holders(operand) > _num_holders(result)
            total = evolve(total, kind="shared" if is_fewer or total.kind == "shared" else "parts")
        return total

    def _piece(self, call: RecordedCall, place: int, value: int, at: int, total: Gradient) -> Gradient:
        """Return the gradient of a whole operand of which a call takes consecutive entries, or which it joins to others."""
        values = self.local.values
        if call.name == "cat":
            axis = int(call.arguments.get("dim") or 0) % len(values[call.results[0]].shape)
            refs = references(call)
            sizes = [0 if values[ref.value].shape == (0,) else values[ref.value].shape[axis] for ref in refs]
            start = sum(sizes[:place])
            stop = start + sizes[place]
            if total.pieces is None:
                return total
            if total.pieces[0] != axis:
                return self._sum(value, list(flat_pieces(total)))
            inside = tuple(
                (max(a, start) - start, min(b, stop) - start, gradient)
                for a, b, gradient in total.pieces[1]
                if max(a, start) < min(b, stop)
            )
            return collapsed_pieces(axis, inside)
        rule = rule_of(operator_call(self.local, call))
        if not isinstance(rule, Taken):  # every second entry: of one kind, as its operand's
            return self._sum(value, list(flat_pieces(total)))
        start, stop = rule.ranges[at]
        if total.pieces is not None and total.pieces[0] != rule.axis:
            total = self._sum(value, list(flat_pieces(total)))
        if total.pieces is not None:
            moved = tuple((a + start, b + start, gradient) for a, b, gradient in total.pieces[1])
            return Gradient("whole", pieces=(rule.axis, moved))
        return Gradient(total.kind, total.scale, total.met, total.scaled_by, (rule.axis, ((start, stop, total),)))

    def _is_collective(self, call: RecordedCall, step: LayoutStep) -> bool:
        is_user = isinstance(step, Sync) and step.op not in get_args(SyncOp)
        return call.name.startswith("shardplan::") or is_user or (isinstance(step, Sync) and step.op == "divide")

    def _through(self, call: RecordedCall, step: LayoutStep, operand: Held, total: Gradient) -> Gradient:  # noqa: C901, PLR0911  an operator each
        """Return the gradient of a collective's operand."""
        if total.kind == "unknown" or operand.kind == "unknown":
            return UNKNOWN_GRADIENT
        module = step.module
        name = call.name.removeprefix("shardplan::")
        if total.pieces and name != "sum_gradient_of":
            total = self._sum(references(call)[0].value, list(flat_pieces(total)))
            if total.kind == "unknown":
                return total
        match name:
            case "all_reduce":
                return self._needing_whole(total)
            case "sum_gradient" | "average_gradient":
                return self._summed(operand, total, module)
            case "sum_gradient_of":
                return self._summed_of(call, operand, total, module)
            case "all_gather":
                found = self._needing_whole(total)
                return found if found.kind == "unknown" else evolve(found, kind="parts")
            case "gather_sum":
                if total.kind == "whole":
                    return evolve(total, kind="parts", scale=total.scale * self.num, scaled_by=module)
                return evolve(total, kind="parts", met=frozenset())
            case "reduce_scatter" | "split":
                return evolve(total, kind="whole")
            case _ if isinstance(step, Sync) and step.op == "divide":
                return evolve(total, scale=total.scale / self.num, scaled_by=module)
            case _:
                return self._of_users(call, step, operand, total)

    def _of_users(self, call: RecordedCall, step: LayoutStep, operand: Held, total: Gradient) -> Gradient:
        """Return the gradient of what a user's function takes: as of an operator of ours that gives the same."""
        assert isinstance(step, Sync), "nothing else calls a function of the user's"
        result = self._held(call.results[0])
        if step.when in {"backward_pre", "backward_post"}:
            return self._as_said(step, operand, total)
        if result.kind == "unknown":
            return UNKNOWN_GRADIENT
        if operand.kind == result.kind:
            return self._needing_whole(total) if operand.kind == "summand" else total
        if operand.kind == "whole" and result.kind == "summand":  # each rank has a share of it
            number = self.types.producers[call.results[0]]
            met = frozenset({Met(number, references(call)[0].value)})
            return evolve(self._needing_whole(total), kind="summand", met=met)
        found = self._needing_whole(total)
        return evolve(found, kind="parts" if operand.kind == "parts" else "whole")

    def _as_said(self, step: Sync, operand: Held, total: Gradient) -> Gradient:
        """Return what the user says that a function makes of a gradient."""
        kinds: dict[str | None, Kind] = {"whole": "whole", "split": "parts", "summand": "summand"}
        kind = kinds.get(step.gives, "unknown")
        if kind == "unknown" or (operand.kind == "parts") != (kind == "parts"):
            return UNKNOWN_GRADIENT
        return evolve(total, kind=kind)

    def _needing_whole(self, total: Gradient) -> Gradient:
        if total.kind == "summand":
            self._report([total])
            return Gradient("whole")  # as it is once it is mended
        return total

    def _summed(self, operand: Held, total: Gradient, module: str) -> Gradient:
        if operand.kind == "whole":
            if total.kind == "summand":
                return Gradient("whole", total.scale)
            return evolve(total, scale=total.scale * self.num, scaled_by=module)
        if operand.kind == "parts":
            if total.kind == "shared":
                return evolve(total, kind="parts")
            cause = "the sum adds gradients of parts, which are other entries on each rank"
            self.faults.append(Fault(-1, module, cause, kind="gradient"))
            return UNKNOWN_GRADIENT
        return evolve(total, scale=total.scale * self.num, scaled_by=module)

    def _summed_of(self, call: RecordedCall, operand: Held, total: Gradient, module: str) -> Gradient:
        if operand.kind != "whole":
            return self._summed(operand, total, module)
        start, stop = call.arguments["start"], call.arguments["stop"]
        size = self.local.values[call.results[0]].shape[-1]
        axis = len(self.local.values[call.results[0]].shape) - 1
        pieces = total.pieces[1] if total.pieces and total.pieces[0] == axis else ((0, size, total),)
        if total.pieces and total.pieces[0] != axis:
            pieces = ((0, size, self._sum(call.results[0], list(flat_pieces(total)))),)
        made: list[tuple[int, int, Gradient]] = []
        for a, b, gradient in pieces:
            for low, high in ((a, min(b, start)), (max(a, start), min(b, stop)), (max(a, stop), b)):
                if low < high:
                    inside = start <= low and high <= stop
                    made.append((low, high, self._summed(operand, gradient, module) if inside else gradient))
        return collapsed_pieces(axis, tuple(made))

    def _at_tensor(self, value: int, path: str, total: Gradient) -> None:
        """Check the gradient of a tensor of the model."""
        if not self.tree[path].requires_grad:
            return
        for gradient in flat_pieces(total):
            if gradient.kind == "unknown":
                self.lost_tensors.append(path)
            elif gradient.kind == "summand":
                self._report([gradient])
            elif gradient.kind == "shared":
                self._report_shared(value)
            elif gradient.scale != 1:
                self._report_scale(value, gradient)

    def _report(self, summands: Iterable[Gradient]) -> None:
        for met in sorted({met for gradient in summands for met in gradient.met}, key=lambda met: met.call):
            call = self.local.calls[met.call]
            self.faults.append(Fault(met.call, call.module, "summand", value=met.value, kind="gradient"))

    def _report_scale(self, value: int, gradient: Gradient) -> None:
        self.scaled.setdefault((gradient.scaled_by, gradient.scale), []).append(value)

    def _counts(self, module: str, scale: Fraction, values: list[int]) -> str:
        paths = dict.fromkeys(path for value in values if (path := self.local.values[value].path))
        first = next(iter(paths), "")
        what = "its gradient" if first and module_of(first) == module else f"the gradient of {first or 'an activation'}"
        further = f" and that of {len(paths) - 1} more tensor{'s' if len(paths) > 2 else ''}" if len(paths) > 1 else ""  # noqa: PLR2004
        return f"{what}{further} counts {scale} times"

    def _report_shared(self, value: int) -> None:
        path = self.local.values[value].path
        cause = "several ranks hold the same entries of it, and nothing adds up their gradients"
        self.faults.append(Fault(-1, path, cause, value=value, kind="gradient"))


def _num_holders(held: Held) -> int:
    """Return how many ranks hold each entry of parts; 1 if each has its own."""
    at = held.split_axis
    if at is None or holders(held.axes[at]) != "repeated":
        return 1
    parts = parts_in(held.axes[at])
    assert parts is not None, "the axis is shared out"
    return max(1, sum(map(len, parts.held)) // parts.size)


def _is_pieced(call: RecordedCall) -> bool:
    return call.name in {"slice", "narrow", "split", "split_with_sizes", "chunk", "cat", "unsafe_split", "unsafe_chunk"}
