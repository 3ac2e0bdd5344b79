"""Import and compile once, in the process that ranks are forked from, all that each rank would import and compile."""

from __future__ import annotations

import atexit
import gc
import importlib
import pkgutil

import deepspeed
import torch
from torch import nn

import shardplan.functional
from shardplan.functional import create_schedule, execute, plan_build
from shardplan.specs import Mesh

for name in (
    "deepspeed.runtime.zero.muon.muon_optimizer",  # with torch's compiler, 1.5 s
    "pytest",
    "torch.distributed.pipelining",
    "torch.profiler._cupti_monitor",
    "triton",
    "tests.helpers.families",
    "tests.helpers.models",
    *(module.name for module in pkgutil.walk_packages(shardplan.functional.__path__, "shardplan.functional.")),
):
    importlib.import_module(name)

_ = deepspeed.ops.__compatible_ops__  # asked for once, as compilers are started for the answer
with torch.device("meta"):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
execute(plan_build(create_schedule(model, Mesh())), device="cpu", progress=False)
plan_build(create_schedule(model, Mesh(pipe=2)).cut_evenly(2), example_inputs={"input": torch.zeros(2, 2)})
gc.collect()
gc.freeze()  # what is imported, hundreds of thousands of objects, is no garbage of the forked processes
atexit.register(gc.unfreeze)
gc.set_threshold(20_000, 50, 100)
