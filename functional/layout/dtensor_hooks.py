"""Modules that hold DTensors and compute with their local tensors while they are called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from attrs import Factory, define, field, frozen
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def call_locally(model: nn.Module) -> None:
    """Let each module of a model that holds DTensors, or has modules below that do, find local tensors while it is called.

    Around all other hooks that are there; also after errors, and when a part is called again by activation checkpointing.
    The gradient of a local tensor becomes that of its DTensor. A function of a module that is called past the module's
    ``__call__`` finds the DTensors themselves.
    """
    for module in model.modules():
        places = tuple(place for below in module.modules() for place in _places(below))
        if places:
            call = LocalCall(places)
            module.register_forward_pre_hook(call.before, prepend=True)
            module.register_forward_hook(call.after, always_call=True)


@frozen(eq=False)
class _Place:
    """Where a module keeps a DTensor.

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
        # not setattr: neither a module nor a class derived from it would take for a parameter what is none
        vars(self.owner)[self.store][self.key] = value

    @property
    def is_filled(self) -> bool:
        """Whether the DTensor is there: not while a call goes on, nor while ``fully_shard`` keeps a part of it instead."""
        collection = vars(self.owner)[self.store]
        found = collection[self.key] if self.store == "_flat_weights" else collection.get(self.key)
        return isinstance(found, DTensor) and found.device_mesh == self.mesh


@define(eq=False)
class LocalCall:
    """Puts local tensors in place of DTensors for the time of a call.

    Args:
        places: Where the DTensors are, in a module and all below it: one may look at the tensors of another.
        swapped: For each call that goes on, what it has put where.
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
        """Put the DTensors back; a buffer that the call has replaced becomes one again."""
        for place, found, local in self.swapped.pop() if self.swapped else ():
            now = place.value
            if now is local:
                place.put(found)
            elif type(now) is Tensor and now.shape == local.shape:
                place.put(part_like(found, now))


def part_like(whole: DTensor, local: Tensor) -> DTensor:
    """Return the DTensor of which a tensor is this rank's part: on the same mesh as another one, and split as it is."""
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
