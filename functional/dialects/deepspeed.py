"""DeepSpeed: what it takes, what it gets silently wrong, and how it wraps. Imported only when it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen
from frozendict import frozendict

from ...specs.errors import Problem
from ...specs.mesh import Mesh, MeshAxis
from .wrapped import Wrapped

if TYPE_CHECKING:
    from torch import nn

    from ...specs.plan import Plan
    from ...specs.tree import SpecTree

_MAX_ZERO_STAGE = 3
_FIX_ZERO = 'Write "zero_optimization": {"stage": 1}'


class DeepSpeedDialect:
    """``target="deepspeed"``: ``deepspeed.initialize`` with the plan's config and the mesh as ``mpu``."""

    def check(self, mesh: Mesh, tree: SpecTree, config: Mapping[str, Any] | None) -> list[Problem]:
        if not isinstance(config, Mapping):
            cause = (
                "DeepSpeed needs its configuration" if config is None else f"it is plain JSON values by name, not {config!r}"
            )
            fix = 'config={"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}'
            return [Problem("config", cause, fix)]
        return [*_not_json("config", config), *_batch(mesh, config), *_clipping(config), *_zero(mesh, config)]

    def groups(self, mesh: Mesh) -> tuple[tuple[MeshAxis, ...], ...]:
        return (("data",), ("tensor",))

    def wrap(
        self,
        module: nn.Module,
        plan: Plan,
        groups: Mapping[tuple[MeshAxis, ...], Any],
        optimizer: Callable[..., Any] | None,
        loss_fn: Callable[..., Any] | None,
    ) -> Wrapped:
        import deepspeed

        if next(module.parameters()).device.type == "cpu":
            # else a C++ build of a minute for an all-reduce in shared memory; gloo does it
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        for spec in plan.tree.values():
            if (
                any(shard.mesh_axis == "tensor" for shard in spec.shards)
                and plan.mesh.tensor > 1
                and spec.kind == "parameter"
            ):
                parameter = module.get_parameter(spec.path)
                # what DeepSpeed's is_model_parallel_parameter reads, so that the gradient norm counts every part
                parameter.model_parallel = True  # type: ignore[attr-defined]
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        initialize: Any = deepspeed.initialize  # its annotation of model_parameters is wrong
        engine, made, dataloader, scheduler = initialize(
            model=module,
            model_parameters=trained,
            optimizer=optimizer(trained) if optimizer else None,
            config=_thawed(plan.config),
            mpu=MeshUnit(plan.mesh, groups),
            dist_init_required=False,
        )
        return Wrapped(engine, made, frozendict(dataloader=dataloader, lr_scheduler=scheduler))


@frozen
class MeshUnit:
    """The mesh as what DeepSpeed calls ``mpu``: sizes, places and groups of model and data parallelism.

    Without a pipeline the model-parallel group is the group along ``tensor``.
    """

    mesh: Mesh
    groups: Mapping[tuple[MeshAxis, ...], Any]

    def get_model_parallel_rank(self) -> int:
        """Place along ``tensor``."""
        return self._index("tensor")

    def get_model_parallel_world_size(self) -> int:
        """Ranks along ``tensor``."""
        return self.mesh.tensor

    def get_model_parallel_group(self) -> Any:
        """Process group along ``tensor``."""
        return self.groups[("tensor",)]

    def get_data_parallel_rank(self) -> int:
        """Place along ``data``."""
        return self._index("data")

    def get_data_parallel_world_size(self) -> int:
        """Ranks along ``data``."""
        return self.mesh.data

    def get_data_parallel_group(self) -> Any:
        """Process group along ``data``."""
        return self.groups[("data",)]

    # what deepspeed.checkpointing.configure asks for
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def _index(self, mesh_axis: MeshAxis) -> int:
        import torch.distributed as dist

        return self.mesh.coordinate(dist.get_rank()).index(mesh_axis)


def to_topology(mesh: Mesh) -> Any:
    """Return DeepSpeed's ``PipeModelDataParallelTopology`` of a mesh; ``tensor`` is its ``model``."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    return PipeModelDataParallelTopology(num_pp=mesh.pipe, num_mp=mesh.tensor, num_dp=mesh.data)


def from_topology(topology: Any) -> Mesh:
    """Return the mesh of a DeepSpeed topology.

    Raises:
        ValueError: If its axes are not pipe, data and model, in this order: its ranks would be others.
    """
    axes = list(topology.get_axis_names())
    if axes != ["pipe", "data", "model"]:
        msg = f"a topology with axes {axes} numbers its ranks otherwise; a mesh has pipe, data, model, in this order"
        raise ValueError(msg)
    return Mesh(pipe=topology.get_dim("pipe"), data=topology.get_dim("data"), tensor=topology.get_dim("model"))


def _not_json(path: str, value: Any) -> Iterator[Problem]:
    match value:
        case Mapping():
            for name, item in value.items():
                yield from _not_json(f"{path}.{name}", item)
        case list() | tuple():
            for place, item in enumerate(value):
                yield from _not_json(f"{path}[{place}]", item)
        case str() | bool() | int() | float() | None:
            pass
        case _:
            yield Problem(path, f"a plan holds plain JSON values, and this is a {type(value).__name__}", "Write its value")


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
    section = config.get(name, {})
    return bool(section.get("enabled", False)) if isinstance(section, Mapping) else bool(section)


def _thawed(value: Any) -> Any:
    match value:
        case Mapping():
            return {name: _thawed(item) for name, item in value.items()}
        case list() | tuple():
            return [_thawed(item) for item in value]
        case _:
            return value
