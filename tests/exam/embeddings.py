"""Embeddings whose own code works on the rows that it looks up, of which ranks have some."""

from __future__ import annotations

from torch import nn

from .blocks import VOCAB, WIDTH, Language, ids, mlp, scheduled, split_mlp
from .entry import right, wrong


class _Rows(nn.Embedding):
    """An embedding, and what is done to the rows that it looks up."""

    def __init__(self, change, norm=None):
        super().__init__(VOCAB, WIDTH)
        self.change, self.norm = change, norm or nn.Identity()

    def forward(self, ids):
        return self.norm(self.change(super().forward(ids)))


class _Read(Language):
    def __init__(self, embed):
        super().__init__(mlp())
        self.embed = embed


def _split(make):
    return split_mlp(scheduled(lambda: _Read(make())), "body.").at["embed"].vocab_parallel()


@right("an embedding that norms the rows it looks up, their weight's gradient summed")
def normed():
    sch = _split(lambda: _Rows(lambda rows: rows * 2, nn.RMSNorm(WIDTH)))
    return sch.at["embed.norm.weight"].sum_gradient(), ids()


@right("an embedding that adds a bias to the rows it looks up, its gradient summed")
def biased():
    sch = _split(lambda: _Rows(lambda rows: rows.tanh(), nn.LayerNorm(WIDTH)))
    return sch.at["embed.norm.{weight,bias}"].sum_gradient(), ids()


@wrong("an embedding that norms the rows it looks up, their weight's gradient nowhere summed", where="embed.norm")
def gradient_of_a_norm():
    return _split(lambda: _Rows(lambda rows: rows * 2, nn.RMSNorm(WIDTH))), ids()


@wrong("an embedding that takes the mean over all tokens from each row", where="embed")
def mean_of_rows():
    return _split(lambda: _Rows(lambda rows: rows - rows.mean(1, keepdim=True))), ids()


@wrong("an embedding that multiplies the rows of two tokens", where="embed")
def rows_of_neighbours():
    return _split(lambda: _Rows(lambda rows: rows * rows.roll(1, dims=1))), ids()


@wrong("an embedding that adds the row of the token before", where="embed")
def rows_of_the_token_before():
    return _split(lambda: _Rows(lambda rows: rows + rows.roll(1, dims=1))), ids()


@wrong("an embedding whose tokens change places with its batch", where="embed")
def rows_in_another_order():
    return _split(lambda: _Rows(lambda rows: rows.transpose(0, 1).reshape(rows.shape).contiguous())), ids(batch=5)


class _Stepped(nn.Embedding):
    """An embedding with two places at which ranks may communicate, before its rows are set to zero."""

    def __init__(self):
        super().__init__(VOCAB, WIDTH)
        self.first, self.second = nn.Identity(), nn.Identity()

    def forward(self, ids):
        return self.second(self.first(super().forward(ids)))


@wrong("an embedding whose rows are averaged over ranks before those of others are zero", where="embed")
def rows_averaged():
    sch = _split(_Stepped).at["embed.first"].sync("forward_post", "all_reduce").sync("backward_pre", "all_reduce")
    return sch.at["embed.second"].sync("forward_post", "divide"), ids()
