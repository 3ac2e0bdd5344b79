"""Inputs of a model with random values, told from its configuration and its forward's signature, and tried."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from ...specs.errors import PlanError
from ..layout.local_model import fake_inputs, following, quiet
from ..model.copy import copy_module
from ..model.known_values import KnownValues
from ..model.rng_state import own_generators
from .graph.inputs import with_no_cache
from .shrink.fields import read_fields
from .shrink.sizes import role_of

_MOST_ELEMENTS = 30_000_000
"""Elements of the largest model that is tried with values; a larger one runs on fake tensors."""

_BATCH = 3
_LENGTH = 11
_SIDE = 32
_CHANNELS = 3
_GRID = 4
_FRAMES = 64
_SAMPLES = 4000
_WIDTH = 0.2
_FIRST = 3


def made_inputs(model: nn.Module, batch: int = _BATCH, length: int = _LENGTH, seed: int = 0) -> dict[str, Any] | None:
    """Return inputs with random values with which a model runs; None if none are found.

    Token numbers are below the vocabulary and stand for no image or padding; images and sounds have the sizes that the
    configuration names. The global generators stay as they are.

    Args:
        model: A model with a configuration, also on the meta device; or one whose forward takes ``input_ids``, or one tensor
            that fits one of its first modules.
        batch: Rows of each input.
        length: Tokens of each row, beside those that stand for an image.
        seed: Seed of the values.

    >>> from transformers import GPT2Config, GPT2Model
    >>> inputs = made_inputs(GPT2Model(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=70)))
    >>> {name: list(value.shape) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    {'use_cache': False, 'input_ids': [3, 11]}
    """
    return _tried(model, batch, length, seed)[0]


def why_no_inputs(model: nn.Module) -> str:
    """Return why a model does not run with the first inputs that are made for it; empty if some inputs are right."""
    return _tried(model, _BATCH, _LENGTH, 0)[1]


def _tried(model: nn.Module, batch: int, length: int, seed: int) -> tuple[dict[str, Any] | None, str]:
    """Return inputs with which a model runs, or None and why the first candidate does not."""
    try:
        trial = _Trial(model)
    except PlanError as error:
        return None, str(error)
    cause = ""
    for candidate in _Candidates(model, batch, length, torch.Generator().manual_seed(seed)).all(trial):
        inputs = with_no_cache(model, candidate)
        try:
            trial(inputs)
        except Exception as error:  # noqa: BLE001  the model's code may raise anything; the next candidate is tried
            lines = str(error).splitlines()
            cause = cause or f"{type(error).__name__}: {lines[0] if lines else ''}"
        else:
            return inputs, ""
    return None, cause or "its forward takes nothing that is known"


class _Trial:
    """A copy of a model that runs: with values if the model is small, else on fake tensors.

    Args:
        model: The model; it is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._mode: FakeTensorMode | None = None
        if sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())) > _MOST_ELEMENTS:
            self._mode = mode = FakeTensorMode(allow_non_fake_inputs=True)

            def tensor_of(tensor: Tensor) -> Tensor:
                with mode:
                    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        else:
            generator = torch.Generator().manual_seed(0)

            def tensor_of(tensor: Tensor) -> Tensor:
                if tensor.device.type != "meta":
                    return tensor.detach().cpu().clone()
                if not tensor.is_floating_point():
                    return torch.zeros(tensor.shape, dtype=tensor.dtype)
                return _WIDTH * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

        self._model = copy_module(model, tensor_of, for_planning=True).eval()

    def __call__(self, inputs: Mapping[str, Any], method: str = "forward") -> Any:
        """Return what the model, or a method of it, returns."""
        call = self._model if method == "forward" else getattr(self._model, method)
        if self._mode is None:
            with torch.no_grad(), own_generators(0), quiet():
                return call(**inputs)
        with following(self._mode, values := KnownValues()), torch.no_grad():
            return call(**fake_inputs(inputs, values))


class _Candidates:
    """What a model may be called with, richest first.

    Args:
        model: The model.
        batch: Rows.
        length: Tokens of a row.
        generator: Draws the values.
    """

    def __init__(self, model: nn.Module, batch: int, length: int, generator: torch.Generator) -> None:
        self.takes = inspect.signature(model.forward).parameters
        self.model = model
        self.config: Any = getattr(model, "config", None)
        self.fields = list(read_fields(self.config)) if self.config is not None else []
        self.batch = batch
        self.length = length
        self.generator = generator

    def all(self, trial: _Trial) -> Iterator[dict[str, Any]]:
        """Iterate over all candidates."""
        tokens = self._tokens(self.length)
        media = list(self._media())
        decoder = {"decoder_input_ids": self._tokens(self._other_length)} if "decoder_input_ids" in self.takes else {}
        if "input_ids" in self.takes:
            for kind, given in media:
                yield from self._with_placeholders(trial, kind, given)
            if getattr(self.model, "main_input_name", "input_ids") != "input_ids":
                yield from ({**given, "input_ids": tokens, **decoder} for _, given in media)
            yield {"input_ids": tokens}
            if decoder:
                yield {"input_ids": tokens, **decoder}
            for codebooks in self._numbers("num_codebooks"):
                yield {"input_ids": self._tokens(self.length, codebooks)}
            yield from ({**given, "input_ids": tokens} for _, given in media)
            for kind, given in media:  # a token for each feature
                if num := self._num_features(trial, kind, given):
                    yield {**given, "input_ids": self._tokens(num)}
        yield from ({**given, **decoder} for _, given in media)
        if "inputs_embeds" in self.takes and self.config is not None:
            width = getattr(self.config.get_text_config(), "hidden_size", _SIDE)
            yield {"inputs_embeds": self._random(self.batch, self.length, width)}
        yield from self._for_the_first_module()

    def _for_the_first_module(self) -> Iterator[dict[str, Any]]:
        """Iterate over inputs that fit the first modules of a model that takes one tensor."""
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        required = [name for name, p in self.takes.items() if p.default is inspect.Parameter.empty and p.kind in kinds]
        if self.config is not None or len(required) != 1:
            return
        with_tensors = [module for module in self.model.modules() if any(True for _ in module.parameters(recurse=False))]
        for module in with_tensors[:_FIRST]:
            yield from ({required[0]: tensor} for tensor in self._for_module(module))

    def _for_module(self, module: nn.Module) -> Iterator[Tensor]:
        match module:
            case nn.Embedding():
                yield torch.randint(module.num_embeddings, (self.batch, self.length), generator=self.generator)
            case nn.Conv1d():
                yield self._random(self.batch, module.in_channels, self.length)
            case nn.Conv2d():
                yield self._random(self.batch, module.in_channels, _SIDE, _SIDE)
            case _:
                widths = dict.fromkeys(p.shape[-1] for p in module.parameters(recurse=False) if p.dim())
                for width in widths:
                    yield self._random(self.batch, self.length, width)
                    yield self._random(self.batch, width)

    @property
    def _other_length(self) -> int:
        return self.length + 2 if self.length % 2 else 2 * self.length

    def _numbers(self, *names: str) -> list[int]:
        """Return the numbers of fields by these names, outermost configuration first."""
        return [number for name in names for f in self.fields if f.name == name for number in (f.number,) if number]

    def _tokens(self, length: int, *more: int) -> Tensor:
        """Return random token numbers that stand for nothing special."""
        sizes = [f.number for f in self.fields if f.name == "vocab_size" and f.number]
        special = {n for f in self.fields if role_of(f) == "id" for n in (f.number, *f.numbers)}
        plain = [n for n in range(min(sizes, default=2)) if n not in special] or [0, 1]
        drawn = torch.randint(len(plain), (self.batch, length, *more), generator=self.generator)
        return torch.tensor(plain)[drawn]

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def _media(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Iterate over images and sounds that the model may take: their kind, and the arguments."""
        if "pixel_values" in self.takes:
            yield from (("image", given) for given in self._patches())
            for shape in self._image_shapes():
                yield "image", {"pixel_values": self._random(*shape)}
        if "input_features" in self.takes:
            bins = self._numbers("num_mel_bins", "input_feat_per_channel", "n_mels", "feature_size", "input_size")
            positions = self._numbers("max_source_positions")
            for frames in dict.fromkeys([*(2 * num for num in positions), _FRAMES]):
                for num in dict.fromkeys([*bins, 80]):
                    yield "audio", {"input_features": self._random(self.batch, num, frames)}
                    yield "audio", {"input_features": self._random(self.batch, frames, num)}
        if "input_values" in self.takes:
            yield "audio", {"input_values": self._random(self.batch, _SAMPLES)}
            yield "audio", {"input_values": self._random(self.batch, 1, _SAMPLES)}

    def _patches(self) -> Iterator[dict[str, Any]]:
        """Iterate over images that are given as patches, all in one list, or in one for each image with their places."""
        num, depth = _GRID**2, next(iter(self._numbers("temporal_patch_size", "patch_temporal")), 1)
        channels = next(iter(self._numbers("num_channels", "in_channels")), _CHANNELS)
        sides = dict.fromkeys(self._numbers("patch_size", "model_patch_size"))
        for grid in (name for name in ("image_grid_thw", "grid_thw") if name in self.takes):
            sizes = {grid: torch.tensor([[1, _GRID, _GRID]] * self.batch)}
            for side in sides:
                yield {"pixel_values": self._random(self.batch * num, channels * depth * side**2), **sizes}
                yield {"pixel_values": self._random(self.batch * num, channels, side, side), **sizes}
                yield {"pixel_values": self._random(self.batch * num, side, side, channels), **sizes}
        for places in (name for name in ("image_position_ids", "pixel_position_ids") if name in self.takes):
            place = torch.cartesian_prod(torch.arange(_GRID), torch.arange(_GRID)).expand(self.batch, num, 2).contiguous()
            for side in sides:
                yield {"pixel_values": self._random(self.batch, num, channels * side**2), places: place}

    def _image_shapes(self) -> Iterator[Sequence[int]]:
        channels = [*self._numbers("num_channels", "in_channels"), 3]
        sides = [f.value for f in self.fields if f.name == "image_size" and f.value]
        for side in (*sides, _SIDE):
            height, width = side if isinstance(side, (list, tuple)) else (side, side)
            yield self.batch, channels[0], height, width
            if not isinstance(side, (list, tuple)):
                yield self.batch, 1, channels[0], height, width

    def _with_placeholders(self, trial: _Trial, kind: str, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Iterate over tokens with as many places for an image as the model makes features of it."""
        ids = self._numbers(f"{kind}_token_id", f"{kind}_token_index")
        if ids and (num := self._num_features(trial, kind, given)):
            tokens, places = self._tokens(self.length), torch.full((self.batch, num), ids[0])
            made = {"input_ids": torch.cat([tokens[:, :1], places, tokens[:, 1:]], 1), **given}
            yield made
            if "mm_token_type_ids" in self.takes:
                yield {**made, "mm_token_type_ids": (made["input_ids"] == ids[0]).long()}

    def _num_features(self, trial: _Trial, kind: str, given: Mapping[str, Any]) -> int:
        """Return how many tokens the features of an image are as long as; 0 if that cannot be told."""
        width = getattr(self.config.get_text_config(), "hidden_size", 0) if self.config is not None else 0
        if not hasattr(self.model, f"get_{kind}_features"):
            return 0
        try:
            features = trial(given, f"get_{kind}_features")
        except Exception:  # noqa: BLE001  as above
            return 0
        features = getattr(features, "pooler_output", features)
        tensors = [leaf for leaf in tree_leaves(features) if isinstance(leaf, Tensor) and leaf.shape[-1] == width]
        num, rest = divmod(sum(tensor.numel() for tensor in tensors), max(1, width * self.batch))
        return 0 if rest else num
