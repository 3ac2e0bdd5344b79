"""What a model may be called with, told from its configuration and its forward's signature."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .config_fields import read_fields, role_of

_SIDE = 32
_CHANNELS = 3
_GRID = 4
_FRAMES = 64
_SAMPLES = 4000
_FIRST = 3


class Trial(Protocol):
    """Calls a method of a model that can run."""

    def __call__(self, inputs: Mapping[str, Any], method: str = "forward") -> Any:
        """Return what the method returns."""
        ...


def with_no_cache(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs that ask for no cache of keys and values, where the model can be asked."""
    takes = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    has_cache = hasattr(getattr(model, "config", None), "use_cache")
    if has_cache and ("use_cache" in takes or takes_any):
        return {"use_cache": False, **inputs}
    return dict(inputs)


class Candidates:
    """What a model may be called with, richest first, with random values.

    Args:
        model: The model.
        batch: Rows.
        length: Tokens of a row.
        generator: Draws the values.
        dtype: Of images and sounds.
    """

    def __init__(
        self, model: nn.Module, batch: int, length: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> None:
        self.takes = inspect.signature(model.forward).parameters
        self.model = model
        self.config: Any = getattr(model, "config", None)
        self.fields = list(read_fields(self.config)) if self.config is not None else []
        self.batch = batch
        self.length = length
        self.generator = generator
        self.dtype = dtype

    def all(self, trial: Trial) -> Iterator[dict[str, Any]]:
        """Iterate over all candidates.

        Args:
            trial: Calls methods of the model.
        """
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
        return torch.randn(shape, generator=self.generator).to(self.dtype)

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

    def _with_placeholders(self, trial: Trial, kind: str, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Iterate over tokens with as many places for an image as the model makes features of it."""
        ids = self._numbers(f"{kind}_token_id", f"{kind}_token_index")
        if ids and (num := self._num_features(trial, kind, given)):
            tokens, places = self._tokens(self.length), torch.full((self.batch, num), ids[0])
            made = {"input_ids": torch.cat([tokens[:, :1], places, tokens[:, 1:]], 1), **given}
            yield made
            kinds = [name for name in self.takes if name.endswith("mm_token_type_ids")]
            if kinds:
                yield {**made, **dict.fromkeys(kinds, (made["input_ids"] == ids[0]).long())}

    def _num_features(self, trial: Trial, kind: str, given: Mapping[str, Any]) -> int:
        """Return how many tokens the features of an image are as long as; 0 if that cannot be told."""
        width = getattr(self.config.get_text_config(), "hidden_size", 0) if self.config is not None else 0
        method = f"get_{kind}_features"  # of the model, or of the one within it
        if not hasattr(self.model, method):
            method = f"{getattr(self.model, 'base_model_prefix', '')}.{method}"
        try:
            features = trial(given, method)
        except Exception:  # noqa: BLE001  as above
            return 0
        features = getattr(features, "pooler_output", features)
        tensors = [leaf for leaf in tree_leaves(features) if isinstance(leaf, Tensor) and leaf.shape[-1] == width]
        num, rest = divmod(sum(tensor.numel() for tensor in tensors), max(1, width * self.batch))
        return 0 if rest else num
