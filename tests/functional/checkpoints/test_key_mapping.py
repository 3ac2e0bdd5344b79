"""Names in checkpoints: what transformers' own loading and saving do is the measure."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    GPT2Model,
    MixtralConfig,
    MixtralForCausalLM,
    conversion_mapping,
    modeling_utils,
)
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    PrefixChange,
    Split,
    Transpose,
    WeightConverter,
    WeightRenaming,
    revert_weight_conversion,
)

from shardplan.functional import create_schedule, plan_build
from shardplan.functional.checkpoints.key_mapping import stored_form
from shardplan.functional.model.read import read_tensors
from shardplan.specs import Checkpoint, Mesh
from shardplan.specs.errors import PlanError
from shardplan.specs.source import Loaded, ModuleValues, Unknown
from tests.helpers.checkpoint_folders import loaded, put_together, sources, write_index
from tests.helpers.families import MAKERS, family
from tests.helpers.models import LLAMA, llama

SMALL = "20KB"


def save(model, folder, size=SMALL):
    model.save_pretrained(folder, max_shard_size=size)
    return str(folder)


def filled(name):
    torch.manual_seed(0)
    return MAKERS[name]()


def text(problems):
    return str(PlanError(problems))


def check_loads(meta, folder, **wishes):
    """What is read is what ``from_pretrained`` gives, bit for bit."""
    tree, found, problems = sources(meta, folder, **wishes)
    assert not problems, text(problems)
    values = loaded(tree, folder)
    expected = type(meta).from_pretrained(folder).state_dict()
    for path, value in values.items():
        for name in tree[path].paths:
            assert torch.equal(value, expected[name]), name
    assert {part.stored.file for path in values for part in tree[path].source.parts} == {file.name for file in found.files}
    return tree, values


def check_saves(whole, meta, folder):
    """What is written is what ``save_pretrained`` writes: keys, shapes, order and values."""
    state = modeling_utils.remove_tied_weights_from_state_dict(dict(whole.state_dict()), whole)
    expected = revert_weight_conversion(whole, state)
    values = whole.state_dict()
    kept = stored_form(meta, read_tensors(meta)[0])
    assert [one.key for one in kept] == list(expected)
    for one in kept:
        value = put_together(one.shape, one.parts, lambda stored: values[stored.key])
        assert one.dtype == str(value.dtype).removeprefix("torch.")
        assert torch.equal(value, expected[one.key]), one.key
    written = {key for path in folder.glob("*.safetensors") for key in load_file(path)}
    assert written == {one.key for one in kept}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen2_moe", "deepseek_v3", "bert", "t5", "vit", "opt"])
def test_a_folder_of_transformers_is_read_as_transformers_reads_it_and_written_as_it_writes_it(name, tmp_path):
    whole, meta = filled(name), family(name)
    save(whole, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tree, values = check_loads(meta, str(tmp_path))
    assert len(values) == len([spec for spec in tree.values() if spec.kind != "non_persistent_buffer"])
    check_saves(whole, meta, tmp_path)


def test_every_expert_of_a_mixture_is_a_part_of_its_own(tmp_path):
    folder = save(filled("mixtral"), tmp_path)
    tree, _, _ = sources(family("mixtral"), folder)
    gates = tree["model.layers.1.mlp.experts.gate_up_proj"].source.parts
    assert [(part.stored.key.split(".experts.")[1], part.at) for part in gates] == [
        (f"{expert}.{name}.weight", (expert, start, 0)) for name, start in (("w1", 0), ("w3", 48)) for expert in range(4)
    ]


def test_a_model_without_its_prefix_serves_one_with_it_and_the_other_way_round(tmp_path):
    config = family("gpt2").config
    torch.manual_seed(0)
    base = GPT2Model(config)
    check_loads(family("gpt2"), save(base, tmp_path / "base"))
    with torch.device("meta"):
        meta = GPT2Model(config)
    check_loads(meta, save(GPT2LMHeadModel(config), tmp_path / "head"))


def test_any_name_of_a_tied_tensor_serves_it(tmp_path):
    whole = filled("gpt2")
    save(whole, tmp_path, "1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, values = check_loads(family("gpt2"), str(tmp_path))
    assert torch.equal(values["transformer.wte.weight"], whole.lm_head.weight)


def test_tied_tensors_that_were_trained_apart_are_told(tmp_path):
    save(filled("gpt2"), tmp_path, "1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_loads(family("gpt2"), str(tmp_path))
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, _, problems = sources(family("gpt2"), tmp_path)
    assert text(problems) == (
        "1 problem\n"
        "  transformer.wte.weight  f32[64, 32]: in the model it is one tensor, and the checkpoint has transformer.wte.weight"
        " and lm_head.weight, which differ\n"
        "      Untie them (config.tie_word_embeddings=False); or leave one out: Checkpoint(..., ignore=('lm_head.weight',))"
    )
    names = ("lm_head.weight", "transformer.wte.weight")
    for left_out, taken in (names, names[::-1]):
        tree, _, problems = sources(family("gpt2"), tmp_path, ignore=(left_out,))
        assert not problems
        assert torch.equal(loaded(tree, tmp_path)["transformer.wte.weight"], tensors[taken])


def test_names_of_old_checkpoints_are_known(tmp_path):
    whole = filled("bert")
    save(whole, tmp_path, "1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): value for key, value in tensors.items()}
    renamed["bert.embeddings.position_ids"] = torch.arange(32)[None]  # a buffer that is not saved any more
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_loads(family("bert"), str(tmp_path))


def declare(monkeypatch, *converters):
    """Let transformers know another form of Llama's checkpoints, for one test."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # which fills it
    known = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setitem(known, "LlamaForCausalLM", list(converters))


def test_tensors_are_split_cut_turned_and_joined_as_declared(monkeypatch, tmp_path):
    torch.manual_seed(0)
    whole = llama("cpu")
    attention = "self_attn.{}_proj.weight"
    declare(
        monkeypatch,
        WeightConverter("self_attn.qkv.weight", [attention.format(name) for name in "qkv"], [Split(dim=0)]),
        WeightConverter("mlp.both.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)]),
        WeightConverter("self_attn.out.weight", attention.format("o"), [Transpose(0, 1)]),
        WeightConverter(["head.0.weight", "head.1.weight"], "lm_head.weight", [Concatenate(dim=1)]),
    )
    folder = save(whole, tmp_path)
    keys = write_index(folder)
    assert "model.layers.1.self_attn.qkv.weight" in keys
    assert "head.1.weight" in keys
    check_loads(llama(), folder)
    check_saves(whole, llama(), tmp_path)


def test_axes_that_are_as_the_model_has_them_are_not_exchanged(monkeypatch, tmp_path):
    declare(monkeypatch, WeightConverter("down_proj.weight", "down_proj.weight", [Transpose(0, 1, check_dims=True)]))
    whole = llama("cpu")
    folder = save(whole, tmp_path, "1GB")
    check_loads(llama(), folder)
    check_saves(whole, llama(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    turned = {key: value.mT.contiguous() if "down_proj" in key else value for key, value in tensors.items()}
    save_file(turned, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_loads(llama(), folder)


def test_an_operation_that_no_boxes_stand_for_is_named(monkeypatch, tmp_path):
    folder = save(llama("cpu"), tmp_path, "1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {key.replace("gate_proj", "mixed"): value for key, value in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    declare(monkeypatch, WeightConverter("mlp.mixed.weight", "mlp.gate_proj.weight", [Interleave(dim=0)]))
    _, _, problems = sources(llama(), folder)
    assert text(problems).startswith(
        "2 problems\n  model.layers.{0..1}.mlp.gate_proj.weight: Interleave(dim=0) of transformers'"
    )
    assert "save_original_format=False" in text(problems)
    with pytest.raises(PlanError, match=r"layers.\{0..1\}.mlp.gate_proj.weight: its original form .* Interleave\(dim=0\)"):
        stored_form(llama(), read_tensors(llama())[0])


def test_of_what_cannot_be_made_together_one_is_told(monkeypatch, tmp_path):
    folder = save(llama("cpu"), tmp_path, "1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    for key in [key for key in tensors if "up_proj" in key]:
        tensors[key.replace("up_proj", "both")] = torch.cat([tensors.pop(key), tensors.pop(key.replace("up", "gate"))])
    save_file(tensors, tmp_path / "model.safetensors")
    targets = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    declare(monkeypatch, WeightConverter("mlp.both.weight", targets, [Interleave(dim=0), Chunk(dim=0)]))
    _, _, problems = sources(llama(), folder)
    assert [problem.path for problem in problems] == [f"model.layers.{layer}.mlp.gate_proj.weight" for layer in (0, 1)]


def test_quantised_weights_whose_scales_would_be_left_out_are_refused(tmp_path):
    folder = save(filled("llama"), tmp_path, "1GB")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    _, _, problems = sources(family("llama"), folder)
    assert not problems
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    _, _, problems = sources(family("llama"), folder, ignore=("**.weight_scale_inv",))
    assert "up_proj.weight  f32[48, 32]: it is stored quantised (fp8) beside" in text(problems)


def test_numbers_are_counted_and_not_spelled(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16}
    config = MixtralConfig(**sizes, num_hidden_layers=11, num_local_experts=12)
    torch.manual_seed(0)
    whole = MixtralForCausalLM(config)
    with torch.device("meta"):
        meta = MixtralForCausalLM(config)
    check_loads(meta, save(whole, tmp_path))
    check_saves(whole, meta, tmp_path)


def test_names_are_changed_back_in_the_other_order_and_prefixes_only_taken_away(monkeypatch, tmp_path):
    declare(
        monkeypatch,
        PrefixChange(prefix_to_remove="old"),
        WeightRenaming("feed.", "ffn."),
        WeightRenaming("ffn.", "mlp."),
        WeightConverter("mlp.both.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)]),
    )
    whole = llama("cpu")
    folder = save(whole, tmp_path, "1GB")
    check_saves(whole, llama(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.feed.both.weight" in tensors
    save_file({f"old.{key}": one for key, one in tensors.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_loads(llama(), folder)


def test_files_of_which_nothing_is_read_are_left_out(tmp_path):
    folder = save(filled("llama"), tmp_path)
    save_file({"extra.weight": torch.ones(2)}, tmp_path / "model-extra.safetensors")
    write_index(folder)
    _, found, problems = sources(family("llama"), folder, ignore=("extra.*",))
    assert not problems
    assert "model-extra.safetensors" not in {file.name for file in found.files}


def test_an_expert_that_is_missing_is_named(tmp_path):
    folder = save(filled("mixtral"), tmp_path, "1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.block_sparse_moe.experts.2.w1.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    _, _, problems = sources(family("mixtral"), folder)
    (problem,) = problems
    assert problem.path == "model.layers.0.mlp.experts.gate_up_proj"
    assert "of .experts.*.w1.weight number 2 is missing, and 3 is there" in problem.cause
    for name in "13":
        tensors.pop(f"model.layers.0.block_sparse_moe.experts.2.w{name}.weight", None)
        del tensors[f"model.layers.0.block_sparse_moe.experts.3.w{name}.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    _, _, problems = sources(family("mixtral"), folder)
    assert "in model.safetensors its 4 tensors make f32[2, 96, 32], and in the model [4, 96, 32]" in text(problems)


def classifier(num_labels=3, device="meta"):
    base = {name: value for name, value in family("bert").config.to_dict().items() if "label" not in name}
    with torch.device(device):
        return BertForSequenceClassification(BertConfig(**base | {"num_labels": num_labels}))


def test_what_a_checkpoint_lacks_is_made_by_init_code_where_the_user_says_so(tmp_path):
    folder = save(BertModel(family("bert").config), tmp_path)
    _, _, problems = sources(classifier(), folder)
    assert [problem.path for problem in problems] == ["classifier.weight", "classifier.bias"]
    assert "the checkpoint has no tensor for it" in text(problems)
    assert "Checkpoint(..., init=('classifier.weight',))" in text(problems)
    tree, _, problems = sources(classifier(), folder, init=("classifier.*",))
    assert not problems
    assert [spec.path for spec in tree.values() if isinstance(spec.source, Unknown) and spec.kind == "parameter"] == [
        "classifier.weight",
        "classifier.bias",
    ]
    plan = plan_build(create_schedule(classifier(), Mesh()), init_weights=Checkpoint(folder, init=("classifier.*",)))
    assert isinstance(plan.tree["bert.pooler.dense.weight"].source, Loaded)


def test_keys_that_serve_nothing_are_folded_and_can_be_left_out(tmp_path):
    folder = save(filled("llama"), tmp_path)
    meta = family("llama")
    for layer in meta.model.layers:
        layer.mlp.up_proj = nn.Identity()
    _, _, problems = sources(meta, folder)
    assert text(problems) == (
        "2 problems\n"
        "  model.layers.{0..1}.mlp.up_proj.weight: the checkpoint has it, and the model has no tensor of this name\n"
        "      To leave it out: Checkpoint(..., ignore=('model.layers.*.mlp.up_proj.weight',))"
    )
    tree, _, problems = sources(meta, folder, ignore=("**.up_proj.weight",))
    assert not problems
    assert "model.layers.0.mlp.up_proj.weight" not in tree


def test_a_family_of_names_that_are_wrong_is_said_once_with_the_closest(tmp_path):
    save(filled("llama"), tmp_path, "1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({key.replace("down_proj", "dwn_proj"): one for key, one in tensors.items()}, tmp_path / "model.safetensors")
    _, _, problems = sources(family("llama"), str(tmp_path))
    assert "model.layers.{0..1}.mlp.down_proj.weight  f32[32, 48]: the checkpoint has no tensor for it; of " in text(
        problems
    )
    assert "of the keys that serve no tensor the closest is model.layers.*.mlp.dwn_proj.weight\n" in text(problems)
    assert text(problems).count("\n") == 4


def test_a_tensor_of_another_shape_is_told_with_both_shapes_and_the_file_and_can_be_started_anew(tmp_path):
    folder = save(classifier(5, "cpu"), tmp_path)
    file = write_index(folder)["classifier.weight"]
    _, _, problems = sources(classifier(3), folder)
    assert f"classifier.weight  f32[3, 32]: in {file} it is f32[5, 32], and in the model [3, 32]" in text(problems)
    wishes = {"ignore": ("classifier.weight", "classifier.bias"), "init": ("classifier.*",)}
    tree, _, problems = sources(classifier(3), folder, **wishes)
    assert not problems
    assert isinstance(tree["classifier.weight"].source, Unknown)
    _, _, problems = sources(classifier(3), folder, ignore=wishes["ignore"])
    assert "classifier.weight  f32[3, 32]: the checkpoint has no tensor for it" in text(problems)


def test_a_whole_model_of_other_sizes_is_told_in_a_line_a_family(tmp_path):
    folder = save(llama("cpu"), tmp_path)
    _, _, problems = sources(llama(intermediate_size=80), folder)
    assert len(problems) == 6
    assert text(problems).count("\n") == 6
    assert "model.layers.{0..1}.mlp.up_proj.weight  f32[80, 64]: in model-0000" in text(problems)


class Counter(nn.Module):
    def __init__(self, weight=torch.float32, count=torch.int64):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, dtype=weight), requires_grad=weight.is_floating_point)
        self.register_buffer("count", torch.empty(2, dtype=count))


@pytest.mark.parametrize(
    ("weight", "count", "wrong"),
    [
        (torch.bfloat16, torch.int32, []),
        (torch.float64, torch.uint8, []),
        (torch.complex64, torch.int64, ["weight"]),
        (torch.int32, torch.float32, ["weight", "count"]),
        (torch.float32, torch.bool, ["count"]),
    ],
)
def test_dtypes_that_are_converted_and_those_that_are_not(weight, count, wrong, tmp_path):
    save_file({"weight": torch.ones(4).to(weight), "count": torch.ones(2).to(count)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        meta = Counter()
    tree, _, problems = sources(meta, tmp_path)
    assert [problem.path for problem in problems] == wrong
    assert all("which is not converted to" in problem.cause for problem in problems)
    for path in {"weight", "count"} - set(wrong):
        assert tree[path].source.dtype == str({"weight": weight, "count": count}[path]).removeprefix("torch.")


def test_integers_are_not_narrowed(tmp_path):
    save_file({"weight": torch.ones(4), "count": torch.ones(2, dtype=torch.int64)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        _, _, problems = sources(Counter(count=torch.int32), tmp_path)
    assert "in model.safetensors it is int64, which is not converted to int32" in text(problems)


def test_parts_of_different_dtypes_are_refused(tmp_path):
    folder = save(filled("mixtral"), tmp_path, "1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors[key] = tensors[key].bfloat16()
    save_file(tensors, tmp_path / "model.safetensors")
    _, _, problems = sources(family("mixtral"), folder)
    (problem,) = problems
    assert "it is made of tensors of float32 and bfloat16" in problem.cause


def test_a_tensor_with_a_source_of_its_own_keeps_it_and_its_key_is_known(tmp_path):
    whole = filled("llama")
    folder = save(whole, tmp_path)
    meta = family("llama")
    meta.model.norm.weight = nn.Parameter(torch.full((32,), 7.0))
    tree, _, problems = sources(meta, folder)
    assert not problems
    assert isinstance(tree["model.norm.weight"].source, ModuleValues)
    plan = plan_build(create_schedule(meta, Mesh()).at["lm_head.weight"].init(0.0), init_weights=Checkpoint(folder))
    assert not isinstance(plan.tree["lm_head.weight"].source, Loaded)
    assert isinstance(plan.tree["model.embed_tokens.weight"].source, Loaded)
    _, _, problems = sources(whole, folder)
    assert "all tensors have values or a source of their own" in text(problems)


def test_patterns_that_match_nothing_are_told_with_the_closest(tmp_path):
    folder = save(BertModel(family("bert").config), tmp_path)
    _, _, problems = sources(classifier(), folder, init=("classifier.*", "clasifier.weight", "x["), ignore=("bert.poler.*",))
    assert text(problems) == (
        "1 problem\n  x[: pattern 'x[': '[' has no partner\n      Close it, or write ? for a bracket that belongs to a name"
    )
    _, _, problems = sources(classifier(), folder, init=("classifier.*", "clasifier.weight"), ignore=("pooler.dnse.weight",))
    assert text(problems) == (
        "2 problems\n"
        "  clasifier.weight: it matches no tensor that the checkpoint lacks\n"
        "      The closest are classifier.weight, classifier.bias\n"
        "  pooler.dnse.weight: it matches no key that serves no tensor\n"
        "      The closest are pooler.dense.weight, pooler.dense.bias, encoder.layer.*.output.dense.weight"
    )


def test_a_model_of_ones_own_has_its_paths_as_keys(tmp_path):
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.BatchNorm1d(4))
    whole = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.BatchNorm1d(4))
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    tree, _, problems = sources(meta, tmp_path)
    assert not problems
    values = loaded(tree, tmp_path)
    assert values.keys() == whole.state_dict().keys()
    assert all(torch.equal(value, whole.state_dict()[path]) for path, value in values.items())
    assert [one.key for one in stored_form(meta, tree)] == list(whole.state_dict())
    save_file({**whole.state_dict(), "position_ids": torch.ones(1)}, tmp_path / "model.safetensors")
    _, _, problems = sources(meta, tmp_path)
    assert [problem.path for problem in problems] == ["position_ids"]


def test_the_model_is_left_as_it_is(tmp_path):
    folder = save(filled("mixtral"), tmp_path)
    meta = family("mixtral")
    before = json.dumps(meta.config.to_dict(), default=str), sorted(vars(meta)), list(meta.state_dict())
    tree, _, _ = sources(meta, folder)
    stored_form(meta, tree)
    assert (json.dumps(meta.config.to_dict(), default=str), sorted(vars(meta)), list(meta.state_dict())) == before


def test_the_model_that_was_loaded_is_saved_in_the_form_it_was_loaded_from(tmp_path):
    whole = filled("mixtral")
    whole.save_pretrained(tmp_path / "new", save_original_format=False)
    again = type(whole).from_pretrained(tmp_path / "new")
    again.save_pretrained(tmp_path / "again", max_shard_size=SMALL)
    (tmp_path / "again").mkdir(exist_ok=True)
    check_saves(again, again, tmp_path / "again")
    check_loads(family("mixtral"), str(tmp_path / "new"))


def test_a_hundred_layers_are_mapped_at_once(tmp_path):
    meta = llama(num_hidden_layers=100, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=2)
    save_file({key: torch.zeros(one.shape) for key, one in meta.state_dict().items()}, tmp_path / "model.safetensors")
    tree, _, problems = sources(meta, tmp_path)
    assert not problems
    assert sum(isinstance(spec.source, Loaded) for spec in tree.values()) == 903
    assert LLAMA["num_hidden_layers"] == 2
