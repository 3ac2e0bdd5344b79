"""DeepSpeed: what it takes, what it gets silently wrong, and how it wraps. Imported only when it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen
from frozendict import frozendict

from ....specs.errors import Problem
from ....specs.json_values import thawed
from ....specs.mesh import Mesh, MeshAxis
from ..handover import Handover, Wrapped, counted_parts
from ..stage_checks import nothing_trained, one_stage_a_place
from .checks import check_boundaries, check_config, check_layout
from .pipeline import mend_buffers, to_pipeline_module

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ....specs.pipeline import Pipeline
    from ....specs.plan import Plan
    from ....specs.steps import LayoutStep
    from ....specs.tree import SpecTree


class DeepSpeedDialect:
    """``target="deepspeed"``: ``deepspeed.initialize`` with the plan's config and the mesh as ``mpu``."""

    def check(
        self, mesh: Mesh, tree: SpecTree, layout: Sequence[LayoutStep], config: Mapping[str, Any] | None
    ) -> list[Problem]:
        if not isinstance(config, Mapping):
            cause = (
                "DeepSpeed needs its configuration" if config is None else f"it is plain JSON values by name, not {config!r}"
            )
            fix = 'config={"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}'
            return [Problem("config", cause, fix)]
        return [*check_config(mesh, config), *check_layout(mesh, tree, layout, config)]

    def check_pipeline(
        self, mesh: Mesh, tree: SpecTree, pipeline: Pipeline | None, config: Mapping[str, Any] | None
    ) -> list[Problem]:
        if pipeline is None:
            return []
        return [
            *one_stage_a_place(mesh, pipeline),
            *nothing_trained(mesh, tree),
            *check_boundaries(mesh, pipeline, config or {}),
        ]

    def check_loss(self, plan: Plan, loss_fn: Callable[..., Any] | None) -> list[Problem]:
        if not plan.pipeline:
            return [Problem("loss_fn", "it is for a pipeline, and this plan has one stage", "Compute the loss yourself")]
        last = plan.stages[-1].outputs
        if loss_fn is None and [output.shape for output in last] != [()]:
            cause = f"engine.train_batch needs a loss, and the last stage gives {', '.join(map(str, last))}"
            return [Problem("loss_fn", cause, "execute(plan, loss_fn=lambda output, target: ...)")]
        return []

    def groups(self, mesh: Mesh) -> tuple[tuple[MeshAxis, ...], ...]:
        return (("data",), ("tensor",))

    def wrap(self, handover: Handover) -> Wrapped:
        import deepspeed
        import torch.distributed as dist

        (module,), plan = handover.modules, handover.plan
        if handover.device.type == "cpu":
            # else a C++ build of a minute for an all-reduce in shared memory; gloo does it
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        for parameter, counted in counted_parts(module, plan, plan.mesh.coordinate(dist.get_rank())):
            if counted.is_split and counted.parts is None:
                # what DeepSpeed's is_model_parallel_parameter reads, so that the gradient norm counts every part once:
                # without it a parameter counts on the first rank along 'tensor' alone, which holds no second copy
                parameter.model_parallel = True
                parameter.tensor_model_parallel = True
        initialize: Any = deepspeed.initialize  # its annotation of model_parameters is wrong
        engine, made, dataloader, scheduler = initialize(
            model=to_pipeline_module(handover, to_topology(plan.mesh)) if plan.pipeline else module,
            model_parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
            optimizer=handover.optimizer,
            config=thawed(plan.config),
            mpu=None if plan.pipeline else MeshUnit(plan.mesh, handover.groups),
            dist_init_required=False,
        )
        if plan.pipeline:
            mend_buffers(engine)
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
