"""Which activations are whole on every rank and which are parts, followed through a forward pass.

A tensor that is whole has, on every rank, the same gradient, unless it meets a part: then each rank computes a part of
the gradient, and nothing adds them up but a synchronisation on the way (``sum_gradient``, Megatron-LM's f).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import frozen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ....specs.errors import Problem

if TYPE_CHECKING:
    from torch import nn

    from ....specs.tree import SpecTree


@frozen
class Part:
    """What is known of a tensor while a forward pass runs.

    Args:
        kind: ``split`` (each rank has a part, or a summand), ``whole`` (all have the same, and need the whole gradient), or
            ``summed`` (whole, and its gradient is added up over ranks).
        needs_gradient: Whether something trained is behind it.
        parameter: Path of the parameter that it is, or is a view or a cast of.
        summed: Paths of the parameters behind it whose gradients are added up, before they have met a part.
    """

    kind: Literal["split", "whole", "summed"]
    needs_gradient: bool
    parameter: str = ""
    summed: frozenset[str] = frozenset()


class Parts(TorchDispatchMode):
    """Follows parts through the operations within the block, and notes where whole tensors meet them.

    Args:
        model: The model, with the tensors of one rank.
        tree: Its tensors, with their layout.
        open_modules: Paths of the modules that are running, innermost last.
        is_split: Whether a tensor, by canonical path, is really split on this mesh; experts of which each rank has some are
            not, as they meet whole tokens.
    """

    def __init__(self, model: nn.Module, tree: SpecTree, open_modules: Sequence[str], is_split: Mapping[str, bool]) -> None:
        super().__init__()
        self.problems: dict[str, Problem] = {}
        self.met: set[str] = set()
        self._open_modules = open_modules
        self._tree = tree
        self._parts: dict[int, Part] = {}
        self._alive: list[object] = []
        for path, parameter in model.named_parameters(remove_duplicate=False):
            if path in tree:
                spec = tree[path]
                if is_split[spec.path]:
                    self._note(parameter, Part("split", spec.requires_grad))
                elif spec.requires_grad:
                    self._note(parameter, Part("whole", needs_gradient=True, parameter=spec.path))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs or {}))
        met = [part for part in map(self._part, given) if part is not None]
        out = func(*args, **(kwargs or {}))
        is_of_experts = any(isinstance(value, str) and value.startswith("expert") for value in given)
        made = self._outcome("" if is_of_experts else func._schema.name, met)  # noqa: SLF001  the operator's name
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self._note(tensor, made)
        return out

    def _outcome(self, operator: str, met: list[Part]) -> Part | None:  # noqa: PLR0911  one case an operator
        if not met:
            return None
        needs_gradient = any(part.needs_gradient for part in met)
        match operator:
            case "shardplan::all_reduce" | "shardplan::all_gather":
                return Part("whole", needs_gradient) if needs_gradient else None
            case "shardplan::gather_sum":
                return Part("summed", needs_gradient)
            case "shardplan::sum_gradient" | "shardplan::sum_gradient_of" if met[0].kind == "whole":
                return Part("summed", needs_gradient, summed=frozenset(filter(None, [met[0].parameter])))
            case "shardplan::reduce_scatter" | "shardplan::split":
                return Part("split", needs_gradient)
            case _ if any(part.kind == "split" for part in met):
                self._meet(part for part in met if part.kind == "whole")
                self.met = self.met.union(*(part.summed for part in met))
                return Part("split", needs_gradient)
            case _ if len(set(met)) == 1:
                return met[0]
            case _:
                kind = "whole" if any(part.kind == "whole" for part in met) else "summed"
                return Part(kind, needs_gradient, summed=frozenset().union(*(part.summed for part in met)))

    def _meet(self, whole: Iterable[Part]) -> None:
        here = self._open_modules[-1] if self._open_modules else ""
        for part in whole:
            if part.parameter:
                where = "its module" if part.parameter.rpartition(".")[0] == here else repr(here or "the model")
                cause = (
                    f"it is whole, and meets parts of an activation in {where}: each rank would have a part of its gradient"
                )
                fix = "Split it alike, keep whole what it works on, or freeze it"
                problem = Problem(part.parameter, cause, fix, self._tree[part.parameter].type)
            else:
                cause = "a whole activation meets parts here, and nothing adds up its gradient: each rank has a part of it"
                problem = Problem(here, cause, f"sch.at[{here!r}].sync('backward_post', 'all_reduce')")
            self.problems.setdefault(problem.path, problem)

    def known(self, tensor: Tensor) -> Hashable:
        """Return what is known of a tensor, but not by which parameters."""
        part = self._part(tensor)
        return part and (part.kind, part.needs_gradient, bool(part.parameter), bool(part.summed))

    def _part(self, value: Any) -> Part | None:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return None
        return self._parts.get(value.untyped_storage()._cdata)  # noqa: SLF001  views share what is known of their memory

    def _note(self, tensor: Tensor, part: Part | None) -> None:
        storage = tensor.untyped_storage()
        if part is None:
            self._parts.pop(storage._cdata, None)  # noqa: SLF001
        else:
            self._parts[storage._cdata] = part  # noqa: SLF001
            self._alive.append(storage)  # else its identity would be given to another one
