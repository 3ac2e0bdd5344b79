"""Operators that need most axes whole, and work on samples or matrices apart: recurrent layers, spectra, linear algebra."""

from __future__ import annotations

from ..relation import Operand, OperatorCall, Relation
from .labels import Labels, OperatorRule, aligned, axes_of, each, numbered, reasons, relate, replaced, shape_of, tensor


def _recurrent(call: OperatorCall) -> Relation | None:
    """Relate ``lstm``, ``gru`` and ``rnn``: samples are apart, the rest is whole; packed sequences are not followed."""
    if tensor(call, "input") is None or "batch_first" not in call.arguments:
        return None
    operands = [numbered(len(operand.shape), f"operand{operand.number}") for operand in call.operands]
    first = call.arguments["batch_first"]
    operands[0] = replaced(operands[0], 0 if first else 1, "batch")
    hidden = call.arguments["hx"]
    for state in hidden if isinstance(hidden, (list, tuple)) else [hidden]:
        if isinstance(state, Operand) and state.number:
            operands[state.number] = replaced(operands[state.number], 1, "batch")
    whole = reasons({label for labels in operands for label in labels} - {"batch"}, "a recurrent layer works on all of them")
    made: Labels = ("batch", "", "") if first else ("", "batch", "")
    states: list[Labels] = [("", "batch", "")] * (len(call.shapes) - 1)
    return Relation(tuple(operands), (made, *states), whole=whole)


def _recurrent_cell(call: OperatorCall) -> Relation:
    hidden = call.arguments["hx"]
    states = hidden if isinstance(hidden, (list, tuple)) else [hidden]
    of_samples = {operand.number for operand in (call.arguments["input"], *states)}
    operands = [numbered(len(operand.shape), f"operand{operand.number}") for operand in call.operands]
    for number in of_samples:
        operands[number] = replaced(operands[number], 0, "batch")
    whole = reasons({label for labels in operands for label in labels} - {"batch"}, "a recurrent layer works on all of them")
    return Relation(tuple(operands), (("batch", ""),) * len(call.shapes), whole=whole)


def _recurrent_layer(call: OperatorCall) -> Relation | None:
    if call.arguments.get("batch_sizes"):
        return None
    operands = [numbered(len(operand.shape), f"operand{operand.number}") for operand in call.operands]
    for name in ("input", "hx_", "cx_"):
        if (met := tensor(call, name)) is not None:
            operands[met.number] = replaced(operands[met.number], len(met.shape) - 2, "batch")
    whole = reasons({label for labels in operands for label in labels} - {"batch"}, "a recurrent layer works on all of them")
    results = [(*("",) * (len(shape) - 2), "batch", "") if len(shape) > 1 else ("",) * len(shape) for shape in call.shapes]
    return Relation(tuple(operands), tuple(results), whole=whole)


def _spectrum(call: OperatorCall) -> Relation:
    shape = shape_of(call, "self")
    labels = numbered(len(shape))
    axes = axes_of(call, len(shape)) if "dim" in call.arguments else [len(shape) - 1]
    if call.arguments.get("dim") is None and call.arguments.get("s") is not None:
        axes = list(range(len(shape) - len(call.arguments["s"]), len(shape)))
    result = tuple("" if at in axes else label for at, label in enumerate(labels))
    whole = reasons((labels[axis] for axis in axes), "a Fourier transform is taken over them")
    return relate(call, {"self": labels}, [result], whole=whole, linear=["self"])


def _of_matrices(call: OperatorCall) -> Relation | None:
    """Relate an operator on matrices, which are the last two axes: the axes before are apart."""
    shapes = [operand.shape for operand in call.operands]
    batch = shapes[0][:-2]
    if any(shape[: len(batch)] != batch or len(shape) > len(batch) + 2 for shape in (*shapes, *call.shapes)):
        return None
    labels = numbered(len(batch), "batch")
    operands = tuple((*labels, *numbered(len(s) - len(batch), f"operand{number}x")) for number, s in enumerate(shapes))
    whole = reasons((label for met in operands for label in met[len(batch) :]), f"{call.name} works on whole matrices")
    results = tuple((*labels, *("",) * (len(shape) - len(batch))) for shape in call.shapes)
    return Relation(operands, results, whole=whole)


def _distances(call: OperatorCall) -> Relation:
    rank = len(call.shapes[0])
    batch = numbered(rank - 2, "batch")
    operands = {
        "x1": (*aligned(shape_of(call, "x1")[:-2], batch), "i", "k"),
        "x2": (*aligned(shape_of(call, "x2")[:-2], batch), "j", "k"),
    }
    return relate(call, operands, [(*batch, "i", "j")], whole={"k": "distances are taken over them"})


BATCHED: dict[str, OperatorRule] = {
    **each("lstm gru rnn_tanh rnn_relu", _recurrent),
    **each("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", _recurrent_cell),
    "mkldnn_rnn_layer": _recurrent_layer,
    **each("_fft_r2c _fft_c2c _fft_c2r fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft", _spectrum),
    **each("fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn", _spectrum),
    **each("linalg_inv_ex linalg_inv inverse linalg_cholesky_ex linalg_cholesky linalg_qr", _of_matrices),
    **each("_linalg_eigh linalg_eigh linalg_eigvalsh _linalg_svd linalg_svd linalg_svdvals linalg_eig", _of_matrices),
    **each("_linalg_det linalg_det det _linalg_slogdet linalg_slogdet linalg_lu_factor_ex linalg_lu", _of_matrices),
    **each("linalg_matrix_exp matrix_exp linalg_pinv linalg_matrix_power matrix_power", _of_matrices),
    **each("linalg_solve_triangular triangular_solve _linalg_solve_ex linalg_solve cholesky_solve", _of_matrices),
    **each("_cdist_forward cdist _euclidean_dist", _distances),
}
