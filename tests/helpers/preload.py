"""What ranks would import and compile, each for itself: done once by the process that they are forked from."""

from __future__ import annotations

import importlib

import torch

from shardplan.functional import create_schedule, execute, plan_build
from shardplan.specs import Mesh

for name in (
    *(
        "deepspeed",
        "pytest",
        "torch.distributed.pipelining",
        "torch.export._trace",
        "torch._export.non_strict_utils",
        "triton",
    ),
    *("shardplan.functional.dialects.deepspeed.wrap", "shardplan.functional.dialects.torch.wrap"),
    *("tests.helpers.families", "tests.helpers.models"),
):
    importlib.import_module(name)

execute(plan_build(create_schedule(torch.nn.Linear(2, 2, device="meta"), Mesh())), device="cpu", progress=False)
