"""A schedule is immutable, says what its verbs say, and collects what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardplan.functional import audit, create_schedule, execute, plan_build
from shardplan.specs import InitProgram, Made, Mesh, Operation, PlanError, Shard, TensorCall
from shardplan.specs.layout_steps import AddBiasAfterSync, SetAttributes, SumGradient, Sync, VocabParallel
from shardplan.specs.program import Fill
from tests.helpers.models import llama, plain, split_llama


def perceptron(device="meta"):
    with torch.device(device):
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))


@pytest.fixture
def sch():
    return create_schedule(perceptron(), Mesh(tensor=2))


def problem_of(sch, **options):
    with pytest.raises(PlanError) as caught:
        plan_build(sch, **options)
    return str(caught.value)


def test_verbs_give_new_schedules_and_leave_the_old(sch):
    before = sch.tree
    split = sch.at["0"].colwise()
    assert sch.tree is before
    assert sch.tree["0.weight"].shards == ()
    assert split.tree["0.weight"].shards == (Shard(0, "tensor"),)


def test_the_model_is_read_and_not_changed():
    model = perceptron("cpu")
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    plan_build(create_schedule(model, Mesh(tensor=2)).at["0"].colwise().at["2"].rowwise().at["0.weight"].init(1.0))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])
    assert not model[0]._forward_pre_hooks
    assert model[0].out_features == 32


def test_it_reads_ties_buffers_and_frozen_parameters():
    tree = create_schedule(plain(), Mesh()).tree
    assert tree["embed.weight"].tie == ("head.weight",)
    assert tree["head.weight"] is tree["embed.weight"]
    assert tree["blocks.0.shift"].kind == "buffer"
    assert not tree["blocks.1.gain"].requires_grad
    assert create_schedule(llama(), Mesh()).tree["model.rotary_emb.inv_freq"].kind == "non_persistent_buffer"


def test_ties_by_storage_are_ties():
    model = perceptron("cpu")
    model[2].weight = nn.Parameter(model[0].weight.detach())
    assert create_schedule(model, Mesh()).tree["0.weight"].tie == ("2.weight",)


def test_colwise_and_rowwise_are_the_verbs_that_they_say(sch):
    short = sch.at["0"].colwise().at["2"].rowwise()
    long = sch.at["0"].shard("weight", axis=0).shard("bias", axis=0).sync("backward_post", "all_reduce").set(out_features=16)
    long = long.at["2"].shard("weight", axis=1).sync("forward_post", "all_reduce").set(in_features=16)
    assert short == long
    assert plan_build(short).fingerprint == plan_build(long).fingerprint
    assert short.layout == (
        Sync("0", "backward_post", "all_reduce"),
        SetAttributes("0", {"out_features": 16}),
        Sync("2", "forward_post", "all_reduce"),
        SetAttributes("2", {"in_features": 16}),
    )
    assert AddBiasAfterSync("2") in plan_build(short).steps


def test_a_bias_waits_for_the_sum_of_its_split_also_where_a_later_sum_is_over_another_axis():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    sch = create_schedule(model, Mesh(data=2, tensor=2)).at["0"].colwise().at["2"].rowwise()
    for mesh_axis in ("data", "tensor"):
        later = sch.at["2"].sync("forward_post", "all_reduce", mesh_axis=mesh_axis)
        assert plan_build(later).steps.count(AddBiasAfterSync("2")) == 1
    scattered = sch.at["2"].sync("forward_post", "reduce_scatter", axis=0).at["2"].sync("forward_post", "divide")
    assert SumGradient("2", "bias") in plan_build(scattered).steps
    gathered = scattered.at["2"].sync("forward_post", "all_gather", axis=0)
    assert SumGradient("2", "bias") not in plan_build(gathered).steps  # it is added to the whole output


def test_gathered_output_and_vocabulary():
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6, bias=False))
    sch = create_schedule(model, Mesh(tensor=2)).at["0"].vocab_parallel().at["1"].colwise(gather_output=True)
    assert VocabParallel("0", 5) in sch.layout
    assert SetAttributes("0", {"num_embeddings": 5}) in sch.layout
    assert Sync("1", "forward_post", "all_gather", -1) in sch.layout


def test_tags_and_values_reach_all_tensors_below_a_module():
    sch = create_schedule(llama(), Mesh()).at["model.layers.0"].tag(rate=0.5).at["model.norm.weight"].init(2).tag(rate=1)
    tagged = [spec.path for spec in sch.tree.values() if spec.tags.get("rate") == 0.5]
    assert len(tagged) == 9
    assert all(path.startswith("model.layers.0.") for path in tagged)
    assert sch.tree["model.norm.weight"].source == InitProgram([Operation(Fill(2))], replaces=True)
    assert sch.tree["model.norm.weight"].tags == {"rate": 1}


def test_a_function_is_known_by_name_and_a_lambda_is_not(sch):
    named = sch.at["0.weight"].init(nn.init.zeros_).tree["0.weight"].source
    assert named == Made((TensorCall("0.weight", "torch.nn.init:zeros_"),))
    nameless = sch.at["0.weight"].init(lambda w: w.zero_()).at["0.bias"].init(lambda w: w.fill_(1))
    names = [spec.source.calls[0].function for spec in nameless.tree.values() if isinstance(spec.source, Made)]
    assert all("<" in name for name in names)
    assert len(set(names)) == 2


def test_origin_names_the_line(sch):
    origin = sch.at["0.weight"].shard(axis=0).tree["0.weight"].origin
    assert (origin.verb, origin.pattern) == ("shard", "0.weight")
    assert origin.where.startswith("test_schedule.py:")


def test_unknown_pattern_names_the_closest():
    message = problem_of(create_schedule(llama(), Mesh()).at["model.layer.*.mlp.up_proj"].colwise())
    assert "model.layer.*.mlp.up_proj: no module and no tensor has a path like this" in message
    assert "The closest are model.layers.0.mlp.up_proj" in message


def test_expect_counts():
    sch = create_schedule(llama(), Mesh(tensor=2)).at["model.layers.*.mlp.up_proj"]
    assert sch.expect(2).problems == ()
    message = problem_of(sch.expect(3))
    assert "3 expected, 2 selected: model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj" in message
    assert ".expect(2)" in message


def test_two_axes_are_refused_with_both_lines(sch):
    message = problem_of(sch.at["0.weight"].shard(axis=0).shard(axis=1))
    assert "0.weight  f32[32@tensor, 8]: it is split twice: along axis 0 over 'tensor' (test_schedule.py:" in message
    assert "and along axis 1 over 'tensor' (test_schedule.py:" in message


def test_two_axes_of_a_tie_name_the_alias():
    sch = create_schedule(plain(), Mesh(tensor=2)).at["embed.weight"].shard(axis=0).at["head.weight"].shard(axis=1)
    assert "It is one tensor with head.weight" in problem_of(sch)


def test_the_same_split_twice_is_no_problem(sch):
    assert not sch.at["0.weight"].shard(axis=0).shard(axis=-2).problems


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda s: s.at["0.bias"].shard(axis=1), "0.bias  f32[32]: it has no axis 1\n      Its axes are 0 to 0"),
        (lambda s: s.at["0.bias"].shard(axis=0, mesh_axis="model"), "mesh axis 'model' is unknown"),
        (lambda s: s.at["0.bias"].shard(axis=0, mesh_axis="pipe"), "a tensor is not split over 'pipe'"),
        (lambda s: s.at["0"].shard(axis=0), 'Name the tensor: .shard("weight", axis=0)'),
        (lambda s: s.at["0"].shard("kernel", axis=0), "0: it has no tensor 'kernel'\n      It holds weight, bias"),
        (lambda s: s.at["1"].colwise(), ".colwise() is for nn.Linear and transformers' Conv1D, and this is a ReLU"),
        (lambda s: s.at["0"].vocab_parallel(), ".vocab_parallel() is for nn.Embedding, and this is a Linear"),
        (lambda s: s.at["0.weight"].sync("forward_post", "all_reduce"), "it selects tensors, and this verb is for modules"),
        (lambda s: s.at["0"].sync("after", "all_reduce"), "a sync cannot stand at 'after'"),
        (lambda s: s.at["0"].sync("forward_post", "sum"), "sync operator 'sum' is unknown"),
        (lambda s: s.at["0"].sync("forward_post", "all_gather"), "all_gather needs the axis of the activation"),
        (lambda s: s.at["0"].sync("forward_post", "all_reduce", axis=1), "all_reduce has no axis, and axis=1 was given"),
        (
            lambda s: s.at["0"].sync("forward_pre", "all_reduce", mesh_axis="pipe"),
            "a sync cannot run along mesh axis 'pipe'",
        ),
        (
            lambda s: s.at["0"].set(out_feature=3),
            "it has no attribute 'out_feature' to set\n      The closest are out_features",
        ),
        (lambda s: s.at["0.[weight"].tag(x=1), "pattern '0.[weight': '[' has no partner"),
        (lambda s: s.at["0"].init("zeros"), "0: .init takes a number or a function, not 'zeros'"),
        (lambda s: s.at["0"].init(None), "0: .init takes a number or a function, not None"),
        (lambda s: s.at["0"].init(float("nan")), "0: a plan holds finite numbers, not nan"),
        (lambda s: s.at["0.weight"].shard(axis="x"), "0.weight  f32[32, 8]: it has no axis 'x'"),
        (lambda s: s.at["0"].sync("forward_post", "all_gather", "x"), "the axis of an activation is an integer, not 'x'"),
        (lambda s: s.at["0"].expect("2"), "'2' expected, 1 selected: 0"),
        (lambda s: s.at["1"].init(0.0), "1: no tensor is there for .init()"),
        (lambda s: s.at["1"].tag(x=1), "1: no tensor is there for .tag()"),
        (lambda s: s.at["0"].set(), "0: .set() names no attribute"),
        (lambda s: s.at["0"].set(forward=3), "its 'forward' is no plain attribute"),
        (lambda s: s.at["0"].set(out_features="x"), "out_features is 32, and would become 'x'"),
        (lambda s: s.at["0"].colwise().set(out_features=5), "out_features is set twice, to 16 and to 5"),
        (lambda s: s.at["{0,2"].colwise(), "pattern '{0,2': '{' is not closed"),
    ],
)
def test_errors_say_what_and_how_to_mend(sch, edit, text):
    assert text in problem_of(edit(sch))


def test_a_split_that_does_not_divide_says_the_sizes():
    with torch.device("meta"):
        model = nn.Linear(4, 50257)
    message = problem_of(create_schedule(model, Mesh(tensor=8)).at[""].colwise(gather_output=True))
    assert (
        "weight  f32[50257@tensor, 4]: axis 0 has 50257 entries, mesh axis 'tensor' has 8, and 8 does not divide 50257"
        in message
    )
    assert "Pad it to 50264: pad_to_multiple=8; or allow uneven parts: uneven=True; or leave it whole" in message


def test_all_problems_come_at_once(sch):
    bad = sch.at["nothing.here"].tag(x=1).at["0.bias"].shard(axis=3).at["1"].rowwise()
    message = problem_of(bad, target="megatron", strategy="gossip", seed="x")
    assert message.startswith("6 problems\n")
    for text in ("nothing.here", "no axis 3", ".rowwise() is for", "'megatron' is unknown", "'gossip' is unknown", "seed"):
        assert text in message


def test_a_verb_without_selection_is_a_mistake(sch):
    with pytest.raises(ValueError, match=r"a verb needs a selection: sch\.at\[pattern\]\.verb"):
        sch.tag(x=1)


def test_embedding_options_that_need_all_rows_are_refused():
    with torch.device("meta"):
        model = nn.Embedding(8, 4, max_norm=1.0)
    assert "max_norm and scale_grad_by_freq look at all rows" in problem_of(
        create_schedule(model, Mesh(tensor=2)).at[""].vocab_parallel()
    )


def test_a_lazy_parameter_is_refused():
    model = nn.LazyLinear(4)
    assert "weight: it is lazy and has no shape yet" in problem_of(create_schedule(model, Mesh()))


def test_a_tensor_on_meta_as_plain_attribute_is_refused():
    model = perceptron()
    model[1].table = torch.empty(4, device="meta")
    message = problem_of(create_schedule(model, Mesh()))
    assert "1.table: a tensor on meta is kept as a plain attribute" in message
    assert "register_buffer('table'" in message


def test_two_views_of_one_memory_are_refused():
    model = perceptron("cpu")
    model[2].weight = nn.Parameter(model[0].weight.detach().view(8, 32))
    assert "2.weight  f32[8, 32]: it shares memory with 0.weight, but is another view of it" in problem_of(
        create_schedule(model, Mesh())
    )


def test_a_hook_that_holds_the_original_is_refused_by_name():
    model = perceptron()
    model[0].register_forward_hook(lambda *_: model[1] and None)
    message = problem_of(create_schedule(model, Mesh()))
    assert "0: a hook in _forward_hooks" in message
    assert "holds on to the original 'model'" in message


def test_a_hook_that_names_a_global_module_is_refused_too():
    model = perceptron()
    names = {"model": model}
    exec("def hook(module, args, output): return model[1](output)", names)
    model[0].register_forward_hook(names["hook"])
    assert "0: a hook in _forward_hooks, hook, holds on to the original 'model'" in problem_of(
        create_schedule(model, Mesh())
    )


def test_split_llama_is_what_the_design_shows():
    sch = split_llama(llama(), Mesh(tensor=4))
    assert not sch.problems
    assert str(sch.tree["model.layers.1.mlp.down_proj.weight"]) == "model.layers.1.mlp.down_proj.weight  f32[64, 96@tensor]"


def test_what_is_no_model_mesh_pattern_schedule_or_plan_is_refused_at_the_door(sch):
    with pytest.raises(TypeError, match=r"a schedule is made for a torch.nn.Module, not for str 'x'"):
        create_schedule("x", Mesh())
    with pytest.raises(TypeError, match="'mesh' must be"):
        create_schedule(perceptron(), {"tensor": 2})
    with pytest.raises(TypeError, match=r"takes one string, not \('0', '2'\); several names are written {a,b}"):
        sch.at["0", "2"]
    with pytest.raises(TypeError, match=r"plan_build takes a schedule, not a Sequential: plan_build\(create_schedule"):
        plan_build(perceptron())
    with pytest.raises(TypeError, match=r"execute takes a plan, not a Schedule: execute\(plan_build"):
        execute(sch)
    with pytest.raises(TypeError, match=r"audit takes a plan, not a Schedule: audit\(plan_build"):
        audit(sch)


def test_inputs_under_other_names_are_refused_with_the_signature(sch):
    message = problem_of(sch, example_inputs={"x": torch.ones(1, 8)})
    assert "example_inputs: the model cannot be called with them: missing a required argument: 'input'" in message
    assert "forward takes (input)" in message


@pytest.mark.parametrize(("dtype", "value"), [(torch.int64, 0.5), (torch.uint8, -1), (torch.int8, 128), (torch.bool, 2)])
def test_a_number_that_the_dtype_has_not_is_refused(dtype, value):
    model = nn.Module()
    model.register_buffer("ids", torch.empty(2, dtype=dtype, device="meta"))
    name = str(dtype).removeprefix("torch.")
    assert f"a {name} cannot be {value}" in problem_of(create_schedule(model, Mesh()).at["ids"].init(value))
    assert not create_schedule(model, Mesh()).at["ids"].init(1).problems


def test_a_star_is_a_name_and_not_the_model(sch):
    assert not sch.at["*"].expect(3).problems
    assert not sch.at[""].expect(1).problems


def test_an_embedding_that_is_called_with_something_else_is_refused():
    class Positions(nn.Embedding):
        def forward(self, attention_mask):
            return super().forward(attention_mask.cumsum(1))

    sch = create_schedule(Positions(8, 4, device="meta"), Mesh(tensor=2)).at[""].vocab_parallel()
    assert "the forward of Positions takes 'attention_mask' first, and not the ids of rows" in problem_of(sch)
