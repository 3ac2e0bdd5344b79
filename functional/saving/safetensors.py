"""Lay out a safetensors file: the header first, then one tensor after another.

https://github.com/huggingface/safetensors#format. Tensors lie in the order of the safetensors library, so that equal tensors
give equal files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from attrs import frozen
from frozendict import frozendict
from torch import Tensor

from ...specs.dtypes import num_bytes
from ...specs.errors import PlanError, Problem
from ..checkpoints.checksum import position_sum
from ..checkpoints.formats.safetensors import DTYPES

_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
_ORDER = (
    *("int64", "float64", "complex64", "float32", "int32", "bfloat16", "float16", "int16"),
    *("float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool"),
)
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64, 16: torch.uint64}


@frozen
class FileLayout:
    """The layout of a safetensors file.

    Args:
        header: Its first bytes, up to the first tensor.
        starts: First byte of each tensor in the file, in the order of their bytes.
        num_bytes: Length of the file.
    """

    header: bytes
    starts: Mapping[str, int]
    num_bytes: int


def file_layout(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] = frozendict()
) -> FileLayout:
    """Lay out tensors in a file.

    Args:
        tensors: Dtype and shape by key.
        metadata: The header's ``__metadata__``.

    Raises:
        PlanError: If the format has no name for a dtype.

    >>> file_layout({"b": ("bool", (2,)), "w": ("float32", (2, 3))}).starts.keys()
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
    return FileLayout(
        header=len(text).to_bytes(8, "little") + text,
        starts={key: first + start for key, start in starts.items()},
        num_bytes=first + end,
    )


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, without a copy if it is contiguous."""
    elements: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(elements)


def sum_of(tensor: Tensor) -> int:
    """Return the checksum of a tensor on the CPU.

    >>> sum_of(torch.tensor([7, 0, 2], dtype=torch.int16))
    17
    """
    return position_sum(tensor.contiguous().view(-1).view(_UNSIGNED[tensor.element_size()]).numpy()) if tensor.numel() else 0
