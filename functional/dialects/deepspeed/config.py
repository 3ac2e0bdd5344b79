"""Facts of a DeepSpeed configuration: micro-batches, optimizer, precision, partitions, buckets; defaults of 0.19.8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from attrs import evolve, frozen

from ....specs.errors import Problem
from ..accounting.training import Optimizer, mapping, named_optimizer

if TYPE_CHECKING:
    from ....specs.plan import Plan

ALL_REDUCE_NUMEL = 500_000_000
"""Elements that the engine sends at a time without ZeRO: ``MEMORY_OPT_ALLREDUCE_SIZE`` in runtime/engine.py."""

_DTYPES = {
    "fp32": "float32",
    "float32": "float32",
    "float": "float32",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}
"""The names in ``DtypeEnum`` of runtime/config.py."""

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

Wrapper = Literal["none", "half", "bf16", "zero", "zero3"]
"""DeepSpeed's wrapper of the optimizer: none, ``FP16_UnfusedOptimizer``, ``BF16_Optimizer``, ``DeepSpeedZeroOptimizer`` of
stages 1 and 2, ``DeepSpeedZeroOptimizer_Stage3``."""


@frozen
class Zero:
    """The options of a DeepSpeed configuration that decide memory and messages (runtime/engine.py, runtime/zero/config.py).

    Args:
        stage: Stage of ZeRO.
        wrapper: DeepSpeed's wrapper of the optimizer.
        half: Dtype to which parameters are cast: ``float16`` or ``bfloat16``; None if they are left as they are.
        accumulate: Dtype in which gradients are accumulated.
        communicate: Dtype in which gradients are sent.
        bucket_numel: Elements of a bucket of gradients.
        num_buckets: Buckets that exist at one time.
        is_contiguous: Whether gradients are copied into the bucket as they come.
        scatters: Whether ZeRO 3 reduces and scatters; it reduces whole gradients otherwise.
        keeps_half_gradients: Whether ``BF16_Optimizer`` keeps gradients after it has accumulated them.
        sub_group_numel: ZeRO 3: elements after which the optimizer begins another tensor.
        persistent_numel: ZeRO 3: parameters of at most so many elements stay whole.
        most_persistent_numel: ZeRO 3: elements of all that stay whole.
        reuse_numel: ZeRO 3: a parameter is not released if so few elements are used before it is used again.
    """

    stage: int
    wrapper: Wrapper
    half: str | None
    accumulate: str
    communicate: str
    bucket_numel: int
    num_buckets: int
    is_contiguous: bool
    scatters: bool
    keeps_half_gradients: bool
    sub_group_numel: int
    persistent_numel: int
    most_persistent_numel: int | None
    reuse_numel: int

    @classmethod
    def of(cls, plan: Plan) -> Zero:
        """Return the options of a plan's configuration."""
        config = plan.config or {}
        zero = mapping(config.get("zero_optimization"))
        stage = int(zero.get("stage", 0))
        half = next((dtype for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")) if _enabled(config, name)), None)
        accumulate = _DTYPES.get(str(mapping(config.get("data_types")).get("grad_accum_dtype")), half or "float32")
        wrapper = _wrapper(stage, half, accumulate, is_cut=plan.pipeline is not None)
        overlaps = zero.get("overlap_comm")
        overlaps = (stage == 3) if overlaps is None else bool(overlaps)  # noqa: PLR2004  ZeRO 3
        doubled = plan.pipeline is not None or overlaps  # the reduction of a pipeline takes a second bucket
        return cls(
            stage=stage,
            wrapper=wrapper,
            half=half,
            accumulate=accumulate,
            communicate=_DTYPES.get(str(config.get("communication_data_type")), half or "float32"),
            bucket_numel=int(zero.get("reduce_bucket_size", 5e8)),
            num_buckets=2 if doubled and wrapper == "zero" else 1,
            is_contiguous=bool(zero.get("contiguous_gradients", True)),
            scatters=bool(zero.get("reduce_scatter", True)),
            keeps_half_gradients=not mapping(config.get("bf16")).get("immediate_grad_update", False),
            sub_group_numel=int(zero.get("sub_group_size", 1e9)),
            persistent_numel=int(_either(zero, "param_persistence_threshold", 1e5)),
            most_persistent_numel=_either(zero, "model_persistence_threshold", None),
            reuse_numel=int(max(_either(zero, "max_reuse_distance", 1e9), _either(zero, "prefetch_bucket_size", 5e7))),
        )


def num_microbatches(plan: Plan) -> int:
    """Return the micro-batches of a training step on a rank.

    DeepSpeed derives the sizes that its configuration leaves out (``_set_batch_related_parameters`` in runtime/config.py).

    >>> from shardplan.specs import Mesh, Plan, SpecTree
    >>> config = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}
    >>> num_microbatches(Plan(Mesh(data=2), SpecTree(), (), target="deepspeed", config=config))
    4
    """
    total, micro, steps = (mapping(plan.config).get(name) for name in _BATCH)
    if steps is not None:
        return steps
    return max(1, total // (micro * plan.mesh.data)) if total and micro else 1


def optimizer_of(plan: Plan) -> Optimizer | None:
    """Return the optimizer that DeepSpeed makes; None without a name in the configuration, or if its states are not known.

    ``adam`` and ``adamw`` may be written in any case (runtime/config.py). DeepSpeed's own FusedAdam
    (ops/adam/fused_adam.py), which a configuration gets unless it says ``torch_adam``, counts its steps in Python.

    >>> from shardplan.specs import Mesh, Plan, SpecTree
    >>> optimizer_of(Plan(Mesh(), SpecTree(), (), target="deepspeed", config={"optimizer": {"type": "adamw"}}))
    Optimizer(name='AdamW', num_states=2, step_bytes=0)
    """
    section = mapping(mapping(plan.config).get("optimizer"))
    kind = str(section.get("type"))
    known = {"adam": "Adam", "adamw": "AdamW"}.get(kind.lower(), kind)
    found = named_optimizer({"optimizer": {**section, "type": known}})
    is_fused = known in ("Adam", "AdamW") and not mapping(section.get("params")).get("torch_adam")
    return evolve(found, step_bytes=0) if found and is_fused else found


def wrong_numbers(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Iterate over batch sizes and sizes of ZeRO that are no numbers, in a configuration that is planned or was saved.

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


def _wrapper(stage: int, half: str | None, accumulate: str, *, is_cut: bool) -> Wrapper:
    """Return DeepSpeed's wrapper of the optimizer: ``_do_optimizer_sanity_check`` in runtime/engine.py."""
    if stage == 3:  # noqa: PLR2004  ZeRO 3
        return "zero3"
    if stage:
        return "bf16" if stage == 1 and half == "bfloat16" and accumulate == "float32" else "zero"
    if half is None:
        return "none"
    return "bf16" if half == "bfloat16" and is_cut else "half"


def _either(zero: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return an option of ZeRO 3 by its short name or its name with the prefix ``stage3_``."""
    return zero.get(f"stage3_{name}", zero.get(name, default))


def _enabled(config: Mapping[str, Any], name: str) -> bool:
    return bool(mapping(config.get(name)).get("enabled", False))
