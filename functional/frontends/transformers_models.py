"""Models of transformers from their default configurations, on the meta device, cut to a few layers."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

NUM_LAYERS = 6
"""Number of layers that are kept: enough for dense and sparse layers, and a full period of most attention patterns."""

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers")


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
