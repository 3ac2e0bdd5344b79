"""Checks of configurations, splits and stages that DeepSpeed refuses at launch or trains wrongly, and of its version.

Each problem was seen with DeepSpeed 0.19.8, by training beside a single process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ....specs.errors import Problem
from ....specs.finding import Finding
from ....specs.json_values import thawed
from ....specs.layout_steps import SumGradient
from ....specs.mesh import MESH_AXES
from ....specs.paths import join
from .config import wrong_numbers

if TYPE_CHECKING:
    from ....specs.layout_steps import LayoutStep
    from ....specs.mesh import Mesh
    from ....specs.pipeline import Pipeline
    from ....specs.tree import SpecTree

_SENT_IN = ("fp32", "fp16", "bf16")
_ADDED_IN = (*_SENT_IN, "float32", "float16", "bfloat16", "float", "half")
"""The names that DeepSpeed knows: ``get_communication_data_type`` and ``DtypeEnum`` in runtime/config.py of 0.19.8."""
READ = "0.19"
"""Memory, messages and checks were read off the code of this version, and measured with it."""

_INSTALL = f"pip install 'deepspeed=={READ}.*'"
_AXES = ("pipe", "data", "tensor")
_FIX_ZERO = 'Write "zero_optimization": {"stage": 1}'


def check_config(mesh: Mesh, config: Mapping[str, Any]) -> list[Problem]:
    """Return the problems of a DeepSpeed configuration on a mesh."""
    wrong = [*wrong_numbers(config), *_sections(config), *_clipping(config)]
    return wrong or [*_batch(mesh, config), *_zero(mesh, config)]


def check_layout(mesh: Mesh, tree: SpecTree, layout: Sequence[LayoutStep], config: Mapping[str, Any]) -> Iterator[Problem]:
    """Iterate over splits whose gradients DeepSpeed would average or sum wrongly, or count wrongly in the norm."""
    if strange := [mesh_axis for mesh_axis in MESH_AXES if mesh_axis not in _AXES and mesh.num(mesh_axis) > 1]:
        cause = f"DeepSpeed's topology has the axes {', '.join(_AXES)}, and none for {', '.join(strange)}"
        yield Problem("target", cause, "target='torch'")
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
            path = join(step.module, step.name)
            cause = "its gradient is summed on its way into its module, before ZeRO 3 has gathered it there"
            yield Problem(path, cause, _FIX_ZERO, tree[path].type)
    for step in shared if config.get("gradient_clipping", 1.0) else ():
        if len({num for _, num in step.sharing}) > 1:
            path = join(step.module, step.name)
            cause = (
                "some of its blocks are repeated on several ranks, and DeepSpeed's norm counts a tensor as a whole or not"
            )
            fix = "Write \"gradient_clipping\": 0.0, use target='torch', or split it over as many ranks as it has granules"
            yield Problem(path, cause, fix, tree[path].type)


def check_boundaries(mesh: Mesh, pipeline: Pipeline, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Iterate over boundaries that DeepSpeed cannot send over.

    With ``tensor`` it sends tensors in parts, unless it is told not to, and then sends exactly one gradient back.
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


def another_version() -> Iterator[Finding]:
    """Find that another version is installed than the accounting knows; nothing where DeepSpeed is not installed."""
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        return
    if installed.split(".")[:2] != READ.split("."):
        cause = (
            f"DeepSpeed {installed} is installed, and its memory, its messages and what it gets wrong are known of {READ}:"
            f" they may differ"
        )
        yield Finding("SP034", "warning", "", cause, _INSTALL)


def not_installed() -> list[Problem]:
    """Return why DeepSpeed cannot be imported here: it is missing, or broken."""
    try:
        import deepspeed  # noqa: F401  whether it can be imported is all that is asked
    except Exception as error:  # noqa: BLE001  a broken package may raise anything
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == "deepspeed"
        found = "it is not installed" if is_missing else f"its import fails: {type(error).__name__}: {error}"
        return [Problem("target", f"'deepspeed' needs the package deepspeed, and {found}", _INSTALL)]
    return []


def _batch(mesh: Mesh, config: Mapping[str, Any]) -> Iterator[Problem]:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = (config.get(name) for name in names)
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


def _sections(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Iterate over sections and dtypes that decide memory and messages, and are not written as DeepSpeed reads them."""
    for name in ("bf16", "fp16"):
        section, fix = config.get(name, {}), f'Write "{name}": {{"enabled": true}}, or false'
        if not isinstance(section, Mapping):
            yield Problem(f"config.{name}", f"it is a section, not {section!r}", fix)
        elif not isinstance(enabled := section.get("enabled", False), bool):
            yield Problem(f"config.{name}.enabled", f"it is true or false, not {enabled!r}", fix)
    sent = config.get("communication_data_type")
    if sent is not None and sent not in _SENT_IN:
        yield Problem("config.communication_data_type", f"{sent!r} is unknown", f"There are {', '.join(_SENT_IN)}")
    types = config.get("data_types", {})
    if not isinstance(types, Mapping):
        cause = f"it is a section, not {types!r}"
        yield Problem("config.data_types", cause, 'Write "data_types": {"grad_accum_dtype": "fp32"}')
    elif (added := types.get("grad_accum_dtype")) is not None and added not in _ADDED_IN:
        yield Problem("config.data_types.grad_accum_dtype", f"{added!r} is unknown", f"There are {', '.join(_ADDED_IN)}")
    optimizer = config.get("optimizer")
    if optimizer is not None and not (isinstance(optimizer, Mapping) and isinstance(optimizer.get("type"), str)):
        cause = f"it is a type and its params, not {thawed(optimizer)!r}"
        yield Problem("config.optimizer", cause, 'Write "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}')


def _clipping(config: Mapping[str, Any]) -> Iterator[Problem]:
    fix = 'Write "gradient_clipping": 1.0, or 0.0 for none'
    if "gradient_clipping" not in config:
        cause = "it is not written, and DeepSpeed 0.19 then clips at 1.0 without a word"
        yield Problem("config.gradient_clipping", cause, fix)
    elif isinstance(value := config["gradient_clipping"], bool) or not isinstance(value, (int, float)):
        yield Problem("config.gradient_clipping", f"it is a number, not {value!r}", fix)


def _zero(mesh: Mesh, config: Mapping[str, Any]) -> Iterator[Problem]:
    stage = config.get("zero_optimization", {}).get("stage", 0)
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


def _enabled(config: Mapping[str, Any], name: str) -> bool:
    return bool(config.get(name, {}).get("enabled", False))
