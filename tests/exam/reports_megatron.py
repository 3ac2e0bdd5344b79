"""The silent numerical faults that Megatron-LM#7452 lists, each as a layout: wrong counts, and parts of the wrong ranks.

Findings 12 and 13 and the appendices are of a runtime, but for Wan's decoder. Finding 8, attention sinks, is in
``reports_attention``.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from shardplan.specs import Mesh

from .blocks import HEAD_DIM, VOCAB, WIDE, WIDTH, scheduled, x
from .entry import right, wrong

GRID = Mesh(data=2, tensor=2)

SMOOTHING = 0.2


class _Smoothed(nn.Module):
    """Cross entropy of each token with label smoothing, in sums over the vocabulary, which may be split."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.labels, self.exponentials, self.label, self.sum = (nn.Identity() for _ in range(4))
        self.num_words = VOCAB

    def forward(self, x, labels):
        logits, labels = self.head(self.first(x)), self.labels(labels)
        label = self.label((logits * labels).sum(-1))
        mean = self.sum(logits.sum(-1)) / self.num_words
        return self.exponentials(logits.exp().sum(-1)).log() - (1 - SMOOTHING) * label - SMOOTHING * mean


def _smoothed():
    """Return the schedule of a cross entropy whose vocabulary is split, all but the mean of its logits, and inputs."""
    sch = scheduled(_Smoothed).at["head"].colwise().at["labels"].sync("backward_post", "all_gather", axis=-1)
    return sch.at["{exponentials,label}"].sync("forward_post", "all_reduce"), _labelled()


def _labelled():
    words = torch.randint(VOCAB, (3, 5), generator=torch.Generator().manual_seed(2))
    return {**x(), "labels": functional.one_hot(words, VOCAB).float()}


@wrong("label smoothing by the mean over the local vocabulary", where="", report="Megatron-LM#7452 (1)")
def local_mean():
    sch, inputs = _smoothed()
    return sch.at[""].set(num_words=VOCAB // 2), inputs


@wrong("label smoothing by a sum over all words, divided by the local number", where="", report="Megatron-LM#7452 (1)")
def local_number_of_words():
    sch, inputs = _smoothed()
    return sch.at["sum"].sync("forward_post", "all_reduce").at[""].set(num_words=VOCAB // 2), inputs


@right("label smoothing by the mean over the whole vocabulary", report="Megatron-LM#7452 (1)")
def whole_mean():
    sch, inputs = _smoothed()
    return sch.at["sum"].sync("forward_post", "all_reduce"), inputs


@wrong("vocabulary-parallel cross entropy of gathered logits", where="exponentials", report="Megatron-LM#7452 (2)")
def gathered_logits():
    """Each exponential is summed over the ranks that all have it: the loss is too large by log(2)."""
    sch = scheduled(_Smoothed).at["head"].colwise(gather_output=True)
    return sch.at["exponentials"].sync("forward_post", "all_reduce"), _labelled()


@right("cross entropy of gathered logits, each rank by itself", report="Megatron-LM#7452 (2)")
def gathered_logits_alone():
    return scheduled(_Smoothed).at["head"].colwise(gather_output=True), _labelled()


class _LaterTokens(nn.Module):
    """The loss of later tokens, weighted by the numbers of next and of later tokens that count."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.start, self.mask, self.later_mask = (nn.Identity() for _ in range(3))
        self.total, self.next, self.later = (nn.Identity() for _ in range(3))

    def forward(self, x, mask, later_mask):
        losses = self.head(self.start(self.first(x)).tanh()).squeeze(-1)
        mask, later_mask = self.mask(mask), self.later_mask(later_mask)
        weight = self.next(mask.sum(1)) / self.later(later_mask.sum(1))
        return self.total((losses * later_mask).sum(1) * weight)


def _later_tokens():
    sch = scheduled(_LaterTokens).at["{start,mask,later_mask}"].sync("backward_pre", "all_gather", axis=1)
    inputs = _masked()
    inputs["later_mask"] = inputs["mask"].roll(1, 0)
    return sch.at["head"].sum_gradient().at["total"].sync("forward_post", "all_reduce"), inputs


@wrong("later tokens' losses weighted by the counts of one rank", where="total", report="Megatron-LM#7452 (3)")
def counts_of_one_rank():
    """The report's ranks have other rows as well; there as here each weights its losses by its own ratio of counts."""
    return _later_tokens()


@right("later tokens' losses weighted by the counts of all ranks", report="Megatron-LM#7452 (3)")
def counts_of_all_ranks():
    sch, inputs = _later_tokens()
    return sch.at["{next,later}"].sync("forward_post", "all_reduce"), inputs


def _masked(batch=4, tokens=6):
    """Activations, and which tokens count: other numbers in each half of the batch and of the sequence."""
    number = torch.arange(batch * tokens).view(batch, tokens)
    return {**x(batch, tokens), "mask": ((number % 3 < 1) | (number % 5 < 2)).float()}


class _Kept(nn.Module):
    """An activation that is kept in parts between two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.kept, self.second = nn.Linear(WIDTH, WIDTH), nn.Identity(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.second(self.kept(self.first(x)).tanh())


def _kept(gathered_over):
    sch = scheduled(_Kept, GRID).at["kept"].sync("backward_post", "all_gather", axis=-1)
    return sch.sync("forward_post", "all_gather", axis=-1, mesh_axis=gathered_over), x(4, 6)


@wrong("saved activations split over one group and gathered over another", where="kept", report="Megatron-LM#7452 (4)")
def gathered_over_data():
    return _kept("data")


@right("saved activations gathered over the group that they are split over", report="Megatron-LM#7452 (4)")
def gathered_over_tensor():
    return _kept("tensor")


class _Sequence(nn.Module):
    """A block on a sequence that is split at its start and gathered at its end, with a mask of tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.start, self.mask, self.end = (nn.Identity() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x, mask):
        y = self.norm(self.start(self.first(x)))
        return self.last(self.end(y * self.mask(mask).unsqueeze(-1)))


def _sequence(start="tensor", mask="tensor", mesh=GRID):
    sch = scheduled(_Sequence, mesh).at["start"].sync("backward_pre", "all_gather", axis=1, mesh_axis=start)
    sch = sch.at["mask"].sync("backward_pre", "all_gather", axis=1, mesh_axis=mask).at["norm"].sum_gradient()
    return sch.at["end"].sync("forward_post", "all_gather", axis=1), _masked()


@wrong("a padding mask split over another group than the tokens", where="mask", report="Megatron-LM#7452 (5)")
def mask_over_data():
    return _sequence(mask="data")


@right("a padding mask split over the group of the tokens", report="Megatron-LM#7452 (5)")
def mask_over_tensor():
    return _sequence()


class _CrossAttention(nn.Module):
    """Attention to a memory; both sequences are split outside it."""

    def __init__(self):
        super().__init__()
        self.first, self.start, self.start_memory, self.end = nn.Linear(WIDTH, WIDTH), *(nn.Identity() for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x, memory):
        y, memory = self.start(self.first(x)), self.start_memory(memory)
        q, k, v = (z.unflatten(-1, (-1, 3)).transpose(1, 2) for z in (self.q(y), self.k(memory), self.v(memory)))
        return self.end(self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


def _cross_attention(keys_over):
    sch = scheduled(_CrossAttention, GRID).at["start{,_memory}"].sync("backward_pre", "all_gather", axis=1)
    sch = sch.at["q"].colwise(sequence_axis=1, granule=3).at["o"].rowwise(sequence_axis=1, granule=3)
    sch = sch.at["[kv]"].shard("weight", axis=0, granule=3).set(out_features=WIDTH // 2)
    sch = sch.sync("forward_pre", "all_gather", axis=1, mesh_axis=keys_over)
    return sch.at["end"].sync("forward_post", "all_gather", axis=1), {**x(4, 6), "memory": x(4, 10)["x"]}


@wrong("keys and values of cross-attention gathered over the wrong group", where="k", report="Megatron-LM#7452 (6)")
def keys_over_data():
    return _cross_attention("data")


@right("keys and values of cross-attention gathered over the group of the queries", report="Megatron-LM#7452 (6)")
def keys_over_tensor():
    return _cross_attention("tensor")


@wrong("embeddings scattered over one group, gathered over another", where="start", report="Megatron-LM#7452 (7)")
def embeddings_over_data():
    return _sequence(start="data", mask="data")


@right("embeddings scattered and gathered over the same group, beside data ranks", report="Megatron-LM#7452 (7)")
def embeddings_over_tensor():
    sch, inputs = _sequence()
    return sch.at["last"].colwise(gather_output=True), inputs


class _MaskedMean(nn.Module):
    """The mean of the losses of the tokens that count, of each sequence."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.start, self.mask, self.total, self.count, self.mean = (nn.Identity() for _ in range(5))

    def forward(self, x, mask):
        losses, mask = self.head(self.start(self.first(x)).tanh()).squeeze(-1), self.mask(mask)
        return self.mean(self.total((losses * mask).sum(1)) / self.count(mask.sum(1)))


def _masked_mean():
    sch = scheduled(_MaskedMean).at["{start,mask}"].sync("backward_pre", "all_gather", axis=1)
    return sch.at["head"].sum_gradient()


@wrong("the mean of the means of parts of a sequence", where="mean", report="Megatron-LM#7452 (9)")
def mean_of_means():
    sch = _masked_mean().at["mean"].sync("forward_post", "all_reduce").sync("forward_post", "divide")
    return sch, _masked()


@right("the mean from sums over all parts of a sequence", report="Megatron-LM#7452 (9)")
def mean_of_sums():
    return _masked_mean().at["{total,count}"].sync("forward_post", "all_reduce"), _masked()


class _RouterLoss(nn.Module):
    """A router's mean scores over the tokens that count, times their local number, over the number of all."""

    def __init__(self):
        super().__init__()
        self.first, self.router = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4, bias=False)
        self.start, self.mask, self.local, self.all, self.total = (nn.Identity() for _ in range(5))

    def forward(self, x, mask):
        scores, mask = self.router(self.start(self.first(x))).softmax(-1), self.mask(mask)
        num = mask.sum(1, keepdim=True)
        mean = (scores * mask.unsqueeze(-1)).sum(1) / num
        return self.total(mean * self.local(num)) / self.all(num)


def _router_loss():
    sch = scheduled(_RouterLoss).at["{start,mask}"].sync("backward_pre", "all_gather", axis=1)
    return sch.at["router"].sum_gradient().at["{all,total}"].sync("forward_post", "all_reduce")


@wrong("a router's loss scaled by the number of all tokens on each rank", where="total", report="Megatron-LM#7452 (10)")
def count_overwritten():
    return _router_loss().at["local"].sync("forward_post", "all_reduce"), _masked()


@right("a router's loss scaled by the number of local tokens", report="Megatron-LM#7452 (10)")
def count_local():
    return _router_loss().at[""].trust("each rank's mean times its own number is its sum"), _masked()


class _OutputNorm(nn.Module):
    """Gated heads that share a norm, as those of a gated delta net do."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDE), nn.Linear(WIDTH, WIDE)
        self.norm, self.down = nn.RMSNorm(HEAD_DIM), nn.Linear(WIDE, WIDTH)

    def forward(self, x):
        y = self.first(x)
        heads, gate = (z.unflatten(-1, (-1, HEAD_DIM)) for z in (self.up(y), self.gate(y)))
        return self.down((self.norm(heads) * functional.silu(gate)).flatten(-2))


def _output_norm():
    return scheduled(_OutputNorm).at["{up,gate}"].colwise(granule=HEAD_DIM).at["down"].rowwise(granule=HEAD_DIM)


@wrong("the output norm of heads without the sum of its gradient", where="norm.weight", report="Megatron-LM#7452 (11)")
def norm_of_local_heads():
    return _output_norm(), x()


@right("the output norm of heads with the sum of its gradient", report="Megatron-LM#7452 (11)")
def norm_of_all_heads():
    return _output_norm().at["norm"].sum_gradient(), x()


class _Decoder(nn.Module):
    """A layer on a split sequence, and a decoder that every rank computes whole."""

    def __init__(self):
        super().__init__()
        self.first, self.hidden, self.decoder = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.start = nn.Identity()

    def forward(self, x):
        return self.decoder(self.hidden(self.start(self.first(x))).tanh())


def _decoder():
    return scheduled(_Decoder).at["start"].sync("backward_pre", "all_gather", axis=1).at["hidden"].sum_gradient()


@wrong("equal gradients of a whole loss summed on their way to a split sequence", where="hidden", report="Megatron-LM#7452")
def gradient_of_whole_loss_summed():
    """The appendix on Wan's decoder; slime#1748 is the same fault in front of linear attention."""
    return _decoder().at["decoder"].sync("forward_pre", "all_gather", axis=1), x(3, 6)


@right("each rank's own part of the gradient of a whole loss", report="Megatron-LM#7452")
def gradient_of_whole_loss_split():
    return _decoder().at["hidden"].sync("forward_post", "all_gather", axis=1), x(3, 6)
