"""Calls of a schedule's verbs as data, and the patterns that apply a call to all layers at once."""

from __future__ import annotations

import re
from collections.abc import Sequence

from attrs import frozen

from .pattern import compile_pattern

Options = tuple[tuple[str, object], ...]
"""Keyword arguments of a verb, in order."""


@frozen
class VerbCall:
    """A call of a verb on a path or a pattern.

    Args:
        path: Module or tensor, or a pattern of them.
        verb: Name of a method of ``Schedule``.
        args: Its positional arguments.
        options: Its keyword arguments.

    >>> print(VerbCall("model.layers.*.mlp.down_proj", "sync", ("forward_post", "all_reduce")))
    .at['model.layers.*.mlp.down_proj'].sync('forward_post', 'all_reduce')
    """

    path: str
    verb: str
    args: tuple[object, ...] = ()
    options: Options = ()

    def __str__(self) -> str:
        told = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.options)]
        return f".at[{self.path!r}].{self.verb}({', '.join(told)})"


def wildcard(path: str) -> str:
    """Return the path with ``*`` for numbers of layers, as the plans of transformers name them.

    >>> wildcard("model.layers.12.mlp.experts.3.w1"), wildcard("lm_head")
    ('model.layers.*.mlp.experts.*.w1', 'lm_head')
    """
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def patterns(paths: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return patterns that select paths which differ in their numbers, and no other known path: a single one if possible.

    >>> patterns(["layers.0.up", "layers.1.up"], ["layers.0.up", "layers.1.up", "layers.2.up"])
    ['layers.{0,1}.up']
    """
    pattern = wildcard(paths[0])
    if "*" not in pattern or len(paths) == 1:
        return list(paths)
    matches = compile_pattern(pattern).fullmatch
    if all(path in paths for path in known if matches(path)):
        return [pattern]
    names = [path.split(".") for path in paths]
    varying = [place for place, column in enumerate(zip(*names, strict=True)) if len(set(column)) > 1]
    if len(varying) != 1:
        return list(paths)
    (place,) = varying
    numbers = ",".join(parts[place] for parts in names)
    return [".".join([*names[0][:place], f"{{{numbers}}}", *names[0][place + 1 :]])]
