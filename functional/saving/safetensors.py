"""How a safetensors file is laid out: the header first, then one tensor after another. No torch.

https://github.com/huggingface/safetensors#format. Tensors lie in the order in which the safetensors library puts them: equal
tensors give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod

from attrs import frozen
from frozendict import frozendict

from ...specs.dtypes import num_bytes
from ...specs.errors import PlanError, Problem
from ..checkpoints.formats.safetensors import DTYPES

_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
_ORDER = (
    *("int64", "float64", "complex64", "float32", "int32", "bfloat16", "float16", "int16"),
    *("float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool"),
)


@frozen
class Layout:
    """Where the tensors of a file lie.

    Args:
        header: The file's first bytes.
        starts: The first byte of each tensor in the file, in the order of their bytes.
        num_bytes: The file's length.
    """

    header: bytes
    starts: Mapping[str, int]
    num_bytes: int


def layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] = frozendict()) -> Layout:
    """Return where tensors lie in a file.

    Args:
        tensors: Dtype and shape by key.
        metadata: Strings that stand in the header.

    Raises:
        PlanError: If the format has no name for a dtype.

    >>> layout({"b": ("bool", (2,)), "w": ("float32", (2, 3))}).starts.keys()
    dict_keys(['w', 'b'])
    """
    strange = {key: dtype for key, (dtype, _) in tensors.items() if dtype not in _NAMES}
    if strange:
        cause = "safetensors has no name for the dtype {}"
        fix = 'Save it as DCP: save_checkpoint(..., format="dcp")'
        raise PlanError([Problem(key, cause.format(dtype), fix) for key, dtype in strange.items()])
    keys = tuple(sorted(tensors, key=lambda key: (_ORDER.index(tensors[key][0]), key)))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end, starts = 0, dict[str, int]()
    for key in keys:
        dtype, shape = tensors[key]
        starts[key] = start = end
        end += prod(shape) * num_bytes(dtype)
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return Layout(
        header=len(text).to_bytes(8, "little") + text,
        starts={key: first + start for key, start in starts.items()},
        num_bytes=first + end,
    )
