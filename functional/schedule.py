"""The schedule: how a model is to be split, declared by verbs, each of which returns a new schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Unpack

import torch
from attrs import frozen
from torch import nn

from ..specs.declaration import Declaration
from ..specs.layout_steps import Gives, SyncOp, When
from ..specs.mesh import Mesh, MeshAxis
from ..specs.pipeline import By
from ..specs.plan import Runtime
from ..specs.shard import Split
from .model.read import read_modules, read_tensors
from .verbs import modules, pipeline, selection, splits, syncs, values


def create_schedule(model: nn.Module, mesh: Mesh) -> Schedule:
    """Return a schedule without declarations: every rank of a stage holds every tensor whole.

    Reads shapes, dtypes, ties, buffers and requires_grad; copies and changes no tensor.

    Args:
        model: The model, best built under ``torch.device("meta")``.
        mesh: The ranks that it will be split over.

    >>> import torch
    >>> from torch import nn
    >>> from shardplan.specs import Mesh
    >>> with torch.device("meta"):
    ...     model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> sch = create_schedule(model, Mesh(tensor=2)).at["0"].colwise().at["2"].rowwise()
    >>> for spec in sch.tree.values():
    ...     print(spec)
    0.weight  f32[32@tensor, 8]
    0.bias  f32[32@tensor]
    2.weight  f32[8, 32@tensor]
    2.bias  f32[8]
    """
    if not isinstance(model, nn.Module):
        msg = f"a schedule is made for a torch.nn.Module, not for {type(model).__name__} {model!r}"
        raise TypeError(msg)
    if isinstance(model, torch.jit.ScriptModule):
        msg = "a scripted model cannot be split, as its code is fixed; schedule the module that it was scripted from"
        raise TypeError(msg)
    tree, problems = read_tensors(model)
    return Schedule(mesh=mesh, tree=tree, modules=read_modules(model), problems=problems, runtime=Runtime(model=model))


@frozen
class Schedule(Declaration):
    """How a model is to be split. Immutable: a verb gives a new schedule.

    ``sch.at[pattern]`` selects modules and tensors; the verbs after it apply to them. Mistakes are collected in
    ``problems`` and raised by ``plan_build``, all at once. The bodies of the verbs stand in ``functional/verbs/``.
    """

    @property
    def at(self) -> selection.At[Schedule]:
        """``sch.at[pattern]``: the same schedule, with a selection.

        ``*`` matches anything within a name, ``**`` across names, ``[qkv]`` any of these characters, ``{gate,up}`` any of
        these names. A pattern that matches nothing is a problem.
        """
        return selection.At(self)

    def expect(self, num: int) -> Schedule:
        """Check the number of modules and tensors that the pattern selects; another number is a problem."""
        return selection.expect(self, num)

    def tag(self, **tags: object) -> Schedule:
        """Note plain values on tensors, or on all tensors of modules; they stand in ``spec.tags``."""
        return values.tag(self, tags)

    def init(self, value: float | Callable[..., object]) -> Schedule:
        """Give tensors their values, which no other init code overwrites.

        Args:
            value: A number that fills them, or a function that is called with each whole tensor and writes it in place.
        """
        return values.init(self, value)

    def set(self, **attributes: object) -> Schedule:
        """Set attributes of modules to their local values, e.g. ``.set(num_heads=8)`` where 32 heads meet 4 ranks."""
        return values.set_attributes(self, attributes)

    def shard(
        self, name: str | None = None, *, axis: int, mesh_axis: MeshAxis = "tensor", **split: Unpack[Split]
    ) -> Schedule:
        """Split tensors along an axis over a mesh axis: in equal parts, unless more is said.

        Args:
            name: Tensor of each selected module; left out if the pattern selects tensors.
            axis: Axis of the tensor, negative from the end.
            mesh_axis: ``tensor``, ``data`` or ``expert``. A tensor can be split along two axes, over two mesh axes.
            split: ``blocks``, ``interleaved``, ``granule``, ``replicate``, ``uneven``, ``allow_empty``, ``pad_to_multiple``:
                ``shardplan.specs.Shard`` explains them.
        """
        return splits.shard(self, name, axis, mesh_axis, **split)

    def sync(
        self,
        when: When,
        op: SyncOp | Callable[..., object],
        axis: int | None = None,
        *,
        mesh_axis: MeshAxis = "tensor",
        which: int = 0,
        features: tuple[int, int] | None = None,
        gives: Gives | None = None,
    ) -> Schedule:
        """Send a module's input or output through a collective operator, with its own autograd formula.

        The operator works on the first floating-point tensor among the arguments, or of the result; the table in
        ``functional/layout/collectives.py`` gives its forward pass and its gradient. A gather before a module
        (``forward_pre``) sums its gradient: it is for modules that are split over the ranks. Before a module that is whole
        on every rank, gather after the preceding module (``forward_post``).

        Args:
            when: ``forward_pre`` (the input), ``forward_post`` (the output), ``backward_post`` (the gradient of the input)
                or ``backward_pre`` (the gradient of the output).
            op: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``divide`` (by the number of ranks), or a function
                ``(tensor, group) -> tensor``.
            axis: Axis of the activation that is gathered or scattered, or along which a function gives parts; negative from
                the end.
            mesh_axis: Mesh axis along which it communicates.
            which: Number of the floating-point tensor, from 0.
            features: Entries of the last axis to which the sum of a gradient is limited, as ``(start, stop)``.
            gives: What a function returns on each rank: ``whole`` (the tensor that the whole model has there, joined along
                ``axis`` from equal parts if there is one), ``split`` (equal parts along ``axis`` of a tensor of the size
                that it takes) or ``summand``. The function is then not called while planning. Its gradient is taken to be
                that of the operator of the table between the same two types: of a sum, a gather, a scatter. Before
                ``backward_post`` and ``backward_pre`` the function returns the tensor that it takes, and this says what its
                gradient is. ``verify`` measures whether the word is true. Without it the law ``equal`` is not followed
                beyond the function.
        """
        return syncs.sync(self, when, op, axis, mesh_axis, which, features, gives)

    def sum_gradient(self, name: str | None = None, *, mesh_axis: MeshAxis = "tensor") -> Schedule:
        """Sum the gradient of tensors that are whole on every rank, and work on parts of activations there.

        Examples are norms of split heads, and norms on a split sequence. The tensor passes through an operator before its
        module computes with it, so that the sum is part of the backward pass.

        Args:
            name: Tensor of each selected module; left out for all its trained tensors, or if the pattern selects tensors.
            mesh_axis: Mesh axis along which the activations are split.
        """
        return syncs.sum_gradient(self, name, mesh_axis)

    def sum_products(self, what: Literal["outputs", "gradients"]) -> Schedule:
        """Sum products with tensors that code uses directly, such as those of an ``nn.ParameterList``.

        No module is called with what they are multiplied with, so that no ``.sync`` could stand there. Products are those
        of ``@``, ``*``, ``linear``, ``einsum`` and their kind, with the tensor or a view of it, while the module runs whose
        code uses it.

        Args:
            what: ``outputs`` sums the products: each rank has a part of the axis that they sum over. ``gradients`` sums the
                gradients of the other factors, which are whole: each rank has a part of the products.
        """
        return syncs.sum_products(self, what)

    def fork_rng(self) -> Schedule:
        """Draw different random numbers on each rank along ``tensor`` within modules: dropout on parts of activations."""
        return syncs.fork_rng(self)

    def share_rng(self, *, onwards: bool = False) -> Schedule:
        """Draw the same random numbers on all ranks along ``tensor``, also within a module with ``.fork_rng()``.

        Args:
            onwards: Whether they stay the same after the selected modules, until the module with ``.fork_rng()`` ends: for
                an attention whose code drops entries of heads, and after its output projection of whole activations.
        """
        return syncs.share_rng(self, onwards=onwards)

    def colwise(self, *, gather_output: bool = False, sequence_axis: int | None = None, **split: Unpack[Split]) -> Schedule:
        """Split the outputs of ``nn.Linear`` or ``Conv1D``: each rank computes some features of the output.

        In verbs, for ``nn.Linear``: ``.shard("weight", axis=0)``, ``.shard("bias", axis=0)``,
        ``.sync("backward_post", "all_reduce")``, ``.set(out_features=...)``.

        Args:
            gather_output: Join the outputs: ``.sync("forward_post", "all_gather", axis=-1)``. Padding is left out.
            sequence_axis: Axis along which the input is split: ``.sync("forward_pre", "all_gather", axis=sequence_axis)``
                in place of the sum of its gradient.
            split: As for ``.shard``.
        """
        return modules.colwise(self, gather_output=gather_output, sequence_axis=sequence_axis, **split)

    def rowwise(self, *, split_input: bool = False, sequence_axis: int | None = None, **split: Unpack[Split]) -> Schedule:
        """Split the inputs of ``nn.Linear`` or ``Conv1D``: each rank sums over some input features, then all ranks sum.

        In verbs, for ``nn.Linear``: ``.shard("weight", axis=1)``, ``.sync("forward_post", "all_reduce")``,
        ``.set(in_features=...)``. A bias is added once, after the sum.

        Args:
            split_input: The input is whole, and each rank takes its own features of it:
                ``.sync("backward_post", "all_gather", axis=-1)``.
            sequence_axis: Axis along which the outputs stay split: ``reduce_scatter`` in place of ``all_reduce``.
            split: As for ``.shard``.
        """
        return modules.rowwise(self, split_input=split_input, sequence_axis=sequence_axis, **split)

    def vocab_parallel(self, *, sequence_axis: int | None = None, **split: Unpack[Split]) -> Schedule:
        """Split the rows of ``nn.Embedding``: each rank looks up its own, and all ranks sum.

        In verbs: ``.shard("weight", axis=0)``, rows of other ranks give zeros, ``.sync("forward_post", "all_reduce")``,
        ``.set(num_embeddings=...)``.

        Args:
            sequence_axis: As for ``.rowwise``.
            split: As for ``.shard``; ``pad_to_multiple`` pads the vocabulary.
        """
        return modules.vocab_parallel(self, sequence_axis=sequence_axis, **split)

    def expert_parallel(self) -> Schedule:
        """Spread the experts of fused modules over ``expert``: axis 0 of each tensor that they hold.

        Such a module has ``num_experts`` and is called with tokens, the experts chosen for each, and their weights. Tokens
        of all ranks along ``expert`` are gathered, each rank computes with its experts, the results are summed, and each
        rank keeps the results of its own tokens; gradients of experts are summed over ``expert_data`` and divided by
        ``data``.
        """
        return modules.expert_parallel(self)

    def cut_pipeline_stage(self) -> Schedule:
        """End a pipeline stage after each selected module: n cuts make n + 1 stages."""
        return pipeline.cut_pipeline_stage(self)

    def leaf(self) -> Schedule:
        """Run each module as it is, as a single operation of its stage: its code is neither exported nor cut."""
        return pipeline.leaf(self)

    def silence(self, code: str, *, reason: str) -> Schedule:
        """Note that findings of a kind are known and meant: the audit lists them apart, and does not fail for them.

        Args:
            code: Their kind, such as ``SP021``; docs/findings.md lists all. Laws that fail (SP001 to SP005, SP007) cannot
                be silenced.
            reason: Why they are meant. The plan keeps it.
        """
        return values.silence(self, code, reason)

    def trust(self, reason: str, *, gives: Gives = "whole", axis: int | None = None) -> Schedule:
        """Declare that modules give what they should, where nobody can follow their code: the audit lists them.

        The word is for the backward pass too: the gradient of each input is what the input asks for, whole for whole inputs.

        Args:
            reason: Why the modules can be trusted. The plan keeps it.
            gives: ``whole``, ``split`` (parts along ``axis``) or ``summand``.
            axis: Axis of the outputs that is split, negative from the end.
        """
        return values.trust(self, reason, gives, axis)

    def cut_evenly(self, num_stages: int, by: By = "parameters") -> Schedule:
        """Cut the longest chain of repeated modules so that the stages weigh alike, embeddings and head counted.

        Args:
            num_stages: Number of stages.
            by: ``parameters`` (their elements) or ``flops`` (of a forward pass on the example inputs).
        """
        return pipeline.cut_evenly(self, num_stages, by)

    def with_stages(self, stages: Sequence[nn.Module]) -> Schedule:
        """Hand over the stages: modules of the model that are called in sequence; nothing is exported.

        Args:
            stages: A module for each stage. The first is called with the example inputs, each later stage with the output
                of its predecessor: a tensor, or a tuple of tensors.
        """
        return pipeline.with_stages(self, stages)
