"""All tensors of a model: an immutable, ordered collection, looked up by path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from attrs import field, frozen

from .param import ParamSpec
from .pattern import closest, compile_pattern


@frozen(repr=False)
class SpecTree(Mapping[str, ParamSpec]):
    """The tensors of a model in the order of its modules, each once, found by any of its paths.

    Iterating gives canonical paths, ``values()`` the specs. Two trees are equal when their specs are, in order.

    Raises:
        ValueError: If two specs claim the same path.

    >>> tree = SpecTree([ParamSpec("embed.weight", (8, 4), "float32", tie=("head.weight",))])
    >>> tree["head.weight"] is tree["embed.weight"], list(tree)
    (True, ['embed.weight'])
    """

    specs: tuple[ParamSpec, ...] = field(default=(), converter=tuple)

    def __attrs_post_init__(self) -> None:
        num_paths = sum(len(spec.paths) for spec in self.specs)
        if len(self._by_path) < num_paths:
            seen: set[str] = set()
            twice = [path for spec in self.specs for path in spec.paths if path in seen or seen.add(path)]
            msg = f"two tensors claim the path {twice[0]!r}"
            raise ValueError(msg)

    @cached_property
    def _by_path(self) -> dict[str, ParamSpec]:
        return {path: spec for spec in self.specs for path in spec.paths}

    def __getitem__(self, path: str) -> ParamSpec:
        try:
            return self._by_path[path]
        except KeyError:
            near = closest(path, self._by_path)
            msg = f"no tensor {path!r}" + (f"; the closest are {', '.join(near)}" if near else "")
            raise KeyError(msg) from None

    def get(self, path: str, default: Any = None) -> Any:
        """Return the spec of a path, or ``default``; a miss is cheap, as it names no closest paths."""
        return self._by_path.get(path, default)

    def __contains__(self, path: object) -> bool:
        return path in self._by_path

    def __iter__(self) -> Iterator[str]:
        return (spec.path for spec in self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def all_paths(self) -> Iterable[str]:
        """Every path, aliases too."""
        return self._by_path.keys()

    def select(self, pattern: str) -> tuple[ParamSpec, ...]:
        """Return the tensors with a path that matches a glob, each once, in order.

        >>> tree = SpecTree(ParamSpec(f"layers.{i}.{n}_proj.weight", (4, 4), "float32") for i in (0, 1) for n in "qo")
        >>> [spec.path for spec in tree.select("layers.*.[qkv]_proj.weight")]
        ['layers.0.q_proj.weight', 'layers.1.q_proj.weight']
        """
        matches = compile_pattern(pattern).fullmatch
        return tuple(spec for spec in self.specs if any(map(matches, spec.paths)))

    def map(self, function: Callable[[ParamSpec], ParamSpec]) -> SpecTree:
        """Return the tree of ``function(spec)`` for every spec, in order."""
        return SpecTree(map(function, self.specs))

    def replace(self, changed: Mapping[str, ParamSpec]) -> SpecTree:
        """Return the tree with some specs exchanged, by canonical path."""
        return self.map(lambda spec: changed.get(spec.path, spec))

    def __repr__(self) -> str:
        return f"SpecTree({len(self.specs)} tensors)"
