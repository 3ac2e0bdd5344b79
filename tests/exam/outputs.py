"""Losses that a model computes itself, and outputs beside its main output: each rank's own, or those of the whole model."""

from __future__ import annotations

from torch import nn
from torch.nn import functional

from .blocks import WIDE, WIDTH, Do, mlp, scheduled, x
from .entry import right, wrong


class _WithLoss(nn.Module):
    """A model that returns the mean of a loss of each token, which may be on the tokens of one rank."""

    def __init__(self):
        super().__init__()
        self.first, self.start, self.inner = nn.Linear(WIDTH, WIDTH), nn.Identity(), mlp()
        self.loss = Do(lambda y: (functional.log_softmax(y, -1)[..., 0]).square().mean())

    def forward(self, x):
        return self.loss(self.inner(self.start(self.first(x))))


def _tokens_split():
    """Each rank has some tokens of the sequence, from the first layer to the loss."""
    sch = scheduled(_WithLoss).at["start"].sync("backward_pre", "all_gather", axis=1)
    return sch.at["inner.{0,2}"].sum_gradient()


@wrong("a mean loss of the tokens of each rank", where="loss")
def loss_of_local_tokens():
    return _tokens_split(), x(3, 6)


@wrong("mean losses of parts of a sequence, summed", where="loss")
def losses_summed():
    return _tokens_split().at["loss"].sync("forward_post", "all_reduce"), x(3, 6)


@right("mean losses of equal parts of a sequence, summed and divided")
def losses_averaged():
    return _tokens_split().at["loss"].sync("forward_post", "all_reduce").sync("forward_post", "divide"), x(3, 6)


@wrong("mean losses of equal parts of a sequence, averaged, their gradient summed", where="inner.2")
def losses_averaged_and_summed():
    sch = _tokens_split().at["loss"].sync("forward_post", "all_reduce").sync("forward_post", "divide")
    return sch.sync("backward_pre", "all_reduce"), x(3, 6)


class _Classes(nn.Module):
    """A model that returns a loss over classes, each of which is right or wrong for itself, or one of which is right."""

    def __init__(self, loss):
        super().__init__()
        self.first, self.head, self.loss = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDE), Do(loss)

    def forward(self, x):
        return self.loss(self.head(self.first(x)))


def _classes(loss):
    sch = scheduled(lambda: _Classes(loss)).at["head"].colwise().at["loss"].sync("forward_post", "all_reduce")
    return sch.sync("forward_post", "divide"), x()


@right("binary cross entropy of split classes, the means of ranks averaged")
def binary_cross_entropy():
    return _classes(lambda y: functional.binary_cross_entropy_with_logits(y, y.new_zeros(y.shape)))


@wrong("cross entropy of split classes, the means of ranks averaged", where="loss")
def cross_entropy():
    """Classes of a rank are numbered from its first, and probabilities are those among its classes."""
    return _classes(lambda y: functional.cross_entropy(y.flatten(0, 1), y.new_zeros(y.shape[:2]).long().flatten()))


class _Beside(nn.Module):
    """A feed-forward block that returns something of its wide features too."""

    def __init__(self, beside):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)
        self.beside = Do(beside)

    def forward(self, x):
        hidden = self.up(self.first(x)).tanh()
        return self.down(hidden), self.beside(hidden)


def _beside(function):
    return scheduled(lambda: _Beside(function)).at["up"].colwise().at["down"].rowwise()


def _kept(y):
    return y.clone()


def _squares(y):
    return y.square().sum()


def _largest(y):
    return y.argmax(-1)


@wrong("hidden features returned beside the output, split", where="")
def hidden_features_split():
    return _beside(_kept), x()


@right("hidden features returned beside the output, gathered for that alone")
def hidden_features_gathered():
    return _beside(_kept).at["beside"].sync("forward_post", "all_gather", axis=-1), x()


@wrong("a penalty of split features returned beside the output, each rank's own", where="")
def penalty_of_local_features():
    return _beside(_squares), x()


@right("a penalty of split features returned beside the output, summed")
def penalty_summed():
    return _beside(_squares).at["beside"].sync("forward_post", "all_reduce"), x()


@wrong("numbers of the largest of split features returned beside the output", where="")
def largest_of_local_features():
    return _beside(_largest), x()


@right("numbers of the largest features, gathered before, returned beside the output")
def largest_of_all_features():
    sch = scheduled(lambda: _Beside(_largest)).at["up"].colwise(gather_output=True)
    return sch.at["down"].rowwise(split_input=True), x()
