"""Which init code makes which tensors, and that it makes them as the model's own library does."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from shardplan.functional import create_schedule, execute, plan_build
from shardplan.specs import InitProgram, Made, Mesh, ModuleValues, Operation, PlanError, Uninitialised
from shardplan.specs.program import Fill, Normal
from shardplan.specs.steps import EvaluateShard, EvaluateWhole, Generate

SMALL_CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def t5():
    config = transformers.T5Config(num_layers=2, d_model=128, d_ff=256, d_kv=16, num_heads=8, vocab_size=1000)
    return transformers.T5ForConditionalGeneration(config)


def gpt2():
    config = transformers.GPT2Config(n_layer=2, n_embd=128, n_head=4, vocab_size=500, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config)


def clip():
    text = {**SMALL_CLIP, "vocab_size": 500, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**SMALL_CLIP, "image_size": 32, "patch_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))


def build(make, edit=lambda sch: sch, **options):
    with torch.device("meta"):
        model = make()
    plan = plan_build(edit(create_schedule(model, Mesh())), **options)
    return plan, execute(plan, device="cpu").module


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize(
    ("make", "edit"),
    [(t5, lambda s: s), (gpt2, lambda s: s), (clip, lambda s: s.at["logit_scale"].init(2.6592))],
    ids=["t5", "gpt2", "clip"],
)
def test_scales_are_those_that_transformers_gives(make, edit):
    _, module = build(make, edit)
    torch.manual_seed(0)
    given = tensors(make())
    made = tensors(module)
    assert made.keys() == given.keys()
    for path, tensor in given.items():
        ours, theirs = made[path].detach().double(), tensor.detach().double()
        assert ours.shape == theirs.shape
        if theirs.numel() == 1 or theirs.std() == 0 or "position_ids" in path:
            torch.testing.assert_close(ours, theirs, msg=path)
        else:
            # the quotient of two standard deviations of n normals has the standard error 1 / sqrt(n); five of them
            assert (ours.std() / theirs.std()).item() == pytest.approx(1, abs=5 / theirs.numel() ** 0.5), path


class Orthogonal(nn.Linear):
    """Init code that has no program."""

    def reset_parameters(self):
        nn.init.orthogonal_(self.weight)


class Attention(nn.Module):
    """Init code that writes the tensors of its children, and has no program."""

    def __init__(self):
        super().__init__()
        self.q, self.k = (Orthogonal(8, 8, bias=False) for _ in range(2))

    def reset_parameters(self):
        for child in (self.q, self.k):
            nn.init.orthogonal_(child.weight, gain=2)


def test_parents_that_rewrite_their_children_come_last():
    plan, _ = build(t5)
    source = plan.tree["decoder.block.1.layer.0.SelfAttention.q.weight"].source
    assert source == InitProgram([Operation(Normal(0, (128 * 16) ** -0.5))])
    plan, module = build(lambda: nn.Sequential(Attention()))
    assert [call.module for call in plan.tree["0.q.weight"].source.calls] == ["0.q", "0"]
    torch.testing.assert_close(module[0].q.weight @ module[0].q.weight.T, 4 * torch.eye(8))


def test_calls_that_write_a_common_tensor_are_one_unit():
    plan, _ = build(lambda: nn.Sequential(Attention(), Attention(), Orthogonal(8, 8, bias=False)))
    units = [set(step.paths) for step in plan.steps if isinstance(step, Generate)]
    assert units == [{"0.q.weight", "0.k.weight"}, {"1.q.weight", "1.k.weight"}, {"2.weight"}]


def test_what_opaque_code_is_computed_from_is_made_with_it():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Parameter(torch.empty(16)) for _ in range(3))

        def reset_parameters(self):
            with torch.no_grad():
                self.first.normal_()
                self.second.copy_(self.first.sort().values)
                self.third.normal_()

    plan, module = build(Pair)
    assert [step.paths for step in plan.steps if isinstance(step, Generate)] == [("first", "second")]
    assert plan.tree["first"].source.cause == "second is computed from it"
    assert plan.tree["third"].source == InitProgram([Operation(Normal(0, 1))])
    assert torch.equal(module.second, module.first.sort().values)


def test_a_tensor_that_no_code_writes_is_an_error_with_its_mend():
    with pytest.raises(
        PlanError, match=r"logit_scale  f32\[\]: no init code writes it\n.*sch.at\['logit_scale'\].init\(function\)"
    ):
        build(clip)


def test_half_written_is_an_error():
    def half(module):
        module.weight[:2].zero_()

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, 4))

    with pytest.raises(PlanError, match=r"weight  f32\[4, 4\]: init code \(.*half\) gives values to 8 of its 16 elements"):
        build(Bare, init_weights=half)


def test_rows_written_one_by_one_count_as_written():
    def rows(module):
        for row in module.weight:
            row.fill_(3.0)

    _, module = build(lambda: nn.Linear(4, 4, bias=False), init_weights=rows)
    assert torch.equal(module.weight, torch.full((4, 4), 3.0))


def test_arithmetic_on_unwritten_values_builds_on_the_code_before():
    def doubled(module):
        module.weight.mul_(2)

    plan, module = build(lambda: nn.Linear(64, 64, bias=False), init_weights=doubled)
    assert str(plan.tree["weight"].source) == "uniform(±0.125); mul(2)"
    assert 1 / 8 < module.weight.abs().max() <= 2 / 8
    plan, module = build(lambda: Orthogonal(8, 8, bias=False), init_weights=doubled)
    assert [call.kind for call in plan.tree["weight"].source.calls] == ["reset_parameters", "init_weights"]
    torch.testing.assert_close(module.weight @ module.weight.T, 4 * torch.eye(8))


def test_user_code_comes_before_transformers_and_transformers_before_the_module():
    def only_norms(module):
        if "Norm" in type(module).__name__:
            module.weight.fill_(7.0)

    plan, module = build(gpt2, lambda s: s, init_weights=lambda m: None)
    assert plan.tree["transformer.h.0.mlp.c_fc.weight"].source == InitProgram([Operation(Normal(0, 0.02))])
    assert str(plan.tree["transformer.h.0.attn.c_proj.weight"].source) == "normal(0, 0.01)"
    plan, module = build(gpt2, init_weights=only_norms)
    assert torch.equal(module.transformer.ln_f.weight, torch.full((128,), 7.0))
    assert plan.tree["transformer.ln_f.weight"].source == InitProgram([Operation(Fill(7))])
    plan, _ = build(lambda: nn.Linear(4, 4))
    assert str(plan.tree["weight"].source) == "uniform(±0.5)"
    plan, _ = build(lambda: nn.MultiheadAttention(8, 2))
    assert str(plan.tree["in_proj_weight"].source) == "uniform(±0.433)"


def test_the_owners_of_opaque_code_are_named():
    def user(module):
        if isinstance(module, nn.Bilinear):
            nn.init.orthogonal_(module.weight.view(4, 4))

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, 4))

        def _reset_parameters(self):
            nn.init.orthogonal_(self.weight)

    plan, _ = build(
        lambda: nn.Sequential(nn.Bilinear(4, 4, 1, bias=False), Orthogonal(4, 4, bias=False), Own()), init_weights=user
    )
    kinds = {path: spec.source.calls[-1].kind for path, spec in plan.tree.items() if isinstance(spec.source, Made)}
    assert kinds == {"0.weight": "init_weights", "1.weight": "reset_parameters", "2.weight": "_reset_parameters"}


def test_user_code_may_ask_for_the_path():
    seen = []

    def init(module, path):
        seen.append(path)
        for parameter in module.parameters(recurse=False):
            parameter.fill_(len(path))

    _, module = build(lambda: nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))), init_weights=init)
    assert seen[:2] == ["0", "1.0"]
    assert module[0].weight[0, 0] == 1
    assert module[1][0].weight[0, 0] == 3


def test_init_overrides_by_number_and_function():
    def edit(sch):
        return sch.at["weight"].init(nn.init.eye_).at["bias"].init(-1)

    _, module = build(lambda: nn.Linear(3, 3), edit)
    assert torch.equal(module.weight, torch.eye(3))
    assert torch.equal(module.bias, torch.full((3,), -1.0))


def test_an_override_does_not_change_its_neighbours():
    _, plain = build(gpt2)
    _, edited = build(gpt2, lambda s: s.at["transformer.h.0.ln_1.weight"].init(5.0))
    for path, tensor in tensors(plain).items():
        assert torch.equal(tensor, tensors(edited)[path]) is (path != "transformer.h.0.ln_1.weight"), path


class Loops(nn.Module):
    """Init code that looks at what it drew, and code that goes through NumPy."""

    def __init__(self):
        super().__init__()
        self.cut = nn.Parameter(torch.empty(64, 64))
        self.tail = nn.Parameter(torch.empty(32, 32))
        self.basis = nn.Parameter(torch.empty(16, 16))
        self.sparse = nn.Parameter(torch.empty(16, 16))
        self.table = nn.Parameter(torch.empty(16))

    def reset_parameters(self):
        nn.init.trunc_normal_(self.cut, std=0.02, a=-0.04, b=0.04)
        nn.init.trunc_normal_(self.tail, a=3.0, b=4.0)
        nn.init.orthogonal_(self.basis)
        nn.init.sparse_(self.sparse, 0.5)
        self.table.data = torch.from_numpy(np.arange(16, dtype=np.float32) + random.random() + np.random.rand())  # noqa: NPY002


@pytest.mark.filterwarnings("ignore:mean is more than 2 std from:UserWarning")
def test_code_that_depends_on_what_it_draws():
    _, module = build(Loops)
    assert module.cut.abs().max() <= 0.04
    assert 0.01 < module.cut.std() < 0.02
    assert 3 <= module.tail.min() <= module.tail.max() <= 4
    torch.testing.assert_close(module.basis @ module.basis.T, torch.eye(16), rtol=1e-4, atol=1e-5)
    assert (module.sparse == 0).sum(dim=0).eq(8).all()
    assert torch.allclose(module.table.diff(), torch.ones(15))
    assert module.table.untyped_storage().nbytes() == 64
    _, again = build(Loops)
    for path, tensor in tensors(module).items():
        assert torch.equal(tensor, tensors(again)[path]), path


def test_code_that_cannot_be_followed_is_taken_to_write_what_its_module_holds():
    def by_numpy(module):
        module.weight.copy_(torch.from_numpy(np.full_like(module.weight.detach().numpy(), 2)))

    _, module = build(lambda: nn.Linear(3, 3, bias=False), init_weights=by_numpy)
    assert torch.equal(module.weight, torch.full((3, 3), 2.0))


def test_code_that_raises_is_a_problem_with_its_name():
    def broken(module):
        msg = "no such file: weights.bin"
        raise FileNotFoundError(msg)

    with pytest.raises(PlanError, match=r"init code .*broken.* raises FileNotFoundError: no such file: weights.bin"):
        build(lambda: nn.Linear(2, 2), init_weights=broken)


def test_global_generators_are_untouched():
    def draws(module):
        for parameter in module.parameters(recurse=False):
            parameter.fill_(random.random() + np.random.rand())  # noqa: NPY002
            torch.manual_seed(5)
            parameter.normal_()

    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    build(lambda: nn.Linear(4, 4), init_weights=draws)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state  # noqa: NPY002


def test_seed_and_path_decide_the_values():
    _, one = build(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    _, same = build(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    _, other = build(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), seed=1)
    assert torch.equal(one[0].weight, same[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    assert not torch.equal(one[0].weight, one[1].weight)


@pytest.mark.parametrize(
    "draw",
    [
        lambda weight: torch.from_numpy(np.random.randn(*weight.shape).astype("float32")),  # noqa: NPY002
        lambda weight: torch.tensor([[random.gauss(0, 1) for _ in range(8)] for _ in range(8)]),
        lambda weight: torch.full((8, 8), random.random()),
        lambda weight: torch.randn(8, 8).sort().values,
        lambda weight: torch.nn.init.orthogonal_(torch.empty(8, 8)),
        lambda weight: torch.randn(8, 8) * 0.02,
    ],
    ids=["numpy", "python", "python_number", "sorted", "orthogonal", "torch"],
)
def test_seed_and_path_decide_whatever_code_draws_from(draw):
    def init(module):
        for weight in module.parameters(recurse=False):
            weight.copy_(draw(weight))

    def made(num, **options):
        return build(
            lambda: nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(num))), init_weights=init, **options
        )[1]

    first, same, other, alone = made(2), made(2), made(2, seed=1), made(1)
    assert torch.equal(first[1].weight, same[1].weight)
    assert torch.equal(first[0].weight, alone[0].weight)
    assert not torch.equal(first[0].weight, first[1].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_rotary_buffers_on_meta_get_their_values():
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=32)
    _, module = build(lambda: transformers.LlamaModel(config))
    assert torch.equal(module.rotary_emb.inv_freq, transformers.LlamaModel(config).rotary_emb.inv_freq)


def test_values_that_are_there_are_kept():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    model.register_buffer("scale", torch.tensor(3.0))
    with torch.no_grad():
        model[0].weight.fill_(9.0)
    plan = plan_build(create_schedule(model, Mesh()), init_weights=lambda module: None)
    assert plan.tree["0.weight"].source == ModuleValues()
    assert isinstance(plan.tree["1.weight"].source, InitProgram)
    module = execute(plan, device="cpu").module
    assert torch.equal(module[0].weight, torch.full((4, 4), 9.0))
    assert module.scale == 3
    with torch.no_grad():
        module[0].weight.zero_()
    assert torch.equal(model[0].weight, torch.full((4, 4), 9.0))
    assert model[1].weight.is_meta


def test_code_that_also_touches_kept_values_does_not_change_them():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = nn.Parameter(torch.full((4,), 6.0))
            self.made = nn.Parameter(torch.empty(4, device="meta"))

        def reset_parameters(self):
            self.made.copy_(self.kept * 2)
            self.kept.zero_()

    model = Pair()
    module = execute(plan_build(create_schedule(model, Mesh())), device="cpu").module
    assert torch.equal(module.made, torch.full((4,), 12.0))
    assert torch.equal(module.kept, torch.full((4,), 6.0))


def test_no_init_leaves_shapes_without_values():
    plan, module = build(lambda: nn.Linear(4, 4), init_weights=False)
    assert plan.tree["weight"].source == Uninitialised()
    assert not any(isinstance(step, (Generate, EvaluateShard, EvaluateWhole)) for step in plan.steps)
    assert module.weight.shape == (4, 4)
    assert not module.weight.is_meta


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
def test_scripted_modules_keep_what_they_came_with():
    scripted = torch.jit.script(nn.Linear(4, 4))
    model = nn.Sequential(scripted, nn.Linear(4, 4, device="meta"))
    module = execute(plan_build(create_schedule(model, Mesh())), device="cpu").module
    assert torch.equal(module[0].weight, scripted.weight)
    with torch.no_grad():
        module[0].weight.zero_()
    assert scripted.weight.abs().sum() > 0
    assert module(torch.ones(1, 4)).shape == (1, 4)
    with pytest.raises(PlanError, match=r"0.weight  f32\[4@tensor, 4\]: it belongs to a scripted module"):
        plan_build(create_schedule(model, Mesh(tensor=2)).at["0.weight"].shard(axis=0))
    with pytest.raises(TypeError, match="a scripted model cannot be split"):
        create_schedule(scripted, Mesh())


def test_recurrent_modules_compute_with_their_new_parameters():
    _, module = build(lambda: nn.LSTM(4, 8, 2))
    assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))
    assert module(torch.ones(3, 4))[0].shape == (3, 8)


class Tied(nn.Module):
    """A tensor under two paths, whose modules would give it different values."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second
        self.second.weight = self.first.weight


def test_a_tied_tensor_is_made_where_it_stands_first():
    plan, module = build(lambda: Tied(nn.Embedding(64, 64), nn.Linear(64, 64, bias=False)))
    assert plan.tree["first.weight"].source == InitProgram([Operation(Normal(0, 1))])
    assert module.first.weight.std().item() == pytest.approx(1, rel=0.1)
    assert module.second.weight is module.first.weight
    plan, module = build(lambda: Tied(Orthogonal(8, 8, bias=False), nn.Linear(8, 8, bias=False)))
    (call,) = plan.tree["first.weight"].source.calls
    assert call.module == "first"
    assert call.code.endswith("Orthogonal.reset_parameters")
    torch.testing.assert_close(module.second.weight @ module.second.weight.T, torch.eye(8))


def test_a_tied_tensor_is_made_where_code_writes_it():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(64, 64))

    plan, _ = build(lambda: Tied(Bare(), Orthogonal(64, 64, bias=False)))
    assert [step.paths for step in plan.steps if isinstance(step, Generate)] == [("second.weight",)]
    plan, module = build(lambda: Tied(Bare(), nn.Linear(64, 64, bias=False)))
    assert str(plan.tree["first.weight"].source) == "uniform(±0.125)"
    assert 0.12 < module.first.weight.abs().max() <= 0.125
    assert module.second.weight is module.first.weight


def test_a_shared_module_is_made_once():
    def make():
        block = nn.Linear(8, 8)
        return nn.ModuleList([block, block])

    plan, module = build(make)
    assert plan.tree["0.weight"].tie == ("1.weight",)
    assert module[0] is module[1]
    assert 0 < module[1].weight.abs().max() <= 8**-0.5


def test_a_buffer_that_shares_a_parameters_memory_stays_a_buffer():
    def make():
        model = nn.Linear(4, 4)
        model.register_buffer("same", model.weight.detach())
        return model

    _, module = build(make)
    assert "same" in dict(module.named_buffers())
    assert torch.equal(module.same, module.weight)
    with torch.no_grad():
        module.weight.zero_()
    assert not module.same.any()


def test_storages_that_come_and_go_are_not_taken_for_others():
    def rebinds(module):
        for _ in range(20):
            module.weight.data = torch.zeros(64, 64)
        scratch = [torch.zeros(64, 64) for _ in range(50)]
        module.bias.copy_(sum(scratch)[0] + 4)

    _, module = build(lambda: nn.Linear(64, 64), init_weights=rebinds)
    assert torch.equal(module.weight, torch.zeros(64, 64))
    assert torch.equal(module.bias, torch.full((64,), 4.0))


@pytest.mark.parametrize(("function", "num"), [(torch.zeros_like, 0), (lambda weight: weight[0].zero_(), 4)])
def test_a_function_that_does_not_write_its_tensor_is_an_error(function, num):
    with pytest.raises(PlanError, match=rf"weight  f32\[4, 4\]: its function .* gives values to {num} of its 16 elements"):
        build(lambda: nn.Linear(4, 4), lambda sch: sch.at["weight"].init(function))


def test_a_function_that_raises_is_named():
    def broken(tensor):
        msg = "out of ideas"
        raise ValueError(msg)

    with pytest.raises(PlanError, match=r"weight: its init code .*broken raises ValueError: out of ideas"):
        build(lambda: nn.Linear(4, 4), lambda sch: sch.at["weight"].init(broken))


def test_a_function_that_cannot_be_followed_is_taken_to_write_its_tensor():
    def by_numpy(tensor):
        tensor.copy_(torch.from_numpy(np.ones(tensor.numpy().shape, dtype=np.float32)))

    _, module = build(lambda: nn.Linear(4, 4), lambda sch: sch.at["weight"].init(by_numpy))
    assert torch.equal(module.weight, torch.ones(4, 4))
    assert module.bias.abs().max() <= 0.5


def test_code_of_a_parent_reaches_a_tied_tensor_by_any_path():
    class Parent(Tied):
        def __init__(self):
            super().__init__(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
            self.third = nn.Parameter(torch.empty(4, 4))

        def reset_parameters(self):
            with torch.no_grad():
                self.second.weight.fill_(3.0)
                self.third.copy_(self.second.weight * 2)

    _, module = build(Parent)
    assert torch.equal(module.first.weight, torch.full((4, 4), 3.0))
    assert torch.equal(module.third, torch.full((4, 4), 6.0))


def test_the_own_code_of_the_other_place_still_makes_what_is_not_tied():
    _, module = build(lambda: Tied(nn.Embedding(64, 64), nn.Linear(64, 64)))
    assert module.first.weight.std().item() == pytest.approx(1, rel=0.1)
    assert 0.1 < module.second.bias.abs().max() <= 0.125


def test_overlapping_writes_count_each_element_once():
    def overlaps(module):
        module.weight[:-1].normal_()
        module.weight[0].zero_()

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(10, 3))

    with pytest.raises(PlanError, match="gives values to 27 of its 30 elements"):
        build(Bare, init_weights=overlaps)


def test_what_opaque_code_leaves_without_values_is_an_error_when_it_runs():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.written, self.left = nn.Parameter(torch.empty(3)), nn.Parameter(torch.empty(4))

    def by_numpy(module):
        module.written.copy_(torch.from_numpy(np.ones(module.written.detach().numpy().shape, dtype=np.float32)))

    with torch.device("meta"):
        model = Bare()
    plan = plan_build(create_schedule(model, Mesh()), init_weights=by_numpy)
    with pytest.raises(ValueError, match=r"left  f32\[4\]: its init code gave no values to 4 of its elements"):
        execute(plan, device="cpu")


def test_a_view_of_something_larger_is_cut_loose():
    def from_a_bank(module):
        module.weight.data = torch.arange(32.0)[:16].view(4, 4)

    _, module = build(lambda: nn.Linear(4, 4, bias=False), init_weights=from_a_bank)
    assert torch.equal(module.weight, torch.arange(16.0).view(4, 4))
    assert module.weight.untyped_storage().nbytes() == 64


def test_plain_tensors_are_copied_with_their_values():
    model = nn.Linear(4, 4, device="meta")
    model.scale, model.table = torch.ones(4), {"shift": torch.full((4,), 2.0)}
    plan = plan_build(create_schedule(model, Mesh()), example_inputs={"input": torch.empty(1, 4)})
    module = execute(plan, device="cpu").module
    assert torch.equal(module.scale, model.scale)
    assert module.scale is not model.scale
    assert torch.equal(module.table["shift"], model.table["shift"])


def test_a_parameter_in_a_plain_attribute_is_refused():
    model = nn.Linear(4, 4)
    model.kept = [model.weight]
    with pytest.raises(
        PlanError, match="kept: a plain attribute keeps weight, and would go on keeping the tensor of before"
    ):
        plan_build(create_schedule(model, Mesh()))


def test_values_with_strides_are_kept():
    model = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    module = execute(plan_build(create_schedule(model, Mesh())), device="cpu").module
    assert torch.equal(module.weight, model.weight)
    assert module.weight.is_contiguous()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda m: m.weight.register_hook(lambda grad: grad),
            "weight: the tensor has a hook, which would stay on the original",
        ),
        (lambda m: m.register_forward_hook(lambda *_: m.weight and None), "holds on to the original"),
        (lambda m: m.register_forward_hook(lambda *_, d={"m": m}: d and None), "holds on to the original 'model'"),
        (
            lambda m: setattr(m, "weight", Special(torch.empty(4, 4))),
            "weight: it is a Special, and a plan makes plain parameters",
        ),
    ],
)
def test_what_a_copy_would_lose_is_refused(change, text):
    model = nn.Linear(4, 4)
    change(model)
    with pytest.raises(PlanError, match=text):
        plan_build(create_schedule(model, Mesh()))


class Special(nn.Parameter):
    """A parameter of a class of its own."""


def test_a_module_that_refuses_to_be_copied_is_not_filled_itself():
    class Single(nn.Linear):
        def __deepcopy__(self, memo):
            return self

    model = nn.Sequential(Single(4, 4, device="meta"))
    with pytest.raises(PlanError, match="0: its copy is the module itself, so that the original would be filled"):
        plan_build(create_schedule(model, Mesh()))
    assert model[0].weight.is_meta


def test_a_hook_with_a_variable_that_is_not_assigned_yet_is_no_obstacle():
    def make():
        def hook(*_):
            return later

        model = nn.Linear(4, 4)
        model.register_forward_hook(hook)
        if model.training:
            return model
        later = None
        return later

    build(make)
