"""Values of fake tensors: known where they follow from given ones, assumed elsewhere, and never those of changed memory."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shardplan.functional.layout.local_model import fake_inputs, following
from shardplan.functional.model.fake_values import DependsOnValuesError
from shardplan.functional.model.known_values import KnownValues


def seen(code, *given):
    """Return what code gives on fake tensors for these, and how often it asked for what is not known."""
    values = KnownValues()
    with following(FakeTensorMode(allow_non_fake_inputs=True), values):
        return code(*fake_inputs(dict(enumerate(given)), values).values()), values.num_guesses


def unknown(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


GRID = torch.tensor([[1, 4, 6], [2, 2, 2]])


@pytest.mark.parametrize(
    "code",
    [
        lambda grid: grid.tolist(),
        lambda grid: int(grid.prod(-1).sum()),
        lambda grid: [size.item() for size in (grid[:, 1] * torch.arange(2)).unbind()],
        lambda grid: len(torch.repeat_interleave(grid[:, 1], grid[:, 0])),
        lambda grid: (grid == 2).nonzero().shape,
        lambda grid: (grid == 2).nonzero().tolist(),
        lambda grid: bool((grid > 0).all()),
        lambda grid: torch.equal(grid, grid.clone()),
        lambda grid: grid[grid > 2].tolist(),
        lambda grid: torch.tensor([grid[0, 1], 3]).tolist(),
        lambda grid: torch.zeros(3).fill_(grid[0, 0]).add_(1).tolist(),
        lambda grid: grid.clone().index_fill_(0, torch.tensor([1]), 7).sum().item(),
        lambda grid: torch.empty(2).tolist() if grid.dim() == 0 else grid.unique().tolist(),
    ],
)
def test_what_follows_from_given_values_is_known(code):
    assert seen(code, GRID) == (code(GRID), 0)


def test_a_change_of_memory_is_seen_through_views():
    def code(grid):
        row = grid[0]
        row.mul_(2)
        return grid.tolist()

    assert seen(code, GRID.clone()) == (code(GRID.clone()), 0)


def test_memory_into_which_unknown_values_were_written_is_not_known():
    def code(grid, x):
        row = grid[0]
        row.copy_(x)
        return bool(grid[1, 0]), row.shape

    assert seen(code, GRID, unknown(3, dtype=torch.long)) == ((False, (3,)), 1)


def test_random_numbers_are_not_known():
    assert seen(lambda: torch.ones(2).bernoulli_(1.0).tolist()) == ([0.0, 0.0], 2)


def test_masks_that_are_not_known_are_assumed_to_be_true():
    def code(x):
        mask = x > 0
        places = mask.nonzero()
        return x[mask].shape, x.masked_select(mask).shape, places.tolist(), [at.shape for at in torch.where(mask)]

    found, num = seen(code, unknown(2, 2))
    assert found == ((4,), (4,), [[0, 0], [0, 1], [1, 0], [1, 1]], [(4,), (4,)])
    assert num == 4


def test_a_known_mask_picks_as_many_entries_as_are_true():
    mask = torch.tensor([[True, False], [True, True]])
    x = unknown(2, 2, 5)
    assert seen(lambda mask, x: (x[mask].shape, x[:, mask[0]].shape), mask, x) == (((3, 5), (2, 1, 5)), 0)
    assert seen(lambda mask, x: x.masked_select(mask[..., None]).shape, mask, x) == ((15,), 0)


def test_given_tensors_and_constants_stay_as_they_are():
    grid, constant = GRID.clone(), torch.ones(2)

    def code(grid):
        grid.zero_()
        constant.add(1)
        constant[0].add_(grid[0, 0])

    seen(code, grid)
    assert torch.equal(grid, GRID)
    assert torch.equal(constant, torch.ones(2))


def test_checks_of_code_on_its_own_values_pass_where_these_are_not_known():
    def code(x):
        torch._check_tensor_all((x == 3).sum() == 2)
        return bool((x == 3).any())

    assert seen(code, unknown(4)) == (False, 2)
    with pytest.raises(RuntimeError, match="Expected cond to be True"):
        seen(code, torch.zeros(4))


def test_large_tensors_are_not_computed():
    assert seen(lambda: bool(torch.ones(2**19).all())) == (False, 1)


def test_code_that_goes_on_asking_is_stopped():
    def code(x):
        while not x.any():
            x = x + 1

    with pytest.raises(DependsOnValuesError):
        seen(code, unknown(2))
