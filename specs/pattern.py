"""Paths selected by glob: ``*`` within a name, ``**`` across names, ``[qkv]``, ``{gate,up}``."""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_TOKEN = re.compile(r"(?:(?<=[.{,])|^)\*\*\.|\*\*|\*|\?|\[!?[^\]!][^\]]*\]|\{|\}|,|[^*?\[\]{},]+|.")
_NUM_CLOSEST = 3


@lru_cache(maxsize=1024)
def compile_pattern(pattern: str) -> re.Pattern[str]:  # noqa: C901, PLR0912  one case a token
    """Return the regular expression that matches the paths selected by ``pattern``.

    ``**.`` stands for any number of names, none included; ``?`` for a character of a name.

    Raises:
        ValueError: If a bracket or brace is not closed.

    >>> bool(compile_pattern("model.layers.*.self_attn.[qkv]_proj").fullmatch("model.layers.0.self_attn.q_proj"))
    True
    >>> bool(compile_pattern("**.{gate,up}_proj.weight").fullmatch("up_proj.weight"))
    True
    >>> bool(compile_pattern("model.*.weight").fullmatch("model.layers.0.weight"))
    False
    """
    depth = 0
    parts: list[str] = []
    for token in _TOKEN.findall(pattern):
        match token:
            case "**.":
                parts.append(r"(?:.+\.)?")
            case "**":
                parts.append(".+")
            case "*":
                parts.append("[^.]*")
            case "?":
                parts.append("[^.]")
            case "{":
                depth += 1
                parts.append("(?:")
            case "}" if depth:
                depth -= 1
                parts.append(")")
            case "," if depth:
                parts.append("|")
            case "[" | "]" | "}":
                msg = f"pattern {pattern!r}: {token!r} has no partner"
                raise ValueError(msg)
            case _ if token.startswith("["):
                negated, inside = ("^", token[2:-1]) if token.startswith("[!") else ("", token[1:-1])
                escaped = "".join(f"\\{c}" if c in "\\^[&~|" else c for c in inside).replace("--", r"-\-")
                parts.append(rf"(?!\.)[{negated}{escaped}]")
            case _:
                parts.append(re.escape(token))
    if depth:
        msg = f"pattern {pattern!r}: '{{' is not closed"
        raise ValueError(msg)
    try:
        return re.compile(("(?=.)" if pattern else "") + "".join(parts))
    except re.error as error:
        msg = f"pattern {pattern!r}: {error}"
        raise ValueError(msg) from None


def closest(pattern: str, paths: Iterable[str]) -> list[str]:
    """Return the paths that look most like ``pattern``, best first, at most three.

    >>> closest("model.layer.0.mlp", ["model.layers.0.mlp", "lm_head"])
    ['model.layers.0.mlp']
    """
    plain = re.sub(r"\*+", "0", pattern)
    return get_close_matches(plain, dict.fromkeys(paths), n=_NUM_CLOSEST, cutoff=0.4)
