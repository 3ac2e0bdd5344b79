"""Every rule of an operator, tried on numbers."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from attrs import evolve

from shardplan.functional.types.relation import Joined, Relation, RepeatedEach, Reshaped, Taken, Tiled
from shardplan.functional.types.rules import RULES, rule_of

from ...helpers.operator_calls import Sample, dispatched, sample, undispatched
from ...helpers.operator_samples import own_samples
from ...helpers.rule_checks import check, label_sizes

ONLY_ON_GPU = {
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_fused_attention_overrideable",
}
GIVES_NOTHING = {"_assert_async"}

WITHOUT_RULE = """
    masked_select nonzero nonzero_static _unique2 unique_consecutive unique_dim _local_scalar_dense equal allclose histogram
    _histogramdd_bin_edges _histogramdd_from_bin_cts _histogramdd_from_bin_tensors _to_sparse hash_tensor resize_ resize_as_
    _chunk_cat block_diag rot90 put index_reduce renorm embedding_renorm_ linspace logspace segment_reduce
    linalg_lu_solve linalg_ldl_solve linalg_ldl_factor_ex linalg_lstsq linalg_householder_product
    lu_unpack ormqr geqrf cholesky cholesky_inverse _linalg_check_errors fractional_max_pool2d fractional_max_pool3d
    max_unpool2d max_unpool3d _embedding_bag_forward_only _pdist_forward _ctc_loss multi_margin_loss
    multilabel_margin_loss_forward _unsafe_masked_index _unsafe_masked_index_put_accumulate
    torch_nn::_linear_cross_entropy_batch_chunked torch_nn::_linear_cross_entropy_batch_chunked_no_reduction
    _softmax_backward_data max_pool2d_with_indices_backward unfold_backward
"""
"""Sizes that depend on values, memory rather than axes, operators that no model uses on parts, backward passes."""


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [*own_samples(), *dispatched()]
        seen = {met.name.removesuffix("_") for met in found}
        return [*found, *undispatched({name for name in RULES if name not in seen})]


def test_what_rules_say_is_so(samples):
    wrong: list[str] = []
    num_tried: Counter[str] = Counter()
    for met in samples:
        rule = rule_of(met.call)
        if rule is None:
            continue
        try:
            num_tried[met.name] += check(met, rule)
        except (AssertionError, RuntimeError, IndexError) as error:
            wrong.append(f"{met.call}: {rule}: {error}")
    assert wrong == []
    assert num_tried.total() > 8000


def test_every_rule_is_tried(samples):
    seen = {met.name for met in samples}
    untried = {name for name in RULES if not {name, f"{name}_"} & seen}
    assert untried == ONLY_ON_GPU | GIVES_NOTHING


def test_operators_without_a_rule_are_listed(samples):
    having = {met.name for met in samples if rule_of(met.call) is not None}
    assert {met.name for met in samples} - having == set(WITHOUT_RULE.split())


def test_rules_are_of_operators_that_there_are():
    of_torch = [name for name in RULES if "::" not in name]  # others have a sample
    assert [name for name in of_torch if not hasattr(torch.ops.aten, name) and not hasattr(torch.ops.aten, f"{name}_")] == []


def test_fused_attention_on_gpus_has_the_same_axes():
    query = torch.empty(2, 6, 4, 8, device="meta", dtype=torch.float16)
    for name in sorted(ONLY_ON_GPU):
        operator = getattr(torch.ops.aten, name).default
        more = (None, True) if "compute_log_sumexp" in str(operator._schema) else ()
        met = sample(operator, query, query, query, *more)
        rule = rule_of(met.call)
        assert isinstance(rule, Relation)
        assert label_sizes(met, rule)["batch1"] == 6


X = torch.randn(4, 6, dtype=torch.float64)
aten = torch.ops.aten

MUTANTS = {
    "softmax over parts": (sample(aten._softmax.default, X, -1, False), {"whole": {}}),
    "cumsum along parts": (sample(aten.cumsum.default, X, 1), {"whole": {}}),
    "topk of parts": (sample(aten.topk.default, X, 2), {"whole": {}, "results": (("x0", "x1"),) * 2}),
    "a norm of parts": (sample(aten.batch_norm.default, X, *[None] * 4, True, 0.1, 1e-5, False), {"whole": {}}),
    "flipped parts": (sample(aten.flip.default, X, [1]), {"whole": {}}),
    "a triangle of parts": (sample(aten.tril.default, X), {"whole": {}}),
    "keys in parts": (
        sample(aten.scaled_dot_product_attention.default, X, X + 1, X.exp()),
        {"whole": {}},
    ),
    "rows in parts": (sample(aten.gather.default, X, 1, torch.zeros(4, 2, dtype=torch.int64)), {"whole": {}}),
    "a mean is a sum": (sample(aten.mean.dim, X, [1]), {"averaged": set(), "summed": {"x1"}}),
    "a sum is a mean": (sample(aten.sum.dim_IntList, X, [1]), {"summed": set(), "averaged": {"x1"}}),
    "gelu is linear": (sample(aten.gelu.default, X), {"linear": ({0},)}),
    "adding a number is linear": (sample(aten.add.Scalar, X, 1.0), {"linear": ({0},)}),
    "a sum is linear in each": (sample(aten.add.Tensor, X, X + 1), {"linear": ({0}, {1})}),
    "a product is linear in both": (sample(aten.mul.Tensor, X, X + 1), {"linear": ({0, 1},)}),
    "a bias is added on each rank": (
        sample(aten.addmm.default, X[0], X, torch.randn(6, 6).double()),
        {"linear": ({1}, {2})},
    ),
    "a cast to integers is linear": (sample(aten._to_copy.default, X, dtype=torch.int64), {"linear": ({0},)}),
    "axes swapped": (sample(aten.t.default, X), {"results": (("x0", "x1"),)}),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_relation_is_found(mutant):
    met, changed = MUTANTS[mutant]
    rule = rule_of(met.call)
    assert isinstance(rule, Relation)
    assert check(met, rule)
    with pytest.raises(AssertionError):
        check(met, evolve(rule, **changed))


@pytest.mark.parametrize(
    ("met", "wrong"),
    [
        (sample(aten.slice.Tensor, X, 1, 1, 4), Taken(1, ((0, 3),))),
        (sample(aten.split.Tensor, X, 3, 1), Taken(1, ((3, 6), (0, 3)))),
        (sample(aten.cat.default, [X, X + 1], 0), Joined(1)),
        (sample(aten.repeat.default, X, [1, 2]), RepeatedEach(1, 2)),
        (sample(aten.repeat_interleave.self_int, X, 2, 1), Tiled((1, 2))),
        (sample(aten.t.default, X), Reshaped()),
    ],
)
def test_a_wrong_move_is_found(met, wrong):
    rule = rule_of(met.call)
    assert rule is not None
    assert check(met, rule)
    with pytest.raises((AssertionError, ValueError)):
        check(met, wrong)
