"""Pipeline stages, alone and with tensor ranks; tensors that several places share."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from shardplan.specs import Mesh

from .blocks import HEADS, TENSOR, VOCAB, WIDE, Attention, Language, ids, mlp, scheduled, split_mlp, x
from .entry import right, wrong

PIPE, BOTH = Mesh(pipe=2), Mesh(pipe=2, tensor=2)


class _Layers(nn.Module):
    """Two layers one after another, and a sum with the input at the end."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.act, self.b = a, nn.ReLU(), b

    def forward(self, x):
        return x + self.b(self.act(self.a(x)))


def _layers(mesh, a=mlp, b=mlp):
    return scheduled(lambda: _Layers(a(), b()), mesh)


@right("two stages, and an input that passes the first")
def two_stages():
    return _layers(PIPE).at["a"].cut_pipeline_stage(), x()


@right("a frozen first stage")
def frozen_stage():
    return _layers(PIPE, lambda: mlp().requires_grad_(False)).at["a"].cut_pipeline_stage(), x()


@right("two stages on tensor ranks")
def stages_and_tensor():
    sch = split_mlp(split_mlp(_layers(BOTH), "a."), "b.")
    return sch.at["a"].cut_pipeline_stage(), x()


@wrong("a sum forgotten at the end of a stage", where="act")
def forgotten_at_the_boundary():
    sch = split_mlp(_layers(BOTH, lambda: mlp(bias=False)), "b.").at["a.0"].colwise()
    return sch.at["a.2"].shard("weight", axis=1).set(in_features=WIDE // 2).at["a"].cut_pipeline_stage(), x()


@wrong("heads not made local in the second stage", where="b")
def heads_of_the_second_stage():
    sch = split_mlp(_layers(BOTH, b=Attention), "a.").at["b.[qkv]"].colwise().at["b.o"].rowwise()
    return sch.at["a"].cut_pipeline_stage(), x()


@right("heads made local in the second stage")
def local_heads_of_the_second_stage():
    sch = split_mlp(_layers(BOTH, b=Attention), "a.").at["b.[qkv]"].colwise().at["b.o"].rowwise()
    local = {"num_heads": HEADS // 2, "num_kv_heads": HEADS // 2}
    return sch.at["b"].set(**local).at["a"].cut_pipeline_stage(), x()


class _Handed(nn.Module):
    """Two square parts, with or without something between them that is not a module."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = mlp(), mlp(), between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


def _handed(*order, between=lambda y: y):
    with torch.device("meta"):
        model = _Handed(between)
    sch = scheduled(lambda: model, PIPE)
    return sch.with_stages([getattr(model, name) for name in order]), x()


@right("stages handed over in their order")
def handed():
    return _handed("a", "b")


@wrong("stages handed over in another order", where="b")
def handed_in_another_order():
    return _handed("b", "a")


@wrong("stages handed over without the code between them", where="b")
def handed_without_code():
    return _handed("a", "b", between=lambda y: 3 * y.tanh())


@right("an embedding tied to a head on another stage")
def tied_over_stages():
    return scheduled(lambda: Language(mlp(), tied=True), PIPE).at["body.0"].cut_pipeline_stage(), ids()


def _tied(mesh=TENSOR):
    return split_mlp(scheduled(lambda: Language(mlp(), tied=True), mesh), "body.")


@right("a tied embedding by rows, its head gathered")
def tied():
    return _tied().at["embed"].vocab_parallel().at["head"].colwise(gather_output=True), ids()


@right("a tied embedding by rows on tensor ranks of two stages")
def tied_over_stages_and_tensor():
    sch = _tied(BOTH).at["embed"].vocab_parallel().at["head"].colwise(gather_output=True)
    return sch.at["body"].cut_pipeline_stage(), ids()


@wrong("a tied embedding by rows, its head not told", where="")
def tied_head_not_told():
    return _tied().at["embed"].vocab_parallel(), ids()


@wrong("a tied head by rows, its embedding not told", where="embed")
def tied_embedding_not_told():
    """Tokens have their whole numbers, and a rank has half of the rows."""
    return _tied().at["head"].colwise(gather_output=True), ids()


@wrong("a tied head whose input's gradient is not summed", where="body.2")
def tied_head_without_a_sum():
    sch = _tied().at["embed"].vocab_parallel()
    return sch.at["head"].sync("forward_post", "all_gather", axis=-1), ids()


class _ByHand(Language):
    """The head is a product with the embedding's weight in the model's own code."""

    def __init__(self):
        super().__init__(mlp())
        self.head = None

    def forward(self, ids):
        return functional.linear(self.body(self.embed(ids)), self.embed.weight)


@wrong("a product with the weight of an embedding by rows", where="")
def product_with_the_embedding():
    return split_mlp(scheduled(_ByHand), "body.").at["embed"].vocab_parallel(), ids()


@right("a product with the weight of a whole embedding")
def product_with_a_whole_embedding():
    return split_mlp(scheduled(_ByHand), "body."), ids()


@right("an embedding by features, gathered")
def embedding_by_features():
    sch = split_mlp(scheduled(lambda: Language(mlp())), "body.").at["embed"].shard("weight", axis=1)
    return sch.at["embed"].sync("forward_post", "all_gather", axis=-1), ids()


@wrong("an embedding by features, gathered along tokens", where="embed")
def embedding_gathered_along_tokens():
    sch = split_mlp(scheduled(lambda: Language(mlp())), "body.").at["embed"].shard("weight", axis=1)
    return sch.at["embed"].sync("forward_post", "all_gather", axis=1), ids()


@wrong("an embedding by rows without its lookup", where="embed")
def rows_without_lookup():
    sch = scheduled(lambda: Language(mlp())).at["embed"].shard("weight", axis=0)
    return sch.at["embed"].sync("forward_post", "all_reduce"), ids(vocab=VOCAB)
