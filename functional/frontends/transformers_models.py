"""Models of transformers from their default configurations, on the meta device, cut to a few layers."""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...specs.mesh import Mesh
from ..layout.local_model import LocalModel
from ..schedule import create_schedule
from ..types.record import Stopped, record_whole

NUM_LAYERS = 6
"""Number of layers that are kept: enough for dense and sparse layers, and a full period of most attention patterns."""

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers")
_BATCH, _LENGTH, _SIDE = 2, 16, 32


def model_types() -> list[str]:
    """Return all model types of transformers."""
    from transformers import CONFIG_MAPPING  # only a test dependency

    return sorted(CONFIG_MAPPING)


def declared_model(model_type: str) -> nn.Module | None:
    """Return the model of a type on the meta device, cut where it can be; None if it declares no plan or cannot be built."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for config in _configs(model_type):
            for cls in model_classes(config):
                try:
                    with torch.device("meta"):
                        model = cls(config)
                except Exception:  # noqa: BLE001, S112  a constructor may raise anything; the next class is tried
                    continue
                return model if getattr(model, "_tp_plan", None) else None
    return None


def example_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """Return inputs with which the whole model runs on fake tensors, None if no candidate does."""
    sch = create_schedule(model, Mesh())
    for inputs in _candidates(model):
        if not isinstance(record_whole(LocalModel(model, sch.mesh, sch.tree, example_inputs=inputs)), Stopped):
            return inputs
    return None


def model_classes(config: Any) -> Iterator[type[nn.Module]]:
    """Iterate over the classes for a configuration: causal language models, then other heads, then models without a head."""
    from transformers.models.auto import modeling_auto as auto  # only a test dependency

    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        auto.MODEL_MAPPING,
    ):
        with contextlib.suppress(Exception):
            if type(config) in mapping:
                found: Any = mapping[type(config)]
                yield from found if isinstance(found, tuple) else (found,)


def _configs(model_type: str) -> Iterator[Any]:
    """Iterate over the default configuration: with few layers, then unchanged."""
    from transformers import CONFIG_MAPPING  # only a test dependency

    for num_layers in (NUM_LAYERS, None):
        try:
            config = CONFIG_MAPPING[model_type]()
            if num_layers is not None:
                config = _cut(config, num_layers)
        except Exception:  # noqa: BLE001, S112  as above
            continue
        config._attn_implementation = "eager"  # noqa: SLF001  as transformers documents
        yield config


def _cut(config: Any, num_layers: int) -> Any:
    parts = {name: value for name, value in vars(config).items() if hasattr(value, "model_type")}
    depths = {name: vars(config)[name] for name in _DEPTHS if isinstance(vars(config).get(name), int)}
    if depths and not parts:
        made = type(config)(**{name: min(depth, num_layers) for name, depth in depths.items()})
        for name, value in vars(made).items():
            if isinstance(value, list) and len(value) in depths.values() and len(value) > num_layers:
                setattr(made, name, value[:num_layers])
        return made
    for name, part in parts.items():
        setattr(config, name, _cut(part, num_layers))
    return config


def _candidates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    takes = set(inspect.signature(model.forward).parameters)
    config: Any = model.config
    tokens = torch.zeros(_BATCH, _LENGTH, dtype=torch.long)
    if "input_ids" in takes:
        yield {"input_ids": tokens}
        if "decoder_input_ids" in takes:
            yield {"input_ids": tokens, "decoder_input_ids": tokens}
        codebooks = getattr(config, "num_codebooks", None)
        if isinstance(codebooks, int):
            yield {"input_ids": torch.zeros(_BATCH, _LENGTH, codebooks, dtype=torch.long)}
    if "pixel_values" in takes:
        side = getattr(config, "image_size", None)
        side = side if isinstance(side, int) else _SIDE
        yield {"pixel_values": torch.zeros(_BATCH, 3, side, side)}
    if "inputs_embeds" in takes:
        width = getattr(config.get_text_config(), "hidden_size", _SIDE)
        yield {"inputs_embeds": torch.zeros(_BATCH, _LENGTH, width)}
