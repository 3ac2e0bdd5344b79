"""Read a pickle without running it: a global becomes a name, a call of it a record; nothing is imported.

``pickletools.genops`` decodes opcodes, numbers and texts, and builds nothing
(https://docs.python.org/3/library/pickletools.html). A small stack machine follows the opcodes that torch and dataclasses
need and refuses the rest, as it refuses every global that the caller does not name. The values read are never hashed,
compared or printed: they may be nested deep, or contain themselves.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Container
from io import BytesIO
from typing import Any

from attrs import Factory, define, frozen

from ....specs.errors import PlanError, Problem
from .untrusted import AGAIN

FIX = "Nothing was run. If the file is your own, save it as safetensors; if not, do not open it with torch.load either"


@frozen(eq=False)
class Global:
    """A name that a pickle imports, such as ``torch.float32``."""

    name: str


@define(eq=False)
class Record:
    """A call that a pickle would make: a global's name, its arguments, and the state that is set afterwards."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


@frozen(eq=False)
class Persistent:
    """A reference to data outside of the pickle, such as the bytes of a tensor."""

    value: Any


@frozen(eq=False)
class Entries:
    """A dict as the list of its assignments, in order; a key may occur twice."""

    pairs: list[tuple[Any, Any]] = Factory(list)

    def get(self, name: str) -> Any:
        """Return the value assigned last to a text key; None if there is none."""
        return next((value for key, value in reversed(self.pairs) if isinstance(key, str) and key == name), None)


def read_pickle(data: bytes, file: str, globals_: Container[str], max_bytes: int) -> Any:
    r"""Return the value of a pickle: plain values, tuples, lists, and the classes above in place of other objects.

    Args:
        data: The pickle.
        file: Name of its file, for messages.
        globals_: Names that it may import, e.g. ``collections.OrderedDict``.
        max_bytes: Longest pickle that is read.

    Raises:
        PlanError: If the pickle imports another name, needs another opcode, or is damaged.

    >>> read_pickle(b"cposix\nsystem\n.", "weights.pt", {"collections.OrderedDict"}, 100)
    Traceback (most recent call last):
    shardplan.specs.errors.PlanError: 1 problem
      weights.pt: it is a pickle that names posix.system, which no checkpoint needs: it could run code if it were unpickled
          Nothing was run. If the file is your own, save it as safetensors; if not, do not open it with torch.load either
    """
    if len(data) > max_bytes:
        cause = f"its pickle has {len(data)} bytes, and {max_bytes} are the most that is read"
        raise PlanError([Problem(file, cause, AGAIN)])
    machine = _Machine(globals_)
    try:
        for opcode, argument, _ in pickletools.genops(BytesIO(data)):
            if opcode.name == "STOP":
                break
            machine.do(opcode.name, argument)
        return machine.result()
    except _RefusedError as error:
        raise PlanError([Problem(file, str(error), FIX)]) from None
    except (ValueError, TypeError, IndexError, struct.error, OverflowError, MemoryError) as error:
        cause = f"its pickle is damaged: {error}"
        raise PlanError([Problem(file, cause, AGAIN)]) from None


class _RefusedError(Exception):
    """A pickle that could run code."""


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PLAIN = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_NEW = {"EMPTY_LIST": list, "EMPTY_DICT": Entries}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@define(eq=False)
class _Machine:
    """The stack machine of a pickle, for opcodes that only build data."""

    globals_: Container[str]
    stack: list[Any] = Factory(list)
    memo: dict[int, Any] = Factory(dict)

    def do(self, name: str, argument: Any) -> None:
        """Execute one opcode."""
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.stack.append(_MARK)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self._top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self._top()
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    msg = f"it asks for entry {argument} of its memo, which it never made"
                    raise ValueError(msg)
                self.stack.append(self.memo[argument])
            case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS" | "BUILD":
                self._fill(name)
            case _:
                self.stack.append(self._made(name, argument))

    def result(self) -> Any:
        """Return the only value left on the stack."""
        value = self._pop()
        if self.stack:
            msg = f"{len(self.stack)} values are left over at its end"
            raise ValueError(msg)
        return value

    def _made(self, name: str, argument: Any) -> Any:
        """Return the value that an opcode pushes."""
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name in _PLAIN:
            return argument
        if name in _TUPLES:
            return tuple(reversed([self._pop() for _ in range(_TUPLES[name])]))
        if name in _NEW:
            return _NEW[name]()
        match name:
            case "TUPLE":
                made: Any = tuple(self._marked())
            case "GLOBAL":
                made = self._global(".".join(argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = self._pop(str), self._pop(str)
                made = self._global(f"{module}.{attribute}")
            case "REDUCE" | "NEWOBJ":
                args = self._pop(tuple)
                made = Record(self._pop(Global).name, args)
            case "BINPERSID":
                made = Persistent(self._pop())
            case _:
                msg = f"it is a pickle with the opcode {name}, which no checkpoint needs: it could run code if unpickled"
                raise _RefusedError(msg)
        return made

    def _fill(self, name: str) -> None:
        """Put values into the container, or the state into the record, on top of the stack."""
        match name:
            case "APPEND":
                value = self._pop()
                self._top(list).append(value)
            case "APPENDS":
                values = self._marked()
                self._top(list).extend(values)
            case "SETITEM":
                value, key = self._pop(), self._pop()
                self._top(Entries).pairs.append((key, value))
            case "SETITEMS":
                values = self._marked()
                self._top(Entries).pairs.extend(zip(values[::2], values[1::2], strict=True))
            case _:
                state = self._pop()
                self._top(Record).state = state

    def _global(self, name: str) -> Global:
        if name not in self.globals_:
            msg = (
                f"it is a pickle that names {name[:200]}, which no checkpoint needs: it could run code if it were unpickled"
            )
            raise _RefusedError(msg)
        return Global(name)

    def _pop(self, kind: type = object) -> Any:
        value = self._top(kind)
        self.stack.pop()
        return value

    def _top(self, kind: type = object) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            msg = "it takes more from its stack than it put there"
            raise ValueError(msg)
        if not isinstance(self.stack[-1], kind):
            msg = f"it has a {type(self.stack[-1]).__name__} where a {kind.__name__} belongs"
            raise TypeError(msg)
        return self.stack[-1]

    def _marked(self) -> list[Any]:
        """Pop the values above the last mark, and the mark."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                values = self.stack[place + 1 :]
                del self.stack[place:]
                return values
        msg = "it takes more from its stack than it put there"
        raise ValueError(msg)
