"""The models that are measured: on meta, with what is said about their split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from attrs import field, frozen
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from shardplan.functional import Schedule, create_schedule
from shardplan.specs import Mesh


@frozen(eq=False)
class Case:
    """A model and how it is split.

    Args:
        build: Makes the model, on the device of the context.
        declare: Says which tensors are split.
        blocks: The modules that FSDP2 gathers one at a time.
        model: The model on meta.
        axes: Split axis of each split tensor, by path.
    """

    build: Callable[[], nn.Module]
    declare: Callable[[Schedule], Schedule]
    blocks: Callable[[nn.Module], Iterable[nn.Module]]
    model: nn.Module = field(init=False)
    axes: Mapping[str, int] = field(init=False)

    @model.default
    def _on_meta(self) -> nn.Module:
        with torch.device("meta"):
            return self.build()

    @axes.default
    def _declared(self) -> Mapping[str, int]:
        tree = self.declare(create_schedule(self.model, Mesh())).tree
        return {path: spec.shards[0].axis for path, spec in tree.items() if spec.shards}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, unsplit."""
        return sum(tensor.nbytes for tensor in tensors(self.model).values())


def llama(layers: int, hidden: int, intermediate: int, vocab: int) -> Case:
    """Return a Llama in Megatron's layout, its embedding and head split by rows."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=vocab,
        tie_word_embeddings=False,
    )
    return Case(partial(LlamaForCausalLM, config), partial(_split_llama, layers), lambda model: model.model.layers)


def small(pairs: int) -> Case:
    """Return many small layers: ``pairs`` linears of 64 by 64 that are split, and as many norms that are not."""
    return Case(
        partial(_pairs, pairs), lambda sch: sch.at["*.0"].expect(pairs).colwise(gather_output=True), nn.Module.children
    )


CASES: Mapping[str, Callable[[], Case]] = {
    "llama": partial(llama, 24, 1024, 2816, 32000),
    "small": partial(small, 2500),
}
"""What is timed."""

TINY: Mapping[str, Callable[[], Case]] = {"llama": partial(llama, 2, 64, 128, 256), "small": partial(small, 8)}
"""The same models, small enough to compare all weights."""


def initialise(model: nn.Module, module: nn.Module) -> None:
    """Give values to the tensors of one module, by the model's own init code."""
    code = getattr(model, "_init_weights", None)
    with torch.no_grad():
        code(module) if code else module.reset_parameters()


def holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the modules that hold tensors themselves, with their paths."""
    for path, module in model.named_modules():
        if any(True for _ in own(module)):
            yield path, module


def own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors that a module holds itself."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of a model by path."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _pairs(pairs: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64, bias=False)) for _ in range(pairs)))


def _split_pairs(pairs: int, sch: Schedule) -> Schedule:
    return sch.at["*.0"].expect(pairs).colwise(gather_output=True)


def _split_llama(layers: int, sch: Schedule) -> Schedule:
    sch = sch.at["model.layers.*.self_attn.[qkv]_proj"].expect(3 * layers).colwise()
    sch = sch.at["model.layers.*.self_attn.o_proj"].expect(layers).rowwise()
    sch = sch.at["model.layers.*.mlp.{gate,up}_proj"].expect(2 * layers).colwise()
    sch = sch.at["model.layers.*.mlp.down_proj"].expect(layers).rowwise()
    sch = sch.at["model.embed_tokens"].vocab_parallel()
    return sch.at["lm_head"].colwise(gather_output=True)
