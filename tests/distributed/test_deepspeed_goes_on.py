"""Training with DeepSpeed that goes on from what another mesh has saved, its flat states among it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from attrs import frozen

from shardplan.functional import create_schedule, execute, load_optimizer, plan_build, save_checkpoint
from shardplan.functional.interpreter.world import ExecutionError
from shardplan.specs import Checkpoint, Mesh
from tests.distributed.test_training_goes_on import ADAM, NUM_STEPS, ROWS, STOP, batch, loss, mean
from tests.helpers.models import llama, split_llama
from tests.helpers.ranks import results, run_ranks


@frozen
class Run:
    """A mesh and how DeepSpeed is asked to train on it."""

    mesh: Mesh
    stage: int = 1
    dtype: torch.dtype = torch.float32
    target: str = "deepspeed"

    def plan(self, init_weights):
        model = llama(use_cache=False, num_key_value_heads=4).to(self.dtype)
        sch = split_llama(model, self.mesh) if self.mesh.tensor > 1 else create_schedule(model, self.mesh)
        adam = {"type": "AdamW", "params": {**ADAM["params"], "torch_adam": True}}
        config = {
            "train_micro_batch_size_per_gpu": ROWS // self.mesh.data,
            "gradient_clipping": 0.0,
            "optimizer": adam,
            "zero_optimization": {"stage": self.stage},
            **({"bf16": {"enabled": True}} if self.dtype == torch.bfloat16 else {}),
        }
        config = config if self.target == "deepspeed" else {"optimizer": ADAM}
        return plan_build(sch, target=self.target, config=config, init_weights=init_weights)

    def __str__(self):
        sizes = [f"{axis}{self.mesh.num(axis)}" for axis in ("data", "tensor") if self.mesh.num(axis) > 1]
        return "-".join([*sizes, f"zero{self.stage}" if self.target == "deepspeed" else "torch", str(self.dtype)[6:]])


BF16 = torch.bfloat16
PAIRS = [
    (Run(Mesh(data=2)), Run(Mesh(tensor=2))),
    (Run(Mesh(data=2, tensor=2)), Run(Mesh(data=4), stage=2)),
    (Run(Mesh(tensor=2), stage=2), Run(Mesh(data=2), target="torch")),
    (Run(Mesh(data=2), dtype=BF16), Run(Mesh(data=2), dtype=BF16)),
]


def train(run, built, rank, steps):
    losses = []
    for step in steps:
        ids = batch(step, run.mesh, rank)
        found = loss(built.model(input_ids=ids), ids)
        losses.append(found.item())
        if run.target == "deepspeed":
            built.model.backward(found)
            built.model.step()
        else:
            found.backward()
            built.optimizer.step()
            built.optimizer.zero_grad()
    return losses


def never_stopped(rank, plan, run, folder):
    built = execute(plan, device="cpu")
    first = train(run, built, rank, range(STOP))
    save_checkpoint(plan, built.model, folder, optimizer=built.optimizer)
    return first + train(run, built, rank, range(STOP, NUM_STEPS))


def gone_on(rank, plan, run, folder):
    built = execute(plan, device="cpu")
    load_optimizer(plan, built.model, built.optimizer, folder)
    return train(run, built, rank, range(STOP, NUM_STEPS))


def from_code(run, folder):
    return run.plan(init_weights=True)


def from_folder(run, folder):
    return run.plan(Checkpoint(folder))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " to ".join(map(str, pair)))
def test_deepspeed_goes_on_from_another_mesh(pair, tmp_path):
    before, after = pair
    wanted = mean(results(run_ranks(never_stopped, before.mesh.num_ranks, before, tmp_path / "saved", shared=from_code)))
    found = mean(results(run_ranks(gone_on, after.mesh.num_ranks, after, tmp_path / "saved", shared=from_folder)))
    # a loss in bfloat16 has three digits: on the same mesh all of them are the same, as the float32 copies are
    torch.testing.assert_close(found, wanted[STOP:], rtol=2e-5 if before.dtype == torch.float32 else 0, atol=0)
    assert wanted[-1] < wanted[0]


def never_stopped_but_saved_by_deepspeed(rank, plan, run, folder):
    built = execute(plan, device="cpu")
    first = train(run, built, rank, range(STOP))
    told = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
    built.model.save_checkpoint(str(folder), tag="last", client_state=told)
    return first + train(run, built, rank, range(STOP, NUM_STEPS))


@pytest.fixture(scope="module")
def universal(tmp_path_factory):
    """A universal checkpoint that DeepSpeed's own tool made, and the losses of the run that went on."""
    from deepspeed.checkpoint.ds_to_universal import main

    root, run = tmp_path_factory.mktemp("universal"), Run(Mesh(data=2))
    losses = mean(results(run_ranks(never_stopped_but_saved_by_deepspeed, 2, run, root / "zero", shared=from_code)))
    asked = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    where = {"input_folder": str(root / "zero" / "last"), "output_folder": str(root / "universal")}
    main(SimpleNamespace(**where, **asked, inject_missing_state=False))
    return root / "universal", losses


@pytest.mark.parametrize("run", [Run(Mesh(tensor=2)), Run(Mesh(tensor=2), target="torch")], ids=str)
def test_a_universal_checkpoint_goes_on_on_another_mesh(universal, run):
    folder, wanted = universal
    found = mean(results(run_ranks(gone_on, run.mesh.num_ranks, run, folder, shared=from_folder)))
    torch.testing.assert_close(found, wanted[STOP:], rtol=2e-5, atol=0)


def before_any_step(rank, plan, run, folder):
    """Save and load before there are states; train, and save again."""
    built = execute(plan, device="cpu")
    save_checkpoint(plan, built.model, folder / "first", optimizer=built.optimizer)
    load_optimizer(plan, built.model, built.optimizer, folder / "first")
    losses = train(run, built, rank, range(2))
    save_checkpoint(plan, built.model, folder / "second", optimizer=built.optimizer)
    return losses


def test_an_optimizer_without_states_is_saved_loaded_and_trained(tmp_path):
    run = Run(Mesh(data=2))
    losses = results(run_ranks(before_any_step, 2, run, tmp_path, shared=from_code))
    assert mean(losses)[1] < mean(losses)[0]
    assert "exp_avg" in (tmp_path / "second" / "manifest.json").read_text()


def with_the_wrong_optimizer(rank, plan, run, folder):
    built = execute(plan, device="cpu")
    train(run, built, rank, range(1))
    save_checkpoint(plan, built.model, folder / "saved", optimizer=built.optimizer)
    with pytest.raises(ExecutionError) as caught:
        load_optimizer(plan, built.model, built.optimizer if rank == 0 else built.model, folder / "saved")
    return str(caught.value)


def test_the_wrong_optimizer_on_one_rank_is_told_on_all(tmp_path):
    first, second = results(run_ranks(with_the_wrong_optimizer, 2, Run(Mesh(data=2)), tmp_path, shared=from_code))
    assert first == second
    assert (
        "rank 1: PlanError: 1 problem\n  optimizer: it is a DeepSpeedEngine, not an optimizer\n      Give engine.optim"
        in first
    )
