"""Folders as ``save_pretrained`` writes them, and boxes of tensors put together by plain slicing."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file

from shardplan.functional.checkpoints.sources import checkpoint_sources
from shardplan.functional.model.read import read_tensors
from shardplan.specs import Checkpoint
from shardplan.specs.source import Loaded


def sources(model, folder, **wishes):
    """What ``checkpoint_sources`` says of all tensors of a model."""
    tree, problems = read_tensors(model)
    assert not problems
    return checkpoint_sources(model, tree, Checkpoint(folder, **wishes))


def put_together(shape, parts, tensor_of):
    """The tensor that parts make of the tensors that ``tensor_of`` gives for what is stored."""
    out = torch.empty(shape, dtype=tensor_of(parts[0].stored).dtype)
    times = torch.zeros(shape, dtype=torch.int32)
    for part in parts:
        taken = tensor_of(part.stored)[tuple(slice(*interval) for interval in part.box)]
        unnamed = [axis for axis in range(taken.dim()) if axis not in part.axes]
        taken = taken.permute([*(axis for axis in part.axes if axis >= 0), *unnamed]).reshape(part.shape)
        place = tuple(slice(start, start + size) for start, size in zip(part.at, part.shape, strict=True))
        out[place] = taken
        times[place] += 1
    assert (times == 1).all()
    return out


def loaded(tree, folder):
    """The values of the tensors that are read, by canonical path."""
    files = {path.name: load_file(path) for path in Path(folder).glob("*.safetensors")}
    return {
        spec.path: put_together(spec.orig_shape, spec.source.parts, lambda stored: files[stored.file][stored.key])
        for spec in tree.values()
        if isinstance(spec.source, Loaded)
    }


def write_index(folder):
    """Write the index of all files of a folder, as it is now."""
    places = {key: path.name for path in sorted(Path(folder).glob("*.safetensors")) for key in load_file(path)}
    text = json.dumps({"metadata": {}, "weight_map": places})
    (Path(folder) / "model.safetensors.index.json").write_text(text)
    return places


def safetensors_bytes(header, data=b""):
    """A file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
