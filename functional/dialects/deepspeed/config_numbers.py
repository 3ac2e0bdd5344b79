"""What a DeepSpeed configuration says in the place of a number that everything else is computed from. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ....specs.errors import Problem

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_SIZES = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "sub_group_size",
    *(
        f"{prefix}{name}"
        for prefix in ("", "stage3_")
        for name in (
            "param_persistence_threshold",
            "model_persistence_threshold",
            "max_reuse_distance",
            "prefetch_bucket_size",
        )
    ),
)
_MAX_STAGE = 3
_NOT_AUTO = "'auto' is not for DeepSpeed itself"


def wrong_numbers(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Iterate over batch sizes and numbers of ZeRO that are none, in a configuration that is planned, or was saved.

    >>> [problem.path for problem in wrong_numbers({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}})]
    ['config.zero_optimization.sub_group_size']
    """
    for name in _BATCH:
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            yield Problem(f"config.{name}", f"it is a positive integer, not {value!r}", _NOT_AUTO)
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        cause = f"it is a section with a stage, not {zero!r}"
        yield Problem("config.zero_optimization", cause, 'Write "zero_optimization": {"stage": 1}')
        return
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage <= _MAX_STAGE:
        cause = f"it is 0, 1, 2 or 3, not {stage!r}"
        yield Problem("config.zero_optimization.stage", cause, 'Write "zero_optimization": {"stage": 1}')
    for name in _SIZES:
        value = zero.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            cause = f"it is a number, not {value!r}"
            yield Problem(f"config.zero_optimization.{name}", cause, f"{_NOT_AUTO}; leave it out")
