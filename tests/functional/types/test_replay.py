"""A tape says what the model computes: run again on values, call by call, it gives the model's outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention
from torch.utils._pytree import tree_leaves

from shardplan.functional import create_schedule
from shardplan.functional.layout.local_model import LocalModel
from shardplan.functional.model.read import first_argument
from shardplan.functional.types.record import Stopped, record_whole
from shardplan.specs import Mesh
from tests.helpers.replay import replayed


class Code(nn.Module):
    """Runs some code."""

    def __init__(self, run):
        super().__init__()
        self.run, self.weight, self.counts = run, nn.Parameter(torch.rand(6, 4)), nn.Buffer(torch.arange(6.0))

    def forward(self, x):
        return self.run(self, x)


def writes_through_views(model, x):
    y = x @ model.weight
    first, second = y[:, :2], y[:, 2:]
    first.mul_(2)
    y[0] = 1
    second[:, 1:].add_(first[:, :1])
    flat = y.view(-1)
    flat[::2] = flat[1::2]
    return y + y.flatten()[3], second


def changes_what_it_reads(model, x):
    model.counts.add_(1)
    scaled = x * model.counts
    model.counts[2:].mul_(scaled[0, 0])
    return scaled + model.counts, torch.add(x, 1, out=torch.empty(3, 6))


def picks_and_joins(model, x):
    order = x[:, 0].argsort()
    y = torch.cat([x[order], x.index_select(0, order.flip(0))], 1).repeat_interleave(2, dim=0)
    places = torch.arange(6) > 2
    return torch.where(places, y[:, :6], y[:, 6:])[:, places], y.masked_fill(y > 0.5, 0).cumsum(1)


def attends(model, x):
    q = torch.einsum("bi,ij->bj", x, model.weight).unflatten(-1, (2, 2)).transpose(0, 1)
    out = scaled_dot_product_attention(q, q, q, is_causal=True)
    return pad(out.transpose(0, 1).reshape(3, -1), (1, 2)), interpolate(out, scale_factor=2)


def layer():
    return nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: Code(writes_through_views), (3, 6)),
        (lambda: Code(changes_what_it_reads), (3, 6)),
        (lambda: Code(picks_and_joins), (3, 6)),
        (lambda: Code(attends), (3, 6)),
        (lambda: nn.TransformerEncoder(layer(), 4, enable_nested_tensor=False), (2, 3, 6)),
        (lambda: nn.LSTM(6, 4, 2, bidirectional=True), (3, 2, 6)),
        (lambda: nn.GRU(6, 4), (3, 2, 6)),
        (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.GroupNorm(2, 6), nn.RMSNorm(3)), (2, 4, 5)),
    ],
)
def test_a_tape_gives_what_the_model_gives(model, shape):
    torch.manual_seed(0)
    model = model().eval()
    inputs = {first_argument(model): torch.rand(shape)}
    sch = create_schedule(model, Mesh())
    tape = record_whole(LocalModel(model, sch.mesh, sch.tree, example_inputs=inputs), skip=False)
    assert not isinstance(tape, Stopped), repr(tape.error)
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad():
        expected = [leaf.clone() for leaf in tree_leaves(model(**inputs)) if isinstance(leaf, torch.Tensor)]
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        found = replayed(tape, model, inputs)
    torch.testing.assert_close(found, expected)  # attention of torch runs a faster kernel without gradients
