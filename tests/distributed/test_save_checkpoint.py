"""Weights of real processes, saved: whole, once, in little memory; and a folder that is good whatever happens."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from shardplan.functional import create_schedule, execute, gather, plan_build, save_checkpoint
from shardplan.functional.checkpoints.detect import read_contents
from shardplan.functional.frontends import infer_schedule, schedule_from_tp_plan
from shardplan.functional.interpreter.world import ExecutionError
from shardplan.functional.saving import messages
from shardplan.specs import Mesh
from tests.helpers.families import MAKERS
from tests.helpers.models import llama, split_llama
from tests.helpers.ranks import results, run_ranks

MIB = 2**20
TENSOR_2 = Mesh(tensor=2)


def whole_model(name):
    """A model with values of its own, the same in all processes."""
    torch.manual_seed(1)
    if name == "odd sizes":
        return llama("cpu", num_key_value_heads=2, vocab_size=131, intermediate_size=90, use_cache=False)
    return MAKERS[name]()


def schedule(name, mesh):
    model = whole_model(name)
    if name == "odd sizes":  # a padded vocabulary, repeated heads, uneven and empty parts, blocks
        sch = create_schedule(model, mesh).at[""].trust("nothing is computed here")
        sch = sch.at["{lm_head,model.embed_tokens}.weight"].shard(axis=0, pad_to_multiple=8)
        sch = sch.at["**.[kv]_proj.weight"].shard(axis=0, granule=8, replicate=True)
        sch = sch.at["**.q_proj.weight"].shard(axis=1, interleaved=2, blocks=(16, 16), granule=8, replicate=True)
        sch = sch.at["**.gate_proj.weight"].shard(axis=0, blocks=(64, 26), uneven=True)
        sch = sch.at["**.up_proj.weight"].shard(axis=0, granule=45, uneven=True, allow_empty=True)
        sch = (
            sch.at["**.down_proj.weight"]
            .shard(axis=0)
            .at["**.down_proj.weight"]
            .shard(axis=1, uneven=True, mesh_axis="data")
        )
        for part in ("lm_head", "model.embed_tokens", "**.[qkv]_proj", "**.{gate,up,down}_proj"):
            sch = sch.at[part].silence("SP010", reason="nothing is computed here")
        return sch
    return (schedule_from_tp_plan if getattr(model, "_tp_plan", None) else infer_schedule)(model, mesh)


def plan_of(name, mesh, *_):
    return plan_build(schedule(name, mesh))


def save(rank, plan, name, mesh, folder, message_bytes):
    messages.MESSAGE_BYTES = message_bytes
    built = execute(plan, device="cpu", progress=False)
    save_checkpoint(plan, built.model, folder)
    return {path: tensor.clone() for path, tensor in gather(plan, built.model)}


def weights(folder):
    kinds = (".safetensors", ".index.json")
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name.endswith(kinds)}


@pytest.mark.parametrize(
    ("name", "mesh", "message_bytes"),
    [
        ("odd sizes", Mesh(data=2, tensor=4), 100),
        ("odd sizes", TENSOR_2, 32 * MIB),
        ("gpt2", TENSOR_2, 100),
        ("mixtral", Mesh(data=2, tensor=2), 100),
        ("gpt_neox", TENSOR_2, 32 * MIB),
        ("phi3", Mesh(tensor=4), 32 * MIB),
    ],
    ids=str,
)
def test_each_layout_is_saved_as_save_pretrained_saves_the_whole_model(name, mesh, message_bytes, tmp_path):
    model = whole_model(name)
    model.save_pretrained(tmp_path / "theirs")
    given = name, mesh, tmp_path / "ours", message_bytes
    first, *others = results(run_ranks(save, mesh.num_ranks, *given, shared=plan_of))
    assert weights(tmp_path / "ours") == weights(tmp_path / "theirs")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    whole = model.state_dict()
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[path], tensor) for path, tensor in whole.items())
    assert all(torch.equal(whole[path], tensor) for path, tensor in first.items())
    assert not any(others)


def save_engine(rank, mesh, folder):
    """Under ZeRO 3, which keeps parameters in pieces."""
    model = whole_model("odd sizes")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 100}
    config = {"train_batch_size": mesh.data, "zero_optimization": zero, "gradient_clipping": 0.0}
    plan = plan_build(split_llama(model, mesh), target="deepspeed", config=config)
    built = execute(plan, device="cpu", progress=False, optimizer=partial(torch.optim.AdamW, lr=0.1))
    save_checkpoint(plan, built.model, folder)
    return sum(parameter.numel() for parameter in built.module.parameters())


def test_pieces_of_zero_3_are_saved_whole(tmp_path):
    whole_model("odd sizes").save_pretrained(tmp_path / "theirs")
    kept = results(run_ranks(save_engine, 2, Mesh(data=2), tmp_path / "ours"))
    assert weights(tmp_path / "ours") == weights(tmp_path / "theirs")
    assert max(kept) < 10_000  # in pieces again


def save_without_some(rank, folder):
    """An optimizer that has trained a tensor on one rank alone."""
    plan = plan_build(create_schedule(nn.Sequential(nn.Linear(4, 4)), TENSOR_2).at["0"].colwise(gather_output=True))
    built = execute(plan, device="cpu", progress=False, optimizer=torch.optim.AdamW)
    if not rank:
        built.module[0].weight.grad = torch.ones_like(built.module[0].weight)
        built.optimizer.step()
    save_checkpoint(plan, built.model, folder, optimizer=built.optimizer)


def test_states_that_some_ranks_lack_are_told(tmp_path):
    for outcome in run_ranks(save_without_some, 2, tmp_path / "ours"):
        assert outcome.error.startswith(
            "ExecutionError: rank 1: PlanError: 2 problems\n  exp_avg/0.weight: the optimizer has"
        )
    assert not list(tmp_path.iterdir())


TIED = {"tie_word_embeddings": True, "use_cache": False}


def staged(mesh, folder):
    sch = split_llama(llama(**TIED), mesh).cut_evenly(mesh.pipe)
    return plan_build(
        sch,
        init_weights=True,
        target="torch",
        config={"num_microbatches": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}},
        example_inputs={"input_ids": torch.zeros(2, 8, dtype=torch.int64)},
    )


def save_stages(rank, plan, mesh, folder):
    built = execute(plan, device="cpu", progress=False, loss_fn=nn.functional.mse_loss)
    save_checkpoint(plan, built.model, folder)


def test_stages_are_saved_as_one_model_saves_what_the_plan_makes(tmp_path):
    mesh = Mesh(pipe=2, tensor=2)
    results(run_ranks(save_stages, mesh.num_ranks, mesh, tmp_path / "ours", shared=staged))
    alone = execute(plan_build(create_schedule(llama(**TIED), Mesh()), init_weights=True), device="cpu", progress=False)
    alone.module.save_pretrained(tmp_path / "theirs")
    assert weights(tmp_path / "ours") == weights(tmp_path / "theirs")


def leave(rank, plan, *_):
    built = execute(plan, device="cpu", progress=False)
    for path, _ in gather(plan, built.model):
        if path.endswith("ln_1.weight"):
            break
    return sum(1 for _ in gather(plan, built.model))


def test_rank_0_may_leave_the_loop_while_others_send_to_its_end():
    num = len(dict(whole_model("gpt2").named_parameters()))
    assert results(run_ranks(leave, 2, "gpt2", TENSOR_2, shared=plan_of)) == [num, 0]


LARGE = (5120, 4096)


def wide():
    """Ten tensors, two of them much larger than the others."""
    sizes = [(1024, 1024)] * 8 + [LARGE] * 2
    return nn.ModuleList(nn.Linear(*size, bias=False, device="meta") for size in sizes)


def plan_wide(mesh):
    sch = create_schedule(wide(), mesh).at["*.weight"].shard(axis=0)
    return plan_build(sch.at["*"].silence("SP010", reason="nothing is computed here"), init_weights=False)


def save_with(rank, folder, fault):
    """Save under a fault on rank 0; what a fault takes away is given back, for the outcome is to be written."""
    plan = plan_wide(TENSOR_2)
    built = execute(plan, device="cpu", progress=False)
    with torch.no_grad():
        for module in built.module:
            module.weight.fill_(3.0)
    give_back = fault(rank, built, folder)
    try:
        save_checkpoint(plan, built.model, folder)
    finally:
        give_back()


def nothing():
    pass


def full_disk(rank, built, folder):
    if rank:
        return nothing
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * MIB, resource.RLIM_INFINITY))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def no_permission(rank, built, folder):
    if rank:
        return nothing
    folder.parent.chmod(0o555)
    if os.geteuid():
        return lambda: folder.parent.chmod(0o755)
    os.seteuid(65534)  # nobody
    return lambda: os.seteuid(0)


def no_room(rank, built, folder):
    """Memory for the messages, and not for a large tensor."""
    warm_up(folder.parent)
    messages.MESSAGE_BYTES = MIB
    if rank:
        return nothing
    used = 1024 * int(
        next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line).split()[1]
    )
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + 64 * MIB, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, limits)


def foreign_folder(rank, built, folder):
    if not rank:
        folder.mkdir()
        (folder / "thesis.tex").write_text("years of work")
    return nothing


def other_model(rank, built, folder):
    if rank:
        built.model[3] = nn.Linear(7, 7)
    return nothing


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (full_disk, "rank 0: OSError: [Errno 27] File too large"),
        (no_permission, "rank 0: PermissionError: [Errno 13] Permission denied: "),
        (no_room, "rank 0: RuntimeError: [enforce fail at alloc_cpu.cpp"),
        (foreign_folder, "rank 0: PlanError: 1 problem"),
        (other_model, "rank 1: PlanError: 1 problem\n  3.weight  f32[1024@tensor, 1024]: the model has float32[7, 7]"),
    ],
)
def test_what_fails_on_one_rank_is_told_on_all_and_nothing_is_left(tmp_path, fault, text):
    for outcome in run_ranks(save_with, 2, tmp_path / "ours", fault):
        assert outcome.error.startswith(f"ExecutionError: {text}"), outcome.trace
    assert [path.name for path in tmp_path.iterdir()] == {foreign_folder: ["ours"], no_room: ["tiny"]}.get(fault, [])


def peak_of_saving(rank, folder):
    plan = plan_wide(TENSOR_2)
    built = execute(plan, device="cpu", progress=False)
    with torch.no_grad():
        for module in built.module:
            module.weight.fill_(3.0)
    warm_up(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    save_checkpoint(plan, built.model, folder / "ours")
    return resident("VmHWM") - before


def warm_up(folder):
    """Import and compile what takes memory once."""
    tiny = plan_build(create_schedule(nn.Linear(2, 2), TENSOR_2))
    save_checkpoint(tiny, execute(tiny, device="cpu", progress=False).model, folder / "tiny")


def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell a process its own peak")
def test_rank_0_needs_one_tensor_and_64_mib_beyond_its_shards_and_others_a_message(tmp_path):
    largest = LARGE[0] * LARGE[1] * 4
    first, other = results(run_ranks(peak_of_saving, 2, tmp_path))
    assert largest <= first <= largest + 64 * MIB
    assert other <= 64 * MIB


NUM_KILLS = 200


class Alternating:
    """A model whose weights are all 1 or all 2, a folder that it is saved to, and what the folder is each time."""

    def __init__(self, root):
        torch.manual_seed(1)
        self.folder = root / "runs" / "last"
        self.plan = plan_build(create_schedule(llama("cpu", num_hidden_layers=1), Mesh()))
        self.built = execute(self.plan, device="cpu", progress=False)
        self.known = [self.saved(root / str(which), which) for which in (0, 1)]

    def saved(self, folder, which):
        self.save(folder, which)
        return contents(folder)

    def save(self, folder, which):
        with torch.no_grad():
            for parameter in self.built.module.parameters():
                parameter.fill_(1.0 + which)
        save_checkpoint(self.plan, self.built.model, folder)

    def child(self, job):
        """Run a job in a process of its own; return its number."""
        number = os.fork()
        if number:
            return number
        try:
            job()
        finally:
            os._exit(1)

    def which(self):
        """Tell which of the two the folder holds; it is whole, as a reader sees it."""
        assert read_contents(str(self.folder)).tensors.keys()
        return self.known.index(contents(self.folder))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def kill_at_random(rank, root, seed):
    """Kill saving processes again and again; return the contents after each, and how many saves were cut short.

    A busy machine may let few saves begin, or most of them end, before a kill: there are 200 kills, and more until enough of
    them have hit.
    """
    pair = Alternating(root)
    start = time.monotonic()
    for which in (0, 1, 0, 1):
        pair.save(pair.folder, which)
    duration = (time.monotonic() - start) / 4
    rng, seen, interrupted = random.Random(seed), [], 0

    def enough():
        return len(seen) >= NUM_KILLS and interrupted > NUM_KILLS // 4 and min(map(seen.count, (0, 1))) > NUM_KILLS // 10

    def forever(first):
        for number in count(first):
            pair.save(pair.folder, number % 2)

    for number in count():
        if enough():
            break
        child = pair.child(lambda first=number: forever(first))
        time.sleep(rng.uniform(0, 2.5 * duration))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        seen.append(pair.which())
        interrupted += pair.folder.with_name(".last.partial").exists()
    pair.save(pair.folder, 0)
    return seen, interrupted, sorted(path.name for path in pair.folder.parent.iterdir())


def test_killed_at_random_200_times_the_folder_is_one_of_the_two_that_were_saved(tmp_path):
    ((seen, interrupted, left),) = results(run_ranks(kill_at_random, 1, tmp_path, 0))
    assert len(seen) >= NUM_KILLS
    assert interrupted > NUM_KILLS // 4
    assert min(seen.count(0), seen.count(1)) > NUM_KILLS // 10
    assert left == ["last"]


_CHANGES = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.scandir",
    "os.listdir",
    "ctypes.dlsym",
    "shutil.rmtree",
}
"""What a process says to its audit hooks before it changes files."""


def save_and_die(pair, which, number):
    """Save, and be killed before a change of a file."""
    left = [number]

    def hook(event, _):
        if event in _CHANGES:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    sys.addaudithook(hook)
    pair.save(pair.folder, which)
    os._exit(0)


def kill_before_each_change(rank, root):
    """Kill a saving process before the first thing that it does to files, before the second, and so on to its end."""
    pair = Alternating(root)
    pair.save(pair.folder, 0)
    seen, before, status = [], 0, -1
    for number in count():
        status = os.waitpid(pair.child(partial(save_and_die, pair, 1 - before, number)), 0)[1]
        found = pair.which()
        seen.append(found != before)
        before = found
        if os.WIFEXITED(status):
            break
    return os.waitstatus_to_exitcode(status), seen


def test_killed_before_each_change_of_a_file_the_folder_is_the_old_or_the_new_one(tmp_path):
    ((code, seen),) = results(run_ranks(kill_before_each_change, 1, tmp_path))
    assert code == 0
    assert len(seen) > 20
    assert seen == sorted(seen)  # the old one up to some moment, the new one from then on
    assert 2 <= sum(seen) < len(seen) - 5


class Unsendable(torch.Tensor):
    """A part whose rank has no memory left to send it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.contiguous:
            msg = "no memory left"
            raise RuntimeError(msg)
        return super().__torch_function__(function, types, args, kwargs or {})


def failing_sender(rank, folder):
    plan = plan_build(split_llama(llama(num_key_value_heads=4), Mesh(tensor=2)))
    model = execute(plan, device="cpu").model
    if rank == 1:
        layer = model.model.layers[1].mlp.up_proj
        layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Unsendable))
    told = []
    for action in (lambda: save_checkpoint(plan, model, folder / "last"), lambda: list(gather(plan, model))):
        with pytest.raises(ExecutionError) as caught:
            action()
        told.append(str(caught.value))
    return told


def test_a_rank_that_cannot_send_is_told_on_all_and_nothing_is_left(tmp_path):
    first, second = results(run_ranks(failing_sender, 2, tmp_path))
    assert first == second == ["rank 1: RuntimeError: no memory left"] * 2
    assert list(tmp_path.iterdir()) == []
