"""Weights that code changes before it uses them: by what all of a tensor says, or by what a rank's part says."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from shardplan.functional import create_schedule

from .blocks import TENSOR, WIDE, WIDTH, Changed, Pair, changed_columns, changed_rows, scheduled, x
from .entry import right, wrong


def _straight_through(w, values):
    """Compute with the values, and pass gradients as if with the weight."""
    return w + (values - w).detach()


def _absmax_int4(w, *axis):
    scale = w.abs().amax(*axis, keepdim=True) / 7
    return _straight_through(w, (w / scale).round() * scale)


def _ternary(w):
    """Weights of -1, 0 and 1 times their mean size, as in BitNet."""
    scale = w.abs().mean()
    return _straight_through(w, (w / scale).round().clamp(-1, 1) * scale)


def _orthogonal(w):
    """Take a step of Newton and Schulz towards an orthogonal matrix."""
    return 1.5 * w - 0.05 * w @ (w.T @ w)


def _standardised(w, axis):
    return (w - w.mean(axis, keepdim=True)) / w.std(axis, keepdim=True)


def _clipped(w):
    bound = 1.2 * w.std()
    return w.minimum(bound).maximum(-bound)


ROWS_MIXED = {
    "a weight quantised by its largest entry": lambda w: _absmax_int4(w, (0, 1)),
    "a ternary weight with one scale": _ternary,
    "a weight pruned below its median": lambda w: w * (w.abs() > w.abs().median()),
    "a weight clipped by its standard deviation": _clipped,
    "a weight centred along its split axis": lambda w: w - w.mean(0, keepdim=True),
    "softmax of a weight along its split axis": lambda w: w.softmax(0),
    "columns of a weight normalised along their split axis": lambda w: functional.normalize(w, dim=0),
    "a weight made orthogonal": _orthogonal,
    "a weight with its rows in another order": lambda w: w.roll(1, 0),
}
"""Changes that need all rows at once."""

ROWS_APART = {
    "rows of a weight quantised by their largest entries": lambda w: _absmax_int4(w, 1),
    "rows of a weight binary, each with a scale": lambda w: _straight_through(w, w.sign() * w.abs().mean(1, keepdim=True)),
    "rows of a weight pruned below their medians": lambda w: w * (w.abs() > w.abs().median(1, keepdim=True).values),
    "rows of a weight centred": lambda w: w - w.mean(1, keepdim=True),
    "softmax within rows of a weight": lambda w: w.softmax(1),
    "rows of a weight standardised": lambda w: _standardised(w, 1),
    "a weight scaled by its whole fan-in": lambda w: w * (2 / w.shape[1]) ** 0.5,
    "a weight with its columns in another order": lambda w: w.roll(1, 1),
    "a weight squashed entry by entry": lambda w: w.tanh() + w.clamp(-0.5, 0.5),
}
"""Changes that need one row at a time."""

for _name, _change in ROWS_MIXED.items():
    wrong(_name, where="up")(partial(changed_columns, _change))
for _name, _change in ROWS_APART.items():
    right(_name)(partial(changed_columns, _change))


@right("columns of a weight over their norms, rows split")
def columns_over_norms():
    return changed_rows(lambda w: functional.normalize(w, dim=0))


@wrong("a weight scaled by its local fan-in", where="down")
def local_fan_in():
    return changed_rows(lambda w: w * (2 / w.shape[1]) ** 0.5)


@wrong("a row-split weight quantised with one scale a row", where="down")
def scales_of_split_rows():
    return changed_rows(lambda w: _absmax_int4(w, 1))


@right("a row-split weight quantised with one scale a column")
def scales_of_columns():
    return changed_rows(lambda w: _absmax_int4(w, 0))


@wrong("cosine similarity with split keys", where="down")
def cosine_of_parts():
    """Each rank divides by the norms of its parts of the activations and of the weight."""
    sch = scheduled(lambda: Pair(nn.Linear(WIDTH, WIDE), _Cosine(WIDE, WIDTH))).at["up"].colwise()
    return sch.at["down"].shard("weight", axis=1).sync("forward_post", "all_reduce"), x()


@right("cosine similarity with some of the keys on each rank")
def cosine_of_rows():
    sch = scheduled(lambda: Pair(_Cosine(WIDTH, WIDE), nn.Linear(WIDE, WIDTH))).at["down"].rowwise()
    return sch.at["up"].shard("weight", axis=0).sync("backward_post", "all_reduce"), x()


class _Cosine(Changed):
    def __init__(self, num_in, num_out):
        super().__init__(num_in, num_out, lambda w: functional.normalize(w, dim=-1))

    def forward(self, x):
        return super().forward(functional.normalize(x, dim=-1))


def _parametrized(parametrize, tensors):
    """The first layer has a weight that is computed from other tensors, some of which have rows to split."""
    sch = create_schedule(Pair(parametrize(nn.Linear(WIDTH, WIDE)), nn.Linear(WIDE, WIDTH)), TENSOR).at["down"].rowwise()
    sch = sch.at[f"up.{{bias,{tensors}}}"].shard(axis=0)
    return sch.at["up"].sync("backward_post", "all_reduce"), x()


@wrong("spectral norm of a split weight", where="up")
def spectral_norm():
    sch, inputs = _parametrized(parametrizations.spectral_norm, "parametrizations.weight.original")
    return sch.at["up.parametrizations.weight.0._u"].shard(axis=0), inputs


@wrong("an orthogonal parametrization of a split weight", where="up")
def orthogonal_parametrization():
    return _parametrized(partial(parametrizations.orthogonal, orthogonal_map="cayley"), "parametrizations.weight.original")
