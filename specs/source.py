"""Where the values of a tensor come from, and the calls of init code that make them."""

from __future__ import annotations

from typing import Literal

from attrs import frozen

from .program import InitProgram
from .stored import Part

CodeKind = Literal["init_weights", "_init_weights", "reset_parameters", "_reset_parameters"]
"""Who owns a piece of init code: the user's callable, a Hugging Face model, or the module itself (two spellings)."""


@frozen
class ModuleCall:
    """Run init code on a module: ``code(module)``.

    Args:
        module: Path of the module that the code is called on.
        kind: Whose code it is.
        code: ``module:qualname`` of the code.
        owner: Path of the module whose method it is; the Hugging Face model for ``_init_weights``.
        opaque: Whether it could not be followed to its end while planning; its results are checked when it runs.
    """

    module: str
    kind: CodeKind
    code: str
    owner: str = ""
    opaque: bool = False

    def __str__(self) -> str:
        return self.code.partition(":")[2]


@frozen
class TensorCall:
    """Run a function of the user's on a whole tensor, which it fills in place: ``function(tensor)``.

    ``opaque`` is as in ``ModuleCall``.
    """

    path: str
    function: str
    opaque: bool = False

    def __str__(self) -> str:
        return self.function.partition(":")[2]


Call = ModuleCall | TensorCall


@frozen
class Made:
    """Init code makes the values of the whole tensor on a single rank: the last of ``calls`` that writes an element wins.

    Args:
        calls: The code.
        cause: Why no init program stands for it.
    """

    calls: tuple[Call, ...]
    cause: str = ""

    def __str__(self) -> str:
        return "; ".join(dict.fromkeys(map(str, self.calls)))


@frozen
class ModuleValues:
    """The values that the module of the stage's first rank has when the plan is executed."""

    def __str__(self) -> str:
        return "values of the module"


@frozen
class OwnValues:
    """The values that each rank's own module has: nothing is sent."""

    def __str__(self) -> str:
        return "own values"


@frozen
class Loaded:
    """Values that lie in files.

    Args:
        parts: Parts of stored tensors with their places; together they are the whole tensor. All have the same dtype.
    """

    parts: tuple[Part, ...]

    @property
    def dtype(self) -> str:
        """The element type in the files."""
        return self.parts[0].stored.dtype

    def __str__(self) -> str:
        return f"checkpoint, {len(self.parts)} tensors" if len(self.parts) > 1 else "checkpoint"


@frozen
class Materialised:
    """Values that lie in the file of each rank's own, which was written before.

    Args:
        plan: Fingerprint of the plan that they were written for.
        parts: The stored parts that they were read from, if any.
    """

    plan: str
    parts: tuple[Part, ...] = ()

    def __str__(self) -> str:
        return "shards on disk"


@frozen
class Uninitialised:
    """No values at all: uninitialised memory."""

    def __str__(self) -> str:
        return "uninitialised"


@frozen
class Unknown:
    """Not decided yet, as in a schedule before it is planned."""

    def __str__(self) -> str:
        return "not planned"


Source = InitProgram | Made | Loaded | Materialised | ModuleValues | OwnValues | Uninitialised | Unknown
