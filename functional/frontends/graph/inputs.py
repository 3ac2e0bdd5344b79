"""Inputs of a model, told from its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ....specs.errors import PlanError, Problem
from ...model.input_candidates import with_no_cache

_BATCH = 2
_LENGTH = 7
_OTHER_LENGTH = 5


def inferred_inputs(model: nn.Module) -> dict[str, Any]:
    """Return inputs for a model that has a configuration and names its main input.

    Raises:
        PlanError: If the model does not name it.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    takes = inspect.signature(model.forward).parameters
    if main == "pixel_values" and (shape := _image(config)):
        inputs: dict[str, Any] = {"pixel_values": torch.zeros(shape, device="meta")}
        if "input_ids" in takes:
            inputs["input_ids"] = _tokens(_LENGTH)
    elif main == "input_ids" and main in takes:
        inputs = {"input_ids": _tokens(_LENGTH)}
        if (
            "pixel_values" in takes
            and (shape := _image(config))
            and takes["pixel_values"].default is inspect.Parameter.empty
        ):
            inputs["pixel_values"] = torch.zeros(shape, device="meta")
    else:
        cause = f"what this {type(model).__name__} is called with cannot be told from its configuration"
        raise PlanError([Problem("example_inputs", cause, "infer_schedule(model, mesh, example_inputs={'x': tensor})")])
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = _tokens(_OTHER_LENGTH)
    return with_no_cache(model, inputs)


def _tokens(length: int) -> Tensor:
    return torch.zeros(_BATCH, length, dtype=torch.long, device="meta")


def _image(config: object) -> tuple[int, ...] | None:
    for holder in _configurations(config):
        side = getattr(holder, "image_size", None)
        height_width = [
            size for size in (side if isinstance(side, (list, tuple)) else (side, side)) if isinstance(size, int)
        ]
        if height_width:
            channels = getattr(holder, "num_channels", 3)
            return (_BATCH, channels if isinstance(channels, int) else 3, *height_width)
    return None


def _configurations(config: object) -> Iterator[object]:
    yield config
    yield getattr(config, "vision_config", None)
