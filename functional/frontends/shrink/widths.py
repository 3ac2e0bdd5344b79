"""Heads, the features of a head, and widths: small numbers with the products, quotients and sums of the large ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import reduce
from math import gcd, lcm
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from ...model.config_fields import Changes, Field
from .sizes import Role, alike, by_role, fewer

if TYPE_CHECKING:
    from ....specs.mesh import Mesh

_MAIN = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim", "emb_dim", "width", "embedding_size")
"""Names of the width of activations between layers, likeliest first."""

_LEAST = 32
_LARGE = 16
_UNIT = 8
_ROW = 4
"""Numbers that lie in 16 bytes, as rows of a rank's part do in grouped matrix products."""

_GROUPS = 32
"""Groups of a group norm, which are often no field of a configuration."""

Sections = Mapping[tuple[str, ...], Sequence[int]]
"""The parts of rotary embeddings in several dimensions, by configuration."""


def small_widths(fields: Sequence[Field], mesh: Mesh, sections: Sections) -> dict[str, Changes]:
    """Return new values of the fields that hold heads, features of a head, and widths.

    Equal widths stay equal, in all configurations, and different ones different.

    Args:
        fields: The fields of all configurations.
        mesh: The ranks; what divides by their number along ``tensor`` does so afterwards, and nothing else.
        sections: Parts of rotary embeddings that the model's code uses, also where no field names them.
    """
    with_words = {of.config for of in by_role(fields)["vocabulary"]}
    images: dict[int, int] = {}
    heads: dict[Field, Any] = {}
    widths: dict[Field, Any] = {}
    for config in sorted(dict.fromkeys(of.config for of in fields), key=lambda config: config not in with_words):
        own = [of for of in fields if of.config == config]
        small = _Widths.of(own, mesh.tensor, images, sections.get(config, ()), is_text=config in with_words)
        heads |= small.heads_and_features()
        widths |= small.widths()
    return {"widths": widths, "heads": heads}


@frozen(eq=False)
class _Widths:
    """The heads and widths of one configuration.

    Args:
        fields: Its fields, by role.
        named: Its fields, by name.
        num: Ranks along ``tensor``.
        images: New widths by old width, of all configurations; filled.
        sections: Parts of its rotary embedding.
        is_text: Whether it has a vocabulary.
        main: The width of activations between layers; 0 if there is none.
        heads: New numbers of heads, by old number.
        features: New numbers of features of a head, by old number.
        own: New widths where those of other configurations do not fit.
    """

    fields: Mapping[Role, Sequence[Field]]
    named: Mapping[str, Field]
    num: int
    images: dict[int, int]
    sections: Sequence[int]
    is_text: bool
    main: int
    heads: Mapping[int, int]
    features: dict[int, int] = field(factory=dict)
    own: dict[int, int] = field(factory=dict)

    @classmethod
    def of(
        cls, fields: Sequence[Field], num: int, images: dict[int, int], sections: Sequence[int], *, is_text: bool
    ) -> _Widths:
        """Return the small heads, features and main width of a configuration."""
        roles = by_role(fields)
        named = {of.name: of for of in fields}
        main = next((named[name].number for name in _MAIN if name in named and named[name].number >= _LARGE), 0)
        heads = fewer([number for of in roles["head"] for number in _numbers(of, is_text=is_text)], num)
        small = cls(roles, named, num, images, sections, is_text, main, heads)
        small.features.update(small._features())
        if main:
            small.own[main] = small._main_width()
            images.setdefault(main, small.own[main])
        return small

    def heads_and_features(self) -> dict[Field, Any]:
        """Return the new values of heads, of their features, and of the parts of rotary embeddings."""
        changes = {of: self._mapped(of, self.heads) for of in self.fields["head"]}
        changes |= {of: self._mapped(of, self.features) for of in self.fields["head_dim"]}
        expand = next((of.number for name, of in self.named.items() if name.endswith("expand")), 0)
        for heads in self.fields["head"] if expand and self.main else ():  # the heads of a state-space model
            for dim in self.fields["head_dim"]:
                if heads.number * dim.number == expand * self.main:
                    changes[dim] = expand * self.own[self.main] // self.heads[heads.number]
        if "rope_parameters" in self.named:
            rope = self.named["rope_parameters"]
            changes[rope] = self._rotary(rope.value)
        return changes

    def widths(self) -> dict[Field, Any]:
        """Return the new values of widths."""
        changes: dict[Field, Any] = {}
        for of in self.fields["width"]:
            numbers = _numbers(of, is_text=self.is_text)
            if numbers and min(numbers) >= _LARGE:
                changes[of] = self._mapped(of, {number: self._width(number, of.name) for number in numbers})
        return changes

    def _features(self) -> dict[int, int]:
        """Return the features of heads: a few times a unit, in the ratios that they had, so that sums stay right."""
        values = sorted({n for of in self.fields["head_dim"] for n in _numbers(of, is_text=self.is_text)})
        large = [value for value in values if value >= _LARGE]
        if not large:
            return {value: value for value in values}
        unit = self._unit()
        joined = [heads for heads in self.heads for dim in large if heads * dim == self.main]
        while joined and min(self.heads[heads] for heads in joined) * unit < _LEAST:
            unit *= 2
        common = reduce(gcd, large)
        is_far = large[-1] // common > _UNIT
        small = {v: min(v, unit * (at + 1 if is_far else v // common)) for at, v in enumerate(large)}
        return {value: small.get(value, value) for value in values}

    def _unit(self) -> int:
        """Return features of which every part of a rotary embedding gets some."""
        unit = _UNIT
        while self.head and sum(self.sections) * unit // self.head < len(self.sections):
            unit *= 2
        return unit

    @property
    def head(self) -> int:
        """The features of a head of the large model; 0 if it has no heads."""
        named = self.named["head_dim"].number if "head_dim" in self.named else 0
        return named or next((self.main // of.number for of in self.fields["head"] if of.number), 0)

    def _main_width(self) -> int:
        width = self.main
        attending = {of.number for of in self.fields["head"] if re.search(r"att|^num_heads$|^n_heads?$", of.name)}
        units = {heads: self._unit() if heads in attending else 2 for heads in self.heads}
        steps = (new * gcd(width // heads, units[heads]) for heads, new in self.heads.items() if width % heads == 0)
        step = reduce(lcm, steps, 2)
        products = {heads * dim: new * small for heads, new in self.heads.items() for dim, small in self.features.items()}
        if width in products:
            return min(width, products[width])
        if width in self.images and self.images[width] % step == 0:
            return self.images[width]
        return alike(width, self.num, least=_LEAST, step=step, taken={*products.values(), *self.images.values()})

    def _width(self, width: int, name: str) -> int:
        known = self.own | {old: new for old, new in self.images.items() if old not in self.own}
        if width in known:
            return known[width]
        for heads, new in self.heads.items():
            for dim, small in self.features.items():
                if heads > 1 and heads * dim == width:
                    return min(width, new * small)
        times, rest = divmod(width, self.main) if self.main else (0, 1)
        if not rest and times <= _UNIT:
            self.own[width] = times * self.own[self.main]
        else:
            least = self.own[self.main] if self.main and width > self.main else _LARGE
            step = gcd(width, _GROUPS if "channels" in name else _UNIT)
            self.images[width] = alike(width, _ROW * self.num, least=least, step=step, taken=known.values())
        return self.own[width] if width in self.own else self.images[width]

    def _rotary(self, rope: Any) -> Any:
        """Return the parameters of a rotary embedding whose parts fill the features of a small head."""
        if not self.sections or not self.head or not isinstance(rope, Mapping):
            return rope
        main = self.own.get(self.main, 0)
        heads = next((self.heads[of.number] for of in self.fields["head"] if of.number), 1)
        new = self.features.get(self.head, main // heads)
        total = max(len(self.sections), sum(self.sections) * new // self.head)
        parts = [max(1, section * total // sum(self.sections)) for section in self.sections]
        return {**rope, "mrope_section": [*parts[:-1], total - sum(parts[:-1])]}

    @staticmethod
    def _mapped(of: Field, images: Mapping[int, int]) -> Any:
        if of.number:
            return images.get(of.number, of.number)
        return type(of.value)(images.get(number, number) for number in of.numbers)


def _numbers(of: Field, *, is_text: bool) -> Sequence[int]:
    """Return the numbers that a field holds: one, or a few for many layers; none for the stages of a pyramid."""
    if of.number:
        return [of.number]
    return sorted(set(of.numbers)) if is_text or len(of.numbers) > 2 * len(set(of.numbers)) else []
