"""Universal checkpoints, made by DeepSpeed itself from a run with ZeRO 1 on two ranks."""

from __future__ import annotations

import os
import shutil
from math import prod
from types import SimpleNamespace

import pytest
import torch

from shardplan.functional import execute, plan_build
from shardplan.functional.checkpoints.detect import read_contents
from shardplan.functional.checkpoints.formats.universal import read_states
from shardplan.specs import Checkpoint, Mesh, PlanError
from tests.helpers.models import schedule
from tests.helpers.ranks import results, run_ranks
from tests.helpers.training import adamw, batch, loss_of

CONFIG = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5, "zero_optimization": {"stage": 1}}
STEPS = 2


def train(rank, folder):
    plan = plan_build(schedule("plain", Mesh(data=2)), target="deepspeed", config=CONFIG)
    engine = execute(plan, device="cpu", optimizer=adamw).model
    for step in range(STEPS):
        loss = loss_of(engine, batch(step, 64)[2 * rank : 2 * rank + 2])
        engine.backward(loss)
        engine.step()
    told = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
    engine.save_checkpoint(str(folder), tag="last", client_state=told)
    return {path: tensor.detach().clone() for path, tensor in engine.module.state_dict().items()}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The folder, and the weights when it was saved."""
    from deepspeed.checkpoint.ds_to_universal import main

    root = tmp_path_factory.mktemp("universal")
    weights = results(run_ranks(train, 2, root / "zero"))[0]
    asked = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    where = {"input_folder": str(root / "zero" / "last"), "output_folder": str(root / "universal")}
    main(SimpleNamespace(**where, **asked, inject_missing_state=False))
    return root / "universal", weights


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


def value(folder, part):
    stored = part.stored
    data = (folder / stored.file).read_bytes()[stored.offset :][: stored.item_bytes * prod(stored.shape)]
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, stored.dtype)).reshape(stored.shape)


def test_the_weights_are_those_of_the_run(saved):
    folder, weights = saved
    contents = read_contents(str(folder))
    assert contents.tensors.keys() == weights.keys()
    for path, (part,) in contents.tensors.items():
        assert torch.equal(value(folder, part), weights[path]), path
        assert part.stored.file == f"zero/{path}/fp32.pt"


def test_the_states_are_those_that_deepspeed_reads(saved):
    folder, _ = saved
    states = read_states(str(folder))
    assert states.tensors.keys() | states.numbers.keys() == {"exp_avg", "exp_avg_sq", "step"}
    trained = {
        path for path, spec in plan_build(schedule("plain")).tree.items() if spec.requires_grad and spec.kind == "parameter"
    }
    for state, by_path in states.tensors.items():
        assert by_path.keys() <= trained
        for path, (part,) in by_path.items():
            theirs = torch.load(folder / "zero" / path / f"{state}.pt", weights_only=False)
            theirs = theirs["param"] if isinstance(theirs, dict) else theirs
            assert torch.equal(value(folder, part), theirs), (state, path)
    assert {float(value(folder, part)) for (part,) in states.tensors["step"].values()} == {STEPS}
    assert (
        states.tensors["exp_avg"].keys() == states.tensors["exp_avg_sq"].keys() == states.tensors["step"].keys() == trained
    )


def test_numbers_are_read_where_they_are_no_tensors(folder):
    torch.save(7, folder / "zero" / "embed.weight" / "step.pt")
    states = read_states(str(folder))
    assert states.numbers == {"step": {"embed.weight": 7}}
    assert "embed.weight" not in states.tensors["step"]


def test_a_plan_starts_from_it(saved):
    folder, weights = saved
    plan = plan_build(schedule("plain", Mesh()), init_weights=Checkpoint(folder))
    found = execute(plan, device="cpu").module.state_dict()
    assert all(torch.equal(found[path], tensor) for path, tensor in weights.items())


def problems(folder):
    with pytest.raises(PlanError) as caught:
        read_contents(str(folder))
    return caught.value.problems


def test_damage_is_told_with_the_file(folder):
    name = "zero/embed.weight/fp32.pt"
    os.truncate(folder / name, 500)
    (problem,) = problems(folder)
    assert problem.path == name
    assert "it is no zip as torch.save writes it" in problem.cause
    (folder / name).unlink()
    (problem,) = problems(folder)
    assert (problem.path, problem.cause) == ("embed.weight", f"it has no file {name}")
    torch.save({"param": "text"}, folder / name)
    (problem,) = problems(folder)
    assert (problem.path, problem.cause.split(", ")[0]) == ("embed.weight", f"{name} holds neither a tensor")
    shutil.rmtree(folder / "zero")
    (folder / "zero").mkdir()
    (problem,) = problems(folder)
    assert problem.cause == "zero/ has no parameter with a fp32.pt"
