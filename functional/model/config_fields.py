"""The fields of a configuration and of the configurations inside it, each with its path, and what its number counts."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from attrs import field, frozen

Role = Literal["id", "vocabulary", "position", "window", "image", "top_k", "group", "expert", "head_dim", "head", "width"]
"""What a number of a configuration counts; the first role whose pattern fits the name of the field."""

_PATTERNS: dict[Role, str] = {
    "id": r"(token|audio|image|video|start|end|eos|bos|pad|blank|sep|cls|mask)_(token_)?(id|index)s?$",
    "vocabulary": r"vocab_size|vocabulary|^codebook_size$|^num_embeddings$",
    "position": r"max_\w*positions?(_embeddings)?$|^n_positions$|^n_ctx$|^max_seq\w*$|^seq_len(gth)?$",
    "window": r"^(sliding|attention|local)_(window|attention|chunk_size)(_size)?$|^index_topk$|chunk_size$",
    "image": r"^image_size$|^patch_size$|^num_position_embeddings$|^image_seq_len\w*$|^num_image_tokens$|tokens_per_image$",
    "top_k": r"experts_per_tok|^top_?k$|^moe_top_?k$|num_selected_experts|^moe_k$",
    "group": r"^(topk_group|n_group|num_expert_groups?|moe_n_group)$",
    "expert": r"^(moe_|n_|num_)*(routed_|local_)?experts$|^zero_expert_num$",
    "head_dim": r"head_(dim|size)$|rotary_n?dims?$|^d_(head|kv)$|^(kv|key_value)_channels$|_d_head$",
    "head": r"(^|_)heads?$|^(mamba_)?n_groups$|embedding_groups$",
    "width": r"(size|dims?|width|channels?|rank|features|inner|hidden|ffn|d_model|d_ff|d_state|d_ssm|units|n_embd|embd)$",
}
_NO_WIDTH = re.compile(
    r"image|patch|kernel|window|chunk|block|batch|stride|sample|tile|crop|merge|pool|grid|tubelet|context|seq|max|queue"
    r"|mel|codebook|group|scale|step|frame"
)

Changes = Mapping["Field", Any]
"""New values by field."""


@frozen
class Field:
    """A field of a configuration.

    Args:
        config: Names of the configurations around it, outermost first: ``("text_config",)``.
        name: Its own name.
        value: Its value.
    """

    config: tuple[str, ...]
    name: str
    value: Any = field(eq=False)

    def __str__(self) -> str:
        return ".".join((*self.config, self.name))

    @property
    def number(self) -> int:
        """Its value as a whole number; 0 if it is none."""
        return self.value if is_number(self.value) else 0

    @property
    def numbers(self) -> tuple[int, ...]:
        """Its value as a list of whole numbers; empty if it is none."""
        is_list = isinstance(self.value, (list, tuple)) and all(map(is_number, self.value))
        return tuple(self.value) if is_list else ()


def is_number(value: object) -> bool:
    """Tell whether a value is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def read_fields(config: Any, above: tuple[str, ...] = ()) -> Iterator[Field]:
    """Iterate over the fields of a configuration: its own, then those of the configurations inside it."""
    public = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    for name, value in public.items():
        if not hasattr(value, "model_type"):
            yield Field(above, name, value)
    for name, value in public.items():
        if hasattr(value, "model_type"):
            yield from read_fields(value, (*above, name))


def role_of(field: Field) -> Role | None:
    """Return what a field's number counts, by the field's name; None if it is not known to count anything."""
    for role in get_args(Role):
        if re.search(_PATTERNS[role], field.name):
            return None if role == "width" and _NO_WIDTH.search(field.name) else role
    return None


def changed(config: Any, changes: Changes) -> Any:
    """Return a copy of a configuration with other values of some fields."""
    made = copy.deepcopy(config)
    for to, value in changes.items():
        holder = made
        for name in to.config:
            holder = getattr(holder, name)
        setattr(holder, to.name, value)
    return made
