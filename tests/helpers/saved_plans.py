"""Plans of many kinds, of the modules of torch and transformers, so that saved ones can be compared with new ones."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from shardplan.functional import as_dtensors, audit, create_schedule, plan_build, predict
from shardplan.functional.frontends import infer_schedule, schedule_from_tp_plan
from shardplan.specs import Checkpoint, Mesh

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "attn_implementation": "eager",
    "use_cache": False,
}
IDS = torch.zeros(4, 8, dtype=torch.long)
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}


def llama(**changes):
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def split_llama(mesh, **changes):
    sch = create_schedule(llama(**changes), mesh)
    sch = sch.at["**.self_attn.[qkv]_proj"].expect(6).colwise().at["**.o_proj"].rowwise()
    sch = sch.at["**.mlp.{gate,up}_proj"].colwise().at["**.mlp.down_proj"].rowwise()
    return sch.at["model.embed_tokens"].vocab_parallel().at["lm_head"].colwise(gather_output=True)


def zero(stage, dtype=None, micro=1, **more):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": micro,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 3000},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        **({dtype: {"enabled": True}} if dtype else {}),
        **more,
    }


def uneven():
    """Two key/value heads on four ranks, an uneven feed-forward block, a padded vocabulary."""
    sch = create_schedule(llama(num_key_value_heads=2, vocab_size=131, intermediate_size=90), Mesh(tensor=4))
    sch = sch.at["**.q_proj"].colwise(granule=4).at["**.[kv]_proj"].colwise(granule=4, replicate=True)
    sch = sch.at["**.self_attn"].set(num_key_value_groups=2).at["**.o_proj"].rowwise(granule=4)
    sch = sch.at["**.mlp.{gate,up}_proj"].colwise(uneven=True).at["**.mlp.down_proj"].rowwise(uneven=True)
    sch = sch.at["model.embed_tokens"].vocab_parallel(pad_to_multiple=8)
    sch = sch.at["lm_head"].colwise(gather_output=True, pad_to_multiple=8)
    return plan_build(sch, target="torch", config=ADAMW, example_inputs={"input_ids": IDS})


def sequence():
    """The sequence is split outside of attention and feed-forward blocks, also for norms and biases."""
    sch = create_schedule(llama(attention_bias=True, mlp_bias=True), Mesh(data=2, tensor=2))
    sch = sch.at["model.layers.0"].sync("backward_post", "all_gather", axis=1)
    sch = sch.at["**.{input,post_attention}_layernorm"].sum_gradient().at["model.norm"].sum_gradient()
    sch = sch.at["model.norm"].sync("forward_post", "all_gather", axis=1)
    sch = sch.at["**.self_attn"].sync("forward_pre", "all_gather", axis=1)
    sch = sch.at["**.self_attn.[qkv]_proj.{weight,bias}"].shard(axis=0).at["**.o_proj"].rowwise(sequence_axis=1)
    sch = sch.at["**.mlp.{gate,up}_proj"].colwise(sequence_axis=1).at["**.mlp.down_proj"].rowwise(sequence_axis=1)
    return plan_build(sch.at["lm_head"].colwise(gather_output=True), target="deepspeed", config=zero(1))


def experts():
    """Experts over ``expert``, each of them over ``tensor``."""
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**sizes))
    sch = schedule_from_tp_plan(model, Mesh(data=4, expert=2, tensor=2))
    return plan_build(sch, target="torch", config=ADAMW)


def row(num_stages, mesh, **arguments):
    """Modules one after another, two to a stage, the first and the last of which share their weights."""

    def mlp():
        return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))

    with torch.device("meta"):
        inner = [module for _ in range(num_stages - 1) for module in (mlp(), mlp())]
        model = nn.Sequential(nn.Embedding(64, 16), *inner, nn.Linear(16, 64, bias=False))
        model[-1].weight = model[0].weight
    sch = create_schedule(model, mesh)
    for number in range(num_stages - 1):
        sch = sch.at[str(2 * number + 1)].cut_pipeline_stage()
    if mesh.tensor > 1:
        sch = sch.at["1.0"].colwise().at["1.2"].rowwise()
    return plan_build(sch, example_inputs={"input": IDS}, **arguments)


def cut_t5():
    """Both stacks are cut; the embedding is in three places."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    config = T5Config(**sizes, vocab_size=64, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    sch = create_schedule(model, Mesh(pipe=2, tensor=2)).at["encoder.block.1"].cut_pipeline_stage()
    sch = sch.at["**.DenseReluDense.wi"].colwise().at["**.DenseReluDense.wo"].rowwise()
    config = {"schedule": "gpipe", "num_microbatches": 4, **ADAMW}
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    return plan_build(sch, target="torch", config=config, example_inputs=inputs)


def gpt2(dtype, mesh, **arguments):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 64}
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.0, resid_pdrop=0.1, embd_pdrop=0.0)).to(dtype)
    return plan_build(infer_schedule(model, mesh), **arguments)


def checkpoint():
    """Values come from a folder in the current one, but for one tensor that is made."""
    Path("weights").mkdir(exist_ok=True)
    model = llama()
    made = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "model.norm.weight"}
    values = {name: torch.arange(shape.numel()).float().reshape(shape) for name, shape in made.items()}
    save_file(values, "weights/model.safetensors")
    weights = Checkpoint("weights", init=("model.norm.weight",))
    return plan_build(split_llama(Mesh(data=2, tensor=2)), init_weights=weights)


def deepspeed_pipeline():
    sch = split_llama(Mesh(pipe=2, data=2, tensor=2), tie_word_embeddings=False)
    sch = sch.at["model.layers.0"].cut_pipeline_stage()
    config = zero(1, "bf16", micro=4, pipeline={"pipe_partitioned": False, "grad_partitioned": False})
    return plan_build(sch, target="deepspeed", config=config, example_inputs={"input_ids": IDS})


PLANS = {
    "llama": lambda: plan_build(split_llama(Mesh(data=2, tensor=2)), example_inputs={"input_ids": IDS}),
    "llama-scatter": lambda: plan_build(split_llama(Mesh(data=2, tensor=4)), strategy="scatter", seed=3),
    "llama-broadcast": lambda: plan_build(split_llama(Mesh(data=2, tensor=2)), strategy="broadcast"),
    "llama-opaque": lambda: plan_build(
        split_llama(Mesh(data=2, tensor=2)).at["**.o_proj.weight"].init(nn.init.orthogonal_).at["lm_head"].tag(group="head")
    ),
    "llama-no-weights": lambda: plan_build(split_llama(Mesh(data=2, tensor=2)), init_weights=False),
    "llama-dtensors": lambda: as_dtensors(plan_build(split_llama(Mesh(data=2, tensor=2)))),
    "llama-uneven": uneven,
    "llama-sequence": sequence,
    "llama-checkpoint": checkpoint,
    "llama-zero-2": lambda: plan_build(split_llama(Mesh(data=2, tensor=2)), target="deepspeed", config=zero(2, micro=2)),
    "llama-pipeline": deepspeed_pipeline,
    "gpt2-zero-3": lambda: gpt2(torch.bfloat16, Mesh(data=4), target="deepspeed", config=zero(3, "bf16")),
    "gpt2-zero-0": lambda: gpt2(torch.float32, Mesh(data=2, tensor=2), target="deepspeed", config=zero(0)),
    "mixtral-experts": experts,
    "row-1f1b": lambda: row(2, Mesh(pipe=2, data=2), target="torch", config={"num_microbatches": 4, **ADAMW}),
    "row-interleaved": lambda: row(
        4, Mesh(pipe=2), target="torch", config={"schedule": "interleaved_1f1b", "num_microbatches": 4, **ADAMW}
    ),
    "row-zero-1": lambda: row(2, Mesh(pipe=2, tensor=2), target="deepspeed", config=zero(1, micro=4)),
    "t5-gpipe": cut_t5,
}


def described(plan):
    """Return all that a plan says: its listing, its audit, and the receipt of each rank."""
    report = audit(plan, ranks_per_node=2, device_memory=2**20)
    return "\n\n".join(map(str, (plan, report, *(predict(plan, rank) for rank in range(plan.mesh.num_ranks))))) + "\n"
