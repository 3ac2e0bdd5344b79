"""Train a small Llama, split over ranks by a plan, and show its losses beside those of the unsplit model.

Run by ``make demo``, or by hand: ``torchrun --nproc-per-node 2 examples/train_llama.py``. With more ranks than
``TENSOR`` (2) the rest is data parallel. On CPUs the ranks talk over gloo, on GPUs over NCCL.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from shardplan.functional import Schedule, audit, create_schedule, execute, plan_build
from shardplan.specs import Mesh

NUM_STEPS = 10
BATCH, LENGTH, VOCAB = 4, 32, 1024
CLIP = 1.0


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
    return sch.at["lm_head"].colwise(gather_output=True)


def batch(step: int) -> torch.Tensor:
    """Return the tokens of one step: two batches in turn, each token the successor of the one before."""
    start = torch.randint(VOCAB, (BATCH, 1), generator=torch.Generator().manual_seed(step % 2))
    return (start + torch.arange(LENGTH)) % VOCAB


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of both runs."""
    return torch.optim.AdamW(parameters, lr=3e-3)


def train_alone() -> list[float]:
    """Return the losses of the unsplit model in this one process."""
    model, optimizer = execute(plan_build(split(make_model(), Mesh())), device="cpu", optimizer=adamw)
    losses: list[float] = []
    for step in range(NUM_STEPS):
        ids = batch(step)
        loss = model(input_ids=ids, labels=ids).loss
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

    tensor = int(os.environ.get("TENSOR", "2"))
    mesh = Mesh(data=world_size // tensor, tensor=tensor)
    ds_config = {
        "train_micro_batch_size_per_gpu": BATCH // mesh.data,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 1},
    }
    inputs = {"input_ids": torch.empty(BATCH, LENGTH, dtype=torch.long, device="meta")}
    plan = plan_build(split(make_model(), mesh), target="deepspeed", config=ds_config, example_inputs=inputs)
    if rank == 0:
        print(plan, audit(plan), sep="\n\n")

    built = execute(plan, optimizer=adamw)
    engine, _ = built
    if rank == 0:
        print(f"\n{built.receipt}\n\nstep  split   alone")
    share = BATCH // mesh.data
    first = mesh.coordinate(rank).data * share
    for step in range(NUM_STEPS):
        ids = batch(step)[first : first + share].to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"{step:>4}  {mean.item() / world_size:.4f}  {alone[step]:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
