"""Nothing on the way from a module to a report leaves a trace; and the guard that says so can fail."""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardplan.functional import audit, create_schedule, plan_build
from shardplan.functional.frontends import infer_schedule, schedule_from_tp_plan
from shardplan.specs import Mesh, dumps
from tests.helpers.families import INFERRED, MAKERS
from tests.helpers.models import MODELS, llama, split_llama


class RealTensors(TorchDispatchMode):
    """Notes operations that give real tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor) and not leaf.is_meta:
                self.seen.append(str(func))
        return out


@contextmanager
def pure():
    def world():
        numpy = np.random.get_state()  # noqa: NPY002
        generators = random.getstate(), numpy[1].tolist(), numpy[2:], torch.get_rng_state().tolist()
        return (
            generators,
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            dist.is_initialized(),
            torch.cuda.is_initialized(),
        )

    before = world()
    with RealTensors() as real:
        yield
    assert not real.seen
    assert world() == before


@pytest.mark.parametrize("name", MODELS)
def test_from_a_module_to_a_report(name):
    make, split = MODELS[name]
    ids = {"input_ids" if name == "llama" else "ids": torch.empty(2, 4, dtype=torch.long, device="meta")}
    model = make()
    with pure():
        plan = plan_build(split(model, Mesh(data=2, tensor=2)), example_inputs=ids)
        assert all((str(plan), str(audit(plan)), dumps(plan)))


@pytest.mark.parametrize(
    "effect",
    [
        lambda: torch.empty(1),
        lambda: torch.manual_seed(random.randrange(2**32)),
        lambda: random.random(),  # noqa: PLW0108  it is called later
        lambda: np.random.rand(),  # noqa: NPY002, PLW0108
    ],
)
def test_the_guard_can_fail(effect):
    with pytest.raises(AssertionError), pure():
        effect()


def test_a_module_with_values_keeps_them_where_they_are():
    model = llama("cpu")
    before = {path: (tensor.data_ptr(), tensor.clone(), tensor._version) for path, tensor in model.state_dict().items()}
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    plan_build(split_llama(model, Mesh(tensor=2)), init_weights=lambda module: nn.init.zeros_(module.weight))
    after = model.state_dict()
    assert all(before[path][0] == tensor.data_ptr() for path, tensor in after.items())
    assert all(torch.equal(before[path][1], tensor) for path, tensor in after.items())
    assert all(before[path][2] == tensor._version for path, tensor in after.items())
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == attributes


def test_the_schedule_keeps_no_tensor_of_its_own():
    sch = create_schedule(llama(), Mesh())
    assert not [leaf for leaf in tree_leaves([sch.tree, sch.modules, sch.layout]) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_a_frontend_leaves_no_trace(name):
    torch.manual_seed(0)
    model = MAKERS[name]()
    before = {path: (tensor.data_ptr(), tensor.clone(), tensor._version) for path, tensor in model.state_dict().items()}
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    generators = random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002
    frontend = infer_schedule if name in INFERRED else schedule_from_tp_plan
    sch = frontend(model, Mesh(tensor=2))
    assert any(spec.shards for spec in sch.tree.values())
    after = model.state_dict()
    assert all(before[path][::2] == (tensor.data_ptr(), tensor._version) for path, tensor in after.items())
    assert all(torch.equal(before[path][1], tensor) for path, tensor in after.items())
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == attributes
    assert generators == (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())  # noqa: NPY002
