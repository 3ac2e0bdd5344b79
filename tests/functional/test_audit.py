"""What the audit says of a plan."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardplan.functional import audit, create_schedule, plan_build, predict
from shardplan.functional.dialects import dialect_of
from shardplan.specs import Mesh
from tests.helpers.models import plain, schedule


def findings(sch):
    return [(f.severity, f.path, f.cause) for f in audit(plan_build(sch)).findings]


def perceptron(mesh):
    with torch.device("meta"):
        return create_schedule(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)), mesh)


def test_shares_are_the_bytes_of_local_shapes():
    plan = plan_build(schedule("llama", Mesh(data=4, tensor=2)))
    report = audit(plan)
    assert sum(share.num_ranks for share in report.shares) == 8
    for rank in range(8):
        receipt, memory = predict(plan, rank), report.memory(rank)
        assert memory.held_bytes == receipt.held_bytes
        assert memory.executing_bytes == receipt.peak_bytes
    whole = sum(spec.num_bytes for spec in plan.tree.values() if not spec.shards)
    assert {share.memory.replicated_bytes for share in report.shares} == {whole}
    assert sum(size for *_, size in report.replicated) == whole
    assert report.replicated[0][2] == max(size for *_, size in report.replicated)


@pytest.mark.parametrize("strategy", ["local", "scatter", "broadcast"])
def test_every_rank_has_the_receipt_and_the_memory_of_its_kind(strategy):
    mesh = Mesh(data=3, tensor=4)
    sch = schedule("llama", mesh).at["model.norm.weight"].shard(axis=0, mesh_axis="data", uneven=True)
    plan = plan_build(sch.at[""].trust("nothing is computed here"), strategy=strategy)
    report = audit(plan)
    for rank in range(mesh.num_ranks):
        receipt, memory = predict(plan, rank), report.memory(rank)
        assert (memory.held_bytes, memory.executing_bytes) == (receipt.held_bytes, receipt.peak_bytes)
        alike = report.distinct.like(mesh.coordinate(rank))
        told = {(row.op, row.mesh_axes): row.num_bytes for row in report.execution if row.coordinate == alike}
        for (op, mesh_axes), num_bytes in told.items():
            calls = [c.num_bytes for c in receipt.collectives if (c.op, c.mesh_axes) == (op, mesh_axes)]
            assert sum(calls) == num_bytes
        assert sum(told.values()) == receipt.received_bytes


def sent_by_the_first(report):
    return {(row.op, row.mesh_axes): (row.num_calls, row.num_bytes) for row in report.execution if row.coordinate.rank == 0}


def test_execution_traffic_of_the_first_rank():
    plan = plan_build(schedule("llama", Mesh(data=2, tensor=2)), strategy="scatter")
    split = sum(spec.num_bytes for spec in plan.tree.values() if spec.shards) // 2
    whole = sum(spec.num_bytes for spec in plan.tree.values() if not spec.shards)
    assert sent_by_the_first(audit(plan)) == {
        ("all_gather", ()): (2, 256),
        ("scatter", ("tensor",)): (1, split),
        ("broadcast", ("data",)): (1, split),
        ("broadcast", ("data", "tensor")): (1, whole),
    }


def test_what_has_a_program_is_not_sent():
    mesh = Mesh(data=2, tensor=2)
    assert sent_by_the_first(audit(plan_build(schedule("llama", mesh)))) == {("all_gather", ()): (2, 256)}
    orthogonal = schedule("llama", mesh).at["lm_head.weight"].init(nn.init.orthogonal_)
    part = 128 * 64 * 4 // 2
    assert sent_by_the_first(audit(plan_build(orthogonal))) == {
        ("all_gather", ()): (2, 256),
        ("scatter", ("tensor",)): (1, part),
        ("broadcast", ("data",)): (1, part),
    }


def test_broadcast_sends_the_whole():
    plan = plan_build(schedule("llama", Mesh(data=2, tensor=2)), strategy="broadcast")
    whole = sum(spec.num_bytes for spec in plan.tree.values())
    assert sent_by_the_first(audit(plan))["broadcast", ("data", "tensor")][1] == whole


def test_a_sound_plan_is_ok_and_prints():
    report = audit(plan_build(schedule("llama", Mesh(tensor=2)), strategy="scatter"))
    assert report.ok
    text = str(report)
    assert text.splitlines()[-1] == "ok      yes, equal proven"
    assert "scatter" in text


def test_a_split_that_nothing_joins_again_is_an_error():
    report = audit(plan_build(perceptron(Mesh(tensor=2)).at["0"].colwise()))
    assert not report.ok
    assert [finding.path for finding in report.findings] == ["0.weight", "0.bias"]
    assert (
        "f32[32@tensor, 8] is split (512 B a rank), and no synchronisation follows in the model" in report.findings[0].cause
    )
    assert ".sync('forward_post', 'all_gather', axis=-1), or .rowwise() on what follows" in report.findings[0].fix
    assert str(report).endswith("ok      no: execute refuses this plan")
    assert report.is_refused


def test_a_split_is_joined_by_a_later_sum_or_its_own_gather():
    sch = perceptron(Mesh(tensor=2))
    assert not findings(sch.at["0"].colwise().at["2"].rowwise())
    assert not findings(sch.at["0"].colwise(gather_output=True))
    before = findings(sch.at["0"].colwise().at["2"].sync("forward_pre", "all_gather", axis=-1))
    assert [severity for severity, _, _ in before] == ["warning"]
    assert not findings(sch.at["0"].colwise().at[""].sync("forward_post", "all_gather", axis=-1))


def test_a_sum_in_another_layer_joins_nothing():
    with torch.device("meta"):
        layers = [nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("up", "down")}) for _ in range(2)]
    split = create_schedule(nn.Sequential(*layers), Mesh(tensor=2)).at["*.up"].colwise()
    assert [path for _, path, _ in findings(split.at["1.down"].rowwise())] == ["0.up.weight"]


def test_rows_that_nobody_sums_are_an_error():
    sch = perceptron(Mesh(tensor=2)).at["2"].shard("weight", axis=1)
    report = audit(plan_build(sch))
    assert report.findings[0].fix == "sch.at['2'].sync('forward_post', 'all_reduce')"


def test_a_split_output_that_is_meant_can_be_said():
    sch = perceptron(Mesh(tensor=2)).at["2"].colwise().sync("forward_post", lambda output, group: output)
    assert not findings(sch)


def test_a_sum_over_ranks_that_hold_the_same_is_a_warning():
    sch = perceptron(Mesh(tensor=2))
    for when, op, axis, what in (
        ("forward_post", "all_reduce", None, "output"),
        ("backward_post", "all_reduce", None, "input's gradient"),
        ("forward_pre", "all_gather", -1, "input's gradient"),
    ):
        ((severity, path, cause),) = findings(sch.at["0"].sync(when, op, axis))
        assert (severity, path) == ("warning", "0")
        assert f"sums its {what} over 2 ranks that hold the same tensors, so that it counts 2 times" in cause
    assert not findings(sch.at["1"].sync("forward_post", "all_reduce"))


def test_gradients_that_nothing_averages_are_a_warning():
    assert [severity for severity, _, _ in findings(schedule("plain", Mesh(data=2)))] == ["warning"]
    assert "nothing averages gradients" in findings(schedule("plain", Mesh(data=2)))[0][2]
    assert audit(plan_build(schedule("plain", Mesh(data=2)))).ok


def test_one_rank_has_nothing_to_say():
    report = audit(plan_build(schedule("llama")))
    assert report.findings == ()
    assert report.execution == ()
    assert report.training == ()
    assert report.replicated == ()


def test_a_whole_bias_beside_a_split_weight_is_an_error():
    sch = perceptron(Mesh(tensor=2)).at["0"].colwise()
    around = sch.at["2"].shard("weight", axis=1).at[""].sync("forward_post", "all_reduce")
    ((severity, path, cause),) = findings(around)
    assert (severity, path) == ("error", "2.bias")
    assert "f32[8] is whole beside f32[8, 32@tensor]: each of 2 ranks adds it, and a sum counts it 2 times" in cause


def test_every_place_of_a_tied_tensor_must_be_joined():
    sch = create_schedule(plain(), Mesh(tensor=2)).at["embed"].vocab_parallel()
    assert ("error", "embed.weight") in [finding[:2] for finding in findings(sch)]
    assert not findings(sch.at["head"].colwise(gather_output=True))


def test_a_split_over_data_must_be_joined_over_data():
    sch = (
        perceptron(Mesh(data=2)).at["2.weight"].shard(axis=1, mesh_axis="data").at["2.bias"].shard(axis=0, mesh_axis="data")
    )
    assert [finding[:2] for finding in findings(sch)][:2] == [("error", "2.weight"), ("error", "2.bias")]
    joined = sch.at["2"].sync("forward_post", "all_gather", -1, mesh_axis="data")
    assert [severity for severity, _, _ in findings(joined)] == ["warning"]


class Orthogonal(nn.Linear):
    def reset_parameters(self):
        nn.init.orthogonal_(self.weight)


def test_what_one_rank_makes_whole_is_told_with_its_cause_and_repeated_layers_once():
    with torch.device("meta"):
        model = nn.Sequential(*(Orthogonal(8, 8, bias=False) for _ in range(3)), nn.Linear(8, 8))

    def warnings(mesh):
        return [f for f in audit(plan_build(create_schedule(model, mesh))).findings if "made whole" in f.cause]

    told = warnings(Mesh(tensor=2))
    assert [(f.severity, f.path) for f in told] == [("warning", f"{number}.weight") for number in range(3)]
    assert {f.cause for f in told} == {
        "f32[8, 8] is made whole (256 B) on one rank by Orthogonal.reset_parameters, and sent: linalg_qr is not pointwise"
    }
    assert str(audit(plan_build(create_schedule(model, Mesh(tensor=2))))).count("made whole") == 1
    assert warnings(Mesh()) == []


@pytest.mark.parametrize("data", [2, 5, 31])
def test_of_ranks_that_zero_2_leaves_different_gradients_the_most_is_told(data):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
    }
    plan = plan_build(schedule("plain", Mesh(data=data, tensor=2)), target="deepspeed", config=config)
    report = audit(plan)
    dialect, kept = dialect_of("deepspeed"), {}
    for rank in range(plan.mesh.num_ranks):
        here = plan.mesh.coordinate(rank)
        kept.setdefault(report.distinct.like(here), []).append(dialect.state(plan, here).gradient_bytes)
    assert {share.coordinate: share.memory.gradient_bytes for share in report.shares} == {
        alike: max(each) for alike, each in kept.items()
    }
    assert data == 2 or any(len(set(each)) > 1 for each in kept.values())


def test_each_process_of_a_node_holds_the_values_that_a_model_came_with():
    model = plain(device="cpu")
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    plan = plan_build(create_schedule(model, Mesh(data=8)))
    assert audit(plan).host_peak_bytes is None
    assert audit(plan, ranks_per_node=4).host_peak_bytes == 4 * total
    assert audit(plan, ranks_per_node=64).host_peak_bytes == 8 * total
    assert "in host memory of each node, for the values that the model came with" in str(audit(plan, ranks_per_node=4))
    on_meta = audit(plan_build(schedule("plain", Mesh(data=8))), ranks_per_node=4)
    assert on_meta.host_peak_bytes == 0
    assert "host memory" not in str(on_meta)


def test_too_little_memory_is_not_what_execute_refuses():
    sound, broken = plan_build(schedule("plain", Mesh(tensor=2))), plan_build(perceptron(Mesh(tensor=2)).at["0"].colwise())
    large = audit(sound, device_memory=1)
    assert [finding.code for finding in large.findings if finding.severity == "error"] == ["SP030"]
    assert (large.ok, large.is_refused) == (False, False)
    assert str(large).endswith("ok      no: it needs more memory than a device has, for which execute does not look")
    both = audit(broken, device_memory=1)
    assert {finding.code for finding in both.findings if finding.severity == "error"} > {"SP030"}
    assert both.is_refused
    assert str(both).endswith("ok      no: execute refuses this plan")
