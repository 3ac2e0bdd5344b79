"""Layouts of real models, trained by real processes, equal the unsplit model in one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig, MixtralForCausalLM

from shardplan.functional import create_schedule, execute, plan_build, predict
from shardplan.specs import Mesh
from tests.helpers.models import llama
from tests.helpers.ranks import results, run_ranks
from tests.helpers.training import BATCH, CLIP, adamw, batch, logits_of, loss_of

NUM_STEPS = 5


def repeated(mesh):
    """Two key/value heads, an uneven feed-forward block, a padded vocabulary."""
    model = llama(num_key_value_heads=2, vocab_size=131, intermediate_size=90)
    sch = create_schedule(model, mesh)
    sch = sch.at["**.q_proj"].colwise(granule=8).at["**.[kv]_proj"].colwise(granule=8, replicate=True)
    groups = (8 // mesh.tensor) // max(1, 2 // mesh.tensor)
    sch = sch.at["**.self_attn"].set(num_key_value_groups=groups).at["**.o_proj"].rowwise(granule=8)
    sch = sch.at["**.mlp.{gate,up}_proj"].colwise(uneven=True).at["**.mlp.down_proj"].rowwise(uneven=True)
    sch = sch.at["model.embed_tokens"].vocab_parallel(pad_to_multiple=8)
    return sch.at["lm_head"].colwise(gather_output=True, pad_to_multiple=8)


def sequence(mesh):
    """The sequence is split outside of attention and feed-forward blocks, also for norms and biases."""
    sch = create_schedule(llama(attention_bias=True, mlp_bias=True), mesh)
    sch = sch.at["model.layers.0"].sync("backward_post", "all_gather", axis=1)
    sch = sch.at["**.{input,post_attention}_layernorm"].sum_gradient().at["model.norm"].sum_gradient()
    sch = sch.at["model.norm"].sync("forward_post", "all_gather", axis=1)
    sch = sch.at["**.self_attn"].sync("forward_pre", "all_gather", axis=1)  # its code looks at the length of its input
    sch = sch.at["**.self_attn.[qkv]_proj.{weight,bias}"].shard(axis=0).at["**.o_proj"].rowwise(sequence_axis=1)
    sch = sch.at["**.mlp.{gate,up}_proj"].colwise(sequence_axis=1).at["**.mlp.down_proj"].rowwise(sequence_axis=1)
    return sch.at["lm_head"].colwise(gather_output=True)


def mixtral(**changes):
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=4,
        attn_implementation="eager",
        **{"num_experts_per_tok": 2, **changes},
    )
    with torch.device("meta"):
        return MixtralForCausalLM(config)


def starved(mesh):
    """All tokens go to one expert, so that ranks with others have nothing to do, and are waited for."""
    model = mixtral(experts_implementation="eager", num_experts_per_tok=1)
    return experts(mesh, model).at["**.mlp.gate.weight"].init(0.0)


def experts(mesh, model=None):
    """Experts over ``expert``, each of them over ``tensor``: gate and up are two blocks of one tensor."""
    sch = create_schedule(model or mixtral(), mesh)
    sch = sch.at["**.self_attn.[qkv]_proj"].colwise(granule=8).at["**.o_proj"].rowwise(granule=8)
    sch = sch.at["**.mlp.experts"].shard("gate_up_proj", axis=1, blocks=(48, 48))
    sch = sch.at["**.mlp.experts"].shard("down_proj", axis=2).at["**.mlp.experts"].sync("forward_post", "all_reduce")
    for which in (0, 1):
        sch = sch.at["**.mlp.experts"].sync("backward_post", "all_reduce", which=which)
    return sch.at["**.mlp.experts"].expert_parallel()


class Fused(nn.Module):
    """Attention with q, k and v in one matrix, two heads of which share a key and a value; its output is padded to 24."""

    def __init__(self, device="meta"):
        super().__init__()
        self.heads, self.groups = 8, 2
        self.embed = nn.Embedding(20, 16, device=device)
        self.qkv = nn.Linear(16, (8 + 2 + 2) * 4, device=device)
        self.out = nn.Linear(32, 16, device=device)
        self.head = nn.Linear(16, 20, device=device)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.qkv(x).split([self.heads * 4, self.groups * 4, self.groups * 4], -1)
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(torch.tanh(x))


def fused(mesh):
    """q|k|v as blocks of one tensor; the padded head's outputs stay split, and the padding is masked."""
    sch = create_schedule(Fused(), mesh)
    sch = sch.at["qkv"].colwise(blocks=(32, 8, 8), granule=4, replicate=True).at["out"].rowwise(granule=4)
    sch = sch.at[""].set(heads=8 // mesh.tensor, groups=max(1, 2 // mesh.tensor))
    return sch.at["head"].colwise(pad_to_multiple=12).at["head"].sync("forward_post", join_padded)


class Grouped(nn.Module):
    """Attention whose matrix has, group by group, four query heads, their key and their value, as Falcon's."""

    def __init__(self, device="meta"):
        super().__init__()
        self.groups, self.queries = 2, 4
        self.embed = nn.Embedding(20, 16, device=device)
        self.qkv = nn.Linear(16, 2 * (4 + 1 + 1) * 4, device=device)
        self.out = nn.Linear(32, 16, device=device)
        self.head = nn.Linear(16, 20, device=device)

    def forward(self, ids):
        x = self.embed(ids)
        mixed = self.qkv(x).unflatten(-1, (self.groups, self.queries + 2, 4)).permute(0, 2, 3, 1, 4)
        q, k, v = mixed[:, :, :-2].flatten(1, 2), mixed[:, :, -2], mixed[:, :, -1]
        k, v = (t.repeat_interleave(self.queries, 1) for t in (k, v))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(torch.tanh(x))


def grouped(mesh):
    """Fewer groups than ranks: two ranks share a group's queries, and each has its key and its value."""
    sch = create_schedule(Grouped(), mesh)
    sch = sch.at["qkv"].colwise(interleaved=2, blocks=(16, 4, 4), granule=4, replicate=True)
    sharing = max(1, mesh.tensor // 2)
    sch = sch.at[""].set(groups=max(1, 2 // mesh.tensor), queries=4 // sharing)
    return sch.at["out"].rowwise(granule=4).at["head"].colwise(gather_output=True)


def join_padded(x, group):
    """Join the split outputs, padding and all."""
    from shardplan.functional.layout.collectives import gather_parts

    return gather_parts(x, -1 % x.dim(), group, None) if group.num_ranks > 1 else x


MODELS = {
    "repeated": (repeated, 131),
    "sequence": (sequence, 128),
    "experts": (experts, 64),
    "starved": (starved, 64),
    "fused": (fused, 20),
    "grouped": (grouped, 20),
}


def plan_of(name, mesh, target, config):
    make, vocab = MODELS[name]
    inputs = {"ids" if name in {"fused", "grouped"} else "input_ids": torch.zeros(BATCH, 12, dtype=torch.long)}
    followed = None if name == "starved" else inputs  # whose code depends on values
    return plan_build(make(mesh), target=target, config=config, example_inputs=followed), vocab


def plans_of(jobs):
    return [plan_of(*job) for job in jobs]


def train(rank, plans, _):
    """What one rank does: for each job its losses and the norms of its gradients."""
    return [_train(rank, *planned) for planned in plans]


def _train(rank, plan, vocab):
    mesh, target = plan.mesh, plan.target
    built = execute(plan, device="cpu", optimizer=adamw)
    assert built.receipt == predict(plan, rank)
    model, optimizer = built
    share = BATCH // mesh.data
    start = mesh.coordinate(rank).data * share
    losses, norms = [], []
    for step in range(NUM_STEPS):
        ids = batch(step, vocab)[start : start + share]
        loss = loss_of(model, ids)
        losses.append(loss.item())
        if target == "deepspeed":
            model.backward(loss)
            model.step()
            norms.append(float(model.get_global_grad_norm()))
        else:
            loss.backward()
            norms.append(built.clip_grad_norm_(CLIP).item())
            optimizer.step()
            optimizer.zero_grad()
    return losses, norms


def alone(name):
    model = execute(plan_of(name, Mesh(), None, None)[0], device="cpu").module
    vocab, optimizer = MODELS[name][1], adamw(model.parameters())
    losses, norms = [], []
    for step in range(NUM_STEPS):
        loss = loss_of(model, batch(step, vocab))
        losses.append(loss.item())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def zero(stage):
    config = {"train_micro_batch_size_per_gpu": BATCH, "gradient_clipping": CLIP, "zero_optimization": {"stage": stage}}
    return "deepspeed", config


@pytest.mark.parametrize(
    ("num_ranks", "jobs"),
    [
        (2, [("repeated", Mesh(tensor=2), "torch", None), ("sequence", Mesh(tensor=2), "torch", None)]),
        (
            4,
            [
                ("repeated", Mesh(tensor=4), "torch", None),
                ("repeated", Mesh(tensor=4), *zero(1)),
                ("repeated", Mesh(tensor=4), *zero(2)),
                ("sequence", Mesh(tensor=4), "torch", None),
                ("sequence", Mesh(tensor=4), *zero(1)),
                ("fused", Mesh(tensor=4), "torch", None),
                ("fused", Mesh(data=2, tensor=2), "torch", None),
                ("grouped", Mesh(tensor=4), "torch", None),
                ("grouped", Mesh(data=2, tensor=2), "torch", None),
                ("experts", Mesh(tensor=2, data=2, expert=2), "torch", None),
                ("experts", Mesh(data=4, expert=2), "torch", None),
                ("starved", Mesh(data=4, expert=4), "torch", None),
                ("starved", Mesh(data=2, expert=2, tensor=2), "torch", None),
            ],
        ),
    ],
)
def test_training_equals_one_process(num_ranks, jobs):
    ranks = results(run_ranks(train, num_ranks, jobs, shared=plans_of))
    expected = {name: alone(name) for name in {name for name, *_ in jobs}}
    for number, (name, mesh, target, _) in enumerate(jobs):
        losses, norms = expected[name]
        found = [one[number] for one in ranks]
        for step in range(NUM_STEPS):
            mean = sum(loss[step] for loss, _ in found) / num_ranks
            assert mean == pytest.approx(losses[step], rel=1e-4), f"{name} on {mesh}, {target}, step {step}"
            for _, norm in found:
                assert norm[step] == pytest.approx(norms[step], rel=1e-3), f"{name} on {mesh}, {target}: norm of step {step}"


class Dropping(nn.Module):
    def __init__(self, device="meta"):
        super().__init__()
        self.inside, self.outside = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x):
        return self.outside(self.inside(x) * 0 + 1), self.inside(x)


def draw(rank, mesh):
    sch = create_schedule(Dropping(), mesh).at["inside"].fork_rng()
    module = execute(plan_build(sch), device="cpu").module
    torch.manual_seed(3)
    first = [t.detach() for t in module(torch.ones(64))]
    x = torch.ones(64, requires_grad=True)
    kept = torch.utils.checkpoint.checkpoint(lambda x: module(x)[1], x, use_reentrant=False)
    kept.sum().backward()
    assert torch.equal(x.grad != 0, kept != 0)  # computed again, it draws the same numbers
    return first, torch.rand(4)


def test_forked_random_numbers_differ_within_and_agree_outside():
    (first, after), (second, other) = results(run_ranks(draw, 2, Mesh(tensor=2)))
    assert torch.equal(first[0] != 0, second[0] != 0)
    assert not torch.equal(first[1], second[1])
    assert torch.equal(after, other)


def test_the_loss_does_not_see_padding():
    plan, vocab = plan_of("fused", Mesh(tensor=4), "torch", None)
    assert plan.tree["head.weight"].local_shape(plan.mesh.coordinate(0)) == (6, 16)
    ranks = results(run_ranks(masked, 4))
    for logits, loss in ranks:
        assert logits.shape[-1] == 24
        assert (logits[..., vocab:] == torch.finfo(torch.float32).min).all()
        assert loss == pytest.approx(ranks[0][1])


def masked(rank):
    plan, vocab = plan_of("fused", Mesh(tensor=4), "torch", None)
    built = execute(plan, device="cpu")
    assert (built.module.head.weight[max(0, vocab - 6 * rank) :] == 0).all()
    ids = batch(0, vocab)
    logits = logits_of(built.module, ids).detach()
    return logits, cross_entropy(logits.flatten(0, 1), ids.flatten()).item()
