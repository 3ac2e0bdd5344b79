"""Functions of summands before their sum: those that are linear, and those that are not."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from .blocks import WIDE, WIDTH, Do, rows_alone, scheduled, x
from .entry import right, wrong


class _Summands(nn.Module):
    """Two layers whose outputs are split and summed, a function between them and the sum, and a last layer."""

    def __init__(self, act):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH, bias=False)
        self.act = act if isinstance(act, nn.Module) else Do(act)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.last(self.act(self.down(self.up(self.first(x)).tanh())))


def _summed_behind(act):
    sch = rows_alone(scheduled(lambda: _Summands(act)).at["up"].colwise(), "down")
    return sch.at["act"].sync("forward_post", "all_reduce"), x()


def _late(y):
    """Tell the later tokens from the earlier ones."""
    return (torch.arange(y.shape[1], device=y.device) > 2).unsqueeze(-1)


def _numbered(y):
    return y * torch.arange(1, y.shape[1] + 1, device=y.device).unsqueeze(-1)


LINEAR = {
    "cumulative sum of summands": lambda y: y.cumsum(-1),
    "mean of summands taken off": lambda y: y - y.mean(-1, keepdim=True),
    "summands of later tokens set to zero": lambda y: y.masked_fill(_late(y), 0.0),
    "summands of later tokens where others are zero": lambda y: torch.where(_late(y), y, torch.zeros_like(y)),
    "Fourier transform of summands": lambda y: torch.fft.fft(y, dim=-1).real,
    "summands weighted by the numbers of their tokens": _numbered,
    "moving average over summands, padded with zeros": lambda y: functional.avg_pool1d(y, 3, stride=1, padding=1),
}
"""Functions whose results may be summed later."""

NOT_LINEAR = {
    "softmax of summands": lambda y: y.softmax(-1),
    "summands of later tokens set to one": lambda y: y.masked_fill(_late(y), 1.0),
    "a number added to summands": lambda y: y + 0.5,
    "positive summands kept": lambda y: torch.where(y > 0, y, torch.zeros_like(y)),
    "largest of summands taken off": lambda y: y - y.amax(-1, keepdim=True),
    "summands multiplied by their neighbours": lambda y: y * y.roll(1, -1),
    "moving largest over summands": lambda y: functional.max_pool1d(y, 3, stride=1, padding=1),
}
"""Functions that need the sum."""

for _name, _function in LINEAR.items():
    right(f"{_name}, summed")(partial(_summed_behind, _function))
for _name, _function in NOT_LINEAR.items():
    wrong(f"{_name}, summed", where="act")(partial(_summed_behind, _function))


@right("dropout of summands, drawn alike on all ranks before their sum")
def dropout_alike():
    return _summed_behind(nn.Dropout(0.5))


@wrong("dropout of summands, drawn by each rank before their sum", where="act")
def dropout_forked():
    sch, inputs = _summed_behind(nn.Dropout(0.5))
    return sch.at["act"].fork_rng(), inputs
