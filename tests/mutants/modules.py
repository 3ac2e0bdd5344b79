"""Small models of torch's modules alone, and the schedules that split them by hand."""

from __future__ import annotations

import torch
from torch import nn

from shardplan.functional import create_schedule

WIDTH, NUM_HEADS, VOCAB, PADDED = 16, 4, 24, 30


class Attention(nn.Module):
    """Attention with q, k and v in one linear module, and dropout of the probabilities."""

    def __init__(self, p):
        super().__init__()
        self.num_heads = NUM_HEADS
        self.qkv, self.out, self.dropout = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(p)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        weights = self.dropout(torch.softmax(q @ k.transpose(-1, -2), -1))
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """A feed-forward block, with dropout of its hidden features."""

    def __init__(self, p, hidden):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH), nn.Dropout(p)

    def forward(self, x):
        return self.down(self.dropout(torch.tanh(self.up(x))))


class Layer(nn.Module):
    """A layer whose norms stand before its blocks, with dropout of what is added to the residual."""

    def __init__(self, p, hidden):
        super().__init__()
        self.norm, self.attention, self.dropout = nn.LayerNorm(WIDTH), Attention(p), nn.Dropout(p)
        self.feed_norm, self.feed = nn.LayerNorm(WIDTH), FeedForward(p, hidden)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm(x)))
        return x + self.dropout(self.feed(self.feed_norm(x)))


class Encoder(nn.Module):
    """An encoder of two layers, whose head may be tied to the embedding."""

    def __init__(self, p=0.0, *, hidden=24, is_tied=False):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer(p, hidden) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        if is_tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Energy(nn.Module):
    """The logarithm of the sum of the exponentials of all logits: padding must not be in it."""

    def __init__(self):
        super().__init__()
        self.embed, self.feed = nn.Embedding(PADDED, WIDTH), FeedForward(0.0, 27)
        self.norm, self.head, self.sum = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, PADDED), SumOfLast()

    def forward(self, ids):
        x = self.embed(ids)
        return torch.log(self.sum(torch.exp(self.head(self.norm(x + self.feed(x))))))


class SumOfLast(nn.Module):
    """The sum along the last axis."""

    def forward(self, x):
        return x.sum(-1)


def encoder(mesh, *, p=0.0, is_tied=False):
    """Return an encoder's schedule, with random numbers of its own where activations are parts."""
    with torch.device("meta"):
        sch = create_schedule(Encoder(p, is_tied=is_tied), mesh)
    local = {"num_heads": NUM_HEADS // mesh.tensor}
    sch = sch.at["layers.*.attention.qkv"].colwise(blocks=(WIDTH,) * 3, granule=WIDTH // NUM_HEADS)
    sch = sch.at["layers.*.attention"].set(**local).at["layers.*.attention.out"].rowwise(granule=WIDTH // NUM_HEADS)
    sch = sch.at["layers.*.feed.up"].colwise().at["layers.*.feed.down"].rowwise()
    if p:
        sch = sch.at["layers.*.{attention,feed}.dropout"].fork_rng()
    return sch.at["embed"].vocab_parallel().at["head"].colwise(gather_output=True)


def sequence(mesh, *, p=0.0):
    """Return an encoder's schedule with the sequence split outside of its blocks, also for the dropout there."""
    with torch.device("meta"):
        sch = create_schedule(Encoder(p), mesh)
    sch = sch.at["embed"].vocab_parallel(sequence_axis=1)
    split = {"blocks": (WIDTH,) * 3, "granule": WIDTH // NUM_HEADS}
    sch = sch.at["layers.*.attention.qkv"].colwise(sequence_axis=1, **split)
    sch = sch.at["layers.*.attention"].set(num_heads=NUM_HEADS // mesh.tensor)
    sch = sch.at["layers.*.attention.out"].rowwise(sequence_axis=1, granule=WIDTH // NUM_HEADS)
    sch = sch.at["layers.*.feed.up"].colwise(sequence_axis=1).at["layers.*.feed.down"].rowwise(sequence_axis=1)
    sch = sch.at["layers.*.{norm,feed_norm}"].sum_gradient().at["norm"].sum_gradient()
    if p:
        sch = sch.at["layers.*.{attention,feed}.dropout"].fork_rng().at["layers.*.dropout"].fork_rng()
    return sch.at["head"].colwise(sequence_axis=1, gather_output=True)


def energy(mesh):
    """Return the schedule of an energy: uneven hidden features, padded rows of the embedding and the head."""
    with torch.device("meta"):
        sch = create_schedule(Energy(), mesh)
    sch = sch.at["embed"].vocab_parallel(pad_to_multiple=8)
    sch = sch.at["feed.up"].colwise(uneven=True).at["feed.down"].rowwise(uneven=True)
    return sch.at["head"].colwise(pad_to_multiple=8).at["sum"].sync("forward_post", "all_reduce")
