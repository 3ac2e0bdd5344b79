"""Recurrences along tokens: of split features, of heads, and within what a rank has of the hidden features."""

from __future__ import annotations

import torch
from torch import nn

from .blocks import HEAD_DIM, HEADS, WIDE, WIDTH, Behind, as_heads, mlp, scheduled, split_between, split_mlp, x
from .entry import right, wrong


class _Decay(nn.Module):
    """A state of each feature that decays by its own factor, as in diagonal state spaces."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.empty(WIDE))

    def reset_parameters(self):
        nn.init.normal_(self.decay)

    def forward(self, y):
        state, states = torch.zeros_like(y[:, 0]), []
        for token in y.unbind(1):
            state = state * self.decay.sigmoid() + token
            states.append(state)
        return torch.stack(states, 1).tanh()


@right("a recurrence of each feature for itself")
def decay():
    sch, inputs = split_between(_Decay())
    return sch.at["middle.decay"].shard(axis=0), inputs


class _Recurrent(nn.Module):
    """A state that is mixed by a matrix in each step: of all features, or of the features of each head."""

    def __init__(self, *shape):
        super().__init__()
        self.mix = nn.Parameter(torch.empty(shape))

    def reset_parameters(self):
        nn.init.normal_(self.mix)

    def forward(self, y):
        y = as_heads(y) if self.mix.dim() > 2 else y
        state, states = torch.zeros_like(y[:, 0]), []
        for token in y.unbind(1):
            state = (self.mixed(state) + token).tanh()
            states.append(state)
        return torch.stack(states, 1).reshape(*y.shape[:2], -1)

    def mixed(self, state):
        if self.mix.dim() > 2:
            return torch.einsum("bhd,hde->bhe", state, self.mix)
        return state @ self.mix[: state.shape[-1]]


@right("a recurrence within each head")
def heads():
    sch, inputs = split_between(_Recurrent(HEADS, HEAD_DIM, HEAD_DIM))
    return sch.at["middle.mix"].shard(axis=0), inputs


@wrong("a recurrence within the hidden features of a rank", where="middle")
def local_hidden_features():
    """Each rank has the columns that its features need, and of them the rows of the first features."""
    sch, inputs = split_between(_Recurrent(WIDE, WIDE))
    return sch.at["middle.mix"].shard(axis=1), inputs


class _Batches(nn.Module):
    """A recurrent layer between two places where a sequence can be split and joined."""

    def __init__(self):
        super().__init__()
        self.first, self.start = nn.Linear(WIDTH, WIDTH), nn.Identity()
        self.cell, self.end = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Identity()

    def forward(self, x):
        return self.end(self.cell(self.start(self.first(x)))[0])


def _batches(axis):
    sch = scheduled(_Batches).at["start"].sync("backward_pre", "all_gather", axis=axis)
    return sch.at["end"].sync("forward_post", "all_gather", axis=axis), x(4, 6)


@wrong("a recurrent layer along a split sequence", where="cell")
def split_sequence():
    return _batches(1)


@wrong("a recurrent layer on split batches, its gradients not summed", where="cell")
def split_batches():
    return _batches(0)


@right("a recurrent layer on split batches, its gradients summed")
def split_batches_summed():
    sch, inputs = _batches(0)
    return sch.at["cell"].sum_gradient(), inputs


class _Cell(nn.Module):
    """A recurrent layer whose outputs are whole, before a feed-forward block."""

    def __init__(self):
        super().__init__()
        self.cell, self.inner = nn.LSTM(WIDTH, WIDTH, batch_first=True), mlp()

    def forward(self, y):
        return self.inner(self.cell(y)[0])


@right("a recurrent layer on whole activations, before split layers")
def whole_cell():
    return split_mlp(scheduled(lambda: Behind(_Cell())), "body.inner."), x()
