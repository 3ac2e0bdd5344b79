"""Public reports of sequences that are split over tensor ranks: norms, biases, adapters and dropout on them."""

from __future__ import annotations

import torch
from torch import nn

from .blocks import WIDE, WIDTH, Attention, scheduled, x
from .entry import right, wrong

TOKENS = 6


class _Block(nn.Module):
    """A norm and feed-forward layers on a sequence that is split outside them, and a last norm."""

    def __init__(self):
        super().__init__()
        self.first, self.start = nn.Linear(WIDTH, WIDTH), nn.Identity()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)
        self.last_norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.start(self.first(x))
        y = y + self.down(self.up(self.norm(y)).relu())
        return self.head(self.last_norm(y))


def _split_tokens(make, *, columns="up", rows="down", norms="{norm,last_norm}"):
    """Split the sequence behind the first layer, but not within the block's layers, and gather it behind the last norm."""
    sch = scheduled(make).at["start"].sync("backward_pre", "all_gather", axis=1)
    sch = sch.at[columns].colwise(sequence_axis=1).at[rows].rowwise(sequence_axis=1).at[norms].sum_gradient()
    return sch.at["last_norm"].sync("forward_post", "all_gather", axis=1)


def _block():
    return _split_tokens(_Block, norms="norm")


@wrong("the last norm of a split sequence without the sum of its gradient", where="last_norm", report="Megatron-LM#1446")
def last_norm_alone():
    return _block(), x(3, TOKENS)


@right("the last norm of a split sequence with the sum of its gradient", report="Megatron-LM#1446")
def last_norm_summed():
    return _block().at["last_norm"].sum_gradient(), x(3, TOKENS)


@wrong("the input of a split layer gathered, its gradient split", where="norm", report="family of pytorch#157606")
def gathered_without_sum():
    """The report misses the last collective of the backward pass; here it is left out."""
    sch = scheduled(_Block).at["start"].sync("backward_pre", "all_gather", axis=1)
    sch = sch.at["{norm,last_norm}"].sum_gradient().sync("forward_post", "all_gather", axis=1)
    sch = sch.at["up"].shard("weight", axis=0).shard("bias", axis=0).set(out_features=WIDE // 2)
    return sch.at["down"].rowwise(sequence_axis=1), x(3, TOKENS)


@right("the input of a split layer gathered, its gradient summed and split", report="family of pytorch#157606")
def gathered_with_sum():
    sch = _block().at["last_norm"].sum_gradient()
    return sch.at["head"].colwise(gather_output=True), x(3, TOKENS)


@wrong("a sequence that is gathered though nobody split it", where="last_norm", report="pytorch#129355")
def sequence_repeated():
    """Each rank's whole sequence is taken for its part: the model gives twice as many tokens."""
    return scheduled(_Block).at["last_norm"].sync("forward_post", "all_gather", axis=1), x(3, TOKENS)


@right("a sequence that is split before it is gathered", report="pytorch#129355")
def sequence_split_and_gathered():
    sch = scheduled(_Block).at["start"].sync("backward_pre", "all_gather", axis=1)
    sch = sch.at["{norm,up,down,last_norm}"].sum_gradient()
    return sch.at["last_norm"].sync("forward_post", "all_gather", axis=1), x(3, TOKENS)


@wrong("the gradient of a norm that every rank computes whole, summed", where="last_norm", report="NeMo-Automodel#3822")
def whole_norm_summed():
    """Also NeMo-RL#3788, where the norm of all gradients counts such a tensor once for each rank."""
    sch = scheduled(_Block).at["up"].colwise().at["down"].rowwise()
    return sch.at["last_norm"].sum_gradient(), x(3, TOKENS)


@right("the gradient of a norm that every rank computes whole, as it is", report="NeMo-Automodel#3822")
def whole_norm_alone():
    return scheduled(_Block).at["up"].colwise().at["down"].rowwise(), x(3, TOKENS)


class _RowLinear(nn.Module):
    """A linear layer that adds its bias to the sum of its outputs."""

    def __init__(self):
        super().__init__()
        self.inner, self.bias = nn.Linear(WIDE, WIDTH, bias=False), nn.Parameter(torch.empty(WIDTH))

    def reset_parameters(self):
        nn.init.normal_(self.bias)

    def forward(self, x):
        return self.inner(x) + self.bias


class _RowBlock(_Block):
    """A block whose second layer adds its bias itself."""

    def __init__(self):
        super().__init__()
        self.down = _RowLinear()


def _row_block():
    return _split_tokens(_RowBlock, rows="down.inner")


@wrong("a bias on a scattered sum without the sum of its gradient", where="down.bias", report="Megatron-LM#236")
def scattered_bias_alone():
    return _row_block(), x(3, TOKENS)


@right("a bias on a scattered sum with the sum of its gradient", report="Megatron-LM#236")
def scattered_bias_summed():
    return _row_block().at["down"].sum_gradient("bias"), x(3, TOKENS)


class _AdaptedBlock(_Block):
    """A block with adapters beside both of its layers."""

    def __init__(self):
        super().__init__()
        self.up_a, self.up_b = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDE, bias=False)
        self.down_a, self.down_b = nn.Linear(WIDE, 4, bias=False), nn.Linear(4, WIDTH, bias=False)

    def forward(self, x):
        y = self.start(self.first(x))
        normed = self.norm(y)
        wide = (self.up(normed) + self.up_b(self.up_a(normed))).relu()
        return self.head(self.last_norm(y + self.down(wide) + self.down_b(self.down_a(wide))))


def _adapted_block():
    return _split_tokens(_AdaptedBlock, columns="{up,up_b}", rows="{down,down_a}")


@wrong("adapters on parts of a sequence without sums of their gradients", where="down_b", report="mcore-bridge#173")
def adapters_alone():
    return _adapted_block(), x(3, TOKENS)


@wrong("one adapter on parts of a sequence without the sum of its gradient", where="up_a", report="mcore-bridge#173")
def one_adapter_alone():
    return _adapted_block().at["down_b"].sum_gradient(), x(3, TOKENS)


@right("adapters on parts of a sequence with sums of their gradients", report="mcore-bridge#173")
def adapters_summed():
    return _adapted_block().at["{down_b,up_a}"].sum_gradient(), x(3, TOKENS)


class _Dropped(_Block):
    """A block with dropout on its split sequence."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        y = self.start(self.first(x))
        y = y + self.dropout(self.down(self.up(self.norm(y)).relu()))
        return self.head(self.last_norm(y))


@wrong("equal dropout on all parts of a sequence", where="dropout", report="PaddleFleetX#1005")
def equal_dropout_of_parts():
    """Also anemoi-core#595, tt-metal#55947."""
    return _split_tokens(_Dropped), x(3, TOKENS)


@right("dropout of its own on each part of a sequence", report="PaddleFleetX#1005")
def own_dropout_of_parts():
    return _split_tokens(_Dropped).at["dropout"].fork_rng(), x(3, TOKENS)


class _DroppedAttention(nn.Module):
    """Attention with dropout on its weights, which are split by heads, and on its output, which is whole."""

    def __init__(self):
        super().__init__()
        self.first, self.attention = nn.Linear(WIDTH, WIDTH), _WeightsDropped()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        y = self.first(x)
        return y + self.dropout(self.attention(y))


class _WeightsDropped(Attention):
    """Attention whose weights are dropped."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        weights = self.dropout((q @ k.transpose(-1, -2)).softmax(-1))
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def _dropped_attention():
    sch = scheduled(_DroppedAttention).at["attention.[qkv]"].colwise().at["attention.o"].rowwise()
    return sch.at["attention"].set(num_heads=2)


@wrong("equal dropout on the weights of all ranks' heads", where="attention.dropout", report="slapo#21")
def equal_dropout_of_heads():
    """Also InternLM#405."""
    return _dropped_attention(), x()


@wrong("dropout of its own on each rank's copy of an activation", where="dropout", report="slapo#21")
def own_dropout_of_copies():
    return _dropped_attention().at["attention.dropout"].fork_rng().at["dropout"].fork_rng(), x()


@right("dropout of its own on heads, equal on whole activations", report="slapo#21")
def dropout_of_heads():
    return _dropped_attention().at["attention.dropout"].fork_rng(), x()
