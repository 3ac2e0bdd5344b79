"""The rules beside those of torch's DTensor: operators on which they differ, and why."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._op_schema import OpSchema
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardplan.functional.types.relation import Label, Relation
from shardplan.functional.types.rules import rule_of

from ...helpers.operator_calls import Sample, dispatched, each_tensor
from ...helpers.operator_samples import own_samples
from ...helpers.rule_checks import adding, label_sizes

pytestmark = pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="another torch has other rules")

Placements = tuple[Any, ...]

DTENSOR_TAKES_PARTS = {
    "it has partial maxima, products and norms beside sums": "max min prod linalg_vector_norm",
    "it takes a reduction over no named axes, which is over all of them, for one over none": "amax",
    "counts that add up, of which no model has parts": "any bucketize",
    "it takes a mean over those that are not ignored for one over all: other ranks ignore others": "nll_loss_forward",
    "the same with places": "nll_loss2d_forward",
}
"""Where DTensor works on parts of an axis that our rule wants whole."""

DTENSOR_TAKES_SUMMANDS = {
    "they are linear, and no model has summands there": "_linalg_solve_ex linalg_solve_triangular special_xlog1py",
    "it drops what is not read: the summand of a tensor that only gives its size": "rand_like randint_like randn_like",
    "it takes the number for a summand where it is none, or drops the summand": "fill linalg_pinv",
    "it sums bools, and skips numbers that are none, as if that were linear": "any sum nansum",
}
"""Where DTensor takes a summand, and our rule says that the operator is not linear."""

DTENSOR_GATHERS_PARTS = {
    "it knows no parts of samples or channels there": "_linalg_svd _native_batch_norm_legit_no_training convolution",
    "nor of images that are read at places": "grid_sampler_2d grid_sampler_3d",
    "it wants all axes of tensors whose entries are moved within some": "diag_embed diagonal squeeze tril view_as_real",
    "it takes means of parts of one size only: here the sizes differ": "mean",
    "it knows no sums over entries that are written by number": "index_put scatter_add",
}
"""Where DTensor communicates, and our rule says that parts will do: tried on numbers, as every rule."""

DTENSOR_SUMS_FIRST = {
    "it lists fewer linear operators: sums": "add addcdiv addcmul lerp mean cumsum",
    "and products": "mul dot linalg_cross deg2rad rad2deg",
    "a power of one": "pow",
    "copies, and choices by a mask that all ranks have": "clone copy masked_fill where tril triu",
    "entries that are picked or written by number": "embedding gather index_fill scatter scatter_add",
    "views and writes to views": "diag_embed diagonal diagonal_copy diagonal_scatter select_scatter slice_scatter squeeze",
    "convolutions in their kernel": "convolution",
}
"""Where DTensor adds summands up, and our rule says that the operator is linear: tried on numbers, as every rule."""

OTHER_RESULTS = {
    "it calls results without entries parts": "_native_batch_norm_legit_no_training",
}
"""Where both work on parts, but not to the same result."""


@pytest.fixture(scope="module")
def differences() -> Iterator[dict[str, set[str]]]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield _differences(_few([*own_samples(), *dispatched(4, 2)]), mesh)
    finally:
        dist.destroy_process_group()


def _few(samples: Iterable[Sample], most: int = 3) -> Iterator[Sample]:
    """Iterate over samples of operators for which DTensor has a rule."""
    rules = DTensor._op_dispatcher.sharding_propagator
    seen: Counter[str] = Counter()
    for met in samples:
        seen[met.name] += 1
        has_rule = met.operator in rules.op_strategy_funcs or met.operator in rules.op_single_dim_strategy_funcs
        if has_rule and seen[met.name] <= most:
            yield met


def _differences(samples: Iterable[Sample], mesh: Any) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for met in samples:
        rule = rule_of(met.call)
        if not isinstance(rule, Relation) or met.name == "_grouped_mm":  # which runs on fake tensors in bfloat16 only
            continue
        for given, expected in _questions(met, rule):
            answer = _ask(met, given, mesh)
            are_summands = not any(isinstance(placement, Shard) for placement in given)
            if answer == "unknown":
                found["unknown"].add(met.name)
            elif answer == expected:
                found["the same"].add(f"{met.name} {given}")
            elif expected is None:
                found["summands taken" if are_summands else "parts taken"].add(met.name.removesuffix("_"))
            elif answer is None:
                found["summands refused" if are_summands else "parts refused"].add(met.name.removesuffix("_"))
            else:
                found["other results"].add(met.name.removesuffix("_"))
    return found


def _questions(met: Sample, rule: Relation) -> Iterator[tuple[Placements, Placements | None]]:
    """Iterate over placements of the operands, and of the results; None where our rule refuses."""
    operands = met.operands
    for label, size in label_sizes(met, rule).items():
        once = all(labels.count(label) <= 1 for labels in rule.operands)
        if size > 1 and once and any(label in labels for labels in rule.operands):
            parts = [_shard(label, labels, operand) for operand, labels in zip(operands, rule.operands, strict=True)]
            for summands in adding(rule, label):
                given = tuple(Partial() if number in summands else part for number, part in enumerate(parts))
                yield given, None if label in rule.whole else tuple(_result(label, rule, labels) for labels in rule.results)
    for group in {*rule.linear, *(frozenset({number}) for number in range(len(operands)))}:
        if all(operands[number].is_floating_point() for number in group):
            given = tuple(Partial() if number in group else Replicate() for number in range(len(operands)))
            yield given, (Partial(),) * len(rule.results) if group in rule.linear else None


def _shard(label: Label, labels: Sequence[Label], operand: torch.Tensor) -> Any:
    is_split = label in labels and operand.shape[labels.index(label)] > 1
    return Shard(labels.index(label)) if is_split else Replicate()


def _result(label: Label, rule: Relation, labels: Sequence[Label]) -> Any:
    if label in rule.summed | rule.averaged:
        return Partial("sum" if label in rule.summed else "avg")
    return Shard(labels.index(label)) if label in labels else Replicate()


def _ask(met: Sample, given: Placements, mesh: Any) -> Placements | str | None:
    """Return what DTensor makes of operands as they are placed; None if it would have to communicate."""
    placed = iter(given)
    named = each_tensor(
        met.arguments,
        lambda tensor: DTensorSpec(mesh, (next(placed),), TensorMeta(tensor.shape, tensor.stride(), tensor.dtype)),
    )
    schema = met.operator._schema.arguments
    args = tuple(named[argument.name] for argument in schema if not argument.kwarg_only)
    kwargs = {argument.name: named[argument.name] for argument in schema if argument.kwarg_only}
    rules = DTensor._op_dispatcher.sharding_propagator
    info = rules.op_to_schema_info.get(met.operator) or rules.op_to_schema_info_for_single_dim_strategy.get(met.operator)
    try:
        made = rules.propagate_op_sharding_non_cached(OpSchema(met.operator, args, kwargs, schema_info=info))
    except RuntimeError as error:
        return None if "in-place operations" in str(error) or "along the sharded" in str(error) else "unknown"
    except (NotImplementedError, ValueError, AssertionError, IndexError):
        return "unknown"
    if made.needs_redistribute:
        return None
    specs: Any = made.output_spec if isinstance(made.output_spec, (tuple, list)) else (made.output_spec,)
    return tuple(spec.placements[0] for spec in specs if spec is not None)


def test_differences_are_explained(differences):
    assert differences["parts taken"] == _names(DTENSOR_TAKES_PARTS)
    assert differences["summands taken"] == _names(DTENSOR_TAKES_SUMMANDS)
    assert differences["parts refused"] == _names(DTENSOR_GATHERS_PARTS)
    assert differences["summands refused"] == _names(DTENSOR_SUMS_FIRST)
    assert differences["other results"] == _names(OTHER_RESULTS)


def _names(table: dict[str, str]) -> set[str]:
    return {name for names in table.values() for name in names.split()}


def test_most_rules_are_the_same(differences):
    assert len(differences["the same"]) > 1000
