"""Record code of the user's own that runs in a backward pass: of functions of ``torch.autograd``, and hooks of tensors.

Such code need not compute a derivative. After a forward pass it is run on gradients that are fake tensors, and its calls
are written down apart from those of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from attrs import Factory, define
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .tape import BackwardCode, references

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .tape_writer import TapeWriter

_OPERATOR = "GeneratedBackwardFor_"
"""How torch begins the names of the functions of operators whose derivative was registered: no code of a user's."""

_OF_MODULES = "BackwardHookFunction"
"""torch's name for the function that passes gradients to the backward hooks of a module."""


def name_of(function: type) -> str:
    """Return the name of a user's function; empty for that of an operator whose derivative was registered."""
    return "" if function.__name__.startswith(_OPERATOR) else function.__name__


@define(eq=False)
class RecordedBackward:
    """Watches a forward pass for code that will run in its backward pass.

    Args:
        writer: Writes the tape.
    """

    writer: TapeWriter
    _current: tuple[FrameType, BackwardCode] | None = None  # kept, so that no other frame takes its place in memory
    _by_value: dict[int, BackwardCode] = Factory(dict)
    _nodes: dict[int, Any] = Factory(dict)  # by the identity of the code
    _hooks: dict[int, tuple[Tensor, RemovableHandle, Callable[..., Any]]] = Factory(dict)
    _is_running: bool = False

    def inside(self, frame: FrameType | None, function: str) -> None:
        """Note the last call that was written, of a function's forward pass, with the frame of its ``apply``."""
        if self._is_running:
            return
        if frame is None:
            self._current = None
            return
        call = self.writer.tape.calls[-1]
        if self._current is None or self._current[0] is not frame:
            given = [self.writer.value(leaf) if isinstance(leaf, Tensor) else None for leaf in frame.f_locals["args"]]
            if any(value in call.results for value in given):  # changed in place by this very call
                before = references(call)[0].value
                given = [before if value in call.results else value for value in given]
            self._current = frame, BackwardCode(function, call.module, call.line, call.step, inputs=given)
            self.writer.tape.backward.append(self._current[1])
        code = self._current[1]
        self._by_value |= dict.fromkeys(call.results, code)
        code.made |= set(call.results)

    def seen(self, tensor: Tensor, value: int) -> None:
        """Note a tensor that is used, which may be a result of a function."""
        code = self._by_value.get(value)
        if code is not None and not self._is_running and isinstance(node := tensor.grad_fn, BackwardCFunction):
            self._nodes[id(code)] = node
            code.outputs.setdefault(tensor.output_nr, value)

    def hooked(self, tensor: Tensor, hook: Callable[..., Any], handle: RemovableHandle) -> None:
        """Note a hook of a tensor's gradient."""
        if self._is_running:
            return
        value = self.writer.value(tensor)
        module, line, step = self.writer.place()
        code = BackwardCode(getattr(hook, "__name__", "hook"), module, line, step, inputs=[value], outputs={0: value})
        code.is_hook = True
        self._hooks[id(code)] = tensor, handle, hook
        self.writer.tape.backward.append(code)

    def run(self) -> None:
        """Run the code that was found, on gradients that are fake tensors, and write down what it calls."""
        if not self.writer.tape.backward:
            return
        for tensor, value in self.writer.known():  # also results that nothing uses
            self.seen(tensor, value)
        self._is_running = True
        for code in self.writer.tape.backward:
            if code.step is not None:  # a synchronisation's, of which the user says what it gives
                continue
            if code.is_hook:
                tensor, handle, hook = self._hooks[id(code)]
                if handle.id not in (tensor._backward_hooks or ()):  # noqa: SLF001  it was removed
                    code.is_removed = True
                    continue
                self._run(code, [torch.empty_like(tensor)], hook)
            elif code.name == _OF_MODULES:
                code.error = "the backward hooks of a module are not followed"
            elif (node := self._nodes.get(id(code))) is None:
                code.error = "it has no result with a gradient"
            else:
                code.inputs = [
                    value if needs else None for value, needs in zip(code.inputs, node.needs_input_grad, strict=False)
                ]
                given = [torch.empty(tuple(known.shape), dtype=known.dtype) for known in node._input_metadata]  # noqa: SLF001
                self._run(code, given, node.apply)

    def _run(self, code: BackwardCode, given: Sequence[Tensor], function: Callable[..., Any]) -> None:
        writer = self.writer
        code.takes = list(writer.values(given))
        try:
            with writer.apart(code), torch.no_grad():
                found = function(*given)
        except Exception as error:  # noqa: BLE001  the user's code may raise any error, which is reported
            code.error = f"it stops with {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            return
        if code.is_hook and found is None:
            found = given[0]
        found = found if isinstance(found, (tuple, list)) else [found]
        code.gives = [writer.value(each) if isinstance(each, Tensor) else None for each in found]
