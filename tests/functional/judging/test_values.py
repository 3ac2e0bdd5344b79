"""Values that hide nothing, and computation without chance in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardplan.functional.judging.exact import Exact
from shardplan.functional.judging.values import random_copy
from tests.helpers.models import llama


class Model(nn.Module):
    """Tensors of the kinds that initialisers leave equal, zero, or fixed."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.lora_b = nn.Parameter(torch.zeros(8, 4))
        self.gate = nn.Parameter(torch.ones(6, 8))
        self.decay = nn.Parameter(torch.log(torch.arange(1.0, 5.0)).repeat(8, 1))
        self.tied = self.lora_b
        self.embed = nn.Embedding(5, 3, padding_idx=1)
        self.register_buffer("table", torch.linspace(0, 1, 8))
        self.register_buffer("places", torch.arange(8))
        self.kept = [torch.full((2,), 0.1)]
        self.plain = torch.tensor(0.5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_two_entries_of_a_trained_tensor_are_equal(device):
    model = llama(num_hidden_layers=1) if device == "meta" else Model()
    for path, parameter in random_copy(model, 0).named_parameters():
        assert parameter.dtype == torch.float64
        assert len(parameter.unique()) == parameter.numel(), path
        assert bool((parameter != 0).all()), path
        assert 0.05 < parameter.std() < 1.5, path


def test_buffers_stay_where_code_has_computed_them_and_ties_stay_ties():
    model = Model()
    copied = random_copy(model, 0)
    assert torch.equal(copied.table, model.table.double())
    assert torch.equal(copied.places, model.places)
    assert copied.tied is copied.lora_b
    assert bool((copied.norm.running_var > 0.4).all())
    assert len(copied.norm.running_var.unique()) == 8
    assert bool((copied.norm.running_mean != 0).all())
    assert copied.kept[0].dtype == copied.plain.dtype == torch.float64
    assert model.plain.dtype == torch.float32
    assert bool((model.lora_b == 0).all())


def test_values_depend_on_the_seed_alone():
    model = Model()
    assert torch.equal(random_copy(model, 1).gate, random_copy(model, 1).gate)
    assert not torch.equal(random_copy(model, 1).gate, random_copy(model, 2).gate)


def test_random_operators_give_constants_and_are_recorded():
    x = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    with Exact(lambda: "here") as exact:
        dropped = nn.functional.dropout(x, 0.5)
        attended = nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5)
        order = torch.randperm(5)
        dropped.sum().backward()
    assert torch.equal(dropped, 2 * x)
    assert torch.equal(attended, 2 * x[None])
    assert order.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(x.grad, torch.full((3, 4), 2.0, dtype=torch.float64))
    assert [(draw.module, draw.op, draw.shape) for draw in exact.draws] == [
        ("here", "bernoulli", (3, 4)),
        ("here", "bernoulli", (1, 3, 3)),
        ("here", "randperm", (5,)),
    ]


def test_random_slopes_are_their_mean():
    x = torch.tensor([-2.0, 3.0], dtype=torch.float64, requires_grad=True)
    with Exact():
        y = nn.functional.rrelu(x, 0.25, 0.75, training=True)
        y.sum().backward()
    assert y.tolist() == [-1.0, 3.0]
    assert x.grad.tolist() == [0.5, 1.0]


def test_a_generator_of_ones_own_is_left_alone():
    with Exact() as exact:
        drawn = torch.rand(3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(1)).double())
    assert exact.draws == []


def test_attention_without_dropout_is_no_random_operator():
    q = torch.randn(1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with Exact() as exact:
        attended = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert torch.allclose(attended, nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert exact.draws == []


@pytest.mark.parametrize("rows", [(2, 6, 6), (0, 3, 6)])
def test_products_of_groups_are_those_of_torch(rows):
    offsets = torch.tensor(rows, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, generator=generator).requires_grad_()
    w = torch.randn(3, 8, 16, generator=generator).requires_grad_()
    torch._grouped_mm(x, w, offs=offsets).square().sum().backward()
    expected = x.grad, w.grad
    doubles = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    with Exact():
        torch._grouped_mm(*doubles, offs=offsets).square().sum().backward()
    for found, single in zip(doubles, expected, strict=True):
        assert torch.allclose(found.grad, single.double(), rtol=1e-4, atol=1e-4)
