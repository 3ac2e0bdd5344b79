"""What DeepSpeed would refuse at launch, and what it gets wrong without a word: said while planning. Pure.

Each refusal was seen with DeepSpeed 0.19.8, by training beside a single process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...specs.errors import Problem
from ...specs.steps import SumGradient

if TYPE_CHECKING:
    from ...specs.mesh import Mesh
    from ...specs.pipeline import Pipeline
    from ...specs.steps import LayoutStep
    from ...specs.tree import SpecTree

_MAX_ZERO_STAGE = 3
_ZERO_NUMBERS = (
    "reduce_bucket_size",
    "sub_group_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_reuse_distance",
)
_FIX_ZERO = 'Write "zero_optimization": {"stage": 1}'


def check_config(mesh: Mesh, config: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with a DeepSpeed configuration on a mesh."""
    return [*_batch(mesh, config), *_clipping(config), *_zero(mesh, config)]


def check_layout(mesh: Mesh, tree: SpecTree, layout: Sequence[LayoutStep], config: Mapping[str, Any]) -> Iterator[Problem]:
    """Iterate over splits whose gradients DeepSpeed would reduce, count or find in another way."""
    for spec in tree.values():
        if spec.kind != "parameter":
            continue
        if spec.on("data") and mesh.data > 1:
            cause = "it is split over 'data', over which DeepSpeed averages gradients as if its parts were copies"
            yield Problem(spec.path, cause, "Split it over 'tensor', or leave it to ZeRO 3", spec.type)
        if spec.on("expert") and mesh.expert > 1:
            cause = (
                "it is split over 'expert', a part of 'data', over which DeepSpeed averages gradients as if it were a copy"
            )
            yield Problem(spec.path, cause, f"target='torch', or Mesh(data={mesh.data}, tensor={mesh.tensor})", spec.type)
    shared = [step for step in layout if isinstance(step, SumGradient)]
    section = config.get("zero_optimization", {})
    if isinstance(section, Mapping) and section.get("stage", 0) == 3:  # noqa: PLR2004  ZeRO 3
        for step in shared:
            path = f"{step.module}.{step.name}".lstrip(".")
            cause = "its gradient is summed on its way into its module, before ZeRO 3 has gathered it there"
            yield Problem(path, cause, _FIX_ZERO, tree[path].type)
    for step in shared if config.get("gradient_clipping", 1.0) else ():
        if len({num for _, num in step.sharing}) > 1:
            path = f"{step.module}.{step.name}".lstrip(".")
            cause = (
                "some of its blocks are repeated on several ranks, and DeepSpeed's norm counts a tensor as a whole or not"
            )
            fix = "Write \"gradient_clipping\": 0.0, use target='torch', or split it over as many ranks as it has granules"
            yield Problem(path, cause, fix, tree[path].type)


def check_boundaries(mesh: Mesh, pipeline: Pipeline, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Iterate over what DeepSpeed cannot send from stage to stage.

    With ``tensor`` it splits over its ranks what it sends, unless it is told not to, and then sends one gradient only.
    """
    section = config.get("pipeline", {})
    wanted = [
        name
        for name in ("pipe_partitioned", "grad_partitioned")
        if not isinstance(section, Mapping) or section.get(name, True)
    ]
    if mesh.tensor == 1 or not wanted:
        return
    for number, stage in enumerate(pipeline.stages[:-1]):
        gradients = [output for output in stage.outputs if output.requires_grad]
        if len(gradients) != 1:
            listed = f": {', '.join(map(str, gradients))}" if gradients else ""
            cause = (
                f"with tensor={mesh.tensor} DeepSpeed splits what it sends, and then sends exactly one gradient back; stage"
                f" {number} gives {len(gradients)} tensors with a gradient{listed}"
            )
            fix = f'Write "pipeline": {{{", ".join(f"{name!r}: false" for name in wanted)}}}'.replace("'", '"')
            yield Problem("config.pipeline", cause, fix)


def _batch(mesh: Mesh, config: Mapping[str, Any]) -> Iterator[Problem]:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = (config.get(name) for name in names)
    for name, value in zip(names, (total, micro, steps), strict=True):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            yield Problem(f"config.{name}", f"it is a positive integer, not {value!r}", "'auto' is not for DeepSpeed itself")
            return
    if total is None and micro is None:
        yield Problem("config", "it has neither train_batch_size nor train_micro_batch_size_per_gpu", "Write one of them")
    elif total is not None:
        per_step = (micro or 1) * (steps or 1) * mesh.data
        exact = micro is not None and steps is not None
        if (total != per_step) if exact else total % per_step:
            relation = "is not" if exact else "is no multiple of"
            cause = (
                f"{total} {relation} micro batch {micro or 1} x accumulation steps {steps or 1} x data {mesh.data}"
                f" = {per_step}"
            )
            fix = f"Write {per_step if exact else max(1, round(total / per_step)) * per_step}, or leave it out"
            yield Problem("config.train_batch_size", cause, fix)


def _clipping(config: Mapping[str, Any]) -> Iterator[Problem]:
    if "gradient_clipping" not in config:
        cause = "it is not written, and DeepSpeed 0.19 then clips at 1.0 without a word"
        yield Problem("config.gradient_clipping", cause, 'Write "gradient_clipping": 1.0, or 0.0 for none')


def _zero(mesh: Mesh, config: Mapping[str, Any]) -> Iterator[Problem]:
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else zero
    if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage <= _MAX_ZERO_STAGE:
        yield Problem("config.zero_optimization.stage", f"it is 0, 1, 2 or 3, not {stage!r}", _FIX_ZERO)
        return
    yield from _sizes(zero)
    if mesh.pipe > 1 and stage > 1:
        cause = (
            f"ZeRO {stage} splits gradients, which a pipeline adds up over micro-batches: DeepSpeed refuses it with pipe > 1"
        )
        yield Problem("config.zero_optimization.stage", cause, _FIX_ZERO)
    half = next((name for name in ("bf16", "fp16") if _enabled(config, name)), None)
    clips = bool(config.get("gradient_clipping", 1.0))
    optimizer = config.get("optimizer")
    optimizer_type = str(optimizer.get("type", "")) if isinstance(optimizer, Mapping) else ""
    where = "config.zero_optimization.stage"
    if stage == 0:
        if half and mesh.tensor > 1 and clips:
            cause = f"ZeRO 0 with {half}, tensor={mesh.tensor} and gradient clipping computes a wrong norm, silently"
            yield Problem(where, cause, _FIX_ZERO)
        if half == "fp16":
            yield Problem(where, "ZeRO 0 with fp16 neither scales the loss nor unscales gradients, silently", _FIX_ZERO)
        elif half and optimizer_type.lower() in ("adam", "adamw"):
            cause = f"ZeRO 0 with {half} and {optimizer_type} takes one optimizer step too many, silently"
            yield Problem(where, cause, _FIX_ZERO)
        if not half and mesh.pipe > 1 and clips:
            cause = f"ZeRO 0 in fp32 with pipe={mesh.pipe} and gradient clipping computes a wrong norm, silently"
            yield Problem(where, cause, _FIX_ZERO)
    elif optimizer_type.lower() == "sgd" and not config.get("zero_allow_untested_optimizer"):
        cause = f"ZeRO {stage} refuses SGD at launch unless it is told otherwise"
        yield Problem("config.zero_allow_untested_optimizer", cause, 'Write "zero_allow_untested_optimizer": true')


def _sizes(zero: Any) -> Iterator[Problem]:
    for name in _ZERO_NUMBERS if isinstance(zero, Mapping) else ():
        value = zero.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            cause = f"it is a number, not {value!r}"
            yield Problem(f"config.zero_optimization.{name}", cause, "'auto' is not for DeepSpeed itself; leave it out")


def _enabled(config: Mapping[str, Any], name: str) -> bool:
    section = config.get(name, {})
    return bool(section.get("enabled", False)) if isinstance(section, Mapping) else bool(section)
