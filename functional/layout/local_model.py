"""A model as one rank has it, on fake tensors: local shapes, layout applied. For looking at, never for running."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any, get_args

import torch
from attrs import evolve
from torch import Tensor, nn

from ...specs.mesh import MeshAxis
from ..model.copy import copy_module
from ..model.fake_values import AnswerZero
from ..model.read import named_tensors
from ..model.rng_state import own_generators
from .apply import Local, apply_layout
from .collectives import SyncGroup
from .hooks import group_name, needed_groups

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ...specs.mesh import Coordinate
    from ...specs.steps import LayoutStep
    from ...specs.tree import SpecTree


def local_copy(
    model: nn.Module,
    tree: SpecTree,
    layout: Sequence[LayoutStep],
    coordinate: Coordinate,
    callables: Mapping[str, Any],
    mode: FakeTensorMode,
    *,
    named: bool = False,
    numbered: bool = False,
) -> nn.Module:
    """Return a copy of a model with fake CPU tensors of the local shapes at a coordinate, changed as the layout says.

    There are no process groups yet: their names are empty, or with ``named`` their mesh axes, which an export keeps; with
    ``numbered`` also the place in the layout of the change that communicates, which tells whose an operator is.
    """
    shapes = {id(tensor): tree[path].local_shape(coordinate) for path, _, tensor in named_tensors(model) if path in tree}

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty(shapes[id(tensor)], dtype=tensor.dtype, device="cpu")

    local = copy_module(model, fake, for_planning=True)
    sizes: dict[str, tuple[int, int]] = {m: (coordinate.mesh.num(m), coordinate.index(m)) for m in get_args(MeshAxis)}
    sizes |= {group_name(m, num): (num, coordinate.index(m) % num) for m, num in needed_groups(layout)}
    # what experts exchange is told from what tensor parallelism does, also where nothing else has a name
    groups = {name: SyncGroup(name if named or name.startswith("expert") else "", *size) for name, size in sizes.items()}
    with mode:
        for number, step in enumerate(layout):
            its = {key: evolve(group, name=f"{key}#{number}") for key, group in groups.items()} if numbered else groups
            apply_layout(local, step, Local(coordinate, its, callables))
    return local


def fake_inputs(example_inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model is called with, tensors as those of the mode that is on."""
    return {
        name: torch.empty(value.shape, dtype=value.dtype, device="cpu") if isinstance(value, Tensor) else value
        for name, value in example_inputs.items()
    }


@contextmanager
def following(mode: FakeTensorMode) -> Iterator[None]:
    """Let a model's code run on fake tensors within the block: it draws from nobody's generator, and values are zero.

    Code that asks hears that it is compiled, as it does while it is exported: some operators have no fake kernel for what
    others do in their place.
    """
    before = torch.compiler._is_compiling_flag  # noqa: SLF001  what torch.compiler.is_compiling() says
    torch.compiler._is_compiling_flag = True  # noqa: SLF001
    try:
        with mode, own_generators(0), AnswerZero(), quiet():
            yield
    finally:
        torch.compiler._is_compiling_flag = before  # noqa: SLF001


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from writing its graph to the terminal; what goes wrong is said by the error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
