"""Follow which activations are whole on every rank and which are split, through a forward pass.

A whole tensor has the same gradient on every rank, unless it meets a split one: then each rank computes only a part of its
gradient, and only a synchronisation on the way sums them up (``sum_gradient``, Megatron-LM's f).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import frozen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ....specs.errors import Problem
from ....specs.paths import module_of
from ...model.read import storage_id
from ..collectives import RESULTS

if TYPE_CHECKING:
    from torch import nn

    from ....specs.tree import SpecTree
    from ...model.open_modules import OpenModules


@frozen
class Sharing:
    """How ranks share an activation.

    Args:
        kind: ``split`` (each rank has a part, or a summand), ``whole`` (equal on all ranks, and needs the whole gradient),
            or ``summed`` (equal on all ranks, and its gradient is summed over them).
        needs_gradient: Whether it depends on a trained tensor.
        parameter: Path of the parameter that it is, or is a view or a cast of.
        summed: Paths of the parameters that it depends on whose gradients are summed, before they have met a split tensor.
    """

    kind: Literal["split", "whole", "summed"]
    needs_gradient: bool
    parameter: str = ""
    summed: frozenset[str] = frozenset()


class ActivationSharing(TorchDispatchMode):
    """Follow how ranks share activations through the operators within the block, and find gradients that stay partial.

    Args:
        model: The model, with the tensors of one rank.
        tree: Its tensors, with their layout.
        running: The modules that are running.
        is_split: Whether a tensor, by canonical path, is really split on this mesh; the experts of a rank count as whole,
            as they meet whole tokens.

    Attributes:
        problems: The problems found, by path.
        met: Paths of the parameters with summed gradients that have met a split tensor.
    """

    def __init__(self, model: nn.Module, tree: SpecTree, running: OpenModules, is_split: Mapping[str, bool]) -> None:
        super().__init__()
        self.problems: dict[str, Problem] = {}
        self.met: set[str] = set()
        self._running = running
        self._tree = tree
        self._of_storage: dict[int, Sharing] = {}
        self._alive: list[object] = []  # storages, so that their identities are not reused
        for path, parameter in model.named_parameters(remove_duplicate=False):
            if path in tree:
                spec = tree[path]
                if is_split[spec.path]:
                    self._set(parameter, Sharing("split", spec.requires_grad))
                elif spec.requires_grad:
                    self._set(parameter, Sharing("whole", needs_gradient=True, parameter=spec.path))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        inputs = [sharing for sharing in map(self._get, leaves) if sharing is not None]
        out = func(*args, **(kwargs or {}))
        is_of_experts = any(isinstance(value, str) and value.startswith("expert") for value in leaves)
        outcome = self._outcome("" if is_of_experts else func._schema.name, inputs)  # noqa: SLF001  the operator's name
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self._set(tensor, outcome)
        return out

    def _outcome(self, operator: str, inputs: list[Sharing]) -> Sharing | None:
        """Return how ranks share the results of an operator."""
        if not inputs:
            return None
        needs_gradient = any(sharing.needs_gradient for sharing in inputs)
        match operator:
            case "shardplan::sum_gradient" | "shardplan::sum_gradient_of" if inputs[0].kind == "whole":
                return Sharing("summed", needs_gradient, summed=frozenset(filter(None, [inputs[0].parameter])))
            case _ if operator in RESULTS:
                kind = RESULTS[operator]
                return None if kind == "whole" and not needs_gradient else Sharing(kind, needs_gradient)
            case _ if any(sharing.kind == "split" for sharing in inputs):
                self._report(sharing for sharing in inputs if sharing.kind == "whole")
                self.met = self.met.union(*(sharing.summed for sharing in inputs))
                return Sharing("split", needs_gradient)
            case _ if len(set(inputs)) == 1:
                return inputs[0]
            case _:
                kind = "whole" if any(sharing.kind == "whole" for sharing in inputs) else "summed"
                return Sharing(kind, needs_gradient, summed=frozenset().union(*(sharing.summed for sharing in inputs)))

    def _report(self, whole: Iterable[Sharing]) -> None:
        """Report whole tensors that meet a split tensor in the running module."""
        here = self._running.innermost
        for sharing in whole:
            if sharing.parameter:
                where = "its module" if module_of(sharing.parameter) == here else repr(here or "the model")
                cause = (
                    f"it is whole, and meets parts of an activation in {where}: each rank would have a part of its gradient"
                )
                fix = "Split it alike, keep whole what it works on, or freeze it"
                problem = Problem(sharing.parameter, cause, fix, self._tree[sharing.parameter].type)
            else:
                cause = "a whole activation meets parts here, and nothing adds up its gradient: each rank has a part of it"
                problem = Problem(here, cause, f"sch.at[{here!r}].sync('backward_post', 'all_reduce')")
            self.problems.setdefault(problem.path, problem)

    def key(self, tensor: Tensor) -> Hashable:
        """Return a key of how ranks share a tensor, without the paths of parameters."""
        sharing = self._get(tensor)
        return sharing and (sharing.kind, sharing.needs_gradient, bool(sharing.parameter), bool(sharing.summed))

    def _get(self, value: Any) -> Sharing | None:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return None
        return self._of_storage.get(storage_id(value))

    def _set(self, tensor: Tensor, sharing: Sharing | None) -> None:
        if sharing is None:
            self._of_storage.pop(storage_id(tensor), None)
        else:
            self._of_storage[storage_id(tensor)] = sharing
            self._alive.append(tensor.untyped_storage())
