"""Losses, by how they are reduced: not at all, to the mean, or to the sum."""

from __future__ import annotations

from ..relation import OperatorCall, Relation
from .labels import Labels, OperatorRule, aligned, broadcast, each, numbered, reasons, relate, shape_of

_MEAN = 1
"""What torch calls the mean, among ways of reducing: 0 is none, 2 the sum."""


def _entry_by_entry(call: OperatorCall) -> Relation:
    shape = broadcast(operand.shape for operand in call.operands)
    labels = aligned(shape, numbered(len(shape)))
    operands = tuple(aligned(operand.shape, labels) for operand in call.operands)
    present = frozenset(label for met in operands for label in met if label)
    match call.arguments.get("reduction", _MEAN):
        case 0:
            return Relation(operands, (labels,))
        case 1:
            return Relation(operands, ((),), averaged=present)
        case _:
            return Relation(operands, ((),), summed=present)


def _of_classes(call: OperatorCall) -> Relation:
    """Relate a loss of classes, which are the second axis, or the only one."""
    shape, target = shape_of(call, "self"), shape_of(call, "target")
    labels = numbered(len(shape))
    axis = min(1, len(labels) - 1)
    samples: Labels = tuple(label for at, label in enumerate(labels) if at != axis)
    classes = labels[axis]
    operands = {"self": labels, "target": labels if target == shape else samples, "weight": (classes,)}
    whole = {classes: "classes are compared with each other"}
    results: list[Labels] = [()] * len(call.shapes)
    match call.arguments.get("reduction", _MEAN):
        case 0:
            results[0] = samples
            return relate(call, operands, results, whole=whole)
        case 1:
            whole |= reasons(samples, "the mean is taken over those that are not ignored")
            return relate(call, operands, results, whole=whole)
        case _:
            return relate(call, operands, results, summed=samples, whole=whole)


LOSSES: dict[str, OperatorRule] = {
    **each(
        "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits", _entry_by_entry
    ),
    **each("kl_div soft_margin_loss poisson_nll_loss hinge_embedding_loss", _entry_by_entry),
    **each("nll_loss_forward nll_loss2d_forward nll_loss nll_loss2d nll_loss_nd cross_entropy_loss", _of_classes),
}
