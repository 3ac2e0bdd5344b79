"""Vocabularies that do not divide: padded, masked, or split unevenly."""

from __future__ import annotations

from torch import nn

from .blocks import WIDTH, Do, Language, ids, mlp, scheduled, split_mlp, x
from .entry import right, wrong

VOCAB = 21


def _language(*, tied=False):
    return split_mlp(scheduled(lambda: Language(mlp(), vocab=VOCAB, tied=tied)), "body.")


@right("a padded embedding and a padded head, gathered")
def padded():
    sch = _language().at["embed"].vocab_parallel(pad_to_multiple=4)
    return sch.at["head"].colwise(gather_output=True, pad_to_multiple=4), ids(vocab=VOCAB)


@right("a padded embedding tied to its head")
def tied():
    sch = _language(tied=True).at["embed"].vocab_parallel(pad_to_multiple=4)
    return sch.at["head"].colwise(gather_output=True, pad_to_multiple=4), ids(vocab=VOCAB)


@right("an embedding and a head split unevenly")
def uneven():
    sch = _language().at["embed"].vocab_parallel(uneven=True)
    return sch.at["head"].colwise(gather_output=True, uneven=True), ids(vocab=VOCAB)


@wrong("a padded head gathered with its padding", where="head")
def gathered_with_padding():
    sch = _language().at["head"].shard("weight", axis=0, pad_to_multiple=4)
    return sch.sync("backward_post", "all_reduce").sync("forward_post", "all_gather", axis=-1), ids(vocab=VOCAB)


class _Scored(nn.Module):
    """Scores of all tokens of a vocabulary, and a function of them."""

    def __init__(self, normaliser):
        super().__init__()
        self.body, self.head, self.normaliser = mlp(), nn.Linear(WIDTH, VOCAB, bias=False), Do(normaliser)

    def forward(self, x):
        return self.normaliser(self.head(self.body(x)))


def _scored(normaliser):
    return split_mlp(scheduled(lambda: _Scored(normaliser)), "body.")


@wrong("a softmax that sees padding", where="head")
def softmax_with_padding():
    sch = _scored(lambda y: y.logsumexp(-1, keepdim=True)).at["head"].shard("weight", axis=0, pad_to_multiple=4)
    return sch.sync("backward_post", "all_reduce").sync("forward_post", "all_gather", axis=-1), x()


@right("a softmax without padding")
def softmax_without_padding():
    sch = _scored(lambda y: y.logsumexp(-1, keepdim=True))
    return sch.at["head"].colwise(gather_output=True, pad_to_multiple=4), x()


@wrong("a sum over a padded vocabulary that takes masked scores as scores", where="normaliser")
def masked_scores_summed():
    sch = _scored(lambda y: y.sum(-1, keepdim=True)).at["head"].colwise(pad_to_multiple=4)
    return sch.at["normaliser"].sync("forward_post", "all_reduce"), x()


@wrong("a sum over a padded vocabulary, padding zero but trained", where="head")
def zeros_summed():
    """Scores of rows of zeros are zero, and add nothing, until these rows have been trained."""
    sch = _scored(lambda y: y.sum(-1, keepdim=True)).at["head"].shard("weight", axis=0, pad_to_multiple=4)
    return sch.sync("backward_post", "all_reduce").at["normaliser"].sync("forward_post", "all_reduce"), x()


@wrong("a mean over a padded vocabulary", where="normaliser")
def mean_with_padding():
    sch = _scored(lambda y: y.mean(-1, keepdim=True)).at["head"].shard("weight", axis=0, pad_to_multiple=4)
    sch = sch.sync("backward_post", "all_reduce").at["normaliser"].sync("forward_post", "all_reduce")
    return sch.sync("forward_post", "divide"), x()


@right("features split unevenly between two layers")
def uneven_features():
    def make():
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB), nn.GELU(), nn.Linear(VOCAB, WIDTH))

    return scheduled(make).at["1"].colwise(uneven=True).at["3"].rowwise(uneven=True), {"input": x()["x"]}
