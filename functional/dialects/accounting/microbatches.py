"""Micro-batches of a training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ....specs.plan import Plan


def num_microbatches(plan: Plan) -> int:
    """Return the micro-batches of one training step on one rank.

    DeepSpeed derives what its configuration leaves out (``_set_batch_related_parameters`` in runtime/config.py of 0.19.8).

    >>> from shardplan.specs import Mesh, Plan, SpecTree
    >>> config = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}
    >>> num_microbatches(Plan(Mesh(data=2), SpecTree(), (), target="deepspeed", config=config))
    4
    """
    config = plan.config or {}
    if plan.target == "torch":
        return config.get("num_microbatches", 1)
    if plan.target != "deepspeed":
        return 1
    total, micro, steps = (
        config.get(name) for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    if steps is not None:
        return steps
    return max(1, total // (micro * plan.mesh.data)) if total and micro else 1
