"""Stages on real processes: trained as in one process, each rank with its own stage's tensors alone."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from attrs import frozen
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from shardplan.functional import create_schedule, execute, plan_build, predict, resolve
from shardplan.functional.interpreter import work
from shardplan.specs import Mesh, dumps, loads
from tests.helpers.models import llama, schedule, split_llama, split_t5, t5
from tests.helpers.ranks import results, run_each, run_ranks
from tests.helpers.tensor_parts import picked
from tests.helpers.training import (
    BF16_ADAMW,
    CLIP,
    LENGTH,
    NUM_STEPS,
    adamw,
    batch,
    loss_of,
    train_alone,
    train_alone_in_bf16,
)

MICRO, ROWS = 4, 2
"""Micro-batches of a step, and the rows of each."""


def tied_llama(device="meta", num_layers=4):
    return llama(device, num_hidden_layers=num_layers, tie_word_embeddings=True, use_cache=False)


MAKE = {"llama": (tied_llama, split_llama), "t5": (t5, split_t5)}
T5_CUTS = {
    2: ("encoder.block.0",),
    4: ("encoder.block.0", "encoder.block.1", "decoder.block.0"),
}


def cut(name, mesh, num_stages, model=None):
    make, split = MAKE[name]
    model = make() if model is None else model
    sch = split(model, mesh) if mesh.tensor > 1 else create_schedule(model, mesh)
    if name == "llama":
        return sch.cut_evenly(num_stages)
    for path in T5_CUTS[num_stages]:
        sch = sch.at[path].cut_pipeline_stage()
    return sch


def example(name):
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :7]} if name == "t5" else {"attention_mask": ids})}


def data(name, step, rows):
    """Return a step's inputs, in the order of the example, and what the model is to say."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 60, (rows, LENGTH), generator=generator)
    if name == "t5":
        return (ids, ids[:, :7].contiguous()), ids[:, :7] + 1
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % MICRO] = 0
    return (ids, mask), ids + 1


def loss(output, target):
    return cross_entropy(output.logits.flatten(0, 1).float(), target.flatten())


def parts(inputs, target, rows):
    """Iterate over micro-batches."""
    for start in range(0, len(target), rows):
        yield tuple(t[start : start + rows] for t in inputs), target[start : start + rows]


@frozen
class Case:
    """A model, the ranks that it is trained on, and by what."""

    name: str
    mesh: Mesh
    target: str
    schedule: str = "1f1b"
    num_stages: int = 0

    def plan(self):
        sch = cut(self.name, self.mesh, self.num_stages or self.mesh.pipe)
        return plan_build(sch, target=self.target, config=self.config, example_inputs=example(self.name))

    @property
    def config(self):
        if self.target == "torch":
            return {"schedule": self.schedule, "num_microbatches": MICRO}
        if self.name == "t5" and self.mesh.tensor > 1:  # two gradients come back over its boundary
            return deepspeed_config(pipeline={"pipe_partitioned": False, "grad_partitioned": False})
        return deepspeed_config()

    def __str__(self):
        sizes = [f"{axis}{self.mesh.num(axis)}" for axis in ("pipe", "data", "tensor") if self.mesh.num(axis) > 1]
        return "-".join([self.name, *sizes, self.target, *([] if self.schedule == "1f1b" else [self.schedule])])


def deepspeed_config(**more):
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": MICRO,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 1},
        **more,
    }


MESHES = (Mesh(pipe=2), Mesh(pipe=2, data=2), Mesh(pipe=2, tensor=2), Mesh(pipe=4))
CASES = [
    *(Case("llama", mesh, target) for mesh in MESHES for target in ("deepspeed", "torch")),
    Case("t5", Mesh(pipe=2), "torch"),
    Case("t5", Mesh(pipe=2, tensor=2), "deepspeed"),
    Case("t5", Mesh(pipe=4), "deepspeed"),
    Case("llama", Mesh(pipe=2), "torch", "gpipe"),
    *(Case(name, Mesh(pipe=2), "torch", "interleaved_1f1b", 4) for name in MAKE),
]


def train_step(built, inputs, target, is_deepspeed):
    """Train one step; return the loss, and the gradient's norm before it is clipped."""
    model, optimizer = built
    if is_deepspeed:
        found = model.train_batch(parts(inputs, target, ROWS))
        return found.item(), float(built.grad_norm())
    found = model.train_batch(*inputs, target=target)
    norm = built.clip_grad_norm_(CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return found.item(), norm.item()


def local_state(modules):
    """Return the tensors of some stages, by path."""
    return {
        path: tensor
        for module in modules
        for path, tensor in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    }


def train_stages(rank, plan, case):
    if (case.name, case.target) == ("t5", "torch"):  # every rank plans for itself, as the script of a user does
        plan = case.plan()
    built = execute(plan, device="cpu", optimizer=adamw, loss_fn=loss, progress=False)
    state = local_state(built.modules)
    first = {path: tensor.detach().clone() for path, tensor in state.items()}
    place, rows = case.mesh.coordinate(rank).data, MICRO * ROWS
    steps = []
    for step in range(NUM_STEPS):
        inputs, target = data(case.name, step, rows * case.mesh.data)
        mine = slice(place * rows, (place + 1) * rows)
        steps.append(train_step(built, [t[mine] for t in inputs], target[mine], case.target == "deepspeed"))
    return {
        "steps": steps,
        "first": first,
        "final": {path: tensor.detach().clone() for path, tensor in state.items()},
        "bytes": sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()}.values()),
        "numbers": [module._shardplan.number for module in built.modules],
        "receipt": built.receipt,
        "plan": dumps(plan) if rank == 0 else None,
    }


@cache
def trained_alike(name, tensor):
    """Return what the ranks of each case of a model ended with; they have one export, and one run serves many tests."""
    cases = [case for case in CASES if (case.name, case.mesh.tensor) == (name, tensor)]
    launches = [(case.mesh.num_ranks, (case,)) for case in cases]
    return dict(zip(cases, run_each(train_stages, launches, shared=Case.plan), strict=True))


def trained(case):
    return trained_alike(case.name, case.mesh.tensor)[case]


@cache
def planned(case):
    """Return the plan that the ranks made; it is not made again here."""
    return loads(results(trained(case))[0]["plan"])


@cache
def made_alone(name):
    return execute(plan_build(create_schedule(MAKE[name][0](), Mesh())), device="cpu").module


@cache
def trained_alone(name, num_data):
    """Return losses and norms of the uncut model in one process, by torch alone."""
    model = MAKE[name][0]("cpu")
    model.load_state_dict(made_alone(name).state_dict())
    model.train()
    optimizer = adamw(model.parameters())
    steps = []
    for step in range(NUM_STEPS):
        inputs, target = data(name, step, MICRO * ROWS * num_data)
        named = [dict(zip(example(name), some, strict=True)) for some, _ in parts(inputs, target, ROWS)]
        targets = [some for _, some in parts(inputs, target, ROWS)]
        mean = sum(loss(model(**some), t) for some, t in zip(named, targets, strict=True)) / len(targets)
        mean.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        steps.append((mean.item(), norm.item()))
        optimizer.step()
        optimizer.zero_grad()
    return steps


def index_of(spec, coordinate):
    return picked(spec.index(coordinate))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradient_norms_are_those_of_one_process(case):
    expected = trained_alone(case.name, case.mesh.data)
    assert all(norm > CLIP for _, norm in expected), "clipping is to matter"
    assert expected[-1][0] < expected[0][0]
    for one in results(trained(case)):
        for step, (found, (loss_alone, norm_alone)) in enumerate(zip(one["steps"], expected, strict=True)):
            assert found[0] == pytest.approx(loss_alone, rel=1e-4), f"loss of step {step}"
            assert found[1] == pytest.approx(norm_alone, rel=1e-3), f"norm of step {step}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_copies_of_a_tensor_stay_bit_equal(case):
    plan, ranks = planned(case), results(trained(case))
    shared = [spec for spec in plan.tree.values() if len(spec.places(case.mesh)) > 1 and spec.kind == "parameter"]
    assert shared
    for spec in plan.tree.values():
        if spec.kind != "parameter":
            continue
        whole = torch.full(spec.orig_shape, torch.nan)
        for rank, one in enumerate(ranks):
            coordinate = case.mesh.coordinate(rank)
            held = [one["final"][path] for path in spec.paths if path in one["final"]]
            assert bool(held) == (coordinate.pipe in spec.places(case.mesh))
            for tensor in held:
                seen = whole[index_of(spec, coordinate)]
                assert seen.isnan().all() or torch.equal(seen, tensor), f"{spec.path} on rank {rank}"
                whole[index_of(spec, coordinate)] = tensor
        assert not whole.isnan().any()
    embedding = next(spec for spec in shared if spec.tie)
    path = next(path for path in embedding.paths if path in ranks[0]["final"])
    assert not torch.equal(ranks[0]["final"][path], ranks[0]["first"][path])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rank_holds_and_receives_the_tensors_of_its_stages_alone(case):
    plan = planned(case)
    for rank, one in enumerate(results(trained(case))):
        here = case.mesh.coordinate(rank)
        assert one["numbers"] == list(range(here.pipe, len(plan.stages), case.mesh.pipe))
        mine = {path for spec in plan.tree.values() if here.pipe in spec.places(case.mesh) for path in spec.paths}
        assert set(one["final"]) <= mine
        own_bytes = sum(spec.local_bytes(here) for spec in plan.tree.values() if here.pipe in spec.places(case.mesh))
        assert one["bytes"] == one["receipt"].held_bytes == own_bytes
        for step in plan.steps:
            task = resolve(step, here, plan.tree)
            if isinstance(task, work.Message):
                assert {piece.path for piece in task.pieces} <= mine


@pytest.mark.parametrize("case", CASES, ids=str)
def test_receipts_are_the_predicted_ones(case):
    plan = planned(case)
    assert [one["receipt"] for one in results(trained(case))] == [predict(plan, n) for n in range(case.mesh.num_ranks)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_first_weights_are_those_of_the_uncut_model(case):
    plan, whole = planned(case), local_state([made_alone(case.name)])
    for rank, one in enumerate(results(trained(case))):
        for path, tensor in one["first"].items():
            spec = plan.tree[path]
            assert torch.equal(tensor, whole[path][index_of(spec, case.mesh.coordinate(rank))]), path


# -- values


def frames(weight):
    """Init code that no rank can run for its part alone."""
    nn.init.orthogonal_(weight)


def weights_schedule(kind, mesh, model=None):
    model = tied_llama(num_layers=2) if model is None else model
    sch = split_llama(model, mesh) if mesh.tensor > 1 else create_schedule(model, mesh)
    if kind == "opaque":
        sch = sch.at["model.embed_tokens.weight"].init(frames).at["model.layers.1.mlp.up_proj.weight"].init(frames)
    return sch.cut_evenly(mesh.pipe) if mesh.pipe > 1 else sch


STRATEGIES = ("local", "scatter", "broadcast")


def plan_weights(kind, mesh, rank=0):
    """The plan of each strategy; with a model of the rank's own, where it comes with values."""
    torch.manual_seed(rank)
    sch = weights_schedule(kind, mesh, tied_llama("cpu" if kind == "own" else "meta", 2))
    return [plan_build(sch, strategy=strategy, example_inputs=example("llama")) for strategy in STRATEGIES]


def make_weights(rank, plans, kind, mesh):
    found = []
    for plan in plan_weights(kind, mesh, rank) if kind == "own" else plans:
        built = execute(plan, device="cpu", progress=False)
        assert built.receipt == predict(plan, rank)
        found.append({path: tensor.detach() for path, tensor in local_state(built.modules).items()})
    return found


WEIGHTS = [
    *((kind, mesh) for kind in ("programs", "opaque") for mesh in (Mesh(pipe=2, tensor=2), Mesh(pipe=2, data=2))),
    ("own", Mesh(pipe=2, tensor=2)),
]


@cache
def made():
    """Return what the ranks of each of these ended with."""
    launches = [(mesh.num_ranks, (kind, mesh)) for kind, mesh in WEIGHTS]
    return dict(zip(WEIGHTS, run_each(make_weights, launches, shared=plan_weights), strict=True))


@pytest.mark.parametrize(("kind", "mesh"), WEIGHTS[:-1], ids=str)
def test_weights_are_those_of_one_process_with_every_strategy(kind, mesh):
    alone = local_state([execute(plan_build(weights_schedule(kind, Mesh())), device="cpu").module])
    tree = weights_schedule(kind, mesh).tree
    for rank, by_strategy in enumerate(results(made()[kind, mesh])):
        for strategy, local in zip(STRATEGIES, by_strategy, strict=True):
            for path, tensor in local.items():
                whole = alone[path][index_of(tree[path], mesh.coordinate(rank))]
                assert torch.equal(tensor, whole), f"{path} on rank {rank} by {strategy}"


@pytest.mark.parametrize("kind", ["opaque", "own"])
def test_both_stages_of_a_tie_get_the_same_values(kind):
    mesh = Mesh(pipe=2, tensor=2)
    ranks = results(made()[kind, mesh])
    for number in range(len(STRATEGIES)):
        for tensor in range(mesh.tensor):
            first, last = ranks[tensor][number], ranks[mesh.tensor + tensor][number]
            assert torch.equal(first["model.embed_tokens.weight"], last["lm_head.weight"])
            assert first["model.embed_tokens.weight"].std() > 0


def test_values_that_models_came_with_are_those_of_the_first_rank_of_each_stage():
    mesh = Mesh(pipe=2, tensor=2)
    tree = weights_schedule("own", mesh).tree
    whole = []
    for rank in range(mesh.num_ranks):
        torch.manual_seed(rank)
        whole.append(local_state([tied_llama("cpu", 2)]))
    for rank, by_strategy in enumerate(results(made()["own", mesh])):
        coordinate = mesh.coordinate(rank)
        for local in by_strategy:
            for path, tensor in local.items():
                owner = 0 if coordinate.pipe == 0 or path == "lm_head.weight" else mesh.tensor
                assert torch.equal(tensor, whole[owner][path][index_of(tree[path], coordinate)]), path


# -- other ways to train


class Skips(nn.Module):
    """The frozen embedding is in the first stage, and the second stage uses it too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.embed.weight.requires_grad_(False)
        self.up = nn.Linear(16, 16)
        self.down = nn.Linear(16, 64)

    def forward(self, ids):
        x = self.embed(ids)
        return self.down(self.up(x).tanh() + x)


def token_loss(output, target):
    return cross_entropy(output.flatten(0, 1), target.flatten())


def skips_batch(step):
    ids = torch.randint(60, (MICRO * ROWS, 6), generator=torch.Generator().manual_seed(step))
    return (ids,), ids + 1


def train_frozen(rank, target):
    config = deepspeed_config() if target == "deepspeed" else {"num_microbatches": MICRO}
    with torch.device("meta"):
        sch = create_schedule(Skips(), Mesh(pipe=2)).at["up"].cut_pipeline_stage()
    plan = plan_build(sch, target=target, config=config, example_inputs={"ids": skips_batch(0)[0][0][:ROWS]})
    crossing = [(output.shape, output.requires_grad) for output in plan.stages[0].outputs]
    assert crossing == [(("batch", "sequence", 16), True), (("batch", "sequence", 16), False)]
    built = execute(plan, device="cpu", optimizer=adamw, loss_fn=token_loss, progress=False)
    before = {path: tensor.detach().clone() for path, tensor in local_state(built.modules).items()}
    steps = [train_step(built, *skips_batch(step), target == "deepspeed") for step in range(NUM_STEPS)]
    after = local_state(built.modules)
    return steps, {path: torch.equal(after[path], tensor) for path, tensor in before.items()}


@pytest.mark.parametrize("target", ["deepspeed", "torch"])
def test_activations_without_gradient_cross(target):
    with torch.device("meta"):
        model = execute(plan_build(create_schedule(Skips(), Mesh())), device="cpu").module
    optimizer = adamw([parameter for parameter in model.parameters() if parameter.requires_grad])
    ranks = results(run_ranks(train_frozen, 2, target))
    for step in range(NUM_STEPS):
        (ids,), wanted = skips_batch(step)
        expected = token_loss(model(ids), wanted)
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        for steps, _ in ranks:
            assert steps[step][0] == pytest.approx(expected.item(), rel=1e-4)
            assert steps[step][1] == pytest.approx(norm.item(), rel=1e-3)
    (_, first), (_, last) = ranks
    assert first == {"embed.weight": True, "up.weight": False, "up.bias": False}
    assert last == {"down.weight": False, "down.bias": False}


def plan_half():
    config = deepspeed_config(bf16={"enabled": True})
    sch = cut("llama", Mesh(pipe=2), 2, tied_llama().bfloat16())
    return plan_build(sch, target="deepspeed", config=config, example_inputs=example("llama"))


def train_half(rank, plan):
    built = execute(plan, device="cpu", optimizer=BF16_ADAMW, loss_fn=loss, progress=False)
    first = local_state(built.modules)["lm_head.weight" if rank else "model.embed_tokens.weight"].detach()
    before = first.clone()
    steps = [train_step(built, *data("llama", step, MICRO * ROWS), True) for step in range(NUM_STEPS)]
    return steps, before, first, built.receipt == predict(plan, rank)


def steps_in_bf16():
    for step in range(NUM_STEPS):
        inputs, target = data("llama", step, MICRO * ROWS)
        yield [
            lambda model, some=some, right=right: loss(model(input_ids=some[0], attention_mask=some[1]), right)
            for some, right in parts(inputs, target, ROWS)
        ]


def test_bf16_under_zero_1_trains_as_in_one_process_and_tied_weights_stay_equal():
    (steps, before, first, predicted), (others, _, last, also) = results(run_ranks(train_half, 2, shared=plan_half))
    assert predicted
    assert also
    assert steps == others
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, last)
    assert not torch.equal(first, before)
    model = execute(plan_build(create_schedule(tied_llama().bfloat16(), Mesh())), device="cpu").module.train()
    expected = train_alone_in_bf16(model, steps_in_bf16())
    # kernels add up in their own order: 1e-4; without clipping, float32 copies or the sum of a tie 9e-4 and more
    assert [found for found, _ in steps] == pytest.approx(expected, rel=4e-4)
    assert expected[-1] < expected[0]


def plan_without_target(*_):
    return plan_build(cut("llama", Mesh(pipe=2), 2), example_inputs=example("llama"))


def plain_stage(rank, planned):
    plan = loads(dumps(planned))
    built = execute(plan, tied_llama(), device="cpu", optimizer=adamw, progress=False)
    inputs, _ = data("llama", 0, ROWS)
    given = inputs if rank == 0 else tuple(torch.zeros(()) for _ in range(2))
    if rank == 0:
        sent = built.module.eval()(*given)
        shapes = [tuple(tensor.shape) for tensor in sent]
    else:
        shapes = []
    same = built.model is built.module and built.modules == (built.module,)
    trained = {id(p) for group in built.optimizer.param_groups for p in group["params"]}
    owned = {id(p) for p in built.module.parameters()}
    state = {path: tensor.detach() for path, tensor in local_state(built.modules).items()}
    return built.module._shardplan.number, same and trained == owned, shapes, state, built.receipt == predict(plan, rank)


def test_without_a_target_a_loaded_plan_gives_the_stage_itself():
    whole = local_state([made_alone("llama")])
    for rank, (number, same, shapes, state, predicted) in enumerate(
        results(run_ranks(plain_stage, 2, shared=plan_without_target))
    ):
        assert number == rank
        assert same
        assert shapes == ([] if rank else [(ROWS, LENGTH, 64), (ROWS, 1, 1, LENGTH)])
        assert predicted
        assert all(torch.equal(whole[path], tensor) for path, tensor in state.items())


def train_loaded(rank, _, text):
    built = execute(loads(text), tied_llama(), device="cpu", optimizer=adamw, loss_fn=loss, progress=False)
    return [train_step(built, *data("llama", step, MICRO * ROWS), False) for step in range(2)]


def test_a_loaded_plan_trains_like_the_planned_one():
    case = Case("llama", Mesh(pipe=2), "torch")
    by_rank = results(run_ranks(train_loaded, 2, dumps(planned(case)), shared=plan_without_target))  # exports the model once
    for again, one in zip(by_rank, results(trained(case)), strict=True):
        assert again == one["steps"][:2]


class Masked(nn.Module):
    """Two inputs of one length."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.up = nn.Linear(16, 16)
        self.down = nn.Linear(16, 64)

    def forward(self, ids, mask):
        return self.down(self.up(self.embed(ids)).tanh() * mask[..., None])


IDS, MASK = torch.arange(48).view(8, 6), torch.ones(8, 6)
WRONG = {
    "rows that do not divide": ((IDS[:-1], MASK[:-1]), IDS, "7 rows for 4 micro-batches, which does not divide"),
    "too few": ((IDS,), IDS, "takes 2 tensors, not 1"),
    "too many": ((IDS, MASK, MASK), IDS, "takes 2 tensors, not 3"),
    "lengths that differ": ((IDS, MASK[:, :-1]), IDS, "sequence is 6 before"),
    "rows that differ": ((IDS, MASK[:4]), IDS, "batch is 2 before"),
    "another number of axes": ((IDS[..., None], MASK), IDS, "is given with shape"),
    "a target of other rows": ((IDS, MASK), IDS[:-1], ""),
    "no target": ((IDS, MASK), None, ""),
}


def wrong_batches(rank):
    """What each batch raises, and the loss of a right one after it."""
    sch = create_schedule(Masked(), Mesh(pipe=2)).at["up"].cut_pipeline_stage()
    plan = plan_build(
        sch, target="torch", config={"num_microbatches": MICRO}, example_inputs={"ids": IDS[:2], "mask": MASK[:2]}
    )
    model, _ = execute(plan, device="cpu", loss_fn=token_loss, progress=False)
    found = {}
    for kind, (inputs, target, _) in WRONG.items():
        try:
            model.train_batch(*inputs, target=target)
        except Exception as error:
            found[kind] = str(error), model.train_batch(IDS, MASK, target=IDS).item()
    return found


@pytest.fixture(scope="module")
def after_wrong_batches():
    return results(run_ranks(wrong_batches, 2))


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_batch_raises_on_every_rank_and_the_next_one_trains(kind, after_wrong_batches):
    (first, loss_there), (last, loss_here) = (one[kind] for one in after_wrong_batches)
    assert WRONG[kind][-1] in first
    assert first
    assert last
    assert loss_there == loss_here > 0


# -- torch alone, without stages


def train_replicated(rank, mesh):
    plan = plan_build(schedule("llama", mesh), target="torch")
    built = execute(plan, device="cpu", optimizer=adamw, progress=False)
    model, optimizer = built
    ids = mesh.coordinate(rank).data
    steps = []
    for step in range(NUM_STEPS):
        found = loss_of(model, batch(step, 128)[2 * ids : 2 * ids + 2])
        found.backward()
        norm = built.clip_grad_norm_(CLIP)
        steps.append((found.item(), norm.item()))
        optimizer.step()
        optimizer.zero_grad()
    wrapped = isinstance(model, DistributedDataParallel) and model.module is built.module
    return steps, wrapped, built.receipt == predict(plan, rank)


@pytest.mark.parametrize("mesh", [Mesh(data=2), Mesh(data=2, tensor=2)], ids=str)
def test_torch_without_stages_replicates_over_data_as_ddp(mesh):
    module = execute(plan_build(schedule("llama")), device="cpu").module
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    _, losses = train_alone("llama", {path: tensor.detach() for path, tensor in weights.items()}, clip=True)
    whole = loss_of(module.train(), batch(0, 128))
    whole.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
    assert norm > CLIP
    ranks = results(run_ranks(train_replicated, mesh.num_ranks, mesh))
    for steps, wrapped, predicted in ranks:
        assert wrapped
        assert predicted
        assert steps[0][1] == pytest.approx(norm.item(), rel=1e-4)
    for step, expected in enumerate(losses):
        mean = sum(steps[step][0] for steps, *_ in ranks) / len(ranks)
        assert mean == pytest.approx(expected, rel=1e-4), f"step {step}"
