"""The schedule: how a model is to be split, said in verbs, each giving a new schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from attrs import evolve, field, frozen
from attrs.validators import instance_of
from torch import nn

from ..specs.errors import Problem
from ..specs.mesh import Mesh, MeshAxis
from ..specs.param import Origin, ParamSpec
from ..specs.pattern import closest, compile_pattern
from ..specs.plain import is_plain
from ..specs.plan import Runtime
from ..specs.program import Fill, InitProgram, Operation
from ..specs.source import Made, TensorCall
from ..specs.steps import LayoutStep, SetAttributes, Sync, SyncOp, VocabParallel, When
from .callables import register
from .cuts import By, Even, wrong_even, wrong_handed
from .selection import At, caller, join
from .skeleton import ModuleSpec, read_modules, read_tensors
from .verb_checks import sharded, wrong_attribute, wrong_embedding, wrong_fill, wrong_sync

if TYPE_CHECKING:
    from ..specs.tree import SpecTree


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
class Schedule:
    """How a model is to be split. Immutable: a verb gives a new schedule.

    ``sch.at[pattern]`` selects modules and tensors; the verbs after it apply to them. What is wrong is collected in
    ``problems`` and raised by ``plan_build``, all at once.

    Args:
        mesh: The ranks.
        tree: Every tensor with what was said of it.
        modules: Every module.
        layout: Changes of how modules compute, in order.
        cuts: Modules after which a pipeline stage ends.
        leaves: Modules that run as they are, as one operation of a stage.
        handed: The modules of each stage, where they were handed over.
        even: The stages that are to be balanced, if any.
        problems: What is wrong so far.
        pattern: What the verbs apply to.
        runtime: Model and callables; outside equality.
    """

    mesh: Mesh = field(validator=instance_of(Mesh))
    tree: SpecTree = field(repr=False)
    modules: tuple[ModuleSpec, ...] = field(repr=False)
    layout: tuple[LayoutStep, ...] = field(default=(), repr=False)
    cuts: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    handed: tuple[tuple[str, ...], ...] = ()
    even: Even | None = None
    problems: tuple[Problem, ...] = field(default=(), converter=tuple, repr=False)
    pattern: str | None = field(default=None, eq=False)
    runtime: Runtime = field(factory=Runtime, eq=False, repr=False)

    @property
    def at(self) -> At:
        """``sch.at[pattern]``: the same schedule, with a selection.

        ``*`` stands for anything within one name, ``**`` across names, ``[qkv]`` for one of these characters,
        ``{gate,up}`` for one of these names. A pattern that matches nothing is a problem.
        """
        return At(self)

    def expect(self, num: int) -> Schedule:
        """Say how many modules and tensors the pattern selects; another number is a problem."""
        found = len(self._modules()) + len(self._tensors())
        if found == 0 or (found == num and not isinstance(num, bool)):
            return self._or_unmatched()
        named = [m.path for m in self._modules()] + [s.path for s in self._tensors()]
        cause = f"{num!r} expected, {found} selected: {', '.join(named[:3])}{', ...' if found > 3 else ''}"  # noqa: PLR2004
        return self._wrong(Problem(self._pattern(), cause, f"Write .expect({found}) if that is meant, or mend the pattern"))

    def tag(self, **tags: object) -> Schedule:
        """Note plain values on tensors, or on all tensors of modules; ``spec.tags`` has them."""
        if not is_plain(tags):
            cause = f"a plan holds plain values, and {tags!r} has others"
            return self._wrong(Problem(self._pattern(), cause, "Note numbers, strings, booleans, or lists of them"))
        return self._edit("tag", self._tensors_below(), lambda spec: evolve(spec, tags={**spec.tags, **tags}))

    def init(self, value: float | Callable[..., object]) -> Schedule:
        """Give tensors their values, whatever other init code says.

        Args:
            value: A number that fills them, or a function that is called with each whole tensor and writes it in place.
        """
        if isinstance(value, float) and not is_plain(value):
            return self._wrong(Problem(self._pattern(), f"a plan holds finite numbers, not {value}", "Fill by a function"))
        if isinstance(value, (bool, int, float)):
            misfits = [wrong_fill(spec, value) for spec in self._tensors_below()]
            sch = evolve(self, problems=(*self.problems, *(problem for problem in misfits if problem)))
            program = InitProgram([Operation(Fill(value))], replaces=True)
            return sch._edit("init", sch._tensors_below(), lambda spec: evolve(spec, source=program))
        if not callable(value):
            fix = "nn.init.ones_, or a function of your own with def"
            return self._wrong(Problem(self._pattern(), f".init takes a number or a function, not {value!r}", fix))
        name, callables = register(self.runtime.callables, value)
        sch = evolve(self, runtime=evolve(self.runtime, callables=callables))
        return sch._edit(
            "init", self._tensors_below(), lambda spec: evolve(spec, source=Made((TensorCall(spec.path, name),)))
        )

    def set(self, **attributes: object) -> Schedule:
        """Set attributes of modules to their local values, e.g. ``.set(num_heads=8)`` where 32 heads meet 4 ranks."""
        sch = self._or_unmatched(modules=True)
        modules = self._modules()
        earlier = {(s.module, name): v for s in self.layout if isinstance(s, SetAttributes) for name, v in s.values.items()}
        problems = [
            problem
            for module in modules
            for name, value in attributes.items()
            if (
                problem := wrong_attribute(
                    module, self._module(module), name, value, earlier.get((module.path, name), value)
                )
            )
        ]
        if not attributes:
            problems = [Problem(self._pattern(), ".set() names no attribute", ".set(num_heads=8)")]
        if problems:
            return evolve(sch, problems=(*sch.problems, *problems))
        return sch._with_layout(SetAttributes(module.path, attributes) for module in modules)

    def shard(self, name: str | None = None, *, axis: int, mesh_axis: MeshAxis = "tensor") -> Schedule:
        """Split tensors along an axis, in equal parts over a mesh axis.

        Args:
            name: Tensor of each selected module; left out if the pattern selects tensors.
            axis: Axis of the tensor, negative from the end.
            mesh_axis: ``tensor`` or ``data``.
        """
        sch = self._or_unmatched(modules=name is not None)
        if name is not None:
            return sch._split_named("shard", self._modules(), name, axis, mesh_axis)
        specs = self._tensors()
        if not specs and self._modules():
            cause = "it selects modules, and .shard(axis=...) is for tensors"
            return sch._wrong(Problem(self._pattern(), cause, f'Name the tensor: .shard("weight", axis={axis})'))
        return sch._split("shard", specs, axis, mesh_axis)

    def sync(
        self, when: When, op: SyncOp | Callable[..., object], axis: int | None = None, *, mesh_axis: MeshAxis = "tensor"
    ) -> Schedule:
        """Send a module's input or output through a collective operator, with its own autograd formula.

        The first floating-point tensor among the arguments, or of the result, is meant. What each does on the way forward
        and to the gradient stands in ``functional/sync.py``. A gather before a module (``forward_pre``) sums its gradient:
        it is for modules of which each rank holds another part. Where the next module is whole on every rank, gather after
        the one before it (``forward_post``).

        Args:
            when: ``forward_pre`` (the input), ``forward_post`` (the output), or ``backward_post`` (the gradient of the
                input).
            op: ``all_reduce``, ``all_gather``, ``reduce_scatter``, or a function ``(tensor, group) -> tensor``.
            axis: Axis of the activation that is gathered or scattered, negative from the end.
            mesh_axis: Mesh axis along which it communicates.
        """
        sch = self._or_unmatched(modules=True)
        if problem := wrong_sync(self._pattern(), when, op, axis, mesh_axis):
            return sch._wrong(problem)
        if callable(op):
            name, callables = register(self.runtime.callables, op)
            sch = evolve(sch, runtime=evolve(self.runtime, callables=callables))
        else:
            name = op
        return sch._with_syncs(self._modules(), when, name, axis, mesh_axis)

    def colwise(self, *, gather_output: bool = False) -> Schedule:
        """Split the outputs of ``nn.Linear``: each rank computes some of the output features from the whole input.

        In verbs: ``.shard("weight", axis=0)``, ``.shard("bias", axis=0)``, ``.sync("backward_post", "all_reduce")``,
        ``.set(out_features=...)``, and with ``gather_output`` also ``.sync("forward_post", "all_gather", axis=-1)``.
        """
        sch, linears = self._of_kind(nn.Linear, "colwise", '.shard("weight", axis=...) and .sync(...)')
        biased = [module for module in linears if join(module.path, "bias") in self.tree]
        sch = sch._split_named("colwise", linears, "weight", 0)._split_named("colwise", biased, "bias", 0)
        sch = sch._with_syncs(linears, "backward_post", "all_reduce")._with_local(linears, "out_features")
        return sch._with_syncs(linears, "forward_post", "all_gather", -1) if gather_output else sch

    def rowwise(self) -> Schedule:
        """Split the inputs of ``nn.Linear``: each rank sums over some of the input features, then all ranks sum.

        In verbs: ``.shard("weight", axis=1)``, ``.sync("forward_post", "all_reduce")``, ``.set(in_features=...)``. A bias
        is added once, after the sum.
        """
        sch, linears = self._of_kind(nn.Linear, "rowwise", '.shard("weight", axis=...) and .sync(...)')
        sch = sch._split_named("rowwise", linears, "weight", 1)
        return sch._with_syncs(linears, "forward_post", "all_reduce")._with_local(linears, "in_features")

    def vocab_parallel(self) -> Schedule:
        """Split the rows of ``nn.Embedding``: each rank looks up its own, and all ranks sum.

        In verbs: ``.shard("weight", axis=0)``, rows of others give zeros, ``.sync("forward_post", "all_reduce")``,
        ``.set(num_embeddings=...)``.
        """
        sch, embeddings = self._of_kind(nn.Embedding, "vocab_parallel", ".colwise() for a head")
        for module in embeddings:
            if problem := wrong_embedding(module, self._module(module)):
                sch = sch._wrong(problem)
        sch = sch._split_named("vocab_parallel", embeddings, "weight", 0)
        sch = sch._with_layout(VocabParallel(module.path) for module in embeddings)
        return sch._with_syncs(embeddings, "forward_post", "all_reduce")._with_local(embeddings, "num_embeddings")

    def cut_pipeline_stage(self) -> Schedule:
        """End a pipeline stage after each selected module; there is one stage more than cuts."""
        sch = self._or_unmatched(modules=True)
        paths = [module.path for module in self._modules()]
        if "" in paths:
            cause = "it is the model itself, and nothing comes after it"
            return sch._wrong(Problem(self._pattern(), cause, "Cut a module inside it"))
        return evolve(sch, cuts=tuple(dict.fromkeys((*self.cuts, *paths))))

    def leaf(self) -> Schedule:
        """Let modules run as they are, as one operation of their stage: their code is not exported, and not cut."""
        sch = self._or_unmatched(modules=True)
        paths = [module.path for module in self._modules()]
        if "" in paths:
            cause = "it is the model itself, and a leaf is one operation of one stage"
            return sch._wrong(Problem(self._pattern(), cause, "Mark the module that cannot be exported"))
        return evolve(sch, leaves=tuple(dict.fromkeys((*self.leaves, *paths))))

    def cut_evenly(self, num_stages: int, by: By = "parameters") -> Schedule:
        """Cut the longest chain of repeated modules so that the stages weigh alike, embeddings and head counted.

        Args:
            num_stages: How many stages.
            by: ``parameters`` (their elements) or ``flops`` (of a forward pass on the example inputs).
        """
        if problem := wrong_even(num_stages, by):
            return self._wrong(problem)
        return evolve(self, even=Even(num_stages, by))

    def with_stages(self, stages: Sequence[nn.Module]) -> Schedule:
        """Hand over the stages: modules of the model that are called one after another; nothing is exported.

        Args:
            stages: One module a stage. The first is called with the example inputs, each other one with what the one before
                gave: a tensor, or a tuple of tensors.
        """
        names = {id(self._module(module)): module.path for module in self.modules}
        if problem := wrong_handed(stages, names):
            return self._wrong(problem)
        paths = [names[id(stage)] for stage in stages]
        return evolve(self, handed=tuple((path,) for path in paths))

    # -- selection

    def _pattern(self) -> str:
        if self.pattern is None:
            msg = "a verb needs a selection: sch.at[pattern].verb(...)"
            raise ValueError(msg)
        return self.pattern

    def _modules(self) -> tuple[ModuleSpec, ...]:
        if self._is_known_wrong():
            return ()
        matches = compile_pattern(self._pattern()).fullmatch
        return tuple(m for m in self.modules if any(map(matches, (m.path, *m.aliases))))

    def _tensors(self) -> tuple[ParamSpec, ...]:
        return () if self._is_known_wrong() else self.tree.select(self._pattern())

    def _is_known_wrong(self) -> bool:
        """Whether the pattern itself is a problem already: it selects nothing, and nothing more is said of it."""
        return any(problem.path == self._pattern() and not self._is_path(problem.path) for problem in self.problems)

    def _is_path(self, pattern: str) -> bool:
        return pattern in self.tree or any(pattern in (m.path, *m.aliases) for m in self.modules)

    def _tensors_below(self) -> Iterator[ParamSpec]:
        prefixes = tuple(f"{m.path}." if m.path else "" for m in self._modules())
        chosen = {spec.path for spec in self._tensors()}
        return (
            s for s in self.tree.values() if s.path in chosen or any(p.startswith(prefixes) for p in s.paths if prefixes)
        )

    def _module(self, module: ModuleSpec) -> nn.Module:
        return self.runtime.model.get_submodule(module.path)

    def _of_kind(self, kind: type[nn.Module], verb: str, instead: str) -> tuple[Schedule, list[ModuleSpec]]:
        """Return the selected modules of a class, and the schedule with a problem for each other one."""
        sch, found = self._or_unmatched(modules=True), []
        for module in self._modules():
            if isinstance(self._module(module), kind):
                found.append(module)
            else:
                cause = f".{verb}() is for nn.{kind.__name__}, and this is a {module.type.partition(':')[2]}"
                sch = sch._wrong(Problem(module.path, cause, f"Spell it out: {instead}"))
        return sch, found

    # -- edits

    def _wrong(self, problem: Problem) -> Schedule:
        return evolve(self, problems=(*self.problems, problem))

    def _or_unmatched(self, *, modules: bool = False) -> Schedule:
        """Return the schedule, with a problem if the pattern selects nothing that the verb is for."""
        pattern = self._pattern()
        if self._is_known_wrong() or self._modules() or (not modules and self._tensors()):
            return self
        if modules and self._tensors():
            return self._wrong(
                Problem(pattern, "it selects tensors, and this verb is for modules", "Drop the tensor's name")
            )
        near = closest(pattern, [*(m.path for m in self.modules), *self.tree.all_paths])
        fix = f"The closest are {', '.join(near)}" if near else "print(model) shows its paths"
        return self._wrong(Problem(pattern, "no module and no tensor has a path like this", fix))

    def _with_layout(self, steps: Iterable[LayoutStep]) -> Schedule:
        """Add steps; one that is there already says nothing new."""
        return evolve(self, layout=tuple(dict.fromkeys((*self.layout, *steps))))

    def _edit(self, verb: str, specs: Iterable[ParamSpec], change: Callable[[ParamSpec], ParamSpec]) -> Schedule:
        origin = Origin(verb, self._pattern(), caller())
        changed = {s.path: change(s if s.origin else evolve(s, origin=origin)) for s in specs}
        sch = self._or_unmatched()
        if not changed and sch is self and not self._is_known_wrong():
            sch = sch._wrong(
                Problem(self._pattern(), f"no tensor is there for .{verb}()", "Select a module that holds some")
            )
        return evolve(sch, tree=self.tree.replace(changed))

    def _with_syncs(
        self, modules: Iterable[ModuleSpec], when: When, op: str, axis: int | None = None, mesh_axis: MeshAxis = "tensor"
    ) -> Schedule:
        return self._with_layout(Sync(module.path, when, op, axis, mesh_axis) for module in modules)

    def _with_local(self, modules: Iterable[ModuleSpec], attribute: str) -> Schedule:
        """Set an attribute that holds a size to the size on one rank."""
        return self._with_layout(
            SetAttributes(module.path, {attribute: getattr(self._module(module), attribute) // self.mesh.tensor})
            for module in modules
        )

    def _split_named(
        self, verb: str, modules: Iterable[ModuleSpec], name: str, axis: int, mesh_axis: MeshAxis = "tensor"
    ) -> Schedule:
        sch, specs = self, []
        for module in modules:
            if (path := join(module.path, name)) in self.tree:
                specs.append(self.tree[path])
            else:
                near = [spec.path.rpartition(".")[2] for spec in self.tree.values() if spec.module == module.path]
                fix = f"It holds {', '.join(near)}" if near else "It holds no tensors itself; its submodules do"
                sch = sch._wrong(Problem(module.path, f"it has no tensor {name!r}", fix))
        return sch._split(verb, dict.fromkeys(specs), axis, mesh_axis)

    def _split(self, verb: str, specs: Iterable[ParamSpec], axis: int, mesh_axis: MeshAxis) -> Schedule:
        origin = Origin(verb, self._pattern(), caller())
        outcomes = {spec.path: sharded(spec, axis, mesh_axis, origin) for spec in specs}
        problems = (outcome for outcome in outcomes.values() if isinstance(outcome, Problem))
        changed = {path: outcome for path, outcome in outcomes.items() if isinstance(outcome, ParamSpec)}
        return evolve(self, tree=self.tree.replace(changed), problems=(*self.problems, *problems))
