"""The schedule: how a model is to be split, said in verbs, each giving a new schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from attrs import evolve, frozen
from torch import nn

from ..specs.declaration import Declaration
from ..specs.errors import Problem
from ..specs.finding import Silence
from ..specs.json_values import is_plain
from ..specs.mesh import STAGE_AXES, Mesh, MeshAxis
from ..specs.paths import join, module_of
from ..specs.pipeline import By, Even
from ..specs.plan import Runtime
from ..specs.program import Fill, InitProgram, Operation
from ..specs.shard import Split
from ..specs.source import Made, TensorCall
from ..specs.steps import ForkRng, SetAttributes, SumGradient, Sync, SyncOp, When
from .model.callables import register
from .model.read import read_modules, read_tensors
from .verbs import modules as module_verbs
from .verbs.checks import wrong_attribute, wrong_even, wrong_fill, wrong_handed, wrong_silence, wrong_sync
from .verbs.edits import (
    edited,
    module_at,
    or_unmatched,
    own_tensors,
    selected_modules,
    selected_tensors,
    split_named,
    split_tensors,
    tensors_below,
    with_layout,
    wrong,
)
from .verbs.selection import At


def create_schedule(model: nn.Module, mesh: Mesh) -> Schedule:
    """Return a schedule that says nothing yet: every rank of a stage holds every tensor whole.

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

    ``sch.at[pattern]`` selects modules and tensors; the verbs after it apply to them. What is wrong is collected in
    ``problems`` and raised by ``plan_build``, all at once.
    """

    @property
    def at(self) -> At[Schedule]:
        """``sch.at[pattern]``: the same schedule, with a selection.

        ``*`` stands for anything within one name, ``**`` across names, ``[qkv]`` for one of these characters,
        ``{gate,up}`` for one of these names. A pattern that matches nothing is a problem.
        """
        return At(self)

    def expect(self, num: int) -> Schedule:
        """Say how many modules and tensors the pattern selects; another number is a problem."""
        found = len(selected_modules(self)) + len(selected_tensors(self))
        if found == 0 or (found == num and not isinstance(num, bool)):
            return or_unmatched(self)
        named = [m.path for m in selected_modules(self)] + [s.path for s in selected_tensors(self)]
        cause = f"{num!r} expected, {found} selected: {', '.join(named[:3])}{', ...' if found > 3 else ''}"  # noqa: PLR2004
        return wrong(self, Problem(self.selected, cause, f"Write .expect({found}) if that is meant, or mend the pattern"))

    def tag(self, **tags: object) -> Schedule:
        """Note plain values on tensors, or on all tensors of modules; ``spec.tags`` has them."""
        if not is_plain(tags):
            cause = f"a plan holds plain values, and {tags!r} has others"
            return wrong(self, Problem(self.selected, cause, "Note numbers, strings, booleans, or lists of them"))
        return edited(self, "tag", tensors_below(self), lambda spec: evolve(spec, tags={**spec.tags, **tags}))

    def init(self, value: float | Callable[..., object]) -> Schedule:
        """Give tensors their values, whatever other init code says.

        Args:
            value: A number that fills them, or a function that is called with each whole tensor and writes it in place.
        """
        if isinstance(value, float) and not is_plain(value):
            return wrong(self, Problem(self.selected, f"a plan holds finite numbers, not {value}", "Fill by a function"))
        if isinstance(value, (bool, int, float)):
            misfits = [wrong_fill(spec, value) for spec in tensors_below(self)]
            sch = evolve(self, problems=(*self.problems, *(problem for problem in misfits if problem)))
            program = InitProgram([Operation(Fill(value))], replaces=True)
            return edited(sch, "init", tensors_below(sch), lambda spec: evolve(spec, source=program))
        if not callable(value):
            fix = "nn.init.ones_, or a function of your own with def"
            return wrong(self, Problem(self.selected, f".init takes a number or a function, not {value!r}", fix))
        name, callables = register(self.runtime.callables, value)
        sch = evolve(self, runtime=evolve(self.runtime, callables=callables))
        return edited(
            sch, "init", tensors_below(self), lambda spec: evolve(spec, source=Made((TensorCall(spec.path, name),)))
        )

    def set(self, **attributes: object) -> Schedule:
        """Set attributes of modules to their local values, e.g. ``.set(num_heads=8)`` where 32 heads meet 4 ranks."""
        sch = or_unmatched(self, modules=True)
        modules = selected_modules(self)
        earlier = {(s.module, name): v for s in self.layout if isinstance(s, SetAttributes) for name, v in s.values.items()}
        problems = [
            problem
            for module in modules
            for name, value in attributes.items()
            if (
                problem := wrong_attribute(
                    module, module_at(self, module), name, value, earlier.get((module.path, name), value)
                )
            )
        ]
        if not attributes:
            problems = [Problem(self.selected, ".set() names no attribute", ".set(num_heads=8)")]
        if problems:
            return evolve(sch, problems=(*sch.problems, *problems))
        return with_layout(sch, (SetAttributes(module.path, attributes) for module in modules))

    def shard(
        self, name: str | None = None, *, axis: int, mesh_axis: MeshAxis = "tensor", **split: Unpack[Split]
    ) -> Schedule:
        """Split tensors along an axis over a mesh axis: in equal parts, unless more is said.

        Args:
            name: Tensor of each selected module; left out if the pattern selects tensors.
            axis: Axis of the tensor, negative from the end.
            mesh_axis: ``tensor``, ``data`` or ``expert``. A tensor can be split along two axes, over two mesh axes.
            split: ``blocks``, ``interleaved``, ``granule``, ``replicate``, ``uneven``, ``allow_empty``, ``pad_to_multiple``:
                what they mean is said by ``shardplan.specs.Shard``.
        """
        sch = or_unmatched(self, modules=name is not None)
        if name is not None:
            return split_named(sch, "shard", selected_modules(self), name, axis, mesh_axis, **split)
        specs = selected_tensors(self)
        if not specs and selected_modules(self):
            cause = "it selects modules, and .shard(axis=...) is for tensors"
            return wrong(sch, Problem(self.selected, cause, f'Name the tensor: .shard("weight", axis={axis})'))
        return split_tensors(sch, "shard", specs, axis, mesh_axis, **split)

    def sync(
        self,
        when: When,
        op: SyncOp | Callable[..., object],
        axis: int | None = None,
        *,
        mesh_axis: MeshAxis = "tensor",
        which: int = 0,
        features: tuple[int, int] | None = None,
    ) -> Schedule:
        """Send a module's input or output through a collective operator, with its own autograd formula.

        The first floating-point tensor among the arguments, or of the result, is meant. What each does on the way forward
        and to the gradient stands in ``functional/layout/collectives.py``. A gather before a module (``forward_pre``) sums
        its gradient: it is for modules of which each rank holds another part. Where the next module is whole on every rank,
        gather after the one before it (``forward_post``).

        Args:
            when: ``forward_pre`` (the input), ``forward_post`` (the output), ``backward_post`` (the gradient of the input)
                or ``backward_pre`` (the gradient of the output).
            op: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``divide`` (by the number of ranks), or a function
                ``(tensor, group) -> tensor``.
            axis: Axis of the activation that is gathered or scattered, negative from the end.
            mesh_axis: Mesh axis along which it communicates.
            which: Another floating-point tensor than the first, counted from 0.
            features: Of a gradient that is summed, some entries of the last axis alone: the first, and the one after the
                last.
        """
        sch = or_unmatched(self, modules=True)
        if problem := wrong_sync(self.selected, when, op, axis, mesh_axis, which, features):
            return wrong(sch, problem)
        if callable(op):
            name, callables = register(self.runtime.callables, op)
            sch = evolve(sch, runtime=evolve(self.runtime, callables=callables))
        else:
            name = op
        syncs = (Sync(m.path, when, name, axis, mesh_axis, which, features) for m in selected_modules(self))
        return with_layout(sch, syncs)

    def sum_gradient(self, name: str | None = None, *, mesh_axis: MeshAxis = "tensor") -> Schedule:
        """Sum the gradient of tensors that are whole on every rank, and work on parts of activations there.

        Such are norms of split heads, or on a split sequence. The tensor passes an operator on its way into its module, so
        that the sum is part of the backward pass.

        Args:
            name: Tensor of each selected module; left out for all its trained ones, or if the pattern selects tensors.
            mesh_axis: Mesh axis along which the activations are split.
        """
        sch = or_unmatched(self, modules=name is not None)
        if mesh_axis not in STAGE_AXES:
            cause = f"activations are not split over mesh axis {mesh_axis!r}"
            return wrong(sch, Problem(self.selected, cause, "They are over data or tensor"))
        chosen = {path for spec in selected_tensors(self) for path in spec.paths}
        for module in selected_modules(self):
            owned = {path for spec in own_tensors(self, module) if spec.requires_grad for path in spec.paths}
            mine = {path for path in owned if module_of(path) == module.path}
            found = mine if name is None else mine & {join(module.path, name)}
            if not found:
                held = ", ".join(sorted(mine)) or "none"
                cause = f"it has no trained tensor{f' {name!r}' if name else ''} of its own"
                sch = wrong(sch, Problem(module.path, cause, f"Its trained tensors are {held}"))
            chosen |= found
        named = (path.rpartition(".") for path in sch.tree.all_paths if path in chosen)
        return with_layout(sch, (SumGradient(module, last, mesh_axis) for module, _, last in named))

    def fork_rng(self) -> Schedule:
        """Draw other random numbers on each rank along ``tensor`` within modules: dropout on parts of activations."""
        sch = or_unmatched(self, modules=True)
        return with_layout(sch, (ForkRng(module.path) for module in selected_modules(self)))

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
        return module_verbs.colwise(self, gather_output=gather_output, sequence_axis=sequence_axis, **split)

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
        return module_verbs.rowwise(self, split_input=split_input, sequence_axis=sequence_axis, **split)

    def vocab_parallel(self, *, sequence_axis: int | None = None, **split: Unpack[Split]) -> Schedule:
        """Split the rows of ``nn.Embedding``: each rank looks up its own, and all ranks sum.

        In verbs: ``.shard("weight", axis=0)``, rows of others give zeros, ``.sync("forward_post", "all_reduce")``,
        ``.set(num_embeddings=...)``.

        Args:
            sequence_axis: As for ``.rowwise``.
            split: As for ``.shard``; ``pad_to_multiple`` pads the vocabulary.
        """
        return module_verbs.vocab_parallel(self, sequence_axis=sequence_axis, **split)

    def expert_parallel(self) -> Schedule:
        """Spread the experts of fused modules over ``expert``: axis 0 of each tensor that they hold.

        Such a module has ``num_experts`` and is called with tokens, the experts chosen for each, and their weights. Tokens
        of all ranks along ``expert`` are gathered, each rank computes with its experts, what they give is summed, and each
        rank keeps its own tokens'; gradients of experts are summed over ``expert_data`` and divided by ``data``.
        """
        return module_verbs.expert_parallel(self)

    def cut_pipeline_stage(self) -> Schedule:
        """End a pipeline stage after each selected module; there is one stage more than cuts."""
        sch = or_unmatched(self, modules=True)
        paths = [module.path for module in selected_modules(self)]
        if "" in paths:
            cause = "it is the model itself, and nothing comes after it"
            return wrong(sch, Problem(self.selected, cause, "Cut a module inside it"))
        return evolve(sch, cuts=tuple(dict.fromkeys((*self.cuts, *paths))))

    def leaf(self) -> Schedule:
        """Let modules run as they are, as one operation of their stage: their code is not exported, and not cut."""
        sch = or_unmatched(self, modules=True)
        paths = [module.path for module in selected_modules(self)]
        if "" in paths:
            cause = "it is the model itself, and a leaf is one operation of one stage"
            return wrong(sch, Problem(self.selected, cause, "Mark the module that cannot be exported"))
        return evolve(sch, leaves=tuple(dict.fromkeys((*self.leaves, *paths))))

    def silence(self, code: str, *, reason: str) -> Schedule:
        """Say that findings of one kind are known and meant: the audit lists them apart, and no longer minds them.

        Args:
            code: Their kind, such as ``SP021``: docs/findings.md has all. Laws that fail (SP001 to SP005, SP007) stay.
            reason: Why they are meant. The plan keeps it.
        """
        if problem := wrong_silence(self.selected, code, reason):
            return wrong(self, problem)
        silences = dict.fromkeys((*self.silences, Silence(code, self.selected, reason)))
        return evolve(or_unmatched(self), silences=tuple(silences))

    def cut_evenly(self, num_stages: int, by: By = "parameters") -> Schedule:
        """Cut the longest chain of repeated modules so that the stages weigh alike, embeddings and head counted.

        Args:
            num_stages: How many stages.
            by: ``parameters`` (their elements) or ``flops`` (of a forward pass on the example inputs).
        """
        if problem := wrong_even(num_stages, by):
            return wrong(self, problem)
        return evolve(self, even=Even(num_stages, by))

    def with_stages(self, stages: Sequence[nn.Module]) -> Schedule:
        """Hand over the stages: modules of the model that are called one after another; nothing is exported.

        Args:
            stages: One module a stage. The first is called with the example inputs, each other one with what the one before
                gave: a tensor, or a tuple of tensors.
        """
        names = {id(module_at(self, module)): module.path for module in self.modules}
        if problem := wrong_handed(stages, names):
            return wrong(self, problem)
        paths = [names[id(stage)] for stage in stages]
        return evolve(self, handed=tuple((path,) for path in paths))
