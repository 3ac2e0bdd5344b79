"""Each finding is made where it is said to be made, reads as its page shows, and can be silenced."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from attrs import evolve
from torch import nn

from shardplan.functional import audit, create_schedule, plan_build
from shardplan.specs import Finding, Mesh, PlanError, Silence, dumps, loads
from shardplan.specs.finding import CODES, LOUD, folded
from shardplan.specs.layout_steps import Sync
from tests.helpers import findings
from tests.helpers.findings import HURT, INSTALLED, NEAR, heads, large, linears, mixture, perceptron, spare, vocabulary
from tests.helpers.models import plain, split_plain

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "findings.md").read_text()
SECTIONS = {
    code: (title, re.search(r"^```text\n(.*?)\n```$", text, flags=re.MULTILINE | re.DOTALL), text)
    for code, title, text in re.findall(r"^## (SP\d+) (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
}


def found(plan, code, **told):
    return [finding for finding in audit(plan, **told).findings if finding.code == code]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Lets a version of DeepSpeed be installed, as far as its metadata says."""

    def install(version):
        info = tmp_path / f"deepspeed-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


@pytest.mark.parametrize("code", CODES)
def test_a_finding_reads_as_its_page_shows(code, machine):
    if code in INSTALLED:
        machine(INSTALLED[code][0])
    plan, told = HURT[code]()
    mine = found(plan, code, **told)
    _, shown, text = SECTIONS[code]
    assert str(folded(mine)[0]) == shown[1]
    (severity,) = {finding.severity for finding in mine}
    assert re.search(rf"^{severity.title()}\b", text, flags=re.MULTILINE)


@pytest.mark.parametrize("code", CODES)
def test_what_is_nearly_so_is_not_said(code, machine):
    if code in INSTALLED:
        machine(INSTALLED[code][1])
    plan, told = NEAR[code]()
    assert not found(plan, code, **told)


def test_every_code_has_its_section_and_its_code():
    assert {code: title for code, (title, *_) in SECTIONS.items()} == CODES
    assert list(SECTIONS) == list(CODES) == list(HURT) == list(NEAR)
    rooms = (ROOT / "functional" / "auditing" / "findings", ROOT / "functional" / "dialects")
    sources = "".join(path.read_text() for room in rooms for path in room.rglob("*.py"))
    assert set(re.findall(r'"(SP\d+)"', sources)) == set(CODES)


def test_thresholds_are_those_of_the_page():
    from shardplan.functional.auditing.findings import stages, training, uneven_splits, whole_tensors

    sizes = [
        whole_tensors.LARGE_BYTES,
        uneven_splits.VOCABULARY_BYTES,
        uneven_splits.IDLE_BYTES,
        stages.OVER_BYTES,
        training.STATE_BYTES,
    ]
    assert [size // findings.MIB for size in sizes] == [16, 16, 1, 64, 64]
    shares = [
        whole_tensors.LARGE_SHARE,
        uneven_splits.IDLE_SHARE,
        uneven_splits.PADDING_SHARE,
        stages.EXTRA_SHARE,
        training.HALF_SHARE,
    ]
    assert shares == [0.01, 0.05, 0.01, 0.1, 0.5]
    assert stages.OVER_MEAN == 1.2


def test_a_tensor_is_large_beside_what_its_rank_holds():
    def whole(num_others):
        sch = create_schedule(linears(2048, 2048, *[16384] * (num_others + 1)), Mesh(tensor=2))
        for number in range(1, num_others + 2):
            sch = sch.at[str(number)].colwise(gather_output=True)
        return [(finding.path, finding.fix) for finding in found(plan_build(sch), "SP021")]

    assert whole(2) == [("0.weight", "If it is a linear module, sch.at['0'].colwise() or .rowwise()")]
    assert whole(5) == []  # 16 MiB beside 2.3 GiB


def test_a_tied_vocabulary_is_split_wherever_it_stands():
    with torch.device("meta"):
        model = nn.ModuleDict({"embed": nn.Embedding(8193, 1024), "head": nn.Linear(1024, 8193, bias=False)})
    model.head.weight = model.embed.weight
    (finding,) = found(plan_build(create_schedule(model, Mesh(tensor=2))), "SP024")
    assert finding.fix == (
        "Pad it to 8194: sch.at['embed'].vocab_parallel(pad_to_multiple=2)"
        " and sch.at['head'].colwise(gather_output=True, pad_to_multiple=2)"
    )


def test_a_vocabulary_that_does_not_divide_is_no_large_replica_besides():
    plan = plan_build(vocabulary(32001, head=False, pad_to_multiple=2))
    assert not found(plan, "SP021")
    (padded,) = found(plan_build(vocabulary(32001, head=False, pad_to_multiple=4096)), "SP024")[:1]
    assert padded.cause == "f32[32001+767@tensor, 1024] has 767 rows of padding, 2 % of its 32001 rows"
    assert padded.fix == "pad_to_multiple=2 pads it to 32002"


def test_a_small_part_may_be_uneven():
    sch = perceptron(Mesh(tensor=5)).at["0"].colwise(gather_output=True, uneven=True)  # 7, 7, 7, 7 and 4 of 32
    assert not found(plan_build(sch), "SP023")
    assert found(heads(5), "SP023")[0].fix == "A model with 1024 in place of 640 has equal parts"


def test_what_a_target_does_without_a_gradient():
    def cause(*args, **options):
        return found(spare(*args, **options), "SP026")[0].cause.partition("inputs: ")[2]

    zeros = "DeepSpeed reduces zeros for it, its states"
    assert cause("deepspeed") == f"{zeros} are kept, and weight decay changes it"
    assert cause("deepspeed", zero=1) == f"{zeros} and a float32 copy are kept, and weight decay changes it"
    assert cause("torch", mesh=Mesh()) == "the optimizer is given it all the same, and passes over it"


def test_casts_of_the_target_are_known():
    plan = findings.mixed(torch.float32)
    assert not found(evolve(plan, target="deepspeed", config={"bf16": {"enabled": True}}), "SP025")
    assert found(evolve(plan, target="deepspeed", config={"bf16": {"enabled": False}}), "SP025")


def test_meshes_within_a_node_are_named():
    def fix(mesh, ranks_per_node):
        return found(findings.joined(mesh), "SP027", ranks_per_node=ranks_per_node)[0].fix

    assert fix(Mesh(data=4, tensor=4), 6) == "Mesh(pipe=1, data=8, tensor=2) stays within nodes"
    assert fix(Mesh(data=1, tensor=8), 3).startswith("No size above 1 divides the 3 ranks of a node and the 8 of a stage")
    assert not found(findings.joined(Mesh(tensor=4)), "SP027", ranks_per_node=6)  # all on one node


def test_a_number_of_experts_that_does_not_divide():
    (first, _) = found(mixture(Mesh(data=6, expert=3), split=False), "SP028")
    assert first.cause.endswith("and the mesh has expert=3, which does not divide 4")
    assert first.fix == "Mesh(expert=...) may be 2; then sch.at['model.layers.0.mlp.experts'].expert_parallel()"
    (first, _) = found(mixture(Mesh(data=3, expert=3), split=False), "SP028")
    assert first.fix == "No size along 'data' (3) divides them: leave out expert=3"

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    with torch.device("meta"):
        sch = create_schedule(Mixture(), Mesh(data=2, expert=2))
    (listed,) = found(plan_build(sch, target="torch"), "SP028")
    assert listed.cause.startswith("its 4 experts are whole on every rank (1.1 KiB on each)")
    assert "a list of modules cannot" in listed.fix


def test_memory_that_checkpoints_would_save_is_said():
    sch = create_schedule(linears(64, 64), Mesh())
    plan = plan_build(sch, target="torch", example_inputs={"input": torch.ones(4096, 64, device="meta")})
    (finding,) = found(plan, "SP030", device_memory=2**16)
    assert "needs" in finding.cause
    assert not audit(plan, device_memory=2**16).ok
    assert not found(plan, "SP030")


def test_repeated_layers_are_one_finding_in_print():
    with torch.device("meta"):
        layers = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(8, 32) for _ in range(4))})
    report = audit(plan_build(create_schedule(layers, Mesh(tensor=2)).at["layers.*"].colwise()))
    assert [finding.path for finding in report.findings][::2] == [f"layers.{number}.weight" for number in range(4)]
    text = str(report)
    assert "SP010 error  layers.{0..3}.weight: f32[32@tensor, 8] is split (512 B a rank)" in text
    assert "sch.at['layers.*'].sync('forward_post', 'all_gather', axis=-1)" in text
    assert text.count("SP010") == 2


def test_folding_keeps_numbers_that_are_no_path():
    rows = [Finding("SP013", "warning", str(number), f"0 of '{number}', {number}.weight at 0") for number in (0, 1)]
    assert [finding.cause for finding in folded(rows[:1])] == [rows[0].cause]
    alike = [Finding("SP013", "warning", str(number), f"'{number}' holds 0 B") for number in (0, 1)]
    assert [(f.path, f.cause) for f in folded(alike)] == [("{0..1}", "'*' holds 0 B")]


class LowRank(nn.Module):
    """A linear layer, and a product of two small ones beside it."""

    def __init__(self, num_in, num_out):
        super().__init__()
        self.base, self.b = nn.Linear(num_in, num_out, bias=False), nn.Linear(3, num_out, bias=False)
        self.a = nn.Linear(num_in, 3, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def test_parts_whose_way_was_followed_are_not_guessed_about():
    with torch.device("meta"):
        sch = create_schedule(nn.Sequential(LowRank(8, 32), LowRank(32, 8)), Mesh(tensor=2))
    sch = sch.at["0.{base,b}"].colwise().at["1.{base,a}"].rowwise()
    inputs = {"input": torch.ones(2, 8, device="meta")}
    assert [finding.path for finding in found(plan_build(sch), "SP010")] == ["0.base.weight", "0.b.weight"]
    plan = plan_build(sch, example_inputs=inputs)
    assert plan.equality.answer == "holds"
    assert not found(plan, "SP010")
    assert found(findings.without(plan, Sync), "SP010")  # another layout than was followed
    silenced = plan_build(sch.at["**"].silence("SP010", reason="meant"), example_inputs=inputs)
    assert not found(silenced, "SP032")


def test_a_silenced_finding_is_listed_apart():
    sch = vocabulary(32000, head=False)
    assert found(plan_build(sch), "SP021")
    plan = plan_build(sch.at["lm_head"].silence("SP021", reason="generation reads it whole"))
    report = audit(plan)
    assert [(quiet.finding.path, quiet.reason) for quiet in report.silenced] == [
        ("lm_head.weight", "generation reads it whole")
    ]
    assert not report.findings
    line = "silenced  SP021 lm_head.weight: generation reads it whole"
    assert line in str(report)
    assert line.replace(".weight", "") in str(plan)
    assert line.replace(".weight", "") in str(sch.at["lm_head"].silence("SP021", reason="generation reads it whole"))
    assert audit(loads(dumps(plan))).silenced == report.silenced


def test_an_error_that_is_silenced_lets_the_plan_be_executed():
    sch = perceptron(Mesh(tensor=2)).at["0"].colwise()
    assert not audit(plan_build(sch)).ok
    assert audit(plan_build(sch.at["0"].silence("SP010", reason="the last one, read in parts"))).ok


@pytest.mark.parametrize(
    ("pattern", "path", "covers"),
    [
        ("lm_head.weight", "lm_head.weight", True),
        ("lm_head", "lm_head.weight", True),
        ("layers.*.mlp", "layers.3.mlp.up.weight", True),
        ("layers.*.mlp", "layers.3.attn.q.weight", False),
        ("**", "layers.3.mlp.up.weight", True),
        ("**", "", False),
        ("", "", True),
        ("", "lm_head.weight", False),
    ],
)
def test_what_a_silence_covers(pattern, path, covers):
    silence = Silence("SP021", pattern, "meant")
    assert silence.covers(Finding("SP021", "warning", path, "")) is covers
    assert not silence.covers(Finding("SP024", "warning", path, ""))


def test_a_tied_tensor_is_silenced_by_any_of_its_paths():
    sch = split_plain(plain(), Mesh(tensor=2)).at["head"].silence("SP006", reason="loaded later")
    report = audit(plan_build(sch, init_weights=False))
    assert [quiet.finding.path for quiet in report.silenced] == ["embed.weight"]
    assert not [finding for finding in report.findings if finding.code == "SP032"]


def test_a_silence_of_what_was_not_asked_is_let_be():
    sch = perceptron(Mesh(tensor=2)).at["0"].colwise().at["2"].rowwise().at[""]
    for code in ("SP026", "SP027", "SP030", "SP034"):
        sch = sch.silence(code, reason="meant")
    assert not found(plan_build(sch), "SP032")
    asked = found(plan_build(sch), "SP032", ranks_per_node=2, device_memory=2**30)
    assert [re.search(r"SP\d+", finding.cause)[0] for finding in asked] == ["SP027", "SP030"]


def test_what_is_wrong_with_a_silence_is_collected():
    sch = perceptron(Mesh()).at["0"].silence("SP21", reason="meant").at["1"].silence("SP021", reason=" ")
    sch = sch.at["2"].silence("SP001", reason="meant").at["tail"].silence("SP021", reason="meant")
    with pytest.raises(PlanError) as caught:
        plan_build(sch)
    causes = {problem.path: (problem.cause, problem.fix) for problem in caught.value.problems}
    assert causes["0"][0] == "no finding has the code 'SP21'"
    assert causes["0"][1].startswith("Write SP021 (a large tensor that is whole along tensor)")
    assert causes["1"] == ("SP021 is silenced without a reason", '.silence("SP021", reason="why it is meant")')
    assert causes["2"][0] == (
        "SP001 (an element is not held exactly once) cannot be silenced: the plan would not be what it says"
    )
    assert causes["tail"][0] == "no module and no tensor has a path like this"


@pytest.mark.parametrize("code", LOUD)
def test_a_law_that_fails_cannot_be_silenced_in_a_record_either(code):
    with pytest.raises(ValueError, match=rf"{code} \(.*\) cannot be silenced"):
        Silence(code, "", "meant")
    with pytest.raises(ValueError, match="code is a finding's"):
        Finding("SP099", "error", "", "")


def test_an_optimizer_matters_where_a_target_makes_it_and_it_is_large():
    assert found(large(), "SP031")
    assert not found(evolve(large(), target=None), "SP031")
    assert not found(spare("deepspeed"), "SP031")  # AdamW would keep 1.7 KiB
