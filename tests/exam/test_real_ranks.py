"""Real processes with gloo, each with its own parts, tell wrong entries from right ones without ``verify``."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from shardplan.functional import audit, create_schedule, execute, plan_build
from shardplan.specs import Mesh
from tests.exam.judge import all_entries
from tests.helpers.ranks import results, run_each
from tests.helpers.tensor_parts import picked

NUM = 50
"""Entries of each kind that are chosen, at least; pipelines are not judged, nor are plans that the audit refuses."""

TOLERANCE = 1e-5
"""Relative difference up to which values are equal: some modules compute in single precision."""

LEFT_OUT = (
    "dropout",
    "stochastic depth",
    "drawn by each rank",
    "the second rank does not join",
    "Qwen2-MoE",
    "kept in a buffer",
)
"""Parts of names of entries that are not judged: of masks, of ranks that wait for ever, of a kernel without doubles, and of
buffers."""


def test_real_ranks_tell_wrong_entries_from_right_ones():
    chosen = {num: _chosen(num) for num in (2, 4)}
    launches = [(num, ([entry.name for entry in entries],)) for num, entries in chosen.items()]
    found = zip(chosen.values(), run_each(_differ, launches, shared=_planned), strict=True)
    judged = [
        (entry, any(differ))
        for entries, outcomes in found
        for entry, *differ in zip(entries, *results(outcomes), strict=True)
        if None not in differ
    ]
    assert not [entry.name for entry, differs in judged if differs == entry.is_right]
    assert sum(differs for _, differs in judged) >= 40
    assert sum(not differs for _, differs in judged) >= 40


def _chosen(num_ranks):
    """Return some of the wrong entries and of the right ones for a number of ranks, without pipelines."""
    entries = [entry for entry in all_entries() if not any(part in entry.name for part in LEFT_OUT)]
    kinds = [[entry for entry in entries if entry.is_right is is_right] for is_right in (True, False)]
    schedules = [(entry, entry.make()[0]) for kind in kinds for entry in kind[:: len(kind) // NUM]]
    return [entry for entry, sch in schedules if sch.mesh.num_ranks == num_ranks and not sch.cuts and not sch.handed]


def _planned(names):
    """Return plans, whole models with random values, and inputs, which all ranks share; None for plans that are refused."""
    entries = {entry.name: entry for entry in all_entries()}
    return [_plan(*entries[name].make()) for name in names]


def _plan(sch, inputs):
    is_trusted = any(not trust.module for trust in sch.trusts)
    plan = plan_build(sch if is_trusted else sch.at[""].trust("real ranks judge it"))
    if not audit(plan).ok:
        return None
    whole = execute(plan_build(create_schedule(sch.runtime.model, Mesh())), device="cpu", progress=False).module.double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return plan, whole, {name: _doubled(value) for name, value in inputs.items()}


def _doubled(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _differ(rank, planned, names):
    """Tell for each entry whether this rank's output or gradients differ from those of the whole model; None if not run."""
    torch.set_default_dtype(torch.float64)
    return [None if shared is None else _differs(rank, *shared) for _, shared in zip(names, planned, strict=True)]


def _differs(rank, plan, whole, inputs):
    num, here = plan.mesh.data, plan.mesh.coordinate(rank)
    batches = [
        {name: value.chunk(num)[place] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        for place in range(num)
    ]
    local = execute(plan, device="cpu", progress=False).module.double()
    _fill(local, plan, here, whole)
    try:
        output, gradients = _run(local, batches[here.data])
    except (IndexError, RuntimeError):  # its sizes do not meet
        output, gradients = None, {}
    from_all = [None] * plan.mesh.num_ranks
    dist.all_gather_object(from_all, gradients)  # also by ranks that have failed
    if output is None:
        return True
    runs = [_run(whole, batch) for batch in batches]
    found = [_is_off(mine, theirs) for mine, theirs in zip(output, runs[here.data][0], strict=True)]
    for path, spec in plan.tree.items():
        if path in gradients:
            expected = sum(of_batch[path] for _, of_batch in runs) / num
            replicas = [from_all[other] for other in range(plan.mesh.num_ranks) if _is_replica(plan, spec, other, rank)]
            part = expected[picked(spec.index(here))]
            mine = sum(of_rank[path] for of_rank in replicas) / len(replicas)
            found.append(_is_off(mine[: len(part)] if part.dim() else mine, part))
            found.append(part.dim() > 0 and bool(mine[len(part) :].any()))  # padding stays zero
    return any(found)


def _fill(local, plan, here, whole):
    """Give a rank its parts of the whole model's tensors; padding is zero."""
    with torch.no_grad():
        for spec in plan.tree.values():
            for path in spec.paths:
                tensor, values = _tensor(local, path), _tensor(whole, path)
                part = values[picked(spec.index(here))] if values.dim() else values
                tensor.zero_()
                tensor[tuple(slice(size) for size in part.shape)] = part


def _tensor(module, path):
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _run(module, inputs):
    """Return the tensors of the output, and the gradients of a fixed linear function of them."""
    module.zero_grad()
    output = [leaf for leaf in tree_leaves(module(**inputs)) if isinstance(leaf, torch.Tensor)]
    generator = torch.Generator().manual_seed(3)
    loss = sum((tensor * torch.randn(tensor.shape, generator=generator)).sum() for tensor in output)
    if loss.requires_grad:
        loss.backward()
    trained = {path: parameter for path, parameter in module.named_parameters() if parameter.requires_grad}
    gradients = {path: torch.zeros_like(p) if p.grad is None else p.grad.clone() for path, p in trained.items()}
    return [tensor.detach() for tensor in output], gradients


def _is_replica(plan, spec, other, rank):
    """Tell whether a gradient is averaged over two ranks: both hold the tensor for different batches."""
    there, here = plan.mesh.coordinate(other), plan.mesh.coordinate(rank)
    if other == rank or spec.on("data") or spec.on("expert"):
        return other == rank
    return there.tensor == here.tensor


def _is_off(mine, whole):
    if mine.shape != whole.shape:
        return True
    return bool((mine - whole).double().norm() > TOLERANCE * whole.double().norm().clamp(min=1e-6))
