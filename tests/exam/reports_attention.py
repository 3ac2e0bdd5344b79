"""Public reports of attention on split heads: what has an entry for each head, what all heads share, and norms of heads."""

from __future__ import annotations

from functools import partial

import torch
from attrs import frozen
from torch import nn
from torch.nn import functional

from .blocks import HEAD_DIM, HEADS, WIDE, WIDTH, scheduled, x
from .entry import right, wrong


class _PerHead(nn.Module):
    """Attention with something that has an entry for each head: sinks, slopes, or biases of distances."""

    def __init__(self, *, sinks=False, slopes=False, distances=False):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDE) for _ in "qkv")
        self.o = nn.Linear(WIDE, WIDTH)
        self.sinks = nn.Parameter(torch.empty(HEADS)) if sinks else None
        self.distances = nn.Embedding(5, HEADS) if distances else None
        self.slopes = nn.Buffer(torch.empty(HEADS)) if slopes else None

    def reset_parameters(self):
        for held in (self.sinks, self.slopes):
            if held is not None:
                nn.init.normal_(held)

    def forward(self, x):
        y = self.first(x)
        q, k, v = (p(y).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores, num = q @ k.transpose(-1, -2), q.shape[1]
        position = torch.arange(x.shape[1], device=x.device)
        distance = (position[:, None] - position).abs()
        if self.slopes is not None:
            scores = scores - self.slopes[:num, None, None] * distance
        if self.distances is not None:
            scores = scores + self.distances(distance)[..., :num].permute(2, 0, 1)
        if self.sinks is None:
            weights = scores.softmax(-1)
        else:
            sinks = self.sinks[:num, None, None].expand(*scores.shape[:-1], 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def _split_heads(make, **options):
    sch = scheduled(lambda: make(**options)).at["[qkv]"].colwise(granule=HEAD_DIM)
    return sch.at["o"].rowwise(granule=HEAD_DIM)


@frozen
class _OfHeads:
    """A tensor with an entry for each head.

    Args:
        name: What it is.
        option: Which option of the module it goes with.
        tensor: The tensor's path.
        axis: Axis of the heads.
        report: The report of an attention where every rank took the entries of the first heads.
    """

    name: str
    option: str
    tensor: str
    axis: int
    report: str


OF_HEADS = (
    # the report is of sinks that a gradient's norm counts as if each rank held the same ones: nobody said they were split
    _OfHeads("attention sinks", "sinks", "sinks", 0, "family of Megatron-LM#7452 (8)"),
    _OfHeads("ALiBi slopes", "slopes", "slopes", 0, "Megatron-DeepSpeed#227"),  # also flashinfer#1606
    _OfHeads("T5's biases of distances", "distances", "distances.weight", 1, "family of tensor_parallel#14"),
)


def _first_heads(held):
    return _split_heads(_PerHead, **{held.option: True}), x()


def _local_heads(held):
    sch, inputs = _first_heads(held)
    return sch.at[held.tensor].shard(axis=held.axis), inputs


for _held in OF_HEADS:
    wrong(f"{_held.name} of the first heads on every rank", where="o", report=_held.report)(partial(_first_heads, _held))
    right(f"{_held.name} of the local heads", report=_held.report)(partial(_local_heads, _held))


class _SharedKey(nn.Module):
    """Attention whose heads share one key and one value."""

    def __init__(self):
        super().__init__()
        self.first, self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * HEAD_DIM)

    def forward(self, x):
        y = self.first(x)
        q = self.q(y).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        k, v = self.kv(y).unsqueeze(1).chunk(2, -1)
        return self.o(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))


def _shared_key():
    sch = scheduled(_SharedKey).at["q"].colwise(granule=HEAD_DIM)
    return sch.at["o"].rowwise(granule=HEAD_DIM)


@wrong("the shared key of all heads, nowhere summed", where="kv", report="bigcode-project/Megatron-LM#11")
def shared_key_alone():
    return _shared_key(), x()


@wrong("the shared key with sums of its weights' gradients only", where="first", report="bigcode-project/Megatron-LM#35")
def shared_key_weights_only():
    """What the key's layer gives back to its input is each rank's own."""
    return _shared_key().at["kv"].sum_gradient(), x()


@right("the shared key with the sum of its output's gradient", report="bigcode-project/Megatron-LM#37")
def shared_key_summed():
    return _shared_key().at["kv"].sync("backward_pre", "all_reduce"), x()


RANK, ROPE = 8, 2


class _Latent(nn.Module):
    """Multi-head latent attention: keys and values from a small latent, and a positional key that all heads share."""

    def __init__(self):
        super().__init__()
        self.first, self.q = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, HEADS * (HEAD_DIM + ROPE))
        self.kv_a, self.kv_b = nn.Linear(WIDTH, RANK + ROPE), nn.Linear(RANK, HEADS * 2 * HEAD_DIM)
        self.norm, self.o = nn.RMSNorm(RANK), nn.Linear(WIDE, WIDTH)

    def forward(self, x):
        y = self.first(x)
        q = self.q(y).unflatten(-1, (-1, HEAD_DIM + ROPE)).transpose(1, 2)
        latent, key = self.kv_a(y).split([RANK, ROPE], -1)
        k, v = self.kv_b(self.norm(latent)).unflatten(-1, (-1, 2 * HEAD_DIM)).transpose(1, 2).chunk(2, -1)
        k = torch.cat([k, key.unsqueeze(1).expand(-1, k.shape[1], -1, -1)], -1)
        return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _latent():
    sch = scheduled(_Latent).at["q"].colwise(granule=HEAD_DIM + ROPE).at["kv_b"].colwise(granule=2 * HEAD_DIM)
    return sch.at["o"].rowwise(granule=HEAD_DIM)


@wrong("the positional key of latent attention, nowhere summed", where="kv_a", report="Megatron-LM#1699")
def positional_key_alone():
    """Also TransformerEngine#1975, torchtitan#1373: the loss is right, and replicas drift apart."""
    return _latent(), x()


@wrong("all of the latent summed a second time", where="kv_a", report="Megatron-LM#6839")
def latent_summed_twice():
    """The latent's part was summed in front of its column-split projection, and counts twice.

    A review of the mend of Megatron-LM#1699 says so of sequences that are split; here none is.
    """
    return _latent().at["kv_a"].sync("backward_pre", "all_reduce"), x()


@wrong("the weights' gradients of the latent summed a second time", where="kv_a", report="AReno#496")
def latent_weights_summed():
    return _latent().at["kv_a"].sum_gradient(), x()


@right("only the positional key of latent attention summed", report="Megatron-LM#1699")
def positional_key_summed():
    return _latent().at["kv_a"].sync("backward_pre", "all_reduce", features=(RANK, RANK + ROPE)), x()


class _HeadNorms(nn.Module):
    """Attention that normalises each head of its queries and keys by one norm each."""

    def __init__(self):
        super().__init__()
        self.first, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDE, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDE) for _ in "qkv")
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)

    def forward(self, x):
        y = self.first(x)
        q, k, v = (p(y).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        out = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.o(out.transpose(1, 2).flatten(2))


@wrong("norms of single heads without the sum of their gradients", where="k_norm.weight", report="NeMo-RL#3716")
def head_norms_alone():
    return _split_heads(_HeadNorms), x()


@wrong("the norm of keys without the sum that the norm of queries has", where="k_norm.weight", report="NeMo-RL#3716")
def one_head_norm_alone():
    return _split_heads(_HeadNorms).at["q_norm"].sum_gradient(), x()


@right("norms of single heads with the sums of their gradients", report="NeMo-RL#3716")
def head_norms_summed():
    return _split_heads(_HeadNorms).at["[qk]_norm"].sum_gradient(), x()


class _WideNorm(nn.Module):
    """An RMS norm over the features of all heads."""

    def __init__(self):
        super().__init__()
        self.weight, self.mean = nn.Parameter(torch.empty(WIDE)), nn.Identity()

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def forward(self, x):
        return x * torch.rsqrt(self.mean(x.square().mean(-1, keepdim=True)) + 1e-6) * self.weight


class _WideNorms(_HeadNorms):
    """Attention that normalises all heads of its queries together, and all of its keys, as OLMoE and OLMo 2 do."""

    def __init__(self):
        super().__init__()
        self.q_norm, self.k_norm = _WideNorm(), _WideNorm()

    def forward(self, x):
        y = self.first(x)
        parts = (self.q_norm(self.q(y)), self.k_norm(self.k(y)), self.v(y))
        q, k, v = (part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in parts)
        return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _wide_norms():
    return _split_heads(_WideNorms).at["[qk]_norm.weight"].shard(axis=0)


@wrong("norms of all heads together, split as their projections", where="q_norm.mean", report="transformers#44668")
def wide_norms_of_local_heads():
    """Also vllm#8747, OLMo#877: the mean is that of the local heads."""
    return _wide_norms(), x()


@wrong("norms of all heads, whose mean's gradient is nowhere summed", where="k", report="family of transformers#44668")
def wide_norms_forward_only():
    sch = _wide_norms().at["[qk]_norm.mean"].sync("forward_post", "all_reduce").sync("forward_post", "divide")
    return sch, x()


@right("norms of all heads together, by the mean over all ranks", report="transformers#44668")
def wide_norms_of_all_heads():
    sch = _wide_norms().at["[qk]_norm.mean"].sync("forward_post", "all_reduce").sync("forward_post", "divide")
    return sch.sync("backward_pre", "all_reduce"), x()


@right("norms of all heads together, between gathered projections", report="transformers#44668")
def wide_norms_gathered():
    sch = scheduled(_WideNorms).at["{q,k,v}"].colwise(gather_output=True)
    return sch.at["o"].rowwise(split_input=True), x()
