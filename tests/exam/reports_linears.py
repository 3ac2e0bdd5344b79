"""Public reports of linear layers: biases that count more than once, orders of fused projections, padding, and adapters."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .blocks import HEAD_DIM, HEADS, VOCAB, WIDE, WIDTH, scheduled, x
from .entry import right, wrong


class _ParallelResidual(nn.Module):
    """Two branches beside each other, as in GPT-J, whose outputs and a bias are added in one place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.up, self.gate = nn.Linear(WIDTH, WIDE), nn.Linear(WIDTH, WIDE)
        self.down, self.out = nn.Linear(WIDE, WIDTH, bias=False), nn.Linear(WIDE, WIDTH, bias=False)
        self.bias, self.sum = nn.Parameter(torch.empty(WIDTH)), nn.Identity()

    def reset_parameters(self):
        nn.init.normal_(self.bias)

    def forward(self, x):
        y = self.first(x)
        return y + self.sum(self.down(self.up(y).relu()) + self.out(self.gate(y).sigmoid()) + self.bias)


@wrong("the bias of two branches added on every rank before one sum", where="sum", report="gpt-neox#962")
def bias_of_branches():
    """Also text-generation-inference#1036, slapo#10: the bias counts once for each rank."""
    sch = scheduled(_ParallelResidual).at["{up,gate}"].colwise().at["{down,out}"].shard("weight", axis=1)
    return sch.set(in_features=WIDE // 2).at["sum"].sync("forward_post", "all_reduce"), x()


@right("two branches summed before their bias is added", report="gpt-neox#962")
def branches_summed():
    sch = scheduled(_ParallelResidual).at["{up,gate}"].colwise()
    return sch.at["{down,out}"].rowwise(), x()


class _Fused(nn.Module):
    """One projection for several things, which a function takes apart."""

    def __init__(self, take_apart, num_in, num_out):
        super().__init__()
        self.first, self.fused, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, num_in), nn.Linear(num_out, WIDTH)
        self.take_apart = take_apart

    def forward(self, x):
        return self.down(self.take_apart(self.fused(self.first(x))))


def _attended(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _three_blocks(fused):
    """All queries, all keys, all values, as in GLM."""
    return _attended(*(part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in fused.chunk(3, -1)))


def _each_head(fused):
    """Query, key and value of each head beside each other, as in BLOOM and GPT-NeoX."""
    return _attended(*fused.unflatten(-1, (-1, 3 * HEAD_DIM)).transpose(1, 2).chunk(3, -1))


def _groups(fused):
    """A few groups, each with its queries, keys and values, as in CodeGen: two heads a group."""
    parts = fused.unflatten(-1, (-1, 6 * HEAD_DIM)).chunk(3, -1)
    return _attended(*(part.unflatten(-1, (2, HEAD_DIM)).flatten(2, 3).transpose(1, 2) for part in parts))


def _fused(take_apart, *, num_in=3 * WIDE, num_out=WIDE, **split):
    sch = scheduled(lambda: _Fused(take_apart, num_in, num_out)).at["fused"].colwise(**split)
    return sch.at["down"].rowwise(), x()


@wrong("queries, keys and values cut as one block", where="down", report="DeepSpeed#3844")
def blocks_cut_as_one():
    return _fused(_three_blocks)


@right("queries, keys and values cut as three blocks", report="DeepSpeed#3844")
def three_blocks():
    return _fused(_three_blocks, blocks=(WIDE, WIDE, WIDE), granule=HEAD_DIM)


@wrong("heads with their own keys and values cut as three blocks", where="down", report="DeepSpeed#3844")
def heads_cut_as_blocks():
    return _fused(_each_head, blocks=(WIDE, WIDE, WIDE))


@right("heads with their own keys and values kept together", report="DeepSpeed#3844")
def heads_kept_together():
    return _fused(_each_head, interleaved=HEADS)


@wrong("groups of queries, keys and values cut as three blocks", where="down", report="DeepSpeed#3844")
def groups_cut_as_blocks():
    return _fused(_groups, blocks=(WIDE, WIDE, WIDE), granule=HEAD_DIM)


@right("groups of queries, keys and values kept together", report="DeepSpeed#3844")
def groups_kept_together():
    return _fused(_groups, granule=6 * HEAD_DIM)


def _delta_inputs(fused):
    """Queries, keys, values, gates, and a decay for each head, as a gated delta net packs them."""
    heads = fused.shape[-1] // (3 * HEAD_DIM + 1)
    *parts, decay = fused.split([heads * HEAD_DIM] * 3 + [heads], -1)
    q, v, gate = (part.unflatten(-1, (heads, HEAD_DIM)) for part in parts)
    return (q.tanh() * v * gate.sigmoid() * decay.sigmoid().unsqueeze(-1)).flatten(-2)


@wrong("packed heads, and a number for each head, cut as one block", where="down", report="Megatron-LM#1989")
def packed_cut_as_one():
    return _fused(_delta_inputs, num_in=HEADS * (3 * HEAD_DIM + 1))


@right("packed heads, and a number for each head, cut by their blocks", report="Megatron-LM#1989")
def packed_blocks():
    return _fused(_delta_inputs, num_in=HEADS * (3 * HEAD_DIM + 1), blocks=(WIDE, WIDE, WIDE, HEADS))


def _gated(fused):
    up, gate = fused.chunk(2, -1)
    return functional.silu(gate) * up


@wrong("a fused feed-forward layer cut as one block", where="down", report="tt-forge-models#855")
def gated_cut_as_one():
    """Also vllm#3775, xllm#1616."""
    return _fused(_gated, num_in=2 * WIDE)


@right("a fused feed-forward layer cut as two blocks", report="tt-forge-models#855")
def gated_blocks():
    return _fused(_gated, num_in=2 * WIDE, blocks=(WIDE, WIDE))


@wrong("parts of a fused layer joined in the order of ranks", where="fused", report="nnsight#719")
def joined_in_order_of_ranks():
    """The joined activation has the right shape, and blocks of ranks in place of blocks of projections."""
    sch = scheduled(lambda: _Fused(_gated, 2 * WIDE, WIDE)).at["fused"].shard("weight", axis=0, blocks=(WIDE, WIDE))
    sch = sch.shard("bias", axis=0, blocks=(WIDE, WIDE)).sync("backward_post", "all_reduce").set(out_features=WIDE)
    return sch.sync("forward_post", "all_gather", axis=-1), x()


@right("parts of a fused layer cut as one block, and joined", report="nnsight#719")
def joined_in_order():
    return scheduled(lambda: _Fused(_gated, 2 * WIDE, WIDE)).at["fused"].colwise(gather_output=True), x()


class _LogTotal(nn.Module):
    """The logarithm of the sum over a vocabulary, which may be split."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB + 1, bias=False)
        self.total = nn.Identity()

    def forward(self, x):
        return self.total(self.head(self.first(x)).exp().sum(-1)).log()


@wrong("a padded vocabulary whose padding counts in a sum", where="total", report="family of Megatron-LM#1754")
def padding_counts():
    """The report is of vocabularies that the ranks do not divide, which train otherwise than on one rank."""
    sch = scheduled(_LogTotal).at["head"].shard("weight", axis=0, pad_to_multiple=8).sync("backward_post", "all_reduce")
    return sch.set(out_features=12).at["total"].sync("forward_post", "all_reduce"), x()


@right("a padded vocabulary whose padding is masked", report="family of Megatron-LM#1754")
def padding_masked():
    sch = scheduled(_LogTotal).at["head"].colwise(pad_to_multiple=8)
    return sch.at["total"].sync("forward_post", "all_reduce"), x()


class _Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it."""

    def __init__(self, num_in, num_out):
        super().__init__()
        self.base = nn.Linear(num_in, num_out, bias=False)
        self.a, self.b = nn.Linear(num_in, 3, bias=False), nn.Linear(3, num_out, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class _Adapters(nn.Module):
    """Feed-forward layers with adapters."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(WIDTH, WIDTH), _Adapted(WIDTH, WIDE), _Adapted(WIDE, WIDTH)

    def forward(self, x):
        return self.down(self.up(self.first(x)).relu())


def _adapters():
    return scheduled(_Adapters).at["up.base"].colwise().at["down.base"].rowwise()


@wrong("an adapter whose second matrix gives back each rank's gradient", where="up.a", report="peft#3044")
def column_adapter_not_summed():
    """Only peft#3079, which answers it, was found: A whole and B split by columns, or A split by rows and B whole."""
    sch = _adapters().at["up.b"].shard("weight", axis=0).set(out_features=WIDE // 2).at["down.a"].rowwise()
    return sch, x()


@wrong("an adapter of parts of the input without a sum", where="down", report="peft#3044")
def row_adapter_not_summed():
    sch = _adapters().at["up.b"].colwise().at["down.a"].shard("weight", axis=1).set(in_features=WIDE // 2)
    return sch, x()


@wrong("an adapter summed with the layer that it adapts, its second matrix not", where="down.b", report="peft#3044")
def row_adapter_summed_with_base():
    """The second matrix works on each rank's summand of what the first gives."""
    return _summed_together(), x()


@right("an adapter summed with the layer that it adapts, its second matrix too", report="peft#3044")
def row_adapter_summed():
    return _summed_together().at["down.b"].sum_gradient(), x()


def _summed_together():
    sch = scheduled(_Adapters).at["up.{base,b}"].colwise().at["down.{base,a}"].shard("weight", axis=1)
    return sch.set(in_features=WIDE // 2).at["down"].sync("forward_post", "all_reduce")


@right("adapters split as the layers that they adapt", report="peft#3044")
def adapters_split():
    return _adapters().at["up.b"].colwise().at["down.a"].rowwise(), x()
