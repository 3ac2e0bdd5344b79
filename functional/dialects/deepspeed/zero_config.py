"""What a DeepSpeed configuration says of precision, partitions and buckets, with the defaults of DeepSpeed 0.19.8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from attrs import frozen

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

Wrapper = Literal["none", "half", "bf16", "zero", "zero3"]
"""What stands around the optimizer: nothing, ``FP16_UnfusedOptimizer``, ``BF16_Optimizer``, ``DeepSpeedZeroOptimizer`` of
stages 1 and 2, ``DeepSpeedZeroOptimizer_Stage3``."""


@frozen
class Zero:
    """A DeepSpeed configuration, as far as it decides what is kept and sent (runtime/engine.py, runtime/zero/config.py).

    Args:
        stage: ZeRO's.
        wrapper: What stands around the optimizer.
        half: What parameters are cast to: ``float16`` or ``bfloat16``; None if they are left.
        accumulate: What gradients are accumulated in.
        communicate: What gradients are sent in.
        bucket_numel: Elements of a bucket of gradients.
        num_buckets: Buckets that there are at one time.
        is_contiguous: Whether gradients are copied into the bucket as they come.
        scatters: Whether ZeRO 3 reduces and scatters; it reduces whole gradients otherwise.
        keeps_half_gradients: Whether ``BF16_Optimizer`` keeps the gradients that it has added up.
        sub_group_numel: ZeRO 3: elements of one tensor that the optimizer works on.
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
        """Return what a plan's configuration says."""
        config = plan.config or {}
        zero = _mapping(config.get("zero_optimization"))
        stage = int(zero.get("stage", 0))
        half = next((dtype for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")) if _enabled(config, name)), None)
        accumulate = _DTYPES.get(str(_mapping(config.get("data_types")).get("grad_accum_dtype")), half or "float32")
        wrapper = _wrapper(stage, half, accumulate, is_cut=plan.pipeline is not None)
        overlaps = zero.get("overlap_comm")
        overlaps = (stage == 3) if overlaps is None else bool(overlaps)  # noqa: PLR2004  ZeRO 3
        doubled = plan.pipeline is not None or overlaps  # a pipeline's reduction takes another one
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
            keeps_half_gradients=not _mapping(config.get("bf16")).get("immediate_grad_update", False),
            sub_group_numel=int(zero.get("sub_group_size", 1e9)),
            persistent_numel=int(_either(zero, "param_persistence_threshold", 1e5)),
            most_persistent_numel=_either(zero, "model_persistence_threshold", None),
            reuse_numel=int(max(_either(zero, "max_reuse_distance", 1e9), _either(zero, "prefetch_bucket_size", 5e7))),
        )


def _wrapper(stage: int, half: str | None, accumulate: str, *, is_cut: bool) -> Wrapper:
    """Return what stands around the optimizer: ``_do_optimizer_sanity_check`` in runtime/engine.py."""
    if stage == 3:  # noqa: PLR2004  ZeRO 3
        return "zero3"
    if stage:
        return "bf16" if stage == 1 and half == "bfloat16" and accumulate == "float32" else "zero"
    if half is None:
        return "none"
    return "bf16" if half == "bfloat16" and is_cut else "half"


def _either(zero: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return an option of ZeRO 3, which has a short name and one that begins with ``stage3_``."""
    return zero.get(f"stage3_{name}", zero.get(name, default))


def _enabled(config: Mapping[str, Any], name: str) -> bool:
    return bool(_mapping(config.get(name)).get("enabled", False))


def _mapping(section: Any) -> Mapping[str, Any]:
    return section if isinstance(section, Mapping) else {}
