"""Weights that are stored as small numbers, which mean something beside their scales alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...specs.dtypes import num_bytes
from ...specs.errors import Problem
from .formats.untrusted import read_object

if TYPE_CHECKING:
    from ...specs.stored import Contents, Part
    from ...specs.tree import SpecTree
    from .key_mapping import MappedCheckpoint

_BESIDE = re.compile(
    r"(?P<of>.+?)(?:[._](?:scale|scales|scale_inv|scale_2|zero_point|zeros|absmax|nested_absmax|quant_map|nested_quant_map"
    r"|quant_state(?:\..+)?|quantization_bias|amax|qparams?))"
)
"""Keys beside a quantised tensor, after its own key: of compressed-tensors, ModelOpt, fine-grained fp8, bitsandbytes."""

_PACKED = re.compile(r"(?P<of>.+\.)(?:qweight|qzeros|g_idx|weight_packed|weight_shape)")
"""Keys in place of a weight: of GPTQ, AWQ and compressed-tensors."""

_FIX = "Let transformers dequantise it, and write it with save_pretrained"


def quantised(tree: SpecTree, mapped: MappedCheckpoint, contents: Contents) -> Iterator[Problem]:
    """Iterate over tensors that are stored quantised, by what lies in the files and not by what a configuration says.

    Loaded without their scales they would be other numbers, and to leave the scales out, or to let init code make the
    weights, would hide it: no pattern of the user's lets them pass.
    """
    method = _method(contents.folder.path)
    found = list(_found(tree, mapped, contents, f" ({method})" if method else ""))
    yield from found
    if method and mapped.extra and not found:
        some = f"{len(mapped.extra)} of its keys, such as {next(iter(mapped.extra))}"
        cause = f"its weights are quantised ({method}), and the model has no tensor for {some}"
        yield Problem("config.json", cause, _FIX)


def _found(tree: SpecTree, mapped: MappedCheckpoint, contents: Contents, told: str) -> Iterator[Problem]:
    beside = _keys_beside(mapped, contents.tensors)
    for spec in tree.values():
        stored = next((mapped.tensors[path] for path in spec.paths if path in mapped.tensors), None)
        keys = () if stored is None else stored.keys
        others = [other for key in keys for other in beside.get(key, ())]
        small = "" if stored is None else _smaller(stored.parts, spec.dtype)
        if others or small:
            what = f"it is stored as {small}" if small else "it is stored quantised"
            by = f" beside {', '.join(others)}" if others else ""
            cause = f"{what}{told}{by}, and the model has no tensor for scales: it would be loaded as other numbers"
            yield Problem(spec.path, cause, _FIX, spec.type)
    for key in mapped.extra:
        if (match := _PACKED.fullmatch(key)) and f"{match['of']}weight" not in contents.tensors:
            cause = f"it is a weight in packed form{told}, which no tensor of the model can take"
            yield Problem(key, cause, _FIX)


def _keys_beside(mapped: MappedCheckpoint, tensors: Mapping[str, object]) -> dict[str, list[str]]:
    """Return the keys that serve no tensor of the model and stand beside a stored tensor, by that tensor's key."""
    found: dict[str, list[str]] = {}
    for key in mapped.extra:
        if (match := _BESIDE.fullmatch(key)) and match["of"] in tensors:
            found.setdefault(match["of"], []).append(key)
    return found


def _smaller(parts: tuple[Part, ...], wanted: str) -> str:
    """Return the dtype in which floating-point numbers are stored, if it is one of 8 bits; empty if it is not."""
    dtypes = {part.stored.dtype for part in parts}
    is_small = all(dtype.startswith("float8") or dtype in {"int8", "uint8"} for dtype in dtypes)
    return dtypes.pop() if is_small and "float" in wanted and num_bytes(wanted) > 1 else ""


def _method(folder: str) -> str:
    """Return the method of quantisation that a folder's configuration names, also of a model within the model."""
    if not (Path(folder) / "config.json").is_file():
        return ""
    config = read_object(folder, "config.json")
    for held in (config, *(part for part in config.values() if isinstance(part, dict))):
        match held.get("quantization_config") or held.get("compression_config"):
            case {"quant_method": str(method)}:
                return method
            case _:
                pass
    return ""
