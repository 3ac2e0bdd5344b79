"""Experts over ranks, routers that choose them, and shared experts beside them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from shardplan.functional.frontends import schedule_from_tp_plan
from shardplan.specs import Mesh

from .blocks import TENSOR, VOCAB, WIDE, WIDTH, Behind, ids, mlp, scheduled, split_mlp, x
from .entry import right, wrong

NUM = 4
EXPERT, BOTH = Mesh(data=2, expert=2), Mesh(data=2, expert=2, tensor=2)


class _Experts(nn.Module):
    """Experts that are called with tokens, the experts chosen for each, and their weights."""

    def __init__(self):
        super().__init__()
        self.num_experts = NUM
        self.up, self.down = nn.Parameter(torch.empty(NUM, WIDTH, WIDE)), nn.Parameter(torch.empty(NUM, WIDE, WIDTH))

    def reset_parameters(self):
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, tokens, chosen, weights):
        total = torch.zeros_like(tokens)
        for number in range(self.num_experts):
            share = (weights * (chosen == number)).sum(-1, keepdim=True)
            total = total + share * (functional.gelu(tokens @ self.up[number]) @ self.down[number])
        return total


class _Mixture(nn.Module):
    """A router, experts, and a shared expert whose output a gate weighs."""

    def __init__(self, *, shared=False):
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, NUM, bias=False), _Experts()
        self.shared = mlp(bias=False) if shared else None
        self.gate = nn.Linear(WIDTH, 1) if shared else None

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        total = self.experts(tokens, chosen, weights)
        if self.shared is not None:
            total = total + self.gate(tokens).sigmoid() * self.shared(tokens)
        return total.view_as(x)


def _mixture(mesh, **options):
    return scheduled(lambda: Behind(_Mixture(**options)), mesh)


def _within_experts(sch):
    """Split each expert's hidden features over tensor, without sums."""
    return sch.at["body.experts.up"].shard(axis=2).at["body.experts.down"].shard(axis=1)


_CONTRACT = "it gives the weighted sum of what its experts give"


@right("experts over data ranks")
def expert_parallel():
    return _mixture(EXPERT).at["body.experts"].expert_parallel().trust(_CONTRACT), x(4, 5)


class _DividedExperts(_Experts):
    """Experts whose sum is divided by how many there are."""

    def forward(self, tokens, chosen, weights):
        return super().forward(tokens, chosen, weights) / self.num_experts


@wrong("experts over data ranks, their sum divided by the local number of experts", where="body.experts")
def divided_by_the_local_number():
    def make():
        mixture = _Mixture()
        mixture.experts = _DividedExperts()
        return Behind(mixture)

    return scheduled(make, EXPERT).at["body.experts"].expert_parallel(), x(4, 5)


@right("experts over data ranks, with a shared expert on all")
def shared_expert():
    return _mixture(EXPERT, shared=True).at["body.experts"].expert_parallel().trust(_CONTRACT), x(4, 5)


@wrong("experts over data ranks without an exchange of tokens", where="body.experts")
def no_exchange():
    sch = _mixture(EXPERT).at["body.experts.{up,down}"].shard(axis=0, mesh_axis="expert")
    return sch.at["body.experts"].set(num_experts=NUM // 2), x(4, 5)


@wrong("experts over tensor ranks, chosen by local numbers", where="body.experts")
def local_numbers():
    """Both ranks compute with the first two numbers, which on the second are experts three and four."""
    sch = _mixture(TENSOR).at["body.experts.{up,down}"].shard(axis=0).at["body.experts"].set(num_experts=NUM // 2)
    sch = sch.at["body.experts"].sync("backward_post", "all_reduce").sync("backward_post", "all_reduce", which=1)
    return sch.at["body.experts"].sync("forward_post", "all_reduce"), x()


@wrong("experts over tensor ranks, the number of experts not made local", where="body.experts")
def number_not_local():
    return _mixture(TENSOR).at["body.experts.{up,down}"].shard(axis=0).at["body.experts"].sync(
        "forward_post", "all_reduce"
    ), x()


@wrong("features within experts over tensor ranks, outputs not summed", where="")
def experts_not_summed():
    sch = _within_experts(_mixture(TENSOR)).at["body.experts"].sync("backward_post", "all_reduce")
    return sch.sync("backward_post", "all_reduce", which=1), x()


def _within_all(sch):
    sch = _within_experts(sch).at["body.experts"].expert_parallel().sync("forward_post", "all_reduce")
    return sch.sync("backward_post", "all_reduce").sync("backward_post", "all_reduce", which=1)


@right("experts over data ranks, and their features over tensor ranks")
def expert_and_tensor():
    return _within_all(_mixture(BOTH)).at["body.experts"].trust(_CONTRACT), x(4, 5)


@wrong("experts over data ranks, and their features over tensor ranks without a sum", where="")
def expert_and_tensor_not_summed():
    sch = _within_experts(_mixture(BOTH)).at["body.experts"].expert_parallel()
    return sch.sync("backward_post", "all_reduce").sync("backward_post", "all_reduce", which=1), x(4, 5)


@right("a shared expert over tensor ranks, beside whole experts")
def shared_over_tensor():
    return split_mlp(_mixture(TENSOR, shared=True), "body.shared."), x()


@wrong("a shared expert summed behind its gate", where="body.gate")
def shared_summed_behind_its_gate():
    """Everything is a summand until the end of the block, so that the whole gate's gradient is partial."""
    sch = _within_experts(_mixture(TENSOR, shared=True)).at["body.shared.0"].colwise()
    sch = sch.at["body.shared.2"].shard("weight", axis=1).set(in_features=WIDE // 2)
    sch = sch.at["body.experts"].sync("backward_post", "all_reduce").sync("backward_post", "all_reduce", which=1)
    return sch.at["body"].sync("forward_post", "all_reduce"), x()


class _ExpertChoice(nn.Module):
    """Each expert chooses the two tokens with its largest scores (expert choice routing)."""

    def __init__(self, squash):
        super().__init__()
        self.squash, self.scores = squash, nn.Linear(WIDTH, NUM, bias=False)
        self.up, self.down = nn.Parameter(torch.empty(NUM, WIDTH, WIDE)), nn.Parameter(torch.empty(NUM, WIDE, WIDTH))

    def reset_parameters(self):
        nn.init.normal_(self.up)
        nn.init.normal_(self.down)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        shares, chosen = self.squash(self.scores(tokens)).T.topk(2)
        out = functional.gelu(tokens[chosen] @ self.up) @ self.down * shares.unsqueeze(-1)
        return torch.zeros_like(tokens).index_add(0, chosen.flatten(), out.flatten(0, 1)).view_as(x)


def _choosing(squash):
    sch = scheduled(lambda: Behind(_ExpertChoice(squash))).at["body.{up,down,scores.weight}"].shard(axis=0)
    return sch.at["body"].sync("forward_post", "all_reduce").sync("backward_post", "all_reduce"), x()


@wrong("experts that choose tokens by a softmax over experts, over tensor ranks", where="body")
def choice_by_softmax():
    return _choosing(lambda scores: scores.softmax(-1))


@right("experts that choose tokens by sigmoids, over tensor ranks")
def choice_by_sigmoid():
    return _choosing(torch.sigmoid)


@right("a Qwen2-MoE by its tp_plan")
def qwen2_moe():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    config = Qwen2MoeConfig(hidden_size=16, intermediate_size=24, **sizes, **experts)
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(config)
    return schedule_from_tp_plan(model, TENSOR), {"input_ids": ids()["ids"], "use_cache": False}
