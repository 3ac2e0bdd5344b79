"""What stands in the page of a report, before a browser draws it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from attrs import evolve

from shardplan.functional import audit
from shardplan.functional.auditing.html.report import html_report
from shardplan.specs import Mesh, ParamSpec, Plan, Shard, SpecTree
from shardplan.specs.dtypes import human_bytes
from shardplan.specs.finding import Finding, Silenced

HOSTILE = "</script><img src=x onerror=alert(1)><!--&amp;\u2028"


def plan_of(*specs, mesh):
    return Plan(mesh, SpecTree(specs), steps=())


def data_of(page):
    """Read back what the script in the page reads."""
    [text] = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def page_data(plan, **options):
    return data_of(html_report(plan, audit(plan, **options)))


def deep_llama(num_layers=126, width=16384):
    """The tensors of a Llama of 405 billion parameters, by their shapes."""
    shapes = {
        "self_attn.q_proj": (width, width, 0),
        "self_attn.k_proj": (width // 16, width, 0),
        "self_attn.v_proj": (width // 16, width, 0),
        "self_attn.o_proj": (width, width, 1),
        "mlp.gate_proj": (53248, width, 0),
        "mlp.up_proj": (53248, width, 0),
        "mlp.down_proj": (width, 53248, 1),
    }
    for layer in range(num_layers):
        around = {"dtype": "bfloat16", "stage": layer * 16 // num_layers}
        for name, (*shape, axis) in shapes.items():
            yield ParamSpec(f"model.layers.{layer}.{name}.weight", shape, shards=(Shard(axis),), **around)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield ParamSpec(f"model.layers.{layer}.{name}.weight", (width,), **around)


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_nothing_is_loaded_from_elsewhere():
    plan = plan_of(ParamSpec("weight", (8, 4), "float32", shards=(Shard(0),)), mesh=Mesh(tensor=2))
    page = html_report(plan, audit(plan))
    tags = Tags(page).found
    addresses = [attrs[name] for _, attrs in tags for name in ("src", "href", "action", "srcset", "data") if name in attrs]
    assert addresses
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    assert not re.search(r"https?:|@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\(", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", page)


def test_text_of_a_plan_stays_text():
    plan = plan_of(ParamSpec(HOSTILE, (4, 4), "float32", tags={"note": HOSTILE}), mesh=Mesh(data=2))
    report = audit(plan)
    finding = Finding("SP021", "warning", HOSTILE, HOSTILE, HOSTILE)
    report = evolve(report, title=HOSTILE, findings=(finding,), silenced=(Silenced(finding, HOSTILE),))
    page = html_report(plan, report)
    plain = html_report(plan_of(ParamSpec("weight", (4, 4), "float32"), mesh=Mesh(data=2)), audit(plan))
    assert [tag for tag, _ in Tags(page).found] == [tag for tag, _ in Tags(plain).found]
    data = data_of(page)
    assert data["tensors"]["rows"][0]["path"] == HOSTILE
    [found] = data["verdicts"]["findings"]
    assert (found["code"], found["cases"]) == ("SP021", [[HOSTILE, HOSTILE, HOSTILE]])
    assert data["verdicts"]["silenced"][0]["reason"] == HOSTILE


@pytest.mark.parametrize("slot", ["{{data}}", "{{script}}", "{{style}}", "{{title}}"])  # the page has these
def test_a_path_like_a_slot_is_a_path(slot):
    plan = plan_of(ParamSpec(slot, (4,), "float32"), mesh=Mesh())
    assert page_data(plan)["tensors"]["rows"][0]["path"] == slot


@pytest.mark.parametrize(
    ("size", "shard", "tensor"),
    [
        (12, Shard(0), 4),
        (13, Shard(0, uneven=True), 4),
        (2, Shard(0, uneven=True, allow_empty=True), 4),
        (50, Shard(0, pad_to_multiple=8), 8),
        (9, Shard(0, pad_to_multiple=8), 8),
        (32, Shard(0, granule=16, replicate=True), 8),
        (64, Shard(0, blocks=(32, 16, 16), granule=8, replicate=True), 4),
        (96, Shard(0, interleaved=4), 2),
        (96, Shard(0, interleaved=2, blocks=(16, 16, 16)), 4),
        (480, Shard(0), 40),
    ],
    ids=str,
)
def test_a_strip_shows_what_each_place_holds(size, shard, tensor):
    mesh = Mesh(tensor=tensor)
    spec = ParamSpec("weight", (size, 3), "float32", shards=(shard,))
    layout = page_data(plan_of(spec, mesh=mesh))["tensors"]["layouts"][0]
    [strip] = layout["strips"]
    first, last = strip["skipped"] or (tensor, tensor)
    drawn = [place for place in range(tensor) if not first <= place <= last]
    assert bool(strip["skipped"]) == (tensor > 32)
    assert list(strip["places"]) == [str(place) for place in drawn]
    for place in drawn:
        here = mesh.coordinate(place)
        segments = [(start, stop) for start, stop, places in strip["segments"] if place in places]
        assert segments == [(held.start, held.stop) for held in shard.held(size, here)]
        words = " ".join(f"{start}:{stop}" for start, stop in spec.index(here)[0]) or "nothing"
        assert strip["places"][str(place)] == [[words, "0:3"], human_bytes(spec.local_bytes(here))]
        assert (place in strip["empty"]) == (not segments)
        padding = sum(num for at, num in strip["padding"] if at == place)
        assert padding == shard.length(size, here) - sum(stop - start for start, stop in segments)


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(),
        Mesh(tensor=2),
        Mesh(pipe=2, data=2, tensor=2),
        Mesh(data=6, tensor=3, expert=2),
        Mesh(data=2048, tensor=8, expert=64),
        Mesh(pipe=16, data=128, tensor=8),
        Mesh(tensor=16384),
        Mesh(pipe=16384),
    ],
    ids=str,
)
def test_every_rank_is_in_one_cell(mesh):
    drawn = page_data(plan_of(ParamSpec("weight", (16384,), "float32"), mesh=mesh))["mesh"]
    cells = [(pipe, cell) for pipe, stage in enumerate(drawn["stages"]) for row in stage["cells"] for cell in row]
    assert sum(int(cell["num"].replace(",", "")) for _, cell in cells) == mesh.num_ranks
    assert len(cells) <= max(256, 16 * mesh.pipe)
    boxes = [(pipe, *map(tuple, cell["places"].values())) for pipe, cell in cells]
    assert len(set(boxes)) == len(boxes)
    for rank in {0, mesh.num_ranks // 3, mesh.num_ranks - 1}:
        here = mesh.coordinate(rank)
        place = (*divmod(here.data, mesh.expert), here.tensor)
        around = [
            cell
            for pipe, cell in cells
            if pipe == here.pipe and all(a <= p < b for p, (a, b) in zip(place, cell["places"].values(), strict=True))
        ]
        assert len(around) == 1


def test_ranks_that_hold_different_parts_are_told_apart():
    spec = ParamSpec("weight", (7, 4), "float32", shards=(Shard(0, uneven=True),))
    plan = plan_of(spec, mesh=Mesh(data=64, tensor=4))
    report = audit(plan)
    data = data_of(html_report(plan, report))
    for share in report.shares:
        [cell] = [c for row in data["mesh"]["stages"][0]["cells"] for c in row if c["first"] == share.coordinate.rank]
        [number] = cell["memory"]
        assert data["memory"]["rows"][number]["bytes"]["parameter"] == share.memory.parameter_bytes


def test_the_largest_page_stays_small():
    mesh = Mesh(pipe=16, data=128, tensor=8)
    plan = plan_of(*deep_llama(), mesh=mesh)
    page = html_report(plan, audit(plan, ranks_per_node=8, device_memory=80 * 2**30))
    assert len(plan.tree) == 9 * 126
    assert len(page.encode()) < 250_000
    rows = data_of(page)["tensors"]["rows"]
    assert len(rows) == 16 * 9
    assert rows[0]["path"] == "model.layers.{0..7}.self_attn.q_proj.weight"
