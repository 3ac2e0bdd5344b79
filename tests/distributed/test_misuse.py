"""Ordinary code around an executed module that would train something else raises on each rank, and says what to use."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from transformers import MixtralConfig, MixtralForCausalLM

from shardplan.functional import TrainingError, create_schedule, execute, plan_build
from shardplan.specs import Mesh
from tests.helpers.models import llama, split_llama
from tests.helpers.ranks import results, run_ranks


def built(mesh, **given):
    plan = plan_build(split_llama(llama(), mesh), init_weights=True)
    return execute(plan, device="cpu", progress=False, **given)


def tokens(seed, length=8):
    return torch.randint(0, 128, (2, length), generator=torch.Generator().manual_seed(seed))


def loss_of(module, ids):
    return module(input_ids=ids, labels=ids, use_cache=False).loss


def told(action):
    """Return what an action raises, empty if nothing."""
    try:
        action()
    except TrainingError as error:
        return str(error)
    return ""


def batches_of_their_own(rank, mesh):
    module = built(mesh).module
    same = told(lambda: loss_of(module, tokens(mesh.coordinate(rank).data)))
    other = told(lambda: loss_of(module, tokens(rank)))
    shape = told(lambda: loss_of(module, tokens(0, length=8 + mesh.coordinate(rank).tensor)))
    unchecked = built(mesh, check_inputs=0).module
    return same, other, shape, told(lambda: loss_of(unchecked, tokens(rank)))


@pytest.mark.parametrize("mesh", [Mesh(tensor=2), Mesh(data=2, tensor=2)], ids=str)
def test_batches_that_differ_along_tensor_are_named(mesh):
    for same, other, shape, unchecked in results(run_ranks(batches_of_their_own, mesh.num_ranks, mesh)):
        assert not same
        assert not unchecked
        assert "called with different batches: input_ids ([2, 8]), labels ([2, 8]) differ" in other
        assert "DistributedSampler(dataset, num_replicas=plan.mesh.data" in other
        assert "input_ids ([2, 8] and [2, 9])" in shape


def clipped(_, mesh, how):
    made = built(mesh, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    if how == "double":
        made.module.double()
    loss_of(made.module, tokens(0)).backward()
    if how == "torch":
        clip_grad_norm_(made.module.parameters(), 0.1)
    foreign = torch.optim.AdamW(made.module.parameters())
    return told(made.optimizer.step), told(foreign.step)


def test_clipping_by_each_ranks_own_norm_is_found_before_the_step():
    for outcome in results(run_ranks(clipped, 2, Mesh(tensor=2), "torch")):
        for message in outcome:
            assert message.startswith("gradients that ranks 0, 1 along tensor hold whole are not alike: model.layers.0.")
            assert "built.clip_grad_norm_(max_norm)" in message
    for how in ("not", "double"):
        assert results(run_ranks(clipped, 2, Mesh(tensor=2), how)) == [("", "")] * 2


class Adapted(nn.Module):
    """A linear module with an addition of its own, as adapters are put on."""

    def __init__(self, base):
        super().__init__()
        self.base, self.own = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.own(x)


class Compiled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def adapted(_, how):
    module = built(Mesh(tensor=2)).module
    before = told(lambda: loss_of(module, tokens(0)))
    if how == "adapter":
        module.model.layers[1].mlp.up_proj = Adapted(module.model.layers[1].mlp.up_proj)
    elif how == "embedding":
        module.lm_head = nn.Linear(64, 140, bias=False)
    else:
        module.model.layers[1].mlp.up_proj = Compiled(module.model.layers[1].mlp.up_proj)
    inside = told(lambda: module.forward(input_ids=tokens(0), use_cache=False))
    return before, told(lambda: loss_of(module, tokens(0))), inside


def test_parameters_that_execute_did_not_place_are_named_at_the_next_call():
    for before, called, inside in results(run_ranks(adapted, 2, "adapter")):
        assert not before
        assert "1 new (model.layers.1.mlp.up_proj.own.weight)" in called
        assert "before planning" in called
        assert called == inside
    for _, called, _ in results(run_ranks(adapted, 2, "embedding")):
        assert "1 are other tensors (lm_head.weight)" in called
    assert results(run_ranks(adapted, 2, "wrapped")) == [("", "", "")] * 2


def wrapped(rank, mesh):
    made = built(mesh, check_inputs=0)
    coordinate = mesh.coordinate(rank)
    before = [parameter.detach().clone() for parameter in made.module.parameters()]
    over_all = told(lambda: DistributedDataParallel(made.module))
    same = all(map(torch.equal, before, made.module.parameters()))
    along_data = [dist.new_group(sorted(ranks)) for ranks in mesh.groups("data")][coordinate.tensor]
    return over_all, same, told(lambda: loss_of(DistributedDataParallel(made.module, process_group=along_data), tokens(0)))


def test_ddp_over_ranks_with_parts_raises_before_it_sends_anything():
    for over_all, same, over_data in results(run_ranks(wrapped, 4, Mesh(data=2, tensor=2))):
        assert over_all.startswith("DistributedDataParallel over ranks 0, 1, 2, 3 takes them for copies of one module")
        assert "ranks along tensor of mesh pipe=1 data=2 tensor=2 hold parts of it" in over_all
        assert same
        assert not over_data


def sharded(rank, layout):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = Mesh(data=2, tensor=2)
    made = built(mesh, layout=layout)
    module = made.module
    over = made.device_mesh["data"] if layout == "dtensor" else init_device_mesh("cpu", (4,))
    before = weakref.ref(module.lm_head.weight)
    fully_shard(module, mesh=over)
    said = told(lambda: loss_of(module, tokens(mesh.coordinate(rank).data)))
    gc.collect()
    return said, before() is None, told(made.grad_norm)


def test_fsdp_over_ranks_with_parts_raises_at_the_first_call():
    for message, _, _ in results(run_ranks(sharded, 4, "local")):
        assert message.startswith("fully_shard over ranks 0, 1, 2, 3 takes them for copies of one module")
    for message, is_freed, norm in results(run_ranks(sharded, 4, "dtensor")):
        assert not message
        assert is_freed  # the whole parameter: nothing here keeps it beside the shards
        assert norm.startswith("FSDP2 holds the parameters")


def with_experts(_, mesh):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4))
    plan = plan_build(create_schedule(model, mesh).at["**.experts"].expert_parallel())
    return told(lambda: DistributedDataParallel(execute(plan, device="cpu", progress=False).module))


def test_ddp_over_ranks_with_other_experts_raises():
    for message in results(run_ranks(with_experts, 2, Mesh(data=2, expert=2))):
        assert "ranks along expert of" in message


def copied(_):
    module = built(Mesh(tensor=2)).module
    saving = told(lambda: module.save_pretrained("nowhere"))
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(nn.Sequential(module.model.norm)))]
    copies[0].extra = nn.Linear(4, 4)
    torch.save(module.state_dict(), io.BytesIO())
    return saving, told(lambda: loss_of(copies[0], tokens(0)))


def test_parts_are_not_saved_as_the_whole_model_and_copies_are_free():
    for saving, of_copy in results(run_ranks(copied, 2)):
        assert "save_checkpoint(plan, model, folder)" in saving
        assert not of_copy
