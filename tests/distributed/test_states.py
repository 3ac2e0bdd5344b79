"""What a plan says of training is what runtimes allocate and send, in real processes."""

from __future__ import annotations

import gc
from collections import Counter
from functools import cache

import pytest
import torch
from attrs import field, frozen
from torch import nn
from torch.nn.functional import cross_entropy

from shardplan.functional import create_schedule, execute, plan_build
from shardplan.functional.auditing.traffic import expert_sums
from shardplan.functional.dialects import dialect_of
from shardplan.specs import Mesh
from shardplan.specs.steps import SumTied
from tests.distributed.test_layouts import experts
from tests.helpers.models import Plain, llama
from tests.helpers.ranks import results, run_ranks
from tests.helpers.runtime_probe import Messages, crossing, kinds, live

ROWS, LENGTH, MICRO = 2, 6, 4
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
MOMENTUM = {"optimizer": {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}}}
SCALARS = 320
"""Bytes of tokens, losses, flags and counters: what else is alive after a step."""


def deepspeed(stage, dtype=None, kind="AdamW", micro=1, zero=None, **more):
    """A configuration with small buckets, and torch's own Adam: DeepSpeed's would be compiled first."""
    params = {"lr": 1e-3, "torch_adam": True} if kind.startswith("Adam") else {"lr": 1e-3}
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": micro,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 3000, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": kind, "params": {**params, **more.pop("params", {})}},
        **({dtype: {"enabled": True}} if dtype else {}),
        **more,
    }


FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
SMALL = {"stage3_param_persistence_threshold": 100}
GATHER_AGAIN = {**SMALL, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "sub_group_size": 1000}


@frozen
class Case:
    """What is trained, on which ranks, and by what."""

    name: str
    target: str | None
    config: dict | None = field(eq=repr)
    mesh: Mesh = field(factory=lambda: Mesh(data=2))
    dtype: str = "float32"
    model: str = "plain"
    num_stages: int = 0

    def plan(self):
        ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
        if self.model == "plain":
            with torch.device("meta"):
                sch = create_schedule(Plain(63, 15).to(getattr(torch, self.dtype)), self.mesh)
            return plan_build(sch, target=self.target, config=self.config)
        if self.model == "experts":
            return plan_build(experts(self.mesh), target=self.target, config=self.config)
        if self.model == "llama":
            model = llama(num_hidden_layers=2, use_cache=False, tie_word_embeddings=True)
            sch = create_schedule(model, self.mesh).cut_evenly(self.num_stages)
            example = {"input_ids": ids, "attention_mask": ids}
            return plan_build(sch, target=self.target, config=self.config, example_inputs=example)
        model = row(self.num_stages).to(getattr(torch, self.dtype))
        sch = create_schedule(model, self.mesh)
        for number in range(self.num_stages - 1):
            sch = sch.at[str(2 * number + 1)].cut_pipeline_stage()
        if self.mesh.tensor > 1:
            sch = sch.at["1.0"].colwise().at["1.2"].rowwise()
        return plan_build(sch, target=self.target, config=self.config, example_inputs={"input": ids})


def row(num_stages):
    """Modules one after another, two to a stage, the first and the last of which share their weights."""
    with torch.device("meta"):
        inner = [module for _ in range(num_stages - 1) for module in (mlp(), mlp())]
        model = nn.Sequential(nn.Embedding(64, 16), *inner, nn.Linear(16, 64, bias=False))
        model[-1].weight = model[0].weight
    return model


def mlp():
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))


WHOLE = [
    Case("alone", None, None),
    Case("torch adamw", "torch", ADAMW),
    Case("torch momentum bf16", "torch", MOMENTUM, dtype="bfloat16"),
    Case("zero 0", "deepspeed", deepspeed(0)),
    Case("zero 0 bf16", "deepspeed", deepspeed(0, "bf16", "SGD", params={"momentum": 0.9}), dtype="bfloat16"),
    Case("zero 1 amsgrad", "deepspeed", deepspeed(1, None, "Adam", 2, params={"amsgrad": True})),
    Case("zero 1 bf16", "deepspeed", deepspeed(1, "bf16"), dtype="bfloat16"),
    Case("zero 1 bf16 summed in fp32", "deepspeed", deepspeed(1, "bf16", **FP32_SUMS), dtype="bfloat16"),
    Case("zero 1 over no data", "deepspeed", deepspeed(1), Mesh(tensor=2)),
    Case("zero 2 sgd", "deepspeed", deepspeed(2, None, "SGD")),
    Case("zero 2 bf16", "deepspeed", deepspeed(2, "bf16", micro=2), dtype="bfloat16"),
    Case("zero 2 bf16 summed in fp32", "deepspeed", deepspeed(2, "bf16", **FP32_SUMS), dtype="bfloat16"),
    Case("zero 3", "deepspeed", deepspeed(3, zero=SMALL)),
    Case("zero 3 bf16", "deepspeed", deepspeed(3, "bf16", micro=2, zero=GATHER_AGAIN), dtype="bfloat16"),
    Case("zero 3 over no data", "deepspeed", deepspeed(3, zero=SMALL), Mesh(tensor=2)),
]


def torch_pipeline(**more):
    return {"num_microbatches": MICRO, **ADAMW, **more}


CUT = [
    Case("1f1b", "torch", torch_pipeline(), Mesh(pipe=2), "float32", "llama", 2),
    Case("gpipe", "torch", torch_pipeline(schedule="gpipe"), Mesh(pipe=2), "float32", "row", 2),
    Case("interleaved", "torch", torch_pipeline(schedule="interleaved_1f1b"), Mesh(pipe=2), "float32", "row", 4),
    Case("deepspeed", "deepspeed", deepspeed(1, micro=MICRO), Mesh(pipe=2), "float32", "llama", 2),
    Case("deepspeed bf16", "deepspeed", deepspeed(0, "bf16", "SGD", MICRO), Mesh(pipe=2), "bfloat16", "row", 2),
]
FOUR = [
    Case("1f1b, data", "torch", torch_pipeline(), Mesh(pipe=2, data=2), "float32", "row", 2),
    Case("deepspeed over 4", "deepspeed", deepspeed(1, micro=MICRO), Mesh(pipe=4), "float32", "row", 4),
    Case("deepspeed, data", "deepspeed", deepspeed(1, micro=MICRO), Mesh(pipe=2, data=2), "float32", "row", 2),
    Case("parts", "deepspeed", deepspeed(1, micro=MICRO), Mesh(pipe=2, tensor=2), "float32", "row", 2),
    Case("experts", "torch", ADAMW, Mesh(data=4, expert=2), model="experts"),
]


class Observer:
    """One rank, looked at while it trains."""

    def __init__(self, plan, rank):
        self.plan, self.here = plan, plan.mesh.coordinate(rank)
        gc.collect()
        gc.freeze()  # what is alive is looked at no more
        loss = self.loss if plan.pipeline else None
        self.built = execute(plan, device="cpu", progress=False, loss_fn=loss)
        self.gradients, self.buckets, self.crossing, self.kept = 0, {}, Counter(), Counter()
        self.is_watching = False
        for name in ("allreduce_gradients", "_bf16_reduce_grads"):
            if hasattr(self.built.model, name):
                self.look_before(name)

    def loss(self, output, target):
        self.look_at_crossing()
        return cross_entropy(getattr(output, "logits", output).flatten(0, 1).float(), target.flatten())

    def look_before(self, name):
        reduce = getattr(self.built.model, name)

        def looked(*args, **kwargs):
            self.look_at_gradients()
            return reduce(*args, **kwargs)

        setattr(self.built.model, name, looked)

    def look_at_gradients(self):
        self.gradients = sum(kinds(self.built)["gradients"].values())

    def look_at_message(self, op, message):
        """What of a reduction is a copy, beside the buckets that are there."""
        self.look_at_crossing()
        if op not in {"all_reduce", "reduce_scatter"}:
            return
        found = kinds(self.built)
        known = {address for kind in ("parameters", "gradients", "states", "masters") for address in found[kind]}
        fresh = {address: size for address, size in message.items() if address not in known}
        now = found["buckets"] | fresh
        if sum(now.values()) > sum(self.buckets.values()):
            self.buckets = now

    def look_at_crossing(self):
        if not (self.is_watching and self.plan.pipeline):
            return
        for kind, found in crossing(self.built, self.here.pipe).items():
            self.crossing[kind] = max(self.crossing[kind], sum(found.values()))
        for schedule in getattr(self.built.model, "_schedules", {}).values():
            for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
                self.kept[stage.stage_index] = max(self.kept[stage.stage_index], len(stage.fwd_cache))
        if hasattr(self.built.model, "pipe_buffers"):
            slots = self.built.model.pipe_buffers["inputs" if self.here.pipe else "outputs"]
            self.kept[self.here.pipe] = max(self.kept[self.here.pipe], sum(slot is not None for slot in slots))

    def step(self):
        model, optimizer = self.built
        num = dialect_of(self.plan.target).training(self.plan).num_microbatches
        generator = torch.Generator().manual_seed(self.here.data)
        ids = torch.randint(1, 60, (ROWS * num, LENGTH), generator=generator)
        if self.plan.pipeline:
            inputs = (ids, torch.ones_like(ids))[: len(self.plan.stages[0].inputs)]
            if self.plan.target == "deepspeed":
                chunks = [tuple(t[ROWS * n : ROWS * (n + 1)] for t in (*inputs, ids)) for n in range(num)]
                model.train_batch(iter([(some[:-1] if len(some) > 2 else some[0], some[-1]) for some in chunks]))
            else:
                model.train_batch(*inputs, target=ids)
                self.look_at_gradients()
                optimizer.step()
                optimizer.zero_grad()
            return
        for some in ids.split(ROWS):
            output = model(some)
            loss = getattr(output, "logits", output).float().square().mean()
            if self.plan.target == "deepspeed":
                model.backward(loss)
                stage = self.plan.config["zero_optimization"]["stage"]
                if stage > 1:
                    self.look_at_gradients()
                model.step()
            else:
                loss.backward()
                self.look_at_gradients()
        if self.plan.target != "deepspeed" and optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    def observe(self):
        """Train three steps, as ZeRO 3 and DDP arrange their messages in the first two; look at the third."""
        self.step()
        self.step()
        self.is_watching = True
        with Messages(self.look_at_message, tuple(self.here.group("expert_data"))) as messages:
            self.step()
        self.is_watching = False
        found = kinds(self.built)
        total = {kind: sum(some.values()) for kind, some in found.items()}
        known = {address for some in found.values() for address in some} | set(self.buckets)
        return {
            "parameters": total["parameters"],
            "gradients": self.gradients,
            "optimizer": total["states"],
            "masters": total["masters"],
            "buckets": sum(self.buckets.values()),
            "crossing": sum(self.crossing.values()),
            "kept": dict(self.kept),
            "sent": {key: size for key, size in messages.sent.items() if size},
            "left": {} if self.plan.pipeline else {k: v for k, v in live().items() if k not in known},
        }


def predicted(plan, rank):
    here = plan.mesh.coordinate(rank)
    dialect = dialect_of(plan.target)
    state = dialect.state(plan, here)
    sent = Counter()
    for row in (*dialect.messages(plan, here), *expert_sums(plan, here, dialect.training(plan).num_microbatches)):
        group = "pair" if row.op == "send" else tuple(here.group(row.mesh_axis))
        if row.mesh_axis == "pipe" and row.op == "all_reduce":
            (between,) = {step.between for step in plan.steps if isinstance(step, SumTied)}
            group = tuple(group[place] for place in between)
        sent[row.op, group] += row.num_bytes
    kept = range(here.pipe, len(plan.stages), plan.mesh.pipe)
    return {
        "parameters": state.parameter_bytes,
        "gradients": state.gradient_bytes,
        "optimizer": state.optimizer_bytes,
        "masters": state.master_bytes,
        "buckets": state.bucket_bytes,
        "crossing": state.boundary_bytes,
        "kept": {stage: dialect.in_flight(plan, stage) for stage in kept},
        "sent": {key: size for key, size in sent.items() if key[1] == "pair" or len(key[1]) > 1},
    }


def plans_of(cases):
    """Plan all cases before any of them runs: ZeRO 3 puts another linear function in torch's place."""
    return [case.plan() for case in cases]


def look(rank, plans, _):
    return [(predicted(plan, rank), Observer(plan, rank).observe()) for plan in plans]


@cache
def looked(num_ranks):
    """Return for each case what was predicted and found on each rank; one run serves many tests."""
    cases = FOUR if num_ranks > 2 else [*WHOLE, *CUT]
    by_rank = results(run_ranks(look, num_ranks, cases, shared=plans_of))
    return dict(zip(cases, zip(*by_rank, strict=True), strict=True))


def pairs(case):
    return looked(case.mesh.num_ranks)[case]


NAMES = {"ids": lambda case: case.name}


@pytest.mark.parametrize("case", [*WHOLE, *CUT, *FOUR], **NAMES)
def test_a_rank_keeps_what_the_plan_says(case):
    for rank, (said, found) in enumerate(pairs(case)):
        for kind in ("parameters", "optimizer", "masters", "gradients"):
            assert found[kind] == said[kind], f"{kind} on rank {rank}"
        assert sum(found["left"].values()) <= SCALARS, found["left"]


@pytest.mark.parametrize("case", [*WHOLE, *CUT, *FOUR], **NAMES)
def test_gradients_are_copied_into_the_buckets_that_the_plan_says(case):
    assert [found["buckets"] for _, found in pairs(case)] == [said["buckets"] for said, _ in pairs(case)]


@pytest.mark.parametrize("case", [*WHOLE, *CUT, *FOUR], **NAMES)
def test_a_step_sends_what_the_plan_says(case):
    for rank, (said, found) in enumerate(pairs(case)):
        assert found["sent"] == said["sent"], f"rank {rank}"


@pytest.mark.parametrize("case", [*CUT, *(case for case in FOUR if case.num_stages)], **NAMES)
def test_a_pipeline_keeps_as_many_micro_batches_and_what_crosses_as_the_plan_says(case):
    for rank, (said, found) in enumerate(pairs(case)):
        assert found["kept"] == said["kept"], f"rank {rank}"
        assert found["crossing"] == said["crossing"], f"rank {rank}"
