"""Train a small Llama, split over ranks by a plan, and show its losses beside those of the unsplit model.

Run by ``make demo``, or by hand: ``torchrun --nproc-per-node 2 examples/train_llama.py``. ``PIPE`` (1) stages of ``TENSOR``
(2) ranks each; with more ranks the rest is data parallel. On CPUs the ranks talk over gloo, on GPUs over NCCL.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from shardplan.functional import Schedule, audit, create_schedule, execute, plan_build
from shardplan.specs import Mesh

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutputWithPast

NUM_STEPS = 10
BATCH, LENGTH, VOCAB = 4, 32, 1024
NUM_MICROBATCHES = 2
CLIP = 1.0
LEARNING_RATE = 3e-3


def make_model() -> LlamaForCausalLM:
    """Return a Llama with grouped-query attention on meta: no memory, no download."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCAB,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def split(model: LlamaForCausalLM, mesh: Mesh) -> Schedule:
    """Say how the model is split: Megatron's layout of attention and MLP, and the vocabulary."""
    sch = create_schedule(model, mesh)
    sch = sch.at["model.layers.*.self_attn.[qkv]_proj"].expect(12).colwise()
    sch = sch.at["model.layers.*.self_attn.o_proj"].expect(4).rowwise()
    sch = sch.at["model.layers.*.mlp.{gate,up}_proj"].expect(8).colwise()
    sch = sch.at["model.layers.*.mlp.down_proj"].expect(4).rowwise()
    sch = sch.at["model.embed_tokens"].vocab_parallel()
    sch = sch.at["lm_head"].colwise(gather_output=True)
    return sch.cut_evenly(mesh.pipe) if mesh.pipe > 1 else sch


def batch(step: int) -> torch.Tensor:
    """Return the tokens of one step: two batches in turn, each token the successor of the one before."""
    start = torch.randint(VOCAB, (BATCH, 1), generator=torch.Generator().manual_seed(step % 2))
    return (start + torch.arange(LENGTH)) % VOCAB


def loss_of(output: CausalLMOutputWithPast, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of each next token."""
    assert output.logits is not None, "the model returns logits"
    return cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of the run in one process; DeepSpeed makes the same one from its configuration."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE)


def train_alone() -> list[float]:
    """Return the losses of the unsplit model in this one process."""
    model, optimizer = execute(plan_build(split(make_model(), Mesh())), device="cpu", optimizer=adamw)
    losses: list[float] = []
    for step in range(NUM_STEPS):
        ids = batch(step)
        loss = loss_of(model(input_ids=ids), ids)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def main() -> None:
    """Plan, audit, execute, train; rank 0 prints."""
    on_gpu = torch.cuda.is_available()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    alone = train_alone() if rank == 0 else []  # before there is a process group: a plan for one rank needs none
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else every rank is told that DeepSpeed found no GPU
    dist.init_process_group("nccl" if on_gpu else "gloo")

    pipe, tensor = int(os.environ.get("PIPE", "1")), int(os.environ.get("TENSOR", "2"))
    mesh = Mesh(pipe=pipe, data=world_size // (pipe * tensor), tensor=tensor)
    num_steps = NUM_MICROBATCHES if pipe > 1 else 1
    rows = BATCH // (mesh.data * num_steps)
    ds_config = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": num_steps,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "torch_adam": True}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 2**18},  # elements; 2 GB by default
        "steps_per_print": NUM_STEPS + 1,
    }
    inputs = {"input_ids": torch.empty(rows, LENGTH, dtype=torch.long, device="meta"), "use_cache": False}
    plan = plan_build(split(make_model(), mesh), target="deepspeed", config=ds_config, example_inputs=inputs)
    if rank == 0:
        print(plan, audit(plan), sep="\n\n", flush=True)

    built = execute(plan, loss_fn=loss_of if pipe > 1 else None)
    engine, _ = built
    if rank == 0:
        print(f"\n{built.receipt}\n\nstep  split   alone")
    first = mesh.coordinate(rank).data * rows * num_steps
    for step in range(NUM_STEPS):
        ids = batch(step)[first : first + rows * num_steps].to(engine.device)
        if pipe > 1:
            loss = engine.train_batch(iter([(part, part) for part in ids.split(rows)]))
        else:
            loss = loss_of(engine(input_ids=ids), ids)
            engine.backward(loss)
            engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"{step:>4}  {mean.item() / world_size:.4f}  {alone[step]:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
