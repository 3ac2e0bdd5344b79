"""What a plan says of a micro-batch is what real ranks send and keep: call by call, byte by byte."""

from __future__ import annotations

from collections import Counter

import torch
from attrs import evolve
from torch.profiler import ProfilerActivity, profile, record_function

from shardplan.functional import execute, plan_build
from shardplan.specs import Mesh, dumps, loads
from tests.distributed.test_layouts import Fused, experts, fused, mixtral, repeated, sequence
from tests.functional.layout.test_microbatch import RealPass
from tests.helpers.models import llama, split_llama
from tests.helpers.ranks import results, run_ranks

IDS = torch.arange(16).view(2, 8)
SIZES = {"float": 4, "long int": 8}
OPS = {"c10d::allreduce_": "all_reduce", "c10d::allgather_": "all_gather", "c10d::reduce_scatter_": "reduce_scatter"}
CASES = {
    "plain": (lambda: split_llama(llama(), Mesh(data=2, tensor=2)), llama),
    "sequence": (lambda: sequence(Mesh(data=2, tensor=2)), lambda: llama(attention_bias=True, mlp_bias=True)),
    "repeated": (
        lambda: repeated(Mesh(tensor=4)),
        lambda: llama(num_key_value_heads=2, vocab_size=131, intermediate_size=90),
    ),
    "experts": (lambda: experts(Mesh(data=2, expert=2, tensor=2)), mixtral),
    "fused": (lambda: fused(Mesh(tensor=4)), Fused),  # a function of the user's joins its outputs by the package's operators
}
"""A schedule, and its model."""


def given(name):
    return {"ids" if name == "fused" else "input_ids": IDS}


def inside(module, path):
    """Let a module's calls, with what stands around them, be seen by the profiler under its path."""
    opened = []

    def enter(*_):
        opened.append(record_function(f"at {path}"))
        opened[-1].__enter__()

    module.register_forward_pre_hook(enter, prepend=True)
    module.register_forward_hook(lambda *_: opened.pop().__exit__(None, None, None))


def issued(events, num_ranks):
    """What gloo was asked for, by module and operator: how often, and the bytes of the whole tensors.

    An operator's messages begin after it; what gloo makes of a reduce-scatter are all-reduces of the parts.
    """
    num_calls, num_bytes, key = Counter(), Counter(), None
    modules = [event for event in events if event.name.startswith("at ")]
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.name in OPS:
            start = event.time_range.start
            around = [m for m in modules if m.time_range.start <= start <= m.time_range.end]
            key = max(around, key=lambda m: m.time_range.start).name[3:] if around else "", OPS[event.name]
            num_calls[key] += 1
        elif event.name.startswith("gloo:"):
            (shape,), (dtype,) = event.input_shapes, event.input_dtypes
            gathered = num_ranks if key[1] == "all_gather" else 1
            num_bytes[key] += gathered * torch.Size(shape).numel() * SIZES[dtype]
    return {key: (num, num_bytes[key]) for key, num in num_calls.items()}


def predicted(calls, direction):
    """The same, as a plan says it; of the backward pass the modules are not seen by the profiler."""
    num_calls, num_bytes = Counter(), Counter()
    for call in calls:
        if call.direction == direction:
            key = call.module if direction == "forward" else "", call.op
            num_calls[key] += call.num_calls
            num_bytes[key] += call.num_bytes
    return {key: (num, num_bytes[key]) for key, num in num_calls.items()}


def profiled(function, num_ranks):
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as seen:
        result = function()
    return result, issued(seen.events(), num_ranks)


def run(_, texts):
    """What one rank does: for each plan what it sends forward and backward, keeps, and has no gradient of."""
    return {name: _run(name, loads(text)) for name, text in texts.items()}


def _run(name, plan):
    module = execute(plan, CASES[name][1](), device="cpu", check_inputs=0).module  # a check sends too
    num_ranks = max(plan.mesh.tensor, plan.mesh.expert)
    for path in {call.module for call in plan.microbatch.calls}:
        inside(module.get_submodule(path), path)
    real, forward = profiled(lambda: RealPass(module, given(name), plan.microbatch.saved), num_ranks)
    without, backward = profiled(real.backward, num_ranks)
    return {"forward": forward, "backward": backward}, real.saved_of(plan.microbatch), without


def test_what_ranks_send_and_keep_is_what_the_plan_says():
    plans = {name: plan_build(make(), example_inputs=given(name)) for name, (make, _) in CASES.items()}
    ranks = results(run_ranks(run, 4, {name: dumps(plan) for name, plan in plans.items()}))
    for name, plan in plans.items():
        found = plan.microbatch
        for rank in ranks:
            sent, _, without = rank[name]
            assert sent == {way: predicted(found.calls, way) for way in ("forward", "backward")}, name
            assert without == found.without_gradient == (), name
        assert ranks[0][name][1] == tuple(map(with_offsets if name == "experts" else lambda one: one, found.saved)), name
    axes = {(call.mesh_axis, call.op, call.cargo) for plan in plans.values() for call in plan.microbatch.calls}
    assert axes == {
        *(("tensor", op, "activations") for op in OPS.values()),
        ("tensor", "all_reduce", "gradients"),
        ("expert", "all_gather", "activations"),
        ("expert", "reduce_scatter", "activations"),
        ("expert_data", "all_reduce", "gradients"),
    }


def with_offsets(saved):
    """What transformers' float32 stand-in for a grouped product hides: where the tokens of each of 2 experts end."""
    return evolve(saved, saved_bytes=saved.saved_bytes + (2 * 4 if saved.is_block else 0))
