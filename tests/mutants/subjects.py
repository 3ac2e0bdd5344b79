"""The right schedules that mutants are made of: models, meshes, and what the models are called with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import frozen
from transformers import GPT2Config, GPT2LMHeadModel

from shardplan.functional import create_schedule
from shardplan.functional.frontends import infer_schedule
from shardplan.specs import Mesh
from tests.helpers.families import VOCAB, schedule_of
from tests.helpers.models import llama, plain, split_llama, split_plain
from tests.mutants import modules

LENGTH, SHORTER, ROWS = 6, 5, 3


@frozen(eq=False)
class Subject:
    """A right schedule.

    Args:
        name: The model, and who declares its splits: ``tp_plan``, ``infer``, or a schedule written by hand.
        mesh: The ranks.
        declare: Returns the schedule on a mesh.
        arguments: What the model is called with: names of its arguments, each with the largest token and the length.
    """

    name: str
    mesh: Mesh
    declare: Callable
    arguments: dict

    def __str__(self):
        sizes = [size for size in str(self.mesh).split()[1:] if not size.endswith("=1")]
        return f"{self.name.rstrip(',')}, {' '.join(sizes)}"

    def schedule(self):
        return self.declare(self.mesh)

    def inputs(self):
        """Return the arguments of the model: all data ranks along axis 0."""
        generator = torch.Generator().manual_seed(0)
        rows = ROWS * self.mesh.data
        if "pixel_values" in self.arguments:
            return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
        found = self.arguments.items()
        return {name: torch.randint(1, vocab, (rows, length), generator=generator) for name, (vocab, length) in found}


def _of_family(name, origin, mesh):
    arguments = {"input_ids": (VOCAB, SHORTER)}
    if name == "t5":
        arguments["decoder_input_ids"] = (VOCAB, SHORTER + 2)
    if name == "vit":
        arguments = {"pixel_values": ()}
    return Subject(f"{name} by {origin}", mesh, lambda mesh: schedule_of(name, mesh), arguments)


def _by_hand(name, mesh, declare, vocab=modules.VOCAB, argument="ids", length=SHORTER):
    return Subject(f"{name} by hand", mesh, declare, {argument: (vocab, length)})


def _split_sequence(mesh):
    """Return the schedule of a Llama whose sequence is split outside of its blocks."""
    sch = create_schedule(llama(), mesh)
    sch = sch.at["model.layers.0"].sync("backward_post", "all_gather", axis=1)
    sch = sch.at["**.{input,post_attention}_layernorm"].sum_gradient().at["model.norm"].sum_gradient()
    sch = sch.at["**.self_attn"].sync("forward_pre", "all_gather", axis=1)
    sch = sch.at["**.[qkv]_proj.weight"].shard(axis=0, granule=8).at["**.o_proj"].rowwise(sequence_axis=1, granule=8)
    sch = sch.at["**.mlp.{gate,up}_proj"].colwise(sequence_axis=1).at["**.mlp.down_proj"].rowwise(sequence_axis=1)
    return sch.at["model.norm"].sync("forward_post", "all_gather", axis=1)


def _dropping_gpt2(mesh):
    """Return the schedule of a GPT-2 with dropout of split heads, of whole activations in the same module, and outside."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": VOCAB}
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5))
    return infer_schedule(model, mesh)


def _cut_encoder(mesh):
    return modules.encoder(mesh).at["layers.0"].cut_pipeline_stage()


def _cut_plain(mesh):
    return split_plain(plain(), mesh).at["blocks.0"].cut_pipeline_stage()


TWO, FOUR, BOTH, STAGES = Mesh(tensor=2), Mesh(tensor=4), Mesh(data=2, tensor=2), Mesh(pipe=2, tensor=2)

SUBJECTS = (
    _of_family("llama", "tp_plan", TWO),
    _of_family("llama", "tp_plan", FOUR),  # two key heads on four ranks
    _of_family("phi3", "tp_plan", TWO),
    _of_family("gemma2", "tp_plan", TWO),
    _of_family("qwen3", "tp_plan", FOUR),
    _of_family("gpt_neox", "tp_plan", FOUR),
    _of_family("mixtral", "tp_plan", TWO),
    _of_family("mixtral", "tp_plan", Mesh(data=2, expert=2, tensor=2)),
    _of_family("qwen2_moe", "tp_plan", TWO),
    _of_family("qwen2_moe", "tp_plan", Mesh(data=2, expert=2)),
    _of_family("deepseek_v3", "tp_plan", TWO),
    Subject("gpt2, dropout, by infer", TWO, _dropping_gpt2, {"input_ids": (VOCAB, SHORTER)}),
    _of_family("bert", "infer", FOUR),
    _of_family("t5", "infer", TWO),
    _of_family("opt", "infer", BOTH),
    _of_family("vit", "infer", TWO),
    _by_hand("llama", BOTH, lambda mesh: split_llama(llama(), mesh), 128, "input_ids"),
    _by_hand("llama, split sequence,", TWO, _split_sequence, 128, "input_ids", LENGTH),
    _by_hand("plain blocks, tied,", BOTH, lambda mesh: split_plain(plain(), mesh), 64),
    _by_hand("plain blocks, tied, two stages,", STAGES, _cut_plain, 64),
    _by_hand("encoder, dropout,", TWO, lambda mesh: modules.encoder(mesh, p=0.5)),
    _by_hand("encoder, tied,", FOUR, lambda mesh: modules.encoder(mesh, is_tied=True)),
    _by_hand("encoder, split sequence, dropout,", TWO, lambda mesh: modules.sequence(mesh, p=0.5), length=LENGTH),
    _by_hand("encoder, two stages,", STAGES, _cut_encoder),
    _by_hand("energy, uneven and padded,", FOUR, modules.energy, modules.PADDED),
)
"""All of them, each right."""
