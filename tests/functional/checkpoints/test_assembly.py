"""What is done to boxes of stored tensors is what torch does to the tensors themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardplan.functional.checkpoints.assembly import (
    Assembly,
    concatenated,
    miscovered,
    narrowed,
    squeezed,
    stacked,
    transposed,
)
from shardplan.specs.stored import Part, StoredTensor
from tests.helpers.checkpoint_folders import put_together


class Stored:
    """Stored tensors of different values, by key."""

    def __init__(self):
        self.tensors = {}

    def new(self, shape):
        key = f"t{len(self.tensors)}"
        self.tensors[key] = torch.rand(shape)
        return self.tensors[key], Assembly.of([Part.whole(StoredTensor("f", key, 0, shape, "float32"))])

    def value(self, assembly):
        return put_together(assembly.shape, assembly.parts, lambda stored: self.tensors[stored.key])


@given(st.data())
def test_any_row_of_operations_gives_what_torch_gives(data):
    stored = Stored()
    tensor, assembly = stored.new(tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))))
    for verb in data.draw(st.lists(st.sampled_from(["cat", "stack", "narrow", "transpose", "squeeze"]), max_size=6)):
        axis = data.draw(st.integers(0, tensor.dim() - 1))
        match verb:
            case "cat" | "stack":
                new, placed = stored.new(tuple(tensor.shape))
                join, like = (torch.cat, concatenated) if verb == "cat" else (torch.stack, stacked)
                tensor, assembly = join([tensor, new, tensor], axis), like([assembly, placed, assembly], axis)
            case "narrow":
                start = data.draw(st.integers(0, tensor.shape[axis] - 1))
                stop = data.draw(st.integers(start + 1, tensor.shape[axis]))
                tensor, assembly = tensor.narrow(axis, start, stop - start), narrowed(assembly, axis, start, stop)
            case "transpose":
                tensor, assembly = tensor.transpose(axis, -1), transposed(assembly, axis, -1)
            case "squeeze" if tensor.shape[axis] == 1 and tensor.dim() > 1:
                tensor, assembly = tensor.squeeze(axis), squeezed(assembly, axis)
    assert assembly.shape == tuple(tensor.shape)
    assert torch.equal(stored.value(assembly), tensor)
    assert miscovered(assembly.shape, assembly.parts) is None


@given(st.lists(st.tuples(*[st.tuples(st.integers(0, 3), st.integers(1, 4))] * 2), max_size=5))
def test_an_element_that_is_not_in_one_part_is_found(boxes):
    times = torch.zeros(4, 4, dtype=torch.int64)
    parts = []
    for (row, rows), (column, columns) in boxes:
        height, width = min(rows, 4 - row), min(columns, 4 - column)
        times[row : row + height, column : column + width] += 1
        stored = StoredTensor("f", "t", 0, (height, width), "float32")
        parts.append(Part(stored, ((0, height), (0, width)), (row, column), (0, 1)))
    fault = miscovered((4, 4), parts)
    assert (fault is None) == bool((times == 1).all())
    if fault is not None:
        place, count = fault
        assert times[place] == count != 1


def test_parts_with_a_hole_make_no_tensor():
    stored = StoredTensor("f", "t", 0, (2, 2), "float32")
    whole = Part.whole(stored)
    with pytest.raises(ValueError, match=r"element \[2, 0\] of \[5, 2\] is in 0 of its 2 parts"):
        Assembly.of([whole, Part(stored, whole.box, (3, 0), (0, 1))])


def test_tensors_that_do_not_go_together_are_told():
    _, one = Stored().new((2, 3))
    _, other = Stored().new((2, 4))
    assert concatenated([one, other], -1).shape == (2, 7)
    with pytest.raises(ValueError, match=r"tensors of \[2, 3\] and \[2, 4\] cannot be joined along axis 0"):
        concatenated([one, other], 0)
    with pytest.raises(ValueError, match=r"tensors of \[2, 3\] and \[2, 4\] cannot be stacked"):
        stacked([one, other], 0)
    with pytest.raises(ValueError, match="there is no axis 2 in 2 axes"):
        narrowed(one, 2, 0, 1)
