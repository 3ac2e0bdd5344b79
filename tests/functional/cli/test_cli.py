"""The command line: what it prints, what it refuses and how, and that a saved plan is answered for without torch."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from attrs import evolve
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from shardplan.functional import audit, plan_build, predict
from shardplan.functional.cli import main
from shardplan.functional.frontends import schedule_from_tp_plan
from shardplan.specs import Mesh, dumps, loads
from shardplan.specs.dtypes import human_bytes, parse_bytes
from shardplan.specs.steps import LoadShard
from tests.helpers.models import plain, split_plain
from tests.helpers.processes import run_on_terminal, run_program, run_python
from tests.helpers.strategies import law

SHARDPLAN = Path(sys.executable).with_name("shardplan")
MESH = Mesh(data=2, tensor=2)
HEAVY = ("torch", "numpy", "transformers", "deepspeed")


@pytest.fixture(scope="module")
def plan():
    return plan_build(split_plain(plain(), MESH))


@pytest.fixture(scope="module")
def saved(plan, tmp_path_factory):
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    file.write_text(dumps(plan))
    return file


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory):
    """The plan of a Llama of 32 layers and 6.7 billion parameters."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32))
    plan = plan_build(schedule_from_tp_plan(model, Mesh(data=8, tensor=8)))
    file = tmp_path_factory.mktemp("plans") / "llama.json"
    file.write_text(dumps(plan))
    return file


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a user's file, in which commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("mine", "broken", "net"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from shardplan.functional import create_schedule\n"
        "class Model(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.embed, self.up, self.down = nn.Embedding(32, 8), nn.Linear(8, 32), nn.Linear(32, 8)\n"
        "    def forward(self, input_ids):\n"
        "        return self.down(self.up(self.embed(input_ids)).relu())\n"
        "def split(mesh):\n"
        "    with torch.device('meta'):\n"
        "        model = Model()\n"
        "    sch = create_schedule(model, mesh).at['up'].colwise().at['down'].rowwise()\n"
        "    return sch.at['up'].cut_pipeline_stage() if mesh.pipe > 1 else sch\n"
        "def uneven(mesh):\n"
        "    return split(mesh).at['embed.weight'].shard(axis=0)\n"
        "def opaque(mesh):\n"
        "    return split(mesh).at['down.weight'].init(nn.init.orthogonal_)\n"
        "def stops(mesh):\n"
        "    return [][mesh.tensor]\n"
        "def number(mesh):\n"
        "    return mesh.num_ranks\n"
        "def loud(mesh):\n"
        "    print('looking at', mesh)\n"
        "    return split(mesh)\n"
        "def leaves(mesh):\n"
        "    raise SystemExit(3)\n"
        "def many(mesh):\n"
        "    assert mesh.num_ranks > 1\n"
        "    return split(mesh)\n"
        "def typo(mesh):\n"
        "    return split(mesh).at['upp'].colwise()\n"
    )
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, dtype="bfloat16"
    ).save_pretrained(tmp_path / "llama")
    (tmp_path / "odd").mkdir()
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "hidden_act": "none"}))
    GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, bos_token_id=0, eos_token_id=0).save_pretrained(
        tmp_path / "gpt2"
    )
    return tmp_path


def run(*arguments, code=0):
    """Run a command in this process; return what it prints, on stderr where it fails."""
    done = CliRunner().invoke(main, [*map(str, arguments)], prog_name="shardplan")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.output
    return done.stderr if code == 2 else done.stdout


def test_a_saved_plan_is_shown_and_audited_by_the_installed_command(plan, saved):
    shown = run_program([SHARDPLAN, "show", saved])
    assert (shown.stdout, shown.stderr, shown.returncode) == (f"{plan}\n", "", 0)
    audited = run_program([SHARDPLAN, "audit", saved, "--device-memory", "1KiB", "--ranks-per-node", "2"])
    report = audit(plan, device_memory=1024, ranks_per_node=2)
    assert (audited.stdout, audited.returncode) == (f"{report}\n", 1)
    assert not report.ok
    missing = run_program([SHARDPLAN, "show", "missing.json"])
    assert (missing.stdout, missing.returncode) == ("", 2)
    assert missing.stderr.startswith("PlanError: 1 problem\n  missing.json: there is no such file\n")


def test_a_plan_of_seven_billion_parameters_is_answered_for_without_torch(seven_billion):
    plan = str(seven_billion)
    commands = [
        ["show", plan],
        ["audit", plan],
        ["audit", plan, "--rank", "63"],
        ["explain", plan, "lm_head.weight"],
        ["diff", plan, plan],
    ]
    code = f"""
import sys
from shardplan.functional.cli import main
for command in {commands}:
    main(command, standalone_mode=False)
    print("loaded by", *command, [name for name in {HEAVY} if name in sys.modules])
"""
    printed = run_python(code).splitlines()
    ends = [printed.index(f"loaded by {' '.join(command)} []") for command in commands]
    assert all(end - start > 1 for start, end in pairwise([-1, *ends])), "each command printed something"


def test_a_terminal_shows_in_colours_where_tensors_are_split(plan, saved):
    shown = run_on_terminal([SHARDPLAN, "show", saved])
    assert re.search("\x1b\\[[0-9;]+m64@tensor\x1b\\[0m", shown)
    assert re.sub("\x1b\\[[0-9;]*m", "", shown) == f"{plan}\n"
    assert run_on_terminal([SHARDPLAN, "show", saved], NO_COLOR="1") == f"{plan}\n"


def test_the_json_of_each_command(plan, saved):
    assert loads(run("show", saved, "--json")) == plan
    report = json.loads(run("audit", saved, "--rank", 3, "--json"))
    assert report["ok"] is True
    assert report["fingerprint"] == plan.fingerprint
    assert report["rank"]["receipt"]["held_bytes"] == predict(plan, 3).held_bytes
    assert report["rank"]["memory"]["parameter_bytes"] == audit(plan).memory(3).parameter_bytes
    held = json.loads(run("explain", saved, "blocks.0.up.weight", "--json"))["held"]
    assert [tuple(map(tuple, place["index"][0])) for place in held] == [((0, 32),), ((32, 64),)]


def test_one_rank_of_the_audit_is_its_receipt(plan, saved):
    receipt = predict(plan, 3)
    shown = run("audit", saved, "--rank", 3)
    assert shown.startswith(f"{audit(plan)}\n\nrank 3  pipe=0 data=1 tensor=1\n")
    assert f"executing: {receipt.num_tensors} tensors, peak {human_bytes(receipt.peak_bytes)}, " in shown
    assert "PlanError: 1 problem\n  --rank: rank 4 is not on mesh pipe=1 data=2 tensor=2" in run(
        "audit", saved, "--rank", 4, code=2
    )


def test_of_ranks_that_zero_2_leaves_different_gradients_it_is_said_that_the_most_is_shown(tmp_path):
    for stage in (1, 2):
        config = {"train_batch_size": 4, "gradient_clipping": 1.0, "zero_optimization": {"stage": stage}}
        plan = plan_build(split_plain(plain(), MESH), target="deepspeed", config=config)
        (tmp_path / "zero.json").write_text(dumps(plan))
        said = run("audit", tmp_path / "zero.json", "--rank", 3)
        assert ("these are those of the rank with the most" in said) == (stage == 2)


def test_an_audit_fails_on_what_it_is_told_to_fail_on(saved):
    assert "SP030 error" in run("audit", saved, "--device-memory", "1KiB", code=1)
    run("audit", saved, "--device-memory", "1KiB", "--fail-on", "never")
    run("audit", saved, "--device-memory", "80GB")


def test_warnings_fail_an_audit_only_if_they_are_to(here):
    run("plan", "--factory", "mine:split", "--mesh", "tensor=2", "-o", "plan.json")
    assert "SP027 warning" in run("audit", "plan.json", "--ranks-per-node", 1)
    run("audit", "plan.json", "--ranks-per-node", 1, "--fail-on", "warning", code=1)
    run("audit", "plan.json", "--ranks-per-node", 2, "--fail-on", "warning")


def test_an_audit_as_a_page(saved, tmp_path):
    run("audit", saved, "--html", tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().lstrip().lower().startswith("<!doctype html")
    assert "page.html: it cannot be written: No such file" in run(
        "audit", saved, "--html", tmp_path / "no/page.html", code=2
    )


def test_a_tensor_is_explained(here):
    run("plan", "--factory", "mine:split", "--mesh", "pipe=2,data=2,tensor=2", *SIZES, "-o", "plan.json")
    assert run("explain", "plan.json", "up.weight").splitlines() == [
        "up.weight  f32[32@tensor, 8]",
        "",
        "is        trained parameter, stage 0 of 2",
        "split     axis 0 over tensor, 2 ranks",
        "said by   mine.py:13 .at['up'].colwise",
        "values    uniform(±0.354): what the model's own init code does, followed while planning",
        "made      every rank evaluates the program for its own part; nothing is sent",
        "module    up  backward_post all_reduce@tensor; out_features=16",
        "holds     tensor  first rank  ranks  axis 0  axis 1  bytes",
        "               0           0      2  0:16    0:8     512 B",
        "               1           1      2  16:32   0:8     512 B",
    ]
    assert "split     no: every rank of its stage holds it whole" in run("explain", "plan.json", "down.bias")
    near = run("explain", "plan.json", "up.wieght", code=2)
    assert "up.wieght: no tensor and no module of the plan has this path\n      The closest are up.weight" in near


def test_what_the_audit_finds_of_a_tensor_is_part_of_why(here):
    run("plan", "--factory", "mine:opaque", "--mesh", "tensor=2", "-o", "plan.json")
    said = run("explain", "plan.json", "down.weight")
    assert "values    orthogonal_: code that runs on the whole tensor, as " in said
    assert (
        "made      the first rank of stage 0 runs the code on the whole tensor\n          every rank is sent its own part"
        in said
    )
    assert "audit     SP020 warning  down.weight: f32[8, 32@tensor] is made whole" in said
    assert "SP020" not in run("explain", "plan.json", "up.weight")


def test_a_tied_tensor_is_explained_by_any_path(saved):
    by_head, by_embed = (run("explain", saved, path) for path in ("head.weight", "embed.weight"))
    assert by_head == by_embed
    assert "tied      = head.weight" in by_head
    assert "module    embed  looks up its own rows" in by_head
    assert "values    normal(0, 1); zero row 3" in by_head


SIZES = ("--batch", "2", "--sequence", "16")


def test_a_plan_from_a_function_is_the_one_that_python_makes(here):
    run("plan", "--factory", "mine:split", "--mesh", "data=2, tensor=2", "--seed", "7", "-o", "plan.json")
    sys.modules.pop("mine", None)
    import mine

    assert loads(Path("plan.json").read_text()) == plan_build(mine.split(MESH), seed=7)
    printed = run("plan", "--factory", "mine:split", "--mesh", "data=2,tensor=2", "--seed", "7")
    assert printed == Path("plan.json").read_text()
    about = json.loads(run("plan", "--factory", "mine:split", "--mesh", "tensor=2", "-o", "other.json", "--json"))
    assert about["ok"] is True
    assert about["fingerprint"] == loads(Path("other.json").read_text()).fingerprint
    assert sorted(path.name for path in here.glob("*.json")) == ["other.json", "plan.json"]


def test_a_plan_from_a_configuration_is_cut_and_split_as_the_model_declares(here):
    run("plan", "--hf-config", "llama", "--mesh", "pipe=2,tensor=2", *SIZES, "-o", "plan.json")
    plan = loads(Path("plan.json").read_text())
    weight = plan.tree["model.layers.1.mlp.up_proj.weight"]
    assert (weight.type, weight.stage) == ("bf16[96@tensor, 64]", 1)
    assert "said by   _tp_plan of llama .at['model.layers.*.mlp.up_proj'].colwise" in run(
        "explain", "plan.json", weight.path
    )
    assert plan.stages[0].output_bytes == 2 * 16 * 64 * 2


def test_a_model_that_declares_nothing_is_split_by_what_it_computes(here):
    run("plan", "--hf-config", "gpt2/config.json", "--mesh", "tensor=2", "-o", "plan.json")
    assert loads(Path("plan.json").read_text()).tree["transformer.h.0.attn.c_attn.weight"].type == "f32[64, 64|64|64@tensor]"


def test_a_plan_starts_from_a_checkpoint_and_its_ranks_are_written(here):
    with torch.device("cpu"):
        LlamaForCausalLM(LlamaConfig.from_pretrained("llama")).save_pretrained("llama", max_shard_size="60KB")
    arguments = ("plan", "--hf-config", "llama", "--mesh", "data=2,tensor=2", "--checkpoint", "llama")
    run(*arguments, "--dedupe", "-o", "plan.json")
    run(*arguments, "-o", "other.json")
    plan, other = (loads(Path(name).read_text()) for name in ("plan.json", "other.json"))
    assert {step.over for step in plan.steps if isinstance(step, LoadShard)} == {("data",)}
    assert {step.over for step in other.steps if isinstance(step, LoadShard)} == {()}
    path = "model.layers.1.mlp.up_proj.weight"
    assert f"values    checkpoint: {path} of model-0000" in run("explain", "plan.json", path)
    assert "reads   stage  ranks  first  files" in run("audit", "plan.json")
    told = json.loads(run("materialize", "plan.json", "--rank", "2-3", "--rank", "0", "-o", "shards", "--json"))
    assert [file["rank"] for file in told["files"]] == [2, 3, 0]
    assert told["fingerprint"] == plan.fingerprint
    assert sorted(file.name for file in Path("shards").iterdir()) == [f"rank-0000{rank}.safetensors" for rank in (0, 2, 3)]
    with safe_open("shards/rank-00003.safetensors", "pt") as file:
        part = plan.tree[path].index(plan.mesh.coordinate(3))[0][0]
        stored = plan.tree[path].source.parts[0].stored
        with safe_open(f"llama/{stored.file}", "pt") as whole:
            assert torch.equal(file.get_tensor(path), whole.get_tensor(path)[slice(*part)])


FACTORY = ("plan", "--factory")
SEARCH = ("search", "--num-ranks", "2", "--device-memory", "1GiB", "--factory")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--mesh", "tensor=2"], "Give one of --factory module:function and --hf-config folder."),
        ([*FACTORY, "mine.py:split", "--mesh", "tensor=2"], "it is not module:function\n      Write mine:split"),
        ([*FACTORY, "yours:split", "--mesh", "tensor=2"], "yours:split: there is no module 'yours', in "),
        ([*FACTORY, "mine:merge", "--mesh", "tensor=2"], "mine has no function 'merge'\n      Its functions are create_"),
        ([*FACTORY, "broken:split", "--mesh", "tensor=2"], "broken.py:1 raised ModuleNotFoundError: No module named 'no_s"),
        ([*FACTORY, "mine:stops", "--mesh", "tensor=2"], "mine.py:20 raised IndexError: list index out of range"),
        (
            [*FACTORY, "mine:split", "--mesh", "tensor=2", "--config", "ds.json", "--target", "deepspeed"],
            "ds.json: it cannot",
        ),
        ([*FACTORY, "mine:leaves", "--mesh", "tensor=2"], "mine.py:27 raised SystemExit: 3"),
        ([*FACTORY, "mine:number", "--mesh", "tensor=2"], "it returns a int, not a schedule"),
        ([*FACTORY, "mine:uneven", "--mesh", "tensor=3"], "3 does not divide 32\n      Pad it to 33: pad_to_multiple=3"),
        ([*FACTORY, "mine:split", "--mesh", "rows=2"], "'rows=2' is no mesh axis with a size; write pipe=2,"),
        ([*FACTORY, "mine:split", "--mesh", "data=3,expert=2"], "expert=2 is carved out of data=3, and does not divide"),
        ([*FACTORY, "mine:split", "--mesh", "data=2,data=2"], "mesh axis 'data' is given twice"),
        ([*FACTORY, "mine:split", "--mesh", "tensor=0"], "'tensor' must be >= 1"),
        ([*FACTORY, "mine:split", "--mesh", "pipe=2"], "has stages, and a model is cut by following it on example in"),
        (
            [*FACTORY, "mine:split", "--mesh", "tensor=2", "--batch", "2"],
            "input_ids has a length\n      Give --batch and",
        ),
        ([*FACTORY, "mine:split", "--mesh", "tensor=2", "--sequence", "2"], "--batch: it is not given, and --sequen"),
        ([*FACTORY, "mine:split", "--mesh", "tensor=2", "--target", "megatron"], "'megatron'"),
        ([*FACTORY, "mine:split", "--mesh", "tensor=2", "--config", "mine.py"], "mine.py: it cannot be read: Expecting"),
        ([*FACTORY, "mine:split", "--mesh", "tensor=2", "-o", "no/plan.json"], "it cannot be written: No such file or dir"),
        (["plan", "--hf-config", "llamas", "--mesh", "tensor=2"], "llamas: there is no such folder or file"),
        (
            ["plan", "--hf-config", "odd", "--mesh", "tensor=2"],
            "odd: LlamaForCausalLM raises KeyError: 'none'; Ll",
        ),
        (["plan", "--hf-config", "mine.py", "--mesh", "tensor=2"], "it holds no configuration of a transformers model"),
        (["audit", "old.json"], "old.json: its schema version is 4, and this shardplan reads"),
        (["show", "mine.py"], "mine.py: it is damaged: it is no JSON"),
        (["show", "."], "is a directory"),
        (["audit", "plan.json", "--device-memory", "80G"], "'80G' is no size in bytes: write 80GiB (80 * 2**30) or 80GB"),
        (["audit", "plan.json", "--device-memory", "0GiB"], "'0GiB' is no memory at all"),
        ([*SEARCH, "mine:typo"], "PlanError: 1 problem\n  upp: "),
        ([*SEARCH, "mine:split", "--target", "megatron"], "PlanError: 1 problem\n  target: 'megatron' is unknown"),
        ([*SEARCH, "mine:split", "--sequence", "4"], "--batch: it is not given, and --sequence is"),
        (["merge"], "No such command 'merge'"),
        ([*FACTORY, "mine:split", "--mesh", "tensor=2", "--dedupe"], "--dedupe: it is for --checkpoint, which is not giv"),
        ([*FACTORY, "mine:split", "--mesh", "tensor=2", "--checkpoint", "none"], "none: there is no such folder\n      D"),
        (
            [*FACTORY, "mine:split", "--mesh", "tensor=2", "--checkpoint", "llama"],
            "llama: it holds no checkpoint that can b",
        ),
        (["materialize", "saved.json", "--rank", "x", "-o", "shards"], "'x' is no rank; write 17, or 16-23"),
        (["materialize", "saved.json", "--rank", "3-1", "-o", "shards"], "'3-1' is no rank; write 17, or 16-23"),
        (["materialize", "saved.json", "--rank", "4", "-o", "shards"], "--rank: there is no rank 4: mesh pipe=1 data=2 ten"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_plainly(here, plan, arguments, said):
    (here / "old.json").write_text(json.dumps({**json.loads(dumps(plan)), "schema_version": 4}))
    (here / "saved.json").write_text(dumps(plan))
    error = run(*arguments, code=2)
    assert said in error
    assert "Traceback" not in error


def test_two_plans_are_compared(plan, saved, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(dumps(evolve(plan, seed=plan.seed + 1)))
    same, differ = run("diff", saved, saved, "--exit-code"), run("diff", saved, other, "--exit-code", code=1)
    assert same != differ
    assert "seed" in differ
    assert run("diff", saved, other) == differ
    assert json.loads(run("diff", saved, other, "--json")) != json.loads(run("diff", saved, saved, "--json"))


def test_meshes_are_searched(here):
    found = run("search", "--factory", "mine:split", "--num-ranks", 4, "--device-memory", "1GiB", *SIZES)
    assert "tensor=4" in found
    assert json.loads(
        run("search", "--factory", "mine:split", "--num-ranks", 4, "--device-memory", "1GiB", *SIZES, "--json")
    )


def test_a_layout_is_judged(here):
    (here / "net.py").write_text(NET)
    said = run("verify", "--factory", "net:schedule", "--mesh", "tensor=2", code=1)
    assert "begins at middle: its output differs by" in said
    assert run("verify", "--factory", "net:schedule", "--mesh", "tensor=2", "--shrink", code=0).startswith("2 ranks (mesh")
    told = json.loads(run("verify", "--factory", "net:schedule", "--mesh", "data=2,tensor=2", "--json", code=1))
    assert (told["ok"], told["first"]["path"], told["mesh"]["data"]) == (False, "middle", 2)
    error = run("verify", "--factory", "mine:split", "--mesh", "tensor=2", "--shrink", code=2)
    assert "and --shrink asks it for a small model" in error


def test_a_configuration_is_made_small_and_judged(here):
    LlamaConfig().save_pretrained(here / "large")
    said = run("verify", "--hf-config", "large", "--shrink", "--mesh", "tensor=2", "--batch", "4", "--sequence", "6")
    assert "beside the whole model: the same (23 tensors" in said


NET = """
from torch import nn

from shardplan.functional import create_schedule


class Net(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(8, 16), middle, nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.middle(self.up(x)))


def schedule(mesh, small=False):
    sch = create_schedule(Net(nn.ReLU() if small else nn.Softmax(-1)), mesh)
    return sch.at["up"].colwise().at["down"].rowwise()
"""


def test_what_a_function_prints_is_not_part_of_the_answer(here):
    done = run_program([SHARDPLAN, "plan", "--factory", "mine:loud", "--mesh", "tensor=2", "-o", "plan.json", "--json"])
    assert json.loads(done.stdout)["ok"] is True
    assert "looking at mesh pipe=1 data=1 tensor=2" in done.stderr


def test_a_function_that_takes_no_single_rank_is_searched(here):
    assert "tensor=2" in run("search", "--factory", "mine:many", "--num-ranks", 2, "--device-memory", "1GiB", *SIZES)
    run("search", "--factory", "mine:many", "--num-ranks", 2, "--device-memory", "1GiB")


@pytest.mark.parametrize("name", ["plan", "show", "audit", "explain", "diff", "search", "completion"])
def test_every_command_has_examples_and_says_its_exit_codes(name):
    said = run(name, "--help")
    assert f"Examples:\n    shardplan {name} " in said
    assert "Exit codes: 0 " in said
    assert f"  {name} " in run("--help")


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_shells_complete_commands(name):
    assert "_SHARDPLAN_COMPLETE" in run("completion", name)
    done = run_program(
        [SHARDPLAN],
        _SHARDPLAN_COMPLETE=f"{name}_complete",
        COMP_WORDS="shardplan au",
        COMP_CWORD="au" if name == "fish" else "1",
    )
    assert "audit" in done.stdout
    assert "explain" not in done.stdout


@law
@given(st.integers(0, 2**52))
def test_a_size_is_read_as_it_is_written(size):
    again = parse_bytes(human_bytes(size))
    assert human_bytes(again) == human_bytes(size)
    assert parse_bytes(str(size)) == size


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("80 GB", 80 * 10**9), ("1.5TiB", 3 * 2**39), ("7kb", 7000), ("0.1KiB", 102), ("12", 12)],
)
def test_units_of_two_kinds(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "80G", "GiB", "-1GiB", "1e9", "80  GiB", "٣GiB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is no size in bytes: write 80GiB"):
        parse_bytes(text)
