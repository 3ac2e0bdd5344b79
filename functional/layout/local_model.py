"""A model as the first rank has it, on fake tensors: local shapes, layout applied. It can be traced, not computed."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from typing import TYPE_CHECKING, Any, get_args

import torch
from attrs import evolve, frozen
from frozendict import frozendict
from torch import Tensor, nn

from ...specs.layout_steps import Sync, SyncOp, needed_neighbours
from ...specs.mesh import AXIS_NAMES, Mesh
from ..model.callables import find_callable
from ..model.copy import copy_module
from ..model.known_values import KnownValues, ReadLists
from ..model.read import named_tensors
from ..model.rng_state import own_generators
from .apply import RankContext, apply_layout
from .collectives import SyncGroup
from .hooks import group_name
from .user_syncs import SyncFunction, stand_in

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ...specs.layout_steps import LayoutStep
    from ...specs.mesh import Coordinate
    from ...specs.tree import SpecTree


@frozen(eq=False)
class LocalModel:
    """A model, its layout and its example inputs: everything needed to try it as the first rank has it.

    Args:
        model: The user's model; it is looked at, never changed.
        mesh: The ranks.
        tree: The model's tensors, with their layout.
        layout: The steps that change how modules compute.
        callables: The user's functions, by name.
        example_inputs: Tensors and plain values, by the names of the model's arguments; None if there are none.
        leaves: Modules that an export does not follow, by path.
    """

    model: nn.Module
    mesh: Mesh
    tree: SpecTree
    layout: Sequence[LayoutStep] = ()
    callables: Mapping[str, Any] = frozendict()
    example_inputs: Mapping[str, Any] | None = None
    leaves: tuple[str, ...] = ()

    def fake_copy(
        self,
        mode: FakeTensorMode,
        *,
        named: bool = False,
        numbered: bool = False,
        coordinate: Coordinate | None = None,
        around: Callable[[LayoutStep], AbstractContextManager[Any]] = nullcontext,
        synchronise: Callable[[Sync, SyncFunction], SyncFunction] = stand_in,
    ) -> nn.Module:
        """Return a copy of the model with fake CPU tensors of one rank's shapes, changed as the layout says.

        Args:
            mode: The mode of the fake tensors.
            named: Whether synchronisation groups, which have no process groups yet, are named after their mesh axes, as an
                export keeps them.
            numbered: Whether their names also end in the place of the layout step that communicates, which tells whose an
                operator is.
            coordinate: The rank; the first by default.
            around: As in ``RankContext``.
            synchronise: Returns what is called in place of a user's function that synchronises.
        """
        here = coordinate or self.mesh.coordinate(0)
        tensors = named_tensors(self.model)
        shapes = {id(tensor): self.tree[path].local_shape(here) for path, _, tensor in tensors if path in self.tree}

        def fake(tensor: Tensor) -> Tensor:
            with mode:
                return torch.empty(shapes[id(tensor)], dtype=tensor.dtype, device="cpu")

        local = copy_module(self.model, fake, for_planning=True)
        sizes: dict[str, tuple[int, int]] = {m: (self.mesh.num(m), here.index(m)) for m in AXIS_NAMES}
        sizes |= {group_name(m, num): (num, here.index(m) % num) for m, num in needed_neighbours(self.layout)}
        # messages between experts are told from those of tensor parallelism, also where no other group has a name
        groups = {name: SyncGroup(name if named or name.startswith("expert") else "", *size) for name, size in sizes.items()}
        with mode:
            for number, step in enumerate(self.layout):
                own = {key: evolve(group, name=f"{key}#{number}") for key, group in groups.items()} if numbered else groups
                callables = self.callables
                if isinstance(step, Sync) and step.op not in get_args(SyncOp):
                    callables = {**callables, step.op: synchronise(step, find_callable(step.op, callables))}
                apply_layout(local, step, RankContext(here, own, callables, around))
        return local

    def fake_inputs(self, values: KnownValues | None = None) -> dict[str, Any]:
        """Return the example inputs with tensors of the fake mode that is on, and tell ``values`` what they hold."""
        assert self.example_inputs is not None, "the caller has asked"
        return fake_inputs(self.example_inputs, values)


def fake_inputs(inputs: Mapping[str, Any], values: KnownValues | None = None) -> dict[str, Any]:
    """Return inputs with tensors of the fake mode that is on, and tell ``values`` what they hold."""
    made: dict[str, Any] = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            made[name] = torch.empty(value.shape, dtype=value.dtype, device="cpu")
            if values is not None:
                values.tell(made[name], value)
    return made


@contextmanager
def following(mode: FakeTensorMode, values: KnownValues | None = None) -> Iterator[None]:
    """Let a model's code run on fake tensors within the block: it has its own generators, and unknown values are zero.

    ``torch.compiler.is_compiling()`` is true, as during an export: only the operators that code uses while it is compiled
    are sure to have fake kernels.

    Args:
        mode: The mode of the fake tensors.
        values: Knows the values of some.
    """
    before = torch.compiler._is_compiling_flag  # noqa: SLF001  read by torch.compiler.is_compiling()
    torch.compiler._is_compiling_flag = True  # noqa: SLF001
    try:
        with mode, own_generators(0), values or KnownValues(), ReadLists(), quiet():
            yield
    finally:
        torch.compiler._is_compiling_flag = before  # noqa: SLF001


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from writing its graph to the terminal; errors are raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
