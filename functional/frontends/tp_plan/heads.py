"""The heads of an attention module: their number, the tensors that they lie in, and their split."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

from attrs import frozen
from torch import nn

from ....specs.errors import Problem
from ....specs.verb_call import Options, VerbCall

if TYPE_CHECKING:
    from .declared import DeclaredPlan

_QUERY = ("num_heads", "num_attention_heads", "num_query_heads", "num_q_heads", "n_heads", "n_head")
_KEY_VALUE = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_GROUPS = ("num_key_value_groups", "num_queries_per_kv", "n_rep")
_SIZE = ("head_dim", "head_size", "qk_head_dim")
_DEPTH = 3
"""How many modules above a projection its attention may be."""


@frozen
class Heads:
    """The heads of an attention module.

    Args:
        path: The module.
        query: Query heads.
        key_value: Key and value heads.
        num: Ranks that share them.
    """

    path: str
    query: int
    key_value: int
    num: int

    @property
    def local_query(self) -> int:
        """Query heads of each rank."""
        return self.query // self.num

    @property
    def local_key_value(self) -> int:
        """Key and value heads of each rank: a repeated head where there are fewer heads than ranks."""
        return max(1, self.key_value // self.num)

    def problem(self) -> Problem | None:
        """Return why the heads cannot be given to the ranks, if they cannot."""
        few = self.query % self.num
        if not few and (self.key_value % self.num == 0 or self.num % self.key_value == 0):
            return None
        count, what = (self.query, "query") if few else (self.key_value, "key/value")
        cause = f"its {count} {what} heads cannot be given to {self.num} ranks along 'tensor'"
        fits = [
            n for n in range(1, self.num) if self.query % n == 0 and (self.key_value % n == 0 or n % self.key_value == 0)
        ]
        return Problem(self.path, cause, f"Split it over {max(fits)} ranks" if max(fits) > 1 else "Leave it whole")

    def count(self, path: str) -> int:
        """Return the number of heads in a tensor or module inside the attention: key and value heads, or query heads."""
        first = path.removeprefix(f"{self.path}.").partition(".")[0]
        is_key_value = re.match(r"(k|v|key|value)s?(_|$)", first) is not None
        return self.key_value if is_key_value else self.query

    def split(self, count: int, size: int) -> Options | None:
        """Return how an axis of ``size`` that holds ``count`` heads is split; None if they do not divide it."""
        if size % count:
            return None
        granule: Options = (("granule", size // count),) if size > count else ()
        return (*granule, ("replicate", True)) if count % self.num else granule


def attention_above(decl: DeclaredPlan, path: str) -> str | None:
    """Return the path of the nearest attention module at or above a path, if there is any."""
    names = path.split(".")
    for depth in range(_DEPTH + 1):
        above = names[: len(names) - depth]
        if not above:
            return None
        named = next((name for name in reversed(above) if not name.isdigit()), "")
        module = decl.module(".".join(above)) if _is_module(decl, ".".join(above)) else None
        if module is None or isinstance(module, (nn.ModuleList, nn.Linear)):
            continue
        if re.search(r"atte?n", named, re.IGNORECASE) or re.search(r"Att|MLA", _kind(module)):
            return ".".join(above)
    return None


def _kind(module: nn.Module) -> str:
    """Return the name of a module's class, unless the class is a layer around its attention."""
    name = type(module).__name__
    return "" if re.search(r"Layer|Block|Model", name) else name


def read_heads(decl: DeclaredPlan, path: str) -> Heads | Problem:
    """Return the heads of an attention module, from its projections, its attributes or its config, in this order."""
    module = decl.module(path)
    config = getattr(module, "config", None)
    size = first_number((module,), _SIZE)
    key = next((c for name, c in module.named_children() if re.fullmatch(r"(k|key)(_proj|_layer)?", name)), None)
    groups = first_number((module,), _GROUPS)
    key_value = first_number((module,), _KEY_VALUE)
    width = _out_features(key)
    if width and size and width % size == 0:
        key_value = width // size
    query = key_value * groups if key_value and groups else first_number((module, config), _QUERY)
    if not query:
        cause = f"this {type(module).__name__} does not say how many heads it has"
        return Problem(path, cause, "Split it with the verbs: .colwise(granule=head_dim)")
    key_value = key_value or (query // groups if groups else first_number((config,), _KEY_VALUE)) or query
    return Heads(path, query, key_value, decl.num)


def counts_heads(module: nn.Module) -> bool:
    """Tell whether a module has an attribute that counts heads."""
    return any(name in vars(module) for name in (*_QUERY, *_KEY_VALUE, *_GROUPS))


def local_sizes(decl: DeclaredPlan, heads: Heads, path: str) -> Iterator[VerbCall]:
    """Set attributes that count heads to their local values, also in the config that the module's code reads."""
    module = decl.module(path)
    local = {
        **dict.fromkeys(_QUERY, (heads.query, heads.local_query)),
        **dict.fromkeys(_KEY_VALUE, (heads.key_value, heads.local_key_value)),
        **dict.fromkeys(_GROUPS, (heads.query // heads.key_value, heads.local_query // heads.local_key_value)),
    }
    read = set(re.findall(r"self\.config\.(\w+)", forward_source(type(module))))
    values: list[tuple[str, object]] = []
    for name, (before, after) in local.items():
        if before != after and vars(module).get(name) == before:
            values.append((name, after))
        if before != after and name in read and first_number((getattr(module, "config", None),), (name,)) == before:
            values.append((f"config.{name}", after))
    if values:
        yield VerbCall(path, "set", (), tuple(values))


@lru_cache(maxsize=256)
def forward_source(cls: type) -> str:
    """Return the source of a class's forward; empty where it was written at run time."""
    try:
        return inspect.getsource(cls.forward)
    except (OSError, TypeError, AttributeError):
        return ""


@lru_cache(maxsize=256)
def source_of(cls: type) -> str:
    """Return the source of a class; empty where it was written at run time."""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def first_number(holders: Iterable[object], names: Iterable[str]) -> int | None:
    """Return the first attribute that is a whole number, holder by holder, name by name.

    >>> class Config:
    ...     num_heads = 8
    >>> first_number((None, Config), ("num_attention_heads", "num_heads"))
    8
    """
    for holder, name in product(holders, names):
        try:
            value = getattr(holder, name, None)
        except Exception:  # noqa: BLE001, S112  configs whose layers differ refuse to be asked as a whole
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _out_features(module: nn.Module | None) -> int:
    inner = getattr(module, "linear", module)
    return inner.out_features if isinstance(inner, nn.Linear) else 0


def _is_module(decl: DeclaredPlan, path: str) -> bool:
    try:
        decl.module(path)
    except AttributeError:
        return False
    return True
