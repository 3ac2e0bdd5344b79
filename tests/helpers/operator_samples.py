"""Calls of operators of which torch has no samples, or none of the kind that models make."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .operator_calls import Sample, sample

aten = torch.ops.aten


def own_samples() -> Iterator[Sample]:
    """Iterate over calls of operators, written by hand."""
    for name, *args in (*_pointwise(), *_products(), *_shapes(), *_indexing(), *_others()):
        packet, _, overload = name.partition(".")
        kwargs: dict[str, Any] = args.pop() if args and isinstance(args[-1], dict) else {}
        yield sample(getattr(getattr(aten, packet), overload or "default"), *args, **kwargs)
    yield _grouped_by_transformers()
    yield from _convolutions()
    yield from _recurrent()


def _made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _ints(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))


X, ROW, COLUMN = _made(4, 6), _made(6, seed=1), _made(4, 1, seed=2)
IMAGE = _made(4, 6, 5, 5)
MASK = X > 0
COMPLEX = torch.complex(X, X + 1)


def _pointwise() -> list[Any]:
    both = ("multiply", "subtract", "divide", "greater", "greater_equal", "less", "less_equal", "not_equal")
    one = ("negative", "absolute", "log_sigmoid", "special_expit", "lift_fresh_copy", "contiguous", "alias", "detach")
    drawn = ("poisson", "bernoulli", "rand_like", "randn_like")
    return [
        *((f"{name}.Tensor", X, other) for name in both for other in (_made(4, 6, seed=3), ROW, COLUMN)),
        *((name, X) for name in one),
        *((name, X.abs()) for name in drawn if name != "bernoulli"),
        *((f"__{name}__.Tensor", MASK, COLUMN > 0) for name in ("and", "or", "xor", "iand", "ior", "ixor")),
        *((f"__{name}__.Tensor", _ints(9, 4, 6), _ints(3, 6)) for name in ("lshift", "rshift")),
        ("imag", COMPLEX),
        ("real", COMPLEX),
        ("add.Tensor", X, ROW, {"alpha": 2}),
        ("add_.Tensor", X, COLUMN),
        ("add.Scalar", X, 0),
        ("add.Scalar", X, 1.5),
        ("add.Tensor", X, torch.tensor(2.0, dtype=torch.float64)),
        ("rsub.Scalar", X, 1.0),
        ("mul_.Tensor", X, ROW),
        ("mul.Scalar", X, 3.0),
        ("div.Tensor_mode", X, ROW, {"rounding_mode": "floor"}),
        ("pow.Tensor_Scalar", X, 1),
        ("pow.Tensor_Scalar", X, 2),
        ("where.self", MASK, X, ROW),
        ("where.ScalarOther", MASK, X, 0.0),
        ("where.ScalarOther", MASK, X, 1.0),
        ("where.ScalarSelf", MASK, 0.0, X),
        ("where.Scalar", MASK, 0.0, 1.0),
        ("where", MASK),
        ("pow.Scalar", 2.0, X),
        ("div.Scalar_mode", X, 2.0, {"rounding_mode": "trunc"}),
        ("bernoulli.Tensor", X, X.abs().clamp(max=1)),
        ("masked_fill.Scalar", X, COLUMN > 0, 0.0),
        ("masked_fill_.Scalar", X, MASK, -1.0),
        ("masked_fill.Tensor", X, MASK, torch.tensor(2.0, dtype=torch.float64)),
        ("addcmul", X, ROW, COLUMN, {"value": 0.5}),
        ("addcdiv", X, ROW, COLUMN, {"value": 0.5}),
        ("lerp.Scalar", X, _made(4, 6, seed=3), 0.3),
        ("lerp.Tensor", X, _made(4, 6, seed=3), COLUMN),
        ("copy_", X, ROW),
        ("copy", X, COLUMN),
        ("fill_.Scalar", X, 0),
        ("fill_.Scalar", X, 1),
        ("fill_.Tensor", X, torch.tensor(2.0, dtype=torch.float64)),
        ("zero_", X),
        ("_to_copy", X, {"dtype": torch.float32}),
        ("_to_copy", X, {"dtype": torch.int64}),
        ("_to_copy", _ints(9, 4, 6), {"dtype": torch.float64}),
        ("to.dtype", X, torch.float32),
        ("to.other", X, _ints(9, 4, 6)),
        ("type_as", X, _ints(9, 4, 6)),
        ("dropout", X, 0.5, True),
        ("dropout", X, 0.5, False),
        ("native_dropout", X, 0.5, True),
        ("feature_dropout", X, 0.5, False),
        ("alpha_dropout", X, 0.5, False),
        ("feature_alpha_dropout", X, 0.5, False),
        *((name, X) for name in ("uniform_", "normal_", "exponential_", "random_", "log_normal_", "cauchy_")),
        ("bernoulli_.float", X, 0.5),
        ("geometric_", X.abs(), 0.5),
        ("prelu", _made(3, 4, 5), _made(4)),
        ("prelu", _made(3, 4, 5), _made(1)),
        ("_prelu_kernel", _made(3, 4, 5), _made(4, 1)),
        *((name, [3, 4]) for name in ("zeros", "ones", "empty.memory_format")),
        ("full", [3, 4], 2.0),
        ("scalar_tensor", 2.0),
        ("empty_permuted", [3, 4], [1, 0]),
        ("empty_strided", [3, 4], [4, 1]),
        ("new_zeros", X, [3, 2]),
        ("_assert_tensor_metadata", X),
    ]


def _products() -> list[Any]:
    batch, other = _made(2, 4, 6), _made(2, 6, 3, seed=1)
    equations = (
        ("ij,jk->ik", X, _made(6, 3)),
        ("bij, bjk -> bik", batch, other),
        ("...ij,jk->...ik", _made(2, 3, 4, 6), _made(6, 3)),
        ("b...,b...->...", batch, _made(2, 4, 6, seed=1)),
        ("bhid,bhjd->bhij", _made(2, 3, 4, 5), _made(2, 3, 6, 5)),
        ("bhid,bjd->bhij", _made(2, 3, 4, 5), _made(2, 6, 5)),
        ("ii->i", _made(4, 4)),
        ("ii", _made(4, 4)),
        ("ij,j", X, ROW),
        ("ba,ca", X, _made(3, 6)),
        ("i,j,k->ijk", _made(2), _made(3), _made(4)),
        ("ij,ij->ij", X, COLUMN),
        ("...ij->...ji", batch),
        ("abc->ca", batch),
        ("i...,...->i...", _made(3, 4, 6), _made(1, 6)),
    )
    matmuls = (
        (ROW, ROW),
        (X, ROW),
        (ROW, _made(6, 3)),
        (X, _made(6, 3)),
        (batch, _made(6, 3)),
        (batch, ROW),
        (ROW, other),
        (X, other),
        (batch, other),
        (_made(5, 1, 4, 6), other),
        (_made(5, 2, 4, 6), _made(5, 1, 6, 3)),
    )
    offsets = torch.tensor([1, 3, 4], dtype=torch.int32)
    rows, matrices = _made(4, 48).float(), _made(3, 48, 24).float()
    return [
        *(("einsum", equation, list(operands)) for equation, *operands in equations),
        *(("matmul", *pair) for pair in matmuls),
        ("linear", batch, _made(3, 6), _made(3)),
        ("linear", batch, _made(3, 6)),
        ("linear", ROW, _made(3, 6), _made(3)),
        ("linear", batch, ROW),
        ("addmm", _made(3), X, _made(6, 3)),
        ("addmm", _made(4, 3), X, _made(6, 3), {"beta": 2, "alpha": 0.5}),
        ("addmm", _made(4, 1), X, _made(6, 3)),
        ("baddbmm", _made(2, 1, 3), batch, other),
        ("baddbmm", _made(3), batch, other),
        ("addbmm", _made(4, 3), batch, other),
        ("addmv", _made(4), X, ROW),
        ("inner", batch, X),
        ("inner", X, ROW),
        ("inner", X, torch.tensor(2.0, dtype=torch.float64)),
        ("tensordot", batch, other, [0, 2], [0, 1]),
        ("tensordot", batch, _made(6, 1), [2, 1], [0, 1]),
        ("outer", _made(4), ROW),
        ("addr", X, _made(4), ROW),
        ("bilinear", X, _made(4, 5), _made(3, 6, 5), _made(3)),
        ("cross", _made(4, 3), _made(4, 3, seed=1), -1),
        ("linalg_multi_dot", [X, _made(6, 3), _made(3, 5)]),
        ("vdot", ROW, _made(6)),
        ("_grouped_mm", rows, matrices, offsets),
        ("_grouped_mm", matrices.mT.contiguous(), _made(48, 16).float(), torch.tensor([1, 3, 16], dtype=torch.int32)),
        ("_grouped_mm", _made(24, 16).float(), _made(16, 24).float(), torch.tensor([8, 16], dtype=torch.int32)),
        ("_grouped_mm", _made(3, 4, 48).float(), matrices),
        ("cdist", X, _made(3, 6)),
        ("cdist", _made(2, 4, 6), _made(1, 3, 6)),
    ]


def _shapes() -> list[Any]:
    y = _made(4, 6, 8)
    return [
        ("view", y, [4, 48]),
        ("reshape", y.mT, [4, 2, 24]),
        ("_unsafe_view", y, [24, 8]),
        ("_reshape_alias", y, [24, 8], [8, 1]),
        ("view.dtype", y, torch.int64),
        ("flatten.using_ints", y, 1, 2),
        ("unflatten.int", y, 1, [2, 3]),
        ("view_as", y, _made(24, 8)),
        ("expand", COLUMN, [3, 4, 6]),
        ("expand_as", COLUMN, X),
        ("permute", y, [2, 0, -2]),
        ("movedim.intlist", y, [0, 1], [2, 0]),
        ("moveaxis.int", y, 0, -1),
        ("movedim.int", y, -1, 0),
        ("swapaxes", y, 0, 1),
        ("swapdims", y, -1, 1),
        ("numpy_T", y),
        ("mT", y),
        ("mH", COMPLEX),
        ("adjoint", COMPLEX),
        ("unsqueeze", y, -1),
        ("unsqueeze", y, 1),
        ("squeeze.dim", _made(4, 1, 6), 1),
        ("squeeze.dims", _made(4, 1, 6), [0, 1]),
        ("squeeze", _made(4, 1, 6)),
        ("slice.Tensor", y, 1, 2, 5),
        ("slice.Tensor", y, 1, -3, 9223372036854775807),
        ("slice.Tensor", y, -1, 0, 8, 2),
        ("slice_copy.Tensor", y, 1, 2, 5),
        ("narrow", y, 1, 2, 3),
        ("narrow", y, -1, -3, 2),
        ("split.Tensor", y, 4, 1),
        ("split_with_sizes", y, [1, 2, 3], 1),
        ("unsafe_split_with_sizes", y, [1, 5], 1),
        ("split_copy.Tensor", y, 4, 1),
        ("chunk", y, 4, 1),
        ("tensor_split.sections", y, 4, 1),
        ("tensor_split.indices", y, [2, 5], 1),
        ("tensor_split.indices", y, [5, 2], 1),
        ("select.int", y, 1, -2),
        ("select_copy.int", y, 1, 2),
        ("unbind.int", y, 1),
        ("cat", [y, _made(4, 2, 8)], 1),
        ("cat", [_made(0), y], -2),
        ("concat", [X, X], 1),
        ("concatenate", [X, X], 1),
        ("stack", [X, _made(4, 6)], -1),
        ("repeat", X, [2, 1, 3]),
        ("tile", X, [3]),
        ("repeat_interleave.self_int", X, 3, 1),
        ("repeat_interleave.self_int", ROW, 2),
        ("flip", y, [1]),
        ("roll", y, [2], [1]),
        ("roll", y, [2]),
        ("tril", y),
        ("triu", X, 1),
        ("constant_pad_nd", y, [1, 2, 0, 0]),
        ("constant_pad_nd", y, [0, 0, 1, 0], 2.0),
        ("pad", y, [0, 0, 1, 0], "constant", None),
        ("pad", y, [1, 1], "reflect"),
        ("unfold", y, 1, 3, 2),
        ("diagonal", y, 0, 0, 2),
        ("diag_embed", X),
        ("diag_embed", X, 0, 0, 1),
        ("view_as_complex", _made(4, 6, 2)),
        ("view_as_real", COMPLEX),
        ("view_as_complex_copy", _made(4, 6, 2)),
        ("view_as_real_copy", COMPLEX),
        ("native_channel_shuffle", IMAGE, 2),
        ("pixel_shuffle", _made(2, 8, 3, 3), 2),
        ("slice_scatter", y, _made(4, 2, 8), 1, 2, 4),
        ("select_scatter", y, _made(4, 8), 1, 2),
    ]


def _indexing() -> list[Any]:
    y, rows = _made(4, 6, 8), _ints(4, 3, 5)
    one, two = _ints(4, 7), _ints(6, 7)
    values = _made(7, 6, 8)
    return [
        ("embedding", X, rows),
        ("index.Tensor", y, [rows]),
        ("index.Tensor", y, [None, rows]),
        ("index.Tensor", y, [None, rows, _ints(8, 5)]),
        ("index.Tensor", y, [one, None, two]),
        ("index.Tensor", y, [one, two]),
        ("index.Tensor", y, [_ints(4, 3, 1), _ints(6, 1, 5)]),
        ("index.Tensor", y, [y[:, 0, 0] > 0]),
        ("index.Tensor", y, [y[..., 0] > 0]),
        ("index.Tensor", y, [None, y[0] > 0]),
        ("index.Tensor", y, [y[:, 0, 0] > -9, None, _ints(8, 4)]),
        ("index_put_", y, [y > 0], torch.tensor(2.0, dtype=torch.float64)),
        ("index_put", y, [y[..., 0] > 0], _made(1)),
        ("index_put", y, [None, y[0, :, 0] > -9], _made(6, 8)),
        ("_unsafe_index.Tensor", y, [None, rows]),
        ("index_put_", y, [one], values),
        ("index_put", y, [one], values, True),
        ("index_put", y, [one], _made(6, 1), True),
        ("index_put", y, [None, one], _made(4, 7, 8), True),
        ("index_put", y, [one, None, two], _made(7, 6), True),
        ("index_put", y, [one, two], _made(7, 1), True),
        ("_unsafe_index_put", y, [one], values),
        ("index_select", y, 1, two),
        ("index_add_", y, 0, one, values),
        ("index_add", y, 1, two, _made(4, 7, 8), {"alpha": 2}),
        ("index_copy", y, 0, torch.tensor([2, 0]), _made(2, 6, 8)),
        ("index_fill.int_Scalar", y, 1, two, 0),
        ("index_fill.int_Scalar", y, 1, two, 1),
        ("gather", y, 1, _ints(6, 4, 3, 8)),
        ("gather", y, 1, _ints(6, 4, 3, 5)),
        ("scatter.src", y, 1, _ints(6, 4, 3, 8), _made(4, 3, 8)),
        ("scatter.value", y, -1, _ints(8, 4, 6, 2), 0),
        ("scatter_.value", y, -1, _ints(8, 4, 6, 2), 1),
        ("scatter_add_", y, 1, _ints(6, 4, 9, 8), _made(4, 9, 8)),
        ("scatter_add", y, 1, _ints(6, 4, 3, 5), _made(4, 3, 8)),
        ("scatter_reduce.two", y, 1, _ints(6, 4, 9, 8), _made(4, 9, 8), "sum"),
        ("scatter_reduce.two", y, 1, _ints(6, 4, 9, 8), _made(4, 9, 8), "amax"),
        ("scatter_reduce.two", y, 1, _ints(6, 4, 9, 8), _made(4, 9, 8), "sum", {"include_self": False}),
        ("take_along_dim", y, _ints(6, 4, 3, 8), 1),
        ("take_along_dim", y, _ints(6, 1, 3, 1), 1),
        ("take_along_dim", y, _ints(100, 7)),
        ("take", y, _ints(100, 3, 4)),
        ("masked_scatter", X, MASK, _made(30)),
        ("one_hot", rows, 5),
        ("one_hot", rows),
        ("isin.Tensor_Tensor", rows, _ints(3, 2)),
        ("bucketize.Tensor", X, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)),
        ("searchsorted.Tensor", X.sort(-1).values, _made(4, 3)),
        ("searchsorted.Tensor", ROW.sort().values, _made(4, 3)),
        ("searchsorted.Scalar", ROW.sort().values, 0.5),
        ("bucketize.Scalar", 0.5, ROW.sort().values),
        ("isin.Tensor_Scalar", rows, 2),
        ("multinomial", X.abs(), 2),
    ]


_FLOATS = (None, torch.float32)
_CLASSES = ("cross_entropy_loss", "nll_loss", "nll_loss_nd")


def _others() -> list[Any]:
    query, key, value = _made(2, 6, 4, 8), _made(2, 6, 5, 8), _made(2, 6, 5, 3)
    few, mask = (_made(2, 3, 5, 8), _made(2, 3, 5, 3)), _made(2, 1, 4, 5)
    labels, scores = _ints(6, 4), _made(4, 6)
    norms = _made(6), _made(6), _made(6), _made(6).abs()
    losses = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "soft_margin_loss", "hinge_embedding_loss")
    sdpa = "scaled_dot_product_attention"
    return [
        (sdpa, query, key, value),
        (sdpa, query, key, value, mask),
        (sdpa, query, key, value, _made(4, 5)),
        (sdpa, query, _made(2, 6, 4, 8), _made(2, 6, 4, 3), {"is_causal": True}),
        (sdpa, query, *few, {"enable_gqa": True}),
        (sdpa, query, few[0][:, :1], few[1][:, :1], {"enable_gqa": True}),
        (sdpa, query[0], key[0], value[0]),
        (sdpa, query[0, 0], key[0, 0], value[0, 0]),
        ("_scaled_dot_product_flash_attention_for_cpu", query, key, _made(2, 6, 5, 8)),
        ("_scaled_dot_product_flash_attention_for_cpu", query, few[0], _made(2, 3, 5, 8), {"attn_mask": mask}),
        *((f"{name}.int", scores, -1) for name in ("softmax", "log_softmax")),
        *((name, scores, -1) for name in ("special_softmax", "special_log_softmax")),
        ("argsort", scores, 0),
        ("_is_all_true", MASK),
        ("_is_any_true", MASK),
        *((name, scores, [0], {"dtype": dtype}) for name in ("sum.dim_IntList", "mean.dim") for dtype in _FLOATS),
        ("sum.dim_IntList", scores * 9, [0], {"dtype": torch.int64}),
        ("sum.dim_IntList", MASK, [0], {"dtype": torch.bool}),
        ("sum", MASK),
        *(("cumsum", scores * 9, 0, {"dtype": dtype}) for dtype in (*_FLOATS, torch.int64)),
        ("batch_norm", IMAGE, *norms, True, 0.1, 1e-5, False),
        ("batch_norm", IMAGE, *norms, False, 0.1, 1e-5, False),
        ("batch_norm", IMAGE, *norms[:2], None, None, True, 0.1, 1e-5, False),
        ("_native_batch_norm_legit_no_training", IMAGE, *norms, 0.1, 1e-5),
        ("instance_norm", IMAGE, *norms[:2], None, None, True, 0.1, 1e-5, False),
        ("instance_norm", IMAGE, *norms, False, 0.1, 1e-5, False),
        ("group_norm", IMAGE, 3, *norms[:2]),
        ("_fused_rms_norm", scores, [6], norms[0], 1e-6),
        ("rms_norm", scores, [6], norms[0], 1e-6),
        ("layer_norm", _made(2, 4, 6), [4, 6], _made(4, 6), _made(4, 6)),
        ("_weight_norm_interface", scores, COLUMN, 0),
        ("_weight_norm_interface", scores, _made(1, 6), 1),
        *((name, scores, scores.sigmoid(), n) for name in losses for n in (0, 1, 2)),
        ("mse_loss", scores, ROW, 1),
        ("binary_cross_entropy", scores.sigmoid(), MASK.double(), None, 1),
        ("binary_cross_entropy_with_logits", scores, MASK.double(), ROW, None, 1),
        ("binary_cross_entropy_with_logits", scores, MASK.double(), None, ROW, 2),
        ("poisson_nll_loss", scores, scores.exp(), True, False, 1e-8, 1),
        *((name, scores, labels, norms[3], n) for name in _CLASSES for n in (0, 1, 2)),
        ("cross_entropy_loss", IMAGE, _ints(6, 4, 5, 5), None, 2),
        ("cross_entropy_loss", scores, scores.softmax(-1), None, 1),
        ("cross_entropy_loss", _made(6), torch.tensor(2), None, 1),
        *(("nll_loss_forward", scores, labels, norms[3], n, -100) for n in (0, 1, 2)),
        ("nll_loss_forward", _made(6), torch.tensor(2), None, 1, -100),
        *(("nll_loss2d_forward", IMAGE, _ints(6, 4, 5, 5), None, n, -100) for n in (0, 1, 2)),
        ("nll_loss2d", IMAGE, _ints(6, 4, 5, 5), None, 2),
        *((f"linalg_{name}", _made(3, 4, 4)) for name in ("det", "slogdet", "svd", "svdvals", "inv")),
        ("linalg_solve", _made(3, 4, 4), _made(3, 4, 2)),
        ("linalg_solve_triangular", _made(3, 4, 4), _made(3, 4, 2), {"upper": True}),
        ("linalg_cholesky", _made(3, 4, 4) @ _made(3, 4, 4).mT + torch.eye(4)),
        ("det", _made(3, 4, 4)),
        ("inverse", _made(3, 4, 4)),
        ("matrix_power", _made(3, 4, 4), 2),
        ("searchsorted.Tensor", X.sort(-1).values, _made(4, 3)),
        ("cosine_similarity", X, _made(1, 6), 1),
    ]


def _grouped_by_transformers() -> Sample:
    importlib.import_module("transformers.integrations.moe")  # which registers it
    offsets = torch.tensor([1, 3, 4], dtype=torch.int32)
    return sample(torch.ops.transformers.grouped_mm_fallback.default, _made(4, 6), _made(3, 6, 5), offsets)


def _convolutions() -> Iterator[Sample]:
    one, ones = _made(4, 6, 5), [1]
    for name, *args in (
        ("conv1d", one, _made(3, 6, 2), _made(3)),
        ("conv1d", one, _made(6, 1, 2), _made(6), [1], [1], [1], 6),
        ("conv1d", one, _made(12, 1, 2), _made(12), [1], [1], [1], 6),
        ("conv1d", one, _made(4, 3, 2), _made(4), [2], [1], [1], 2),
        ("conv2d", IMAGE, _made(3, 6, 2, 2)),
        ("conv_transpose1d", one, _made(6, 3, 2), _made(3)),
        ("conv_transpose1d", one, _made(6, 1, 2), _made(6), [1], [0], [0], 6),
        ("_convolution", one, _made(3, 6, 2), _made(3), ones, ones, ones, False, [0], 1, False, False, False, False),
        ("max_pool1d", one, [2]),
        ("max_pool2d", IMAGE, [2, 2]),
        ("max_pool3d", _made(2, 3, 4, 4, 4), [2, 2, 2]),
        ("adaptive_max_pool1d", one, [2]),
        ("adaptive_avg_pool1d", one, [2]),
        ("im2col", IMAGE, [2, 2], [1, 1], [0, 0], [1, 1]),
        ("col2im", _made(2, 12, 16), [5, 5], [2, 2], [1, 1], [0, 0], [1, 1]),
        ("grid_sampler", IMAGE, _made(4, 3, 3, 2).tanh(), 0, 0, False),
        ("_upsample_bicubic2d_aa", IMAGE, [7, 7], False),
        ("_upsample_nearest_exact3d", _made(2, 3, 4, 4, 4), [5, 5, 5]),
    ):
        yield sample(getattr(aten, name).default, *args)
    yield sample(aten.conv2d.padding, IMAGE, _made(3, 6, 2, 2), None, [1, 1], "same")
    yield sample(aten.upsample_nearest2d.vec, IMAGE, None, [2.0, 2.0])
    yield sample(aten.upsample_bilinear2d.vec, IMAGE, [7, 7], False, None)


def _recurrent() -> Iterator[Sample]:
    x, state = _made(5, 4, 6), _made(1, 4, 3)
    for name, gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)):
        weights = [_made(gates * 3, 6), _made(gates * 3, 3), _made(gates * 3), _made(gates * 3)]
        hidden = [state, _made(1, 4, 3, seed=1)] if name == "lstm" else state
        yield sample(getattr(aten, name).input, x, hidden, weights, True, 1, 0.0, False, False, False)
        of_cell = (x[0], [met[0] for met in hidden] if name == "lstm" else hidden[0], *weights)
        yield sample(getattr(aten, f"{name}_cell").default, *of_cell)
        yield sample(getattr(aten, name).input, x.transpose(0, 1), hidden, weights, True, 1, 0.0, False, False, True)
    weights = [weight.float() for weight in (_made(12, 6), _made(12, 3), _made(12), _made(12))]
    states = [state.float(), state.float()]
    yield sample(aten.mkldnn_rnn_layer.default, x.float(), *weights, *states, False, [], 2, 3, 1, True, False, False, False)
