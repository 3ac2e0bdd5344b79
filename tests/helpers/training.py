"""Train a split model on several ranks, and the unsplit one in one process."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import cross_entropy

from shardplan.functional import execute, plan_build
from tests.helpers.models import MODELS, schedule
from tests.helpers.tensor_parts import picked, without_padding

NUM_STEPS = 10
BATCH, LENGTH = 4, 12
CLIP = 0.5


def batch(step, vocab):
    """Tokens of one step; each is followed by its successor, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(vocab, (BATCH, 1), generator=generator)
    return (start + torch.arange(LENGTH)) % vocab


def logits_of(model, ids):
    out = model(ids)
    return out.logits if hasattr(out, "logits") else out


def loss_of(model, ids):
    logits = logits_of(model, ids)
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def adamw(parameters, lr=1e-2):
    return torch.optim.AdamW(parameters, lr=lr)


BF16_ADAMW = partial(adamw, lr=1e-3)
"""At a larger rate AdamW's first steps, as large for small gradients as for large ones, make rounding matter."""


def vocab_of(name):
    return 128 if name == "llama" else 64


def local_tensors(module, tree):
    """This rank's tensors; what ZeRO 3 has spread over the data ranks is gathered for the moment."""
    import deepspeed

    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with deepspeed.zero.GatheredParameters([p for p in module.parameters() if hasattr(p, "ds_id")]):
        return {spec.path: state[spec.path].detach().clone() for spec in tree.values()}


def put_together(plan, by_rank):
    """Return the logical tensors from every rank's parts, checking that replicas are equal bit for bit."""
    whole = {}
    for path, spec in plan.tree.items():
        tensor = torch.full(spec.orig_shape, -77, dtype=getattr(torch, spec.dtype))
        written = torch.zeros(spec.orig_shape, dtype=torch.bool)
        for rank, local in enumerate(by_rank):
            here = plan.mesh.coordinate(rank)
            assert tuple(local[path].shape) == spec.local_shape(here), f"{path} on rank {rank}"
            index, part = picked(spec.index(here)), without_padding(local[path], spec.index(here))
            assert torch.equal(tensor[index][written[index]], part[written[index]]), f"{path} differs on rank {rank}"
            tensor[index] = part
            written[index] = True
        assert written.all(), path
        whole[path] = tensor
    return whole


def plan_training(name, mesh, target, config, strategy):
    return plan_build(schedule(name, mesh), target=target, config=config, strategy=strategy)


def train_ranks(rank, plan, name, mesh, target, *_):
    """Train on one rank; return its first weights, its first logits, its losses and its receipt."""
    built = execute(plan, device="cpu", optimizer=adamw)
    model, optimizer = built
    local = local_tensors(built.module, plan.tree)
    here = mesh.coordinate(rank)
    share = BATCH // mesh.data
    mine = slice(here.data * share, (here.data + 1) * share)
    vocab = vocab_of(name)
    built.module.eval()
    with torch.no_grad():
        logits = logits_of(built.module, batch(0, vocab))
    built.module.train()
    losses = []
    for step in range(NUM_STEPS):
        loss = loss_of(model, batch(step, vocab)[mine])
        losses.append(loss.item())
        if target == "deepspeed":
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    final = local_tensors(built.module, plan.tree)
    frozen = [p for p in plan.tree if not plan.tree[p].requires_grad and plan.tree[p].kind == "parameter"]
    assert all(torch.equal(final[path], local[path]) for path in frozen)
    tied = [[id(_get(built.module, path)) for path in spec.paths] for spec in plan.tree.values() if spec.tie]
    assert all(len(set(same)) == 1 for same in tied)
    return {"weights": local, "logits": logits, "losses": losses, "receipt": built.receipt, "final": final}


def train_alone(name, weights, *, clip):
    """The unsplit model in one process, from the same weights, by torch alone."""
    model = MODELS[name][0](device="cpu")
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    assert all("inv_freq" in key for key in unexpected), unexpected
    vocab = vocab_of(name)
    model.eval()
    with torch.no_grad():
        logits = logits_of(model, batch(0, vocab))
    model.train()
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    losses = []
    for step in range(NUM_STEPS):
        loss = loss_of(model, batch(step, vocab))
        losses.append(loss.item())
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return logits, losses


def train_alone_in_bf16(model, steps):
    """Train an unsplit bfloat16 model by AdamW on float32 copies of its parameters, as ZeRO does; return the losses.

    ``steps`` gives for each step the functions that compute the loss of each of its micro-batches.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = [parameter.detach().float() for parameter in trained]
    optimizer, losses = BF16_ADAMW(masters), []
    for step in steps:
        for master in masters:
            master.grad = torch.zeros_like(master)
        found = []
        for loss_of_part in step:
            loss = loss_of_part(model)
            (loss / len(step)).backward()
            found.append(loss.item())
            for parameter, master in zip(trained, masters, strict=True):
                master.grad += parameter.grad
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(trained, masters, strict=True):
                parameter.copy_(master)
        losses.append(sum(found) / len(found))
    return losses


def _get(module, path):
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)
