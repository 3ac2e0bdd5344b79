"""A small configuration of the same structure as a large one: made by the fields' names, then built and tried."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, frozen
from torch import nn

from ....specs.errors import PlanError, Problem
from ...model.config_fields import Changes, Field, changed, read_fields
from ..model_inputs import why_no_inputs
from ..transformers_models import model_classes
from .layers import Kept, layer_changes, layers_from_the_start, layers_of_each_kind, stacks, without_numbers
from .sizes import small_counts
from .widths import Sections, small_widths

if TYPE_CHECKING:
    from ....specs.mesh import Mesh

_log = logging.getLogger(__name__)

_ROUNDER = (1, 4, 16)
"""Powers of two that numbers keep beside those of the mesh, one after another, as code may ask for them."""


def shrink_config(config: Any, mesh: Mesh) -> Any:
    """Return a small configuration of the same structure: for a model that a laptop runs, split as the large one is split.

    Two layers of each kind are kept (dense and sparse, with sliding and full attention, of attention and of state space).
    Heads, key and value heads, groups and experts become few, and ranks divide them and widths exactly where they divided
    the large numbers. Equal widths stay equal, different ones different, and the width of all heads together stays the
    width of the model, or another one. The model has the same kinds of tensors and the same ties.

    What names do not tell is tried: if the model does not build, has other tensors, or does not run with made inputs,
    some fields keep their values, which the log says.

    Args:
        config: The configuration of a transformers model; it stays as it is.
        mesh: The ranks that the model is to be split over.

    Raises:
        PlanError: If the configuration builds no model, or none with fewer layers; the error names the fields.

    >>> from transformers import LlamaConfig
    >>> from shardplan.specs import Mesh
    >>> small = shrink_config(LlamaConfig(num_key_value_heads=8), Mesh(tensor=4))
    >>> small.num_hidden_layers, small.hidden_size, small.num_attention_heads, small.num_key_value_heads, small.vocab_size
    (2, 64, 8, 4, 72)
    """
    few = _with_fewer_layers(_Trial.of(config))
    return changed(few.config, _small(evolve(few, also_runs=True), mesh))


def _small(trial: _Trial, mesh: Mesh) -> Changes:
    """Return small values of as many fields as can be: of all, of all with rounder numbers, or of some."""
    sizes: dict[str, dict[Field, Any]] = {}
    everything: dict[Field, Any] = {}
    for times in _ROUNDER:
        sizes = _sizes(trial, evolve(mesh, tensor=mesh.tensor * times))
        everything = {of: value for changes in sizes.values() for of, value in changes.items()}
        if not trial.fails(everything):
            return everything
    if trial.also_runs and trial.fails({}):  # it does not run with made inputs, however large it is
        return _small(evolve(trial, also_runs=False), mesh)
    chosen = next((some for some in _parts(sizes, trial.fields) if not trial.fails(some)), {})
    left = [(of, value) for of, value in everything.items() if of not in chosen]
    chosen = {**chosen, **trial.added(chosen, left)}
    kept = ", ".join(str(of) for of in everything if of not in chosen)
    _log.warning("these fields keep their values, as with smaller ones the model does not run: %s", kept)
    return chosen


def _sizes(trial: _Trial, mesh: Mesh) -> dict[str, dict[Field, Any]]:
    """Return new values of fields by what they count, where they are other than before."""
    sizes = small_counts(trial.fields, mesh) | small_widths(trial.fields, mesh, trial.sections)
    return {what: {of: value for of, value in changes.items() if value != of.value} for what, changes in sizes.items()}


def _with_fewer_layers(large: _Trial) -> _Trial:
    """Return a model with two layers of each kind; with all layers up to these, or up to one of each kind."""
    causes: list[str] = []
    fields, model = large.fields, large.model
    for kept in (
        layers_of_each_kind(fields, model),
        layers_from_the_start(fields, model),
        layers_from_the_start(fields, model, num=1),
    ):
        layers = layer_changes(fields, kept)
        few = evolve(large, kept=kept)
        if not (cause := few.fails(layers)):
            config = changed(large.config, layers)
            return evolve(few, config=config, fields=list(read_fields(config)))
        causes.append(f"with {', '.join(f'{of} {value}' for of, value in layers.items())} {cause}")
    raise PlanError([Problem(type(large.config).__name__, causes[0], "Give a configuration with fewer layers")])


def _parts(sizes: Mapping[str, Changes], fields: Sequence[Field]) -> Iterator[Changes]:
    """Iterate over parts of the changes: all but one kind, all but one configuration, all but several kinds."""
    everything = {of: value for changes in sizes.values() for of, value in changes.items()}
    for what in sizes:
        yield {of: value for of, value in everything.items() if of not in sizes[what]}
    for config in dict.fromkeys(of.config for of in fields if of.config):
        yield {of: value for of, value in everything.items() if of.config != config}
    kinds = list(sizes)
    for at in range(2, len(kinds)):
        yield {of: value for what in kinds[at:] for of, value in sizes[what].items()}


@frozen(eq=False)
class _Trial:
    """A large model, and what a small one has in common with it.

    Args:
        config: The configuration that is changed.
        fields: Its fields.
        model: The large model, on the meta device.
        kept: The layers that a small model has; empty if that is not looked at.
        sections: Parts of its rotary embeddings in several dimensions.
        also_runs: Whether a small model also has to run with made inputs.
    """

    config: Any
    fields: Sequence[Field]
    model: nn.Module
    kept: Kept
    sections: Sections
    also_runs: bool = False

    @classmethod
    def of(cls, config: Any) -> _Trial:
        """Return the model of a configuration.

        Raises:
            PlanError: If it builds no model.
        """
        causes: list[str] = []
        for kind in model_classes(config):
            try:
                own = copy.deepcopy(config)  # constructors write to their configuration
                model = _built(kind, own)
                return cls(config, list(read_fields(config)), model, {}, _sections(own, model))
            except Exception as error:  # noqa: BLE001  a constructor may raise anything; the next class is tried
                causes.append(f"{kind.__name__} raises {type(error).__name__}: {error}")
        cause = f"it builds no model: {'; '.join(causes) or 'transformers has none for it'}"
        raise PlanError([Problem(type(config).__name__, cause)])

    def fails(self, changes: Changes) -> str:
        """Return why a small model will not do, empty if it will."""
        try:
            small = _built(type(self.model), changed(self.config, changes))
        except Exception as error:  # noqa: BLE001  a constructor may raise anything
            return f"{type(error).__name__}: {error}"
        if other := _tensors(self.model) ^ _tensors(small):
            return f"{', '.join(sorted(map(' tied to '.join, map(sorted, other)))[:3])} are in one of the models alone"
        before = stacks(self.model)
        for path, layers in stacks(small).items():
            kept = self.kept.get(len(before.get(path, ())), ())
            if len(layers) == len(kept) and layers != [before[path][at] for at in kept]:
                return f"layers of {path} are of another kind"
        return why_no_inputs(small) if self.also_runs else ""

    def added(self, chosen: Changes, left: Sequence[tuple[Field, Any]]) -> Changes:
        """Return further changes with which the model will do, found by halving."""
        if not left or not self.fails({**chosen, **dict(left)}):
            return dict(left)
        if len(left) == 1:
            return {}
        first = self.added(chosen, left[: len(left) // 2])
        return {**first, **self.added({**chosen, **first}, left[len(left) // 2 :])}


def _built(kind: type[nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"):
        return kind(config)


def _sections(config: Any, model: nn.Module) -> Sections:
    """Return the parts of rotary embeddings in several dimensions, which code may know without a field."""
    configs = {id(inner): path for path, inner in _configurations(config)}
    found: dict[tuple[str, ...], Sequence[int]] = {}
    for module in model.modules():
        parts, own = getattr(module, "mrope_section", None), getattr(module, "config", None)
        if isinstance(parts, (list, tuple)) and parts and id(own) in configs:
            turned = getattr(module, "inv_freq", torch.empty(sum(parts), device="meta")).numel()
            scaled = [part * turned // sum(parts) for part in parts]
            found[configs[id(own)]] = [*scaled[:-1], turned - sum(scaled[:-1])]
    return found


def _configurations(config: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield above, config
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):
            yield from _configurations(value, (*above, name))


def _tensors(model: nn.Module) -> frozenset[frozenset[str]]:
    """Return the names of each tensor, several if it is tied, without the numbers of layers."""
    names: dict[int, set[str]] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        names.setdefault(id(tensor), set()).add(without_numbers(name))
    return frozenset(map(frozenset, names.values()))
