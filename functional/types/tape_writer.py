"""Write the calls of operators on a tape: which value each tensor object holds, also after a change in place."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ..layout.hooks import random_numbers_differ
from ..model.read import storage_id
from .composites import Composites
from .recorded_backward import RecordedBackward, name_of
from .tape import BackwardCode, RecordedCall, Tape, Value, ValueRef

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType

    from ...specs.tree import SpecTree
    from ..model.known_values import KnownValues
    from ..model.open_modules import OpenModules

_FEW = 16
"""Most entries of a constant that are written down; of a larger one, a checksum is."""

_OUTSIDE = tuple(str(Path(home).parent) + "/" for home in (torch.__file__, attrs.__file__, Path(__file__).parent))
"""Folders whose code is not the model's."""

_APPLY = torch.autograd.Function.apply.__func__.__code__  # pyright: ignore[reportFunctionMemberAccess]  a class method


class TapeWriter(TorchDispatchMode):
    """Write each operator that runs within the block.

    Args:
        running: The modules that are running.
        runner: The code that runs the model.
        known: Knows values, and assumes others.

    Attributes:
        tape: What is written.
        steps: Places of the layout steps whose code runs, innermost last.
        composites: The mode that finds functions which are written as one call; it is to be on too.
        backward: Watches for code of the user's own that runs in the backward pass.
    """

    def __init__(self, running: OpenModules, runner: CodeType, known: KnownValues) -> None:
        super().__init__()
        self.tape = Tape(num_calls=running.num_calls)
        self.steps: list[int] = []
        self.backward = RecordedBackward(self)
        self.composites = Composites(self._composite, self.backward.hooked)
        self._running = running
        self._runner = runner
        self._known = known
        self._guesses_before = 0
        self._value_of: dict[int, int] = {}  # by the identity of the tensor object, which is kept alive
        self._kept: list[object] = []
        self._in_storage: dict[int, list[Tensor]] = {}
        self._storages: dict[int, int] = {}
        self._changed: list[Tensor] | None = None  # tensors that a function changes which is written as one call
        self._files: dict[str, str] = {}
        self._apart = ""  # the module of code that is written apart

    def name_tensors(self, model: nn.Module, tree: SpecTree) -> None:
        """Let the values of a model's parameters and buffers have their paths."""
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for path, tensor in named:
            if id(tensor) not in self._value_of:
                self._new_value(tensor, tree[path].path if path in tree else path)

    def name_changed(self, model: nn.Module, tree: SpecTree) -> None:
        """Note the values of parameters and buffers that are others than those that :meth:`name_tensors` has named."""
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for path, tensor in named:
            name, number = tree[path].path if path in tree else path, self.value(tensor)
            if self.tape.values[number].path != name:
                self.tape.changed[name] = number

    def value(self, tensor: Tensor) -> int:
        """Return the number of the value that a tensor holds now."""
        number = self._value_of.get(id(tensor))
        if number is None:
            number = self._new_value(tensor)
            if not isinstance(tensor, FakeTensor):
                self._write("constant", {"values": _constant(tensor)}, (number,))
        self.backward.seen(tensor, number)
        return number

    def values(self, tree: Any) -> tuple[int, ...]:
        """Return the numbers of the values of all tensors in a pytree."""
        with torch._C.DisableTorchFunction():  # noqa: SLF001  sizes of tensors are asked for very often
            return tuple(self.value(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))

    def known(self) -> Iterator[tuple[Tensor, int]]:
        """Iterate over all tensors that were seen, each with the value that it holds."""
        yield from ((tensor, self._value_of[id(tensor)]) for tensor in self._kept if isinstance(tensor, Tensor))

    def place(self) -> tuple[str, str, int | None]:
        """Return the module that runs, the line of the model's code, and the place of the layout step, if one runs."""
        return self._apart or self._running.innermost, self._where()[0], self.steps[-1] if self.steps else None

    @contextmanager
    def apart(self, code: BackwardCode) -> Iterator[None]:
        """Write what runs within the block as calls of some code in the backward pass."""
        calls, modules = self.tape.calls, self.tape.modules
        self.tape.calls, self.tape.modules, self._apart = code.calls, [], code.module
        try:
            with self, self.composites:
                yield
        finally:
            self.tape.calls, self.tape.modules, self._apart = calls, modules, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim" or func.__name__.startswith("sym_"):
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # noqa: SLF001  sizes of tensors are asked for very often
            if self._changed is not None:
                out = func(*args, **kwargs)
                self._changed += (tensor for tensor in _written(func, args, kwargs) if id(tensor) in self._value_of)
                return out
            arguments = self._arguments(func, args, kwargs)
            out = func(*args, **kwargs)
            self._record(func, arguments, out, _written(func, args, kwargs), operands=(args, kwargs))
        return out

    def _composite(self, func: Any, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a function and write it as one call."""
        if self._changed is not None:
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # noqa: SLF001  as above
            arguments = self._arguments(func, args, kwargs)
        self._changed = changed = []
        try:
            out = function(*args, **kwargs)
        finally:
            self._changed = None
        with torch._C.DisableTorchFunction():  # noqa: SLF001  as above
            self._record(func, arguments, out, {id(tensor): tensor for tensor in changed}.values(), operands=(args, kwargs))
        return out

    def _arguments(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of an operator by name."""
        self._guesses_before = self._known.num_guesses
        taken = func._schema.arguments  # noqa: SLF001  the operator's signature
        given = dict(zip((argument.name for argument in taken), args, strict=False))
        given |= {"self" if name == "input" and taken[0].name == "self" else name: value for name, value in kwargs.items()}
        follows = torch.is_grad_enabled()
        return {
            argument.name: self._argument(given.get(argument.name, argument.default_value), follows=follows)
            for argument in taken
        }

    def _argument(self, value: Any, *, follows: bool) -> Any:
        if isinstance(value, Tensor):
            return ValueRef(self.value(value), value.requires_grad and follows)
        if isinstance(value, (list, tuple)):
            return [self._argument(item, follows=follows) for item in value]
        return value

    def _record(
        self, func: Any, arguments: dict[str, Any], out: Any, written: Iterable[Tensor], *, operands: object
    ) -> None:
        """Write a call that has run: its results, and what it has changed."""
        results = [leaf for leaf in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(leaf, Tensor)]
        written = list(written)
        changed = {id(tensor) for tensor in written}
        given = {id(leaf) for leaf in tree_leaves(operands)}
        if results and not written and all(id(result) in given for result in results):
            return
        before = self._aliases(written)
        numbers = [
            self._value_of[id(tensor)] if id(tensor) in given and id(tensor) not in changed else self._new_value(tensor)
            for tensor in [*results, *(tensor for tensor in written if not any(tensor is result for result in results))]
        ]
        self._write(
            func._schema.name.removeprefix("aten::"),  # noqa: SLF001  the operator's name
            arguments,
            tuple(numbers),
            is_pointwise=torch.Tag.pointwise in func.tags,
            is_random=_draws(func, arguments),
            is_guessed=self._known.num_guesses > self._guesses_before,
        )
        follows = torch.is_grad_enabled()
        for alias, tensor in before:
            arguments = {"view": self._argument(alias, follows=follows), "changed": self._argument(tensor, follows=follows)}
            self._write("written", arguments, (self._new_value(alias),))

    def _aliases(self, written: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return all other tensors that the program still holds of the memory of changed ones, each with the changed one."""
        changed = {id(tensor) for tensor in written}
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for tensor in written:
            for alias in self._in_storage.get(_storage(tensor), ()):
                if id(alias) not in changed and sys.getrefcount(alias) > _OWN_REFERENCES:
                    found[id(alias)] = alias, tensor
        return list(found.values())

    def _write(
        self,
        name: str,
        arguments: dict[str, Any],
        results: tuple[int, ...],
        *,
        is_pointwise: bool = False,
        is_random: bool = False,
        is_guessed: bool = False,
    ) -> None:
        line, applying = self._where()
        function = name_of(applying.f_locals["cls"]) if applying else ""
        call = RecordedCall(
            name=name,
            arguments=arguments,
            results=results,
            module=self._apart or self._running.innermost,
            line=line,
            step=self.steps[-1] if self.steps else None,
            is_pointwise=is_pointwise,
            is_random=is_random,
            is_forked=is_random and random_numbers_differ(),
            function=function,
            is_guessed=is_guessed,
        )
        self.tape.calls.append(call)
        self.backward.inside(applying if function else None, function)

    def _new_value(self, tensor: Tensor, path: str = "") -> int:
        number = len(self.tape.values)
        storage = _storage(tensor)
        if id(tensor) not in self._value_of:
            self._kept.append(tensor)
            self._in_storage.setdefault(storage, []).append(tensor)
        self._value_of[id(tensor)] = number
        known = self._storages.setdefault(storage, len(self._storages))
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.tape.values.append(Value(tuple(tensor.shape), dtype, path, known))
        return number

    def _where(self) -> tuple[str, FrameType | None]:
        """Return the line of the model's code that runs, and the frame that applies the ``autograd.Function`` around it."""
        line, applying = "", None
        frame = sys._getframe(1)  # noqa: SLF001  cheaper than inspect.stack()
        while frame is not None and (code := frame.f_code) is not self._runner:
            if not line and (name := self._file_name(code.co_filename)):
                line = f"{name}:{frame.f_lineno}"
            if code is _APPLY:
                applying = frame
            frame = frame.f_back
        return line, applying

    def _file_name(self, path: str) -> str:
        """Return the name of a file of the model's code; empty for other files."""
        name = self._files.get(path)
        if name is None:
            name = "" if path.startswith((*_OUTSIDE, "<")) else Path(path).name
            self._files[path] = name
        return name


_OWN_REFERENCES = 4
"""References to a tensor that the writer itself has where it counts them: two lists, the loop, the count's argument."""


def _storage(tensor: Tensor) -> int:
    return storage_id(tensor) if tensor.layout == torch.strided else -id(tensor)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterable[Tensor]:
    """Iterate over the tensors that an operator changes."""
    for place, argument in enumerate(func._schema.arguments):  # noqa: SLF001  the operator's signature
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _draws(func: Any, arguments: Mapping[str, Any]) -> bool:
    """Tell whether an operator draws random numbers."""
    is_on = all(arguments.get(name, 1) for name in ("p", "dropout", "dropout_p", "train"))
    return is_on and torch.Tag.nondeterministic_seeded in func.tags


def _constant(tensor: Tensor) -> Any:
    """Return the values of a tensor that is no fake tensor, or their checksum; None if it has none."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return None
    with _disable_current_modes(), torch.no_grad():
        if tensor.numel() <= _FEW:
            return tensor.tolist()
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        return blake2b(content.numpy().data, digest_size=16).hexdigest()
