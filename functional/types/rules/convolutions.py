"""Convolutions, pools, and other operators on images: samples, channels, and places."""

from __future__ import annotations

from ..relation import OperatorCall, Relation
from .labels import Labels, OperatorRule, each, numbered, reasons, relate, shape_of

_PLACES = "windows of places are taken"


def _convolution(call: OperatorCall) -> Relation | None:
    image, kernel = shape_of(call, "input"), shape_of(call, "weight")
    num = len(kernel) - 2
    batch: Labels = ("batch",) if len(image) == num + 2 else ()
    places, windows = numbered(num, "place"), numbered(num, "window")
    groups, is_transposed = call.arguments.get("groups", 1), _is_transposed(call)
    channels = image[len(batch)]
    whole = reasons((*places, *windows), _PLACES)
    summed: Labels = ()
    if groups == 1:
        made, used, summed = "out", ("in", "out") if is_transposed else ("out", "in"), ("in",)
    elif groups == channels == call.shapes[0][len(batch)]:  # a kernel for each channel
        made, used = "in", ("in", "")
    else:
        made, used = "", ("out", "in")
        whole |= reasons((*used, "channels", "bias"), "groups of channels are convolved")
    operands = {
        "input": (*batch, "in" if made else "channels", *places),
        "weight": (*used, *windows),
        "bias": ((made or "bias",) if shape_of(call, "bias") else ()),
    }
    result = (*batch, made, *("",) * num)
    return relate(call, operands, [result], summed=summed, whole=whole, linear=["input bias", "weight bias"])


def _is_transposed(call: OperatorCall) -> bool:
    return bool(call.arguments.get("transposed", call.name.startswith("conv_transpose")))


def _places(call: OperatorCall, *, is_linear: bool) -> Relation:
    """Relate an operator that takes windows of the last axes, as many as its name says; other axes are apart."""
    num = next(int(letter) for letter in call.name if letter in "123")
    labels = numbered(len(call.operands[0].shape))
    apart, places = labels[: len(labels) - num], labels[len(labels) - num :]
    result = (*apart, *("",) * num)
    linear = (frozenset({0}),) if is_linear else ()
    return Relation((labels,), (result,) * len(call.shapes), whole=reasons(places, _PLACES), linear=linear)


def _average_pool(call: OperatorCall) -> Relation:
    return _places(call, is_linear=True)


def _max_pool(call: OperatorCall) -> Relation:
    return _places(call, is_linear=False)


def _columns(call: OperatorCall) -> Relation:
    """Relate ``im2col`` and ``col2im``: windows of an image as columns, and back."""
    labels = numbered(len(call.operands[0].shape))
    batch = labels[: len(labels) - (3 if call.name == "im2col" else 2)]
    result = (*batch, *("",) * (len(call.shapes[0]) - len(batch)))
    return Relation((labels,), (result,), whole=reasons(labels[len(batch) :], _PLACES), linear=(frozenset({0}),))


def _sampled(call: OperatorCall) -> Relation:
    num = len(shape_of(call, "input")) - 2
    places, read = numbered(num, "place"), numbered(num, "read")
    operands = {"input": ("batch", "channel", *read), "grid": ("batch", *places, "coordinate")}
    whole = reasons(read, "they are read at places that are computed") | {"coordinate": "they are coordinates of a place"}
    return relate(call, operands, [("batch", "channel", *places)], whole=whole, linear=["input"])


CONVOLUTIONS: dict[str, OperatorRule] = {
    **each("convolution _convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", _convolution),
    **each("avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d", _average_pool),
    **each(
        "_adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d", _average_pool
    ),
    **each("_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d", _average_pool),
    **each("upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d", _average_pool),
    **each("_upsample_bilinear2d_aa _upsample_bicubic2d_aa", _average_pool),
    **each("max_pool1d max_pool2d max_pool3d max_pool2d_with_indices", _max_pool),
    **each("max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d", _max_pool),
    **each("im2col col2im", _columns),
    **each("grid_sampler_2d grid_sampler_3d grid_sampler", _sampled),
}
