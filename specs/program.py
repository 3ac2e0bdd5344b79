"""Init programs: the few operations that give a tensor its values, element by element.

The value of element i depends on the index i alone, so that any rank evaluates any part of a tensor, in any layout, and all
ranks get the same values. ``shardplan.functional.init.evaluate`` evaluates them.
"""

from __future__ import annotations

from math import erfc, isfinite, prod, sqrt
from typing import TYPE_CHECKING, Any

from attrs import evolve, field, frozen
from attrs.validators import ge, gt
from frozendict import deepfreeze, frozendict

from .dtypes import num_bytes
from .json_values import check_plain, from_plain, is_plain, to_plain

if TYPE_CHECKING:
    from attrs import Attribute

RANDOM_SCHEME = 1
"""Version of the function from (seed, path, element) to random values; a plan of another version is not executed."""

Box = tuple[tuple[int, int, int] | None, ...]
"""A part of a tensor: for each axis the first index, the end (exclusive) and the step; None for the whole axis."""


def _check_finite(_: object, attribute: Attribute[Any], value: float) -> None:
    if not isfinite(value):
        msg = f"{attribute.name} is a finite number, not {value!r}"
        raise ValueError(msg)


def _freeze(value: Any) -> Any:
    return deepfreeze(value) if is_plain(value) else value  # the validator has the rest


def _number(*checks: Any) -> Any:
    return field(converter=float, validator=[_check_finite, *checks])


def _probability(_: object, attribute: Attribute[Any], value: float) -> None:
    if not 0 <= value <= 1:
        msg = f"{attribute.name} is a probability, not {value!r}"
        raise ValueError(msg)


@frozen
class Normal:
    """Gaussian with a mean and a standard deviation."""

    mean: float = _number()
    std: float = _number(ge(0))

    def __str__(self) -> str:
        return f"normal({_short(self.mean)}, {_short(self.std)})"


@frozen
class Uniform:
    """Uniform between ``low`` and ``high``."""

    low: float = _number()
    high: float = _number()

    def __attrs_post_init__(self) -> None:
        if self.low > self.high:
            msg = f"nothing lies between {self.low} and {self.high}"
            raise ValueError(msg)

    def __str__(self) -> str:
        if self.low == -self.high:
            return f"uniform(±{_short(self.high)})"
        return f"uniform({_short(self.low)}, {_short(self.high)})"


@frozen
class TruncatedNormal:
    """Gaussian, given that it lies between ``low`` and ``high``."""

    mean: float = _number()
    std: float = _number(gt(0))
    low: float = _number()
    high: float = _number()

    def __attrs_post_init__(self) -> None:
        near = max((self.low - self.mean) / self.std, (self.mean - self.high) / self.std)  # from the centre, in widths
        if self.low > self.high or not erfc(near / sqrt(2)):
            msg = f"nothing of a normal of mean {self.mean} and std {self.std} lies between {self.low} and {self.high}"
            raise ValueError(msg)

    def __str__(self) -> str:
        between = f"±{_short(self.high)}" if self.low == -self.high else f"{_short(self.low)}, {_short(self.high)}"
        return f"truncated_normal({_short(self.mean)}, {_short(self.std)}, {between})"


@frozen
class Exponential:
    """Exponential with a rate: its mean is 1 / rate."""

    rate: float = _number(gt(0))

    def __str__(self) -> str:
        return f"exponential({_short(self.rate)})"


@frozen
class LogNormal:
    """The exponential of a Gaussian with this mean and standard deviation."""

    mean: float = _number()
    std: float = _number(gt(0))

    def __str__(self) -> str:
        return f"log_normal({_short(self.mean)}, {_short(self.std)})"


@frozen
class Bernoulli:
    """1 with probability ``p``, else 0."""

    p: float = field(converter=float, validator=_probability)

    def __str__(self) -> str:
        return f"bernoulli({_short(self.p)})"


@frozen
class Cauchy:
    """Cauchy with a median and a half width ``sigma``."""

    median: float = _number()
    sigma: float = _number(gt(0))

    def __str__(self) -> str:
        return f"cauchy({_short(self.median)}, {_short(self.sigma)})"


@frozen
class Geometric:
    """Trials up to the first success, 1 at least, with probability ``p`` each."""

    p: float = field(converter=float, validator=[_probability, gt(0)])

    def __str__(self) -> str:
        return f"geometric({_short(self.p)})"


Draw = Normal | Uniform | TruncatedNormal | Exponential | LogNormal | Bernoulli | Cauchy | Geometric
"""Every element gets a random number of its own."""


@frozen
class Node:
    """An operator in the computation of a constant, by its name in ``torch.ops.aten``.

    Arguments are JSON values. torch's own values are written as dictionaries: ``{"node": 3}`` is the result
    of the fourth node (``{"node": 3, "item": 1}`` the second of its results), ``{"dtype": "float32"}`` an element type,
    ``{"memory_format": "contiguous_format"}`` a memory format, ``{"float": "-inf"}`` a number that JSON lacks,
    ``{"tensor": [1, 2], "shape": [2], "dtype": "int64"}`` values that were written down in the code.
    """

    op: str
    args: tuple[Any, ...] = field(default=(), converter=_freeze, validator=check_plain)
    kwargs: frozendict[str, Any] = field(factory=frozendict, converter=_freeze, validator=check_plain)


@frozen
class Constant:
    """A tensor that init code computes on the side, without random numbers: the operators that make it, in order.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        nodes: The operators; the result of the last operator is the constant.
        values: The values computed while planning, row-major, if they are few; outside equality and fingerprint, since
            the last digit of a logarithm differs between machines.
        default_dtype: torch's default dtype, which the operators follow where whole numbers become floats.
    """

    shape: tuple[int, ...] = field(converter=tuple)
    dtype: str
    nodes: tuple[Node, ...] = field(converter=tuple)
    values: tuple[Any, ...] | None = field(default=None, eq=False, repr=False, converter=_freeze, validator=check_plain)
    default_dtype: str = "float32"

    def __attrs_post_init__(self) -> None:
        if self.values is not None:
            are_numbers = all(isinstance(from_plain(value), (bool, int, float)) for value in self.values)
            if len(self.values) != prod(self.shape) or not are_numbers:
                msg = f"a constant of shape {list(self.shape)} has {prod(self.shape)} numbers, not {list(self.values)}"
                raise ValueError(msg)

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * num_bytes(self.dtype)

    def __str__(self) -> str:
        names = list(dict.fromkeys(node.op.partition(".")[0].strip("_") for node in self.nodes))
        shown = [name for name in names if name not in _HOUSEKEEPING] or ["numbers"]
        return ", ".join([*shown[:6], *(["..."] if len(shown) > 6 else [])])  # noqa: PLR2004


@frozen
class Fill:
    """Every element becomes a number."""

    value: Any = field(converter=to_plain, validator=check_plain)

    @property
    def number(self) -> bool | int | float:
        """The number, infinities included."""
        return from_plain(self.value)

    def __str__(self) -> str:
        return f"fill({_exact(self.number)})" if self.number or isinstance(self.number, bool) else "zero"


@frozen
class Map:
    """Every element goes through one of torch's pointwise in-place operators: ``x = op(x, *args, **kwargs)``.

    Args:
        op: Its name in ``torch.ops.aten``, e.g. ``mul_.Tensor``.
        args: Its arguments after the tensor, written as in a ``Node``; ``{"node": 0}`` is the first constant.
        kwargs: Its keyword arguments.
        constants: Tensors among the arguments, each in the shape of the part that is written.
    """

    op: str
    args: tuple[Any, ...] = field(default=(), converter=_freeze, validator=check_plain)
    kwargs: frozendict[str, Any] = field(factory=frozendict, converter=_freeze, validator=check_plain)
    constants: tuple[Constant, ...] = field(default=(), converter=tuple)

    def __str__(self) -> str:
        given = [self._argument(value) for value in self.args]
        given += [f"{name}={self._argument(value)}" for name, value in self.kwargs.items()]
        return f"{self.op.partition('.')[0].strip('_')}({', '.join(given)})"

    def _argument(self, value: Any) -> str:
        match value:
            case {"node": int() as number}:
                return f"[{self.constants[number]}]"
            case bool() | int() | float() | {"float": _}:
                return _exact(from_plain(value))
            case _:
                return str(value)


@frozen
class Set:
    """Every element takes its value from a constant, which has the shape of the part that is written."""

    constant: Constant

    def __str__(self) -> str:
        return f"constant({self.constant})"


What = Draw | Fill | Map | Set


@frozen
class Operation:
    """An operation on a tensor, or on a part of it.

    >>> str(Operation(Fill(0), box=((0, 1, 1), None)))
    'zero row 0'

    Args:
        what: The operation.
        box: To which elements; None for all.
    """

    what: What
    box: Box | None = None

    @property
    def overwrites(self) -> bool:
        """Whether it gives every element a value that does not depend on the element's earlier value."""
        return self.box is None and not isinstance(self.what, Map)

    def __str__(self) -> str:
        match self.box:
            case None:
                return str(self.what)
            case ((start, stop, 1), None, *rest) if not any(rest):
                return f"{self.what} row {start}" if stop == start + 1 else f"{self.what} rows {start}:{stop}"
            case box:
                return f"{self.what} [{', '.join(map(_slice, box))}]"


@frozen
class InitProgram:
    """The operations that make the values of a tensor, in order; each is pointwise.

    Args:
        operations: The operations.
        replaces: Whether the schedule asks for it in place of the values that the module has.

    >>> program = InitProgram([Operation(Normal(0, 0.02)), Operation(Fill(0), ((0, 1, 1), None))])
    >>> str(program)
    'normal(0, 0.02); zero row 0'
    """

    operations: tuple[Operation, ...] = field(converter=tuple)
    replaces: bool = False

    @property
    def constants(self) -> tuple[Constant, ...]:
        """The constants that it needs."""
        found: list[Constant] = []
        for operation in self.operations:
            match operation.what:
                case Set(constant=constant):
                    found.append(constant)
                case Map(constants=constants):
                    found += constants
                case _:
                    pass
        return tuple(found)

    def then(self, operation: Operation) -> InitProgram:
        """Return the program with a further operation; operations that it overwrites altogether are dropped.

        >>> str(InitProgram([Operation(Normal(0, 1))]).then(Operation(Fill(1))))
        'fill(1)'
        """
        return (
            evolve(self, operations=(operation,))
            if operation.overwrites
            else evolve(self, operations=(*self.operations, operation))
        )

    def __str__(self) -> str:
        return "; ".join(map(str, self.operations))


_LARGE = 10**6
_HOUSEKEEPING = frozenset(
    [
        *("alias", "clone", "copy", "detach", "empty", "expand", "full", "lift_fresh", "permute", "reshape"),
        *("select", "slice", "to_copy", "unsqueeze", "view", "zeros"),
    ]
)


def _short(number: float) -> str:
    """Write a parameter of a distribution."""
    return f"{number:.0f}" if number.is_integer() and abs(number) < _LARGE else f"{number:.3g}"


def _exact(number: float) -> str:
    """Write a number that someone wrote down."""
    return str(number) if isinstance(number, (bool, int)) else f"{number:.0f}" if number.is_integer() else f"{number:.4g}"


def _slice(interval: tuple[int, int, int] | None) -> str:
    match interval:
        case None:
            return ":"
        case (start, stop, 1):
            return str(start) if stop == start + 1 else f"{start}:{stop}"
        case (start, stop, step):
            return f"{start}:{stop}:{step}"
