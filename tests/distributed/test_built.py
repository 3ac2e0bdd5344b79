"""What a training loop asks of an executed model, for each target: norms, whole tensors, generation, accumulation."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

from shardplan.functional import create_schedule, execute, plan_build
from shardplan.specs import Mesh
from tests.helpers.models import llama, split_llama
from tests.helpers.ranks import results, run_ranks

CLIP = 0.1


def built(sch, target=None, layout="local"):
    zero = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": CLIP, "zero_optimization": {"stage": 1}}
    config = zero if target == "deepspeed" else None
    plan = plan_build(sch, target=target, config=config, init_weights=True)
    return execute(plan, device="cpu", progress=False, optimizer=adamw, layout=layout)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def tokens(place, rows=2):
    return torch.randint(0, 128, (rows, 8), generator=torch.Generator().manual_seed(place))


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def alone(places):
    """The whole model in one process, with the batches of all places: norms, weights after a step, generated tokens."""
    made = built(create_schedule(llama(), Mesh()))
    generated = made.module.generate(tokens(0), max_new_tokens=6, do_sample=False)
    loss_of(made.module, torch.cat([tokens(place) for place in range(places)])).backward()
    norm = clip_grad_norm_(made.module.parameters(), CLIP).item()
    made.optimizer.step()
    return norm, {path: tensor.detach().clone() for path, tensor in made.module.state_dict().items()}, generated


def trained(rank, mesh, target, layout):
    made = built(split_llama(llama(), mesh), target, layout)
    place = mesh.coordinate(rank).data
    greedy = made.generate(tokens(0), max_new_tokens=6, do_sample=False)
    torch.manual_seed(rank)  # other numbers on each rank
    drawn = [made.generate(tokens(0), max_new_tokens=6, do_sample=True, temperature=5.0) for _ in range(2)]
    if target == "deepspeed":
        made.model.backward(loss_of(made.model, tokens(place)))
        made.model.step()
        return float(made.grad_norm()), None, made.state_dict(), greedy, drawn
    loss_of(made.model, tokens(place)).backward()
    norm, clipped = made.grad_norm().item(), made.clip_grad_norm_(CLIP).item()
    made.optimizer.step()
    return norm, clipped, made.state_dict(), greedy, drawn


CASES = [
    (Mesh(tensor=2), None, "local"),
    (Mesh(tensor=2), None, "dtensor"),
    (Mesh(tensor=2), "torch", "local"),
    (Mesh(data=2, tensor=2), "torch", "local"),
    (Mesh(tensor=2), "deepspeed", "local"),
]


@pytest.mark.parametrize(("mesh", "target", "layout"), CASES, ids=str)
def test_norms_tensors_and_tokens_are_those_of_one_process(mesh, target, layout):
    norm, weights, generated = alone(mesh.data)
    outcomes = results(run_ranks(trained, mesh.num_ranks, mesh, target, layout))
    for rank, (found, clipped, state, greedy, drawn) in enumerate(outcomes):
        assert found == pytest.approx(norm, rel=1e-4)
        assert clipped in {None, found}
        assert torch.equal(greedy, generated)
        along = mesh.coordinate(rank).data * mesh.tensor
        assert all(map(torch.equal, drawn, outcomes[along][4]))
        assert not torch.equal(*drawn)
        if rank:
            assert not state
        else:
            assert state.keys() == weights.keys()
            assert all(torch.allclose(state[path], weights[path], atol=1e-5) for path in weights)


def accumulated(rank, mesh):
    made = built(split_llama(llama(), mesh), "torch")
    place = mesh.coordinate(rank).data
    with made.no_sync():
        (loss_of(made.model, tokens(place)) / 2).backward()
    own = made.grad_norm().item()
    (loss_of(made.model, tokens(place + 2)) / 2).backward()
    norms = [torch.tensor(0.0) for _ in range(dist.get_world_size())]
    dist.all_gather(norms, torch.tensor(own))
    return [norm.item() for norm in norms], made.grad_norm().item()


def test_gradients_are_accumulated_and_averaged_once():
    made = built(create_schedule(llama(), Mesh()))
    loss_of(made.module, torch.cat([tokens(place) for place in range(4)])).backward()
    for own, norm in results(run_ranks(accumulated, 4, Mesh(data=2, tensor=2))):
        assert own[0] == pytest.approx(own[1])
        assert own[0] != pytest.approx(own[2])
        assert norm == pytest.approx(made.grad_norm().item(), rel=1e-4)
