"""Public reports of split mixtures of experts: gradients of routers and tokens, and biases of experts."""

from __future__ import annotations

import torch
from torch import nn

from .blocks import WIDE, WIDTH, scheduled, x
from .entry import right, wrong

EXPERTS = 4


class _Experts(nn.Module):
    """All experts compute all tokens; what they give is weighted and summed."""

    def __init__(self, *, bias=False):
        super().__init__()
        self.up = nn.Parameter(torch.empty(EXPERTS, WIDTH, WIDE))
        self.down = nn.Parameter(torch.empty(EXPERTS, WIDE, WIDTH))
        self.bias = nn.Parameter(torch.empty(EXPERTS, WIDTH)) if bias else None
        self.sum, self.bias_scale = nn.Identity(), 1.0

    def reset_parameters(self):
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, tokens, weights):
        hidden = torch.einsum("btd,edf->btef", tokens, self.up).relu()
        out = torch.einsum("btef,efd->bted", hidden, self.down)
        if self.bias is not None:
            out = self.sum(out) + self.bias * self.bias_scale
        return (out * weights.unsqueeze(-1)).sum(2)


class _Mixture(nn.Module):
    """A layer, a router, and experts."""

    def __init__(self, **options):
        super().__init__()
        self.first, self.router = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.experts = _Experts(**options)

    def forward(self, x):
        y = self.first(x)
        return self.experts(y, self.router(y).softmax(-1))


def _features_split(**options):
    """Return the schedule of experts whose hidden features are split; nothing is summed yet."""
    sch = scheduled(lambda: _Mixture(**options))
    return sch.at["experts.up"].shard(axis=2).at["experts.down"].shard(axis=1).at["experts"]


@wrong("tokens' gradients of split experts nowhere summed", where="first", report="torchtitan#1805")
def tokens_not_summed():
    """Also torchtitan#4054. The router's gradient is right, and that of the layer before it is not."""
    return _features_split().sync("forward_post", "all_reduce").sync("backward_post", "all_reduce", which=1), x()


@wrong("routing weights' gradients of split experts nowhere summed", where="router", report="torchtitan#2387")
def weights_not_summed():
    """Each rank weights its summands of the experts' outputs before they are summed."""
    return _features_split().sync("forward_post", "all_reduce").sync("backward_post", "all_reduce"), x()


@right("gradients of tokens and of routing weights summed", report="torchtitan#2387")
def both_summed():
    sch = _features_split().sync("forward_post", "all_reduce").sync("backward_post", "all_reduce")
    return sch.sync("backward_post", "all_reduce", which=1), x()


@wrong("biases of experts added on every rank before the sum", where="experts", report="torchtitan#4245")
def biases_added_twice():
    sch = _features_split(bias=True).sync("forward_post", "all_reduce").sync("backward_post", "all_reduce")
    return sch.sync("backward_post", "all_reduce", which=1).sum_gradient("bias"), x()


@wrong("biases of experts divided by the ranks, their gradients too", where="experts.bias", report="torchtitan#4332")
def biases_and_gradients_divided():
    """Also torchtitan#2106: a divided bias is right in the forward pass, and its gradient is divided as well."""
    sch = _features_split(bias=True).sync("forward_post", "all_reduce").sync("backward_post", "all_reduce")
    return sch.sync("backward_post", "all_reduce", which=1).set(bias_scale=0.5), x()


@right("biases of experts divided by the ranks, and their gradients summed", report="torchtitan#4332")
def biases_divided():
    sch = _features_split(bias=True).sync("forward_post", "all_reduce").sync("backward_post", "all_reduce")
    return sch.sync("backward_post", "all_reduce", which=1).set(bias_scale=0.5).sum_gradient("bias"), x()


@right("biases of experts added after the sum", report="torchtitan#4245")
def biases_added_once():
    sch = _features_split(bias=True).sync("backward_post", "all_reduce")
    return sch.at["experts.sum"].sync("forward_post", "all_reduce"), x()


def own_slots(weights, group):
    """Keep the routing weights of the experts that a rank holds, and set those of others to zero."""
    return weights * _is_own(weights, group)


def own_slots_forward_only(weights, group):
    """As ``own_slots``, but the slots of other ranks' experts keep their gradients."""
    return weights - (weights * (1 - _is_own(weights, group))).detach()


def _is_own(weights, group):
    held = torch.arange(EXPERTS, device=weights.device) // (EXPERTS // group.num_ranks) == group.index
    return held.to(weights.dtype)


class _LocalExperts(_Experts):
    """Experts of which a rank may hold some; in the slots of the others it computes an expert of its own."""

    def forward(self, tokens, weights):
        held = torch.arange(EXPERTS, device=tokens.device) % self.up.shape[0]
        hidden = torch.einsum("btd,edf->btef", tokens, self.up[held]).relu()
        return (torch.einsum("btef,efd->bted", hidden, self.down[held]) * weights.unsqueeze(-1)).sum(2)


class _LocalMixture(_Mixture):
    """A mixture of experts of which a rank may hold some."""

    def __init__(self):
        super().__init__()
        self.experts = _LocalExperts()


def _experts_split(slots):
    """Return the schedule of experts that are spread over ranks which all have the same tokens."""
    sch = scheduled(_LocalMixture).at["experts.{up,down}"].shard(axis=0).at["experts"].sync("forward_pre", slots, which=1)
    return sch.sync("forward_post", "all_reduce").sync("backward_post", "all_reduce")


@wrong("a router's gradient from slots that its rank never routed", where="router", report="transformers#48687")
def gradient_of_foreign_slots():
    """A weight of zero hides them in the forward pass, not in the backward pass."""
    sch = scheduled(_LocalMixture).at["experts.{up,down}"].shard(axis=0).at["experts"]
    sch = sch.sync("backward_post", "all_reduce", which=1).sync("forward_pre", own_slots_forward_only, which=1)
    return sch.sync("forward_post", "all_reduce").sync("backward_post", "all_reduce"), x()


@wrong("a router's gradient from the experts of one rank", where="router", report="transformers#48205")
def gradient_of_own_slots():
    return _experts_split(own_slots), x()


@right("a router's gradient from the slots of all ranks", report="transformers#48687")
def gradient_of_all_slots():
    sch = scheduled(_LocalMixture).at["experts.{up,down}"].shard(axis=0).at["experts"]
    sch = sch.sync("backward_post", "all_reduce", which=1).sync("forward_pre", own_slots, which=1)
    sch = sch.trust("slots of other ranks' experts have weights of zero, so that the sum has each expert once")
    return sch.sync("forward_post", "all_reduce").sync("backward_post", "all_reduce"), x()


class _Whole(nn.Module):
    """Feed-forward layers with a residual around them."""

    def __init__(self):
        super().__init__()
        self.first, self.mlp = (
            nn.Linear(WIDTH, WIDTH),
            nn.Sequential(nn.Linear(WIDTH, WIDE), nn.SiLU(), nn.Linear(WIDE, WIDTH)),
        )

    def forward(self, x):
        y = self.first(x)
        return y + self.mlp(y)


@wrong("feed-forward layers that are whole on each rank, summed over ranks", where="mlp", report="tokenspeed#80")
def whole_layers_summed():
    return scheduled(_Whole).at["mlp"].sync("forward_post", "all_reduce"), x()


@right("feed-forward layers split, and summed over ranks", report="tokenspeed#80")
def split_layers_summed():
    return scheduled(_Whole).at["mlp.0"].colwise().at["mlp.2"].rowwise(), x()


class _Shared(nn.Module):
    """A mixture of experts beside feed-forward layers that all tokens pass, added and then summed over ranks."""

    def __init__(self):
        super().__init__()
        self.first, self.router, self.experts = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, EXPERTS), _Experts()
        self.up, self.down = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH, bias=False)
        self.sum = nn.Identity()

    def forward(self, x):
        y = self.first(x)
        return self.sum(self.experts(y, self.router(y).softmax(-1)) + self.down(self.up(y).relu()))


def _shared():
    sch = scheduled(_Shared).at["experts.up"].shard(axis=2).at["experts.down"].shard(axis=1).at["up"].colwise()
    sch = sch.at["experts"].sync("backward_post", "all_reduce").sync("backward_post", "all_reduce", which=1)
    return sch.at["sum"].sync("forward_post", "all_reduce")


@wrong("shared layers summed over ranks, and again with the experts", where="sum", report="family of torchtitan#1750")
def shared_layers_summed_twice():
    """That report was not found; this is a fault of split experts beside shared ones, as its neighbours' are."""
    return _shared().at["down"].rowwise(), x()


@right("shared layers summed over ranks with the experts", report="family of torchtitan#1750")
def shared_layers_summed_once():
    return _shared().at["down"].shard("weight", axis=1).set(in_features=WIDE // 2), x()
