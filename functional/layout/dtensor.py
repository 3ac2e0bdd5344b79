"""Wrap the tensors of a module as DTensors, and unwrap them while the module computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import Factory, define, field, frozen
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from ...specs.mesh import MODEL_AXES, STAGE_AXES
from ..model.copy import get_tensor, like, put_tensor, tied

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ...specs.mesh import Mesh, MeshAxis
    from ...specs.param import ParamSpec


def to_dtensors(module: nn.Module, specs: Iterable[ParamSpec], mesh: Mesh, device_mesh: DeviceMesh) -> None:
    """Wrap a module's local tensors as DTensors; it still computes with its local tensors.

    Args:
        module: The module; parameters and buffers keep their memory, attributes and ties.
        specs: The tensors.
        mesh: The plan's mesh.
        device_mesh: The same mesh, with the mesh axes of a stage as dimensions.
    """
    # the same object for all tensors: torch compares meshes often
    meshes: dict[tuple[str, ...], DeviceMesh] = {STAGE_AXES: device_mesh}
    for spec in specs:
        on, local = placements(spec, mesh), get_tensor(module, spec.path)
        if (names := tuple(on)) not in meshes:
            meshes[names] = device_mesh[names]
        first = like(local, _dtensor(local.detach(), spec, on, meshes[names]))
        put_tensor(module, spec.path, first)
        for path in spec.tie:
            put_tensor(module, path, tied(get_tensor(module, path), first))
    call_locally(module)


def placements(spec: ParamSpec, mesh: Mesh) -> dict[MeshAxis, int | None]:
    """Return the dimensions of the device mesh that a tensor is on, each with the tensor axis that it splits, or None.

    Every tensor is on ``tensor``, and a tensor split over ``data`` on ``data`` too: any other tensor may still be split over
    it by ``fully_shard``, and its gradients may differ along an axis that carries batches.

    >>> from shardplan.specs import Mesh, ParamSpec, Shard
    >>> placements(ParamSpec("down.weight", (8, 4), "float32", shards=(Shard(1),)), Mesh(data=2, tensor=2))
    {'tensor': 1}
    """
    split: dict[MeshAxis, int] = {shard.mesh_axis: shard.axis for shard in spec.shards if mesh.num(shard.mesh_axis) > 1}
    return {mesh_axis: split.get(mesh_axis) for mesh_axis in STAGE_AXES if mesh_axis in (*split, *MODEL_AXES)}


def _dtensor(local: Tensor, spec: ParamSpec, on: Mapping[MeshAxis, int | None], device_mesh: DeviceMesh) -> DTensor:
    """Wrap a local shard as a DTensor, without communication or copy."""
    whole = torch.empty(spec.orig_shape, device="meta")
    put = [Replicate() if axis is None else Shard(axis) for axis in on.values()]
    return DTensor.from_local(local, device_mesh, put, shape=whole.shape, stride=whole.stride())


def call_locally(model: nn.Module) -> None:
    """Unwrap DTensors while a module runs: each module that holds any, itself or below, finds local tensors when called.

    The hooks are outermost, and hold after errors and for a recomputation by activation checkpointing. The gradient of a
    local tensor becomes the gradient of its DTensor. A method that is called without the module's ``__call__`` finds the
    DTensors.
    """
    for module in model.modules():
        places = tuple(place for below in module.modules() for place in _places(below))
        if places:
            hook = UnwrapHook(places)
            module.register_forward_pre_hook(hook.before, prepend=True)
            module.register_forward_hook(hook.after, always_call=True)


@frozen(eq=False)
class _Place:
    """A place where a module keeps a DTensor.

    Args:
        owner: The module.
        store: Name of the collection.
        key: Key or number in it.
        mesh: The device mesh of the DTensor.
    """

    owner: nn.Module
    store: Literal["_parameters", "_buffers", "_flat_weights"]
    key: Any
    mesh: DeviceMesh

    @property
    def value(self) -> Any:
        return vars(self.owner)[self.store][self.key]

    def put(self, value: Any) -> None:
        # not setattr: a module takes only a parameter in the place of a parameter
        vars(self.owner)[self.store][self.key] = value

    @property
    def is_filled(self) -> bool:
        """Whether the DTensor is there: not during a call, nor while ``fully_shard`` keeps a part of it instead."""
        collection = vars(self.owner)[self.store]
        found = collection[self.key] if self.store == "_flat_weights" else collection.get(self.key)
        return isinstance(found, DTensor) and found.device_mesh == self.mesh


@define(eq=False)
class UnwrapHook:
    """Put local tensors in the place of DTensors during a call.

    Args:
        places: Places of the DTensors, in a module and all modules below it, which may read each other's tensors.
        swapped: For each running call, the places, their DTensors and local tensors.
    """

    places: tuple[_Place, ...] = field(repr=False)
    swapped: list[list[tuple[_Place, DTensor, Tensor]]] = Factory(list)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Put local tensors in place."""
        made: dict[int, Tensor] = {}
        mine: list[tuple[_Place, DTensor, Tensor]] = []
        self.swapped.append(mine)
        for place in self.places:
            if place.is_filled:
                found = place.value
                local = made[id(found)] if id(found) in made else made.setdefault(id(found), found.to_local())
                place.put(local)
                mine.append((place, found, local))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Put the DTensors back; a buffer that the call has replaced is wrapped as a DTensor again."""
        for place, found, local in self.swapped.pop() if self.swapped else ():
            now = place.value
            if now is local:
                place.put(found)
            elif type(now) is Tensor and now.shape == local.shape:
                place.put(dtensor_like(found, now))


def dtensor_like(whole: DTensor, local: Tensor) -> DTensor:
    """Wrap a local shard as a DTensor with the mesh and the placements of another DTensor."""
    return DTensor.from_local(local, whole.device_mesh, whole.placements, shape=whole.shape, stride=whole.stride())


def _places(module: nn.Module) -> list[_Place]:
    found = [
        _Place(module, store, key, value.device_mesh)
        for store in ("_parameters", "_buffers")
        for key, value in vars(module)[store].items()
        if isinstance(value, DTensor)
    ]
    # recurrent modules keep a second list of their parameters, and compute with that
    again = vars(module).get("_flat_weights") if isinstance(module, nn.RNNBase) else None
    return found + [
        _Place(module, "_flat_weights", n, t.device_mesh) for n, t in enumerate(again or ()) if isinstance(t, DTensor)
    ]
