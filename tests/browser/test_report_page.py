"""The page of a report, as Chromium draws it from a file."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from attrs import evolve
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from shardplan.functional import audit, plan_build
from shardplan.functional.auditing.html.report import html_report
from shardplan.specs import (
    ActivationType,
    CallType,
    Equality,
    Mesh,
    ModuleTypes,
    ParamSpec,
    Plan,
    Shard,
    SpecTree,
    Trust,
    Unfollowed,
)
from shardplan.specs.dtypes import human_bytes
from shardplan.specs.finding import Finding, Silenced
from shardplan.specs.fold_layers import fold
from tests.helpers.models import llama as llama_model
from tests.helpers.models import split_llama

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
HOSTILE = "</script><img src=x onerror=alert(1)>"
HEAD = "types of activations, from inputs made from the configuration, by torch 2.13.0"
WIDE, NARROW = 1280, 400


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        reason = "no chromium and chromedriver here: apt-get install chromium chromium-driver"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def llama():
    """A Llama over two stages, and what the audit says of it on devices that are too small."""
    sch = split_llama(llama_model(num_hidden_layers=4), Mesh(pipe=2, data=2, tensor=2)).cut_evenly(2)
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    plan = plan_build(sch, example_inputs={"input_ids": ids, "use_cache": False})
    plan = evolve(plan, equality=evidence(plan))
    return plan, audit(plan, ranks_per_node=4, device_memory=100_000)


def evidence(plan):
    """Of layer 1, for all but the first; an operator was not followed."""
    whole, split = ActivationType("float32", ("2", "16")), ActivationType("float32", ("2", "16@tensor"), "split")
    modules = [ModuleTypes("", [whole], [split]), ModuleTypes("model.layers.0", [whole], [whole])]
    modules += [ModuleTypes("model.layers.1", [whole], [whole], ["model.layers.2", "model.layers.3"])]
    calls = [CallType(f"model.layers.{number}", "add", "model.py:7", whole) for number in (0, 1)]
    lost = [Unfollowed(f"model.layers.{number}", "topk", "it has no rule") for number in range(4)]
    trusted = [Trust("model.norm", "a kernel of our own")]
    return Equality(modules, calls, lost, trusted, "made", "2.13.0", plan.layout_digest)


@pytest.fixture(scope="module")
def odd():
    """Parts that are uneven, repeated, padded and in blocks, on many ranks; a path and a finding that are markup."""
    layouts = {
        "even": (96, Shard(0)),
        "uneven": (97, Shard(0, uneven=True)),
        "repeated": (96, Shard(0, granule=48, replicate=True)),
        "padded": (97, Shard(0, pad_to_multiple=8)),
        "qkv": (96, Shard(0, blocks=(48, 24, 24))),
    }
    mesh = Mesh(data=2048, tensor=8)
    specs = [ParamSpec(name, (size, 4), "float32", shards=(shard,)) for name, (size, shard) in layouts.items()]
    specs += [ParamSpec("whole", (4,), "float32"), ParamSpec("table", (4,), "float32", kind="buffer")]
    plan = Plan(mesh, SpecTree([*specs, ParamSpec(HOSTILE, (4,), "float32")]), steps=())
    report = audit(plan)
    mild = Finding("SP021", "warning", HOSTILE, HOSTILE, HOSTILE)
    return plan, evolve(report, findings=(*report.findings, mild), silenced=(Silenced(mild, HOSTILE),))


@pytest.fixture(scope="module")
def addresses(tmp_path_factory, llama, odd):
    folder = tmp_path_factory.mktemp("pages")
    for name, made in (("llama", llama), ("odd", odd)):
        (folder / f"{name}.html").write_text(html_report(*made), encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in ("llama", "odd")}


@pytest.fixture
def page(browser, addresses):
    """Open a page, afresh; after the test nothing was complained of, and nothing was asked of a network."""

    def open_page(name, *, width=WIDE, scheme="light"):
        wishes = {
            "prefers-color-scheme": scheme,
            "prefers-reduced-motion": "reduce",
        }  # so that nothing moves when it is clicked
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(addresses[name])
        return browser

    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    yield open_page
    assert browser.get_log("browser") == []
    asked = requests(browser)
    assert asked
    assert asked <= {*addresses.values(), "data:,"}


def requests(browser):
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}


def one(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def texts(browser, selector):
    """The texts of all elements, also of those that are not to be seen just now."""
    return browser.execute_script("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)


def rows(browser):
    """The paths of the tensors that are shown."""
    script = "return [...document.querySelectorAll('#tensors li')].map((e) => e.dataset.path)"
    return browser.execute_script(script)


def tip(browser):
    shown = one(browser, "#tip")
    return shown.text if shown.is_displayed() else None


def focus(browser, element):
    browser.execute_script("arguments[0].focus()", element)


def segments(browser, path):
    return browser.find_elements(By.CSS_SELECTOR, f"#tensors li[data-path='{path}'] .segment")


def search(browser, text):
    field = one(browser, "#tensors input[type=search]")
    field.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE, text)


def test_the_numbers_are_the_reports(page, llama):
    plan, report = llama
    browser = page("llama")
    assert browser.title == report.title
    head = one(browser, "header").text
    assert plan.fingerprint in head
    assert f"not ok\n{report.verdict.removeprefix('no: ')}" in head
    num_errors = sum(finding.severity == "error" for finding in report.findings)
    assert num_errors
    assert f"{num_errors} error" in head
    assert "pipe 2 × data 2 × tensor 2" in head

    assert texts(browser, "#mesh .rank") == [str(rank) for rank in range(8)]
    peaks = {human_bytes(share.memory.peak_bytes) for share in report.shares}
    assert {text.removesuffix(" over") for text in texts(browser, "#memory .peak")} == peaks
    one(browser, "#memory summary").click()
    numbers = texts(browser, "#memory td")
    assert {human_bytes(share.memory.parameter_bytes) for share in report.shares} <= set(numbers)

    assert report.training
    cells = [" ".join(row) for row in browser.execute_script(
        "return [...document.querySelectorAll('#traffic tr')].map((r) => [...r.children].map((c) => c.textContent))"
    )]  # fmt: skip
    for row in report.training:
        said = f"{row.mesh_axis} {row.cargo} {row.op} {row.num_calls} {human_bytes(row.num_bytes)}"
        assert any(said in cell for cell in cells), said
    for stage in range(2):
        for mesh_axis in {row.mesh_axis for row in report.training}:
            wire = [row.wire_bytes for row in report.training if (row.stage, row.mesh_axis) == (stage, mesh_axis)]
            matrix = texts(browser, "#traffic .heat b")
            assert not wire or human_bytes(sum(wire)) in matrix
    for row in report.execution:
        assert any(row.op in cell and human_bytes(row.num_bytes) in cell for cell in cells)

    laws = dict(zip(texts(browser, "#proofs b"), texts(browser, "#proofs .result"), strict=True))
    assert laws.keys() == {proof.law for proof in report.proofs}
    assert all(laws[proof.law].startswith(proof.answer) for proof in report.proofs)
    assert {finding.code for finding in report.findings} == set(texts(browser, "#findings .findings:first-of-type .code b"))


def test_types_of_activations_are_folded_and_opened(page):
    browser = page("llama")
    assert one(browser, "#types .note").text == f"{HEAD}."
    assert texts(browser, "#types .path") == ["the model", "model.layers.{0..3}"]
    assert texts(browser, "#types li > div") == ["f32[2, 16] → f32[2, 16@tensor]", "f32[2, 16] → f32[2, 16]"]
    assert not one(browser, "#types table").is_displayed()
    one(browser, "#types summary").click()
    assert one(browser, "#types tbody").text == "add f32[2, 16] model.py:7"
    assert texts(browser, "#proofs .open .failures") == ["model.layers.{0..3} (topk): it has no rule"]


def test_a_page_without_evidence_says_that_types_are_not_known(page):
    assert one(page("odd"), "#types .body").text.startswith("Not known")


def test_tensors_are_folded_and_told(page, llama):
    plan, _ = llama
    browser = page("llama")
    assert f"{len(plan.tree)} of {len(plan.tree)} tensors" in one(browser, "#tensors [role=status]").text
    assert len(rows(browser)) < len(plan.tree)
    types = texts(browser, "#tensors .type code")
    assert set(types) == {spec.type for spec in plan.tree.values()}
    spec = plan.tree["model.embed_tokens.weight"]
    row = one(browser, f"#tensors li[data-path='{spec.path}']").text
    assert human_bytes(spec.local_bytes(plan.mesh.coordinate(0))) in row
    assert human_bytes(spec.num_bytes) in row


def test_search_and_filters(page, llama):
    plan, _ = llama
    browser = page("llama")
    everything = rows(browser)

    def paths(chosen):
        return [path for path, _ in fold((spec.path, (spec.type, str(spec.stage))) for spec in chosen)]

    search(browser, "Q_PROJ")
    assert sorted(rows(browser)) == sorted(paths(s for s in plan.tree.values() if "q_proj" in s.path))
    search(browser, "**.[qk]_proj")
    found = plan.tree.values()
    assert sorted(rows(browser)) == sorted(paths(s for s in found if s.module.endswith(("q_proj", "k_proj"))))
    search(browser, "nothing is called so")
    assert rows(browser) == []
    assert one(browser, "#tensors [role=status]").text.startswith("0 of")
    search(browser, "")
    assert rows(browser) == everything

    one(browser, "#tensors select option[value='1']").click()
    assert sorted(rows(browser)) == sorted(paths(s for s in plan.tree.values() if 1 in (s.stage, *s.also_on)))
    one(browser, "#tensors select option[value='all']").click()

    def kind(name):
        browser.execute_script(f"document.querySelector('#tensors input[value={name}]').click()")
        return sorted(rows(browser))

    parameters = [spec for spec in plan.tree.values() if spec.kind == "parameter"]
    assert kind("split") == sorted(paths(spec for spec in parameters if spec.shards))
    assert kind("whole") == sorted(paths(spec for spec in parameters if not spec.shards))
    assert kind("buffer") == sorted(paths(spec for spec in plan.tree.values() if spec.kind != "parameter"))
    assert kind("all") == sorted(everything)


def test_what_is_pointed_at_or_focused_is_told(page, llama):
    plan, report = llama
    browser = page("llama")
    spec = plan.tree["model.embed_tokens.weight"]
    assert tip(browser) is None
    held = segments(browser, spec.path)
    assert len(held) == 2
    focus(browser, held[0])
    for number, rank in enumerate((0, 1)):  # the arrow keys lead from part to part
        here = plan.mesh.coordinate(rank)
        for axis, [(start, stop)] in enumerate(spec.index(here)):
            assert f"axis {axis} {start}:{stop}" in tip(browser)
        assert human_bytes(spec.local_bytes(here)) in tip(browser)
        assert browser.switch_to.active_element == held[number]
        browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert tip(browser) is None

    cell = browser.find_elements(By.CSS_SELECTOR, "#mesh .rank")[5]
    webdriver.ActionChains(browser).move_to_element(cell).perform()
    assert "rank 5" in tip(browser)
    assert "pipe 1, data 0, tensor 1" in tip(browser)
    memory = report.memory(5)
    for size in (memory.parameter_bytes, memory.training_bytes, memory.executing_bytes):
        assert human_bytes(size) in tip(browser)

    cell.click()
    chosen = browser.execute_script("return [...document.querySelectorAll('#tensors .chosen')].map((e) => e.dataset.places)")
    assert set(chosen) <= {"1", ""}  # tensor 1, or whole
    assert "1" in chosen
    assert "rank 5" in one(browser, "#tensors .banner").text


def test_parts_are_drawn_as_they_are(page, odd):
    plan, report = odd
    browser = page("odd")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#mesh .rank")) <= 256
    assert "×2,047" in texts(browser, "#mesh .rank")
    assert len(segments(browser, "even")) == 8
    assert [s.text for s in segments(browser, "repeated")] == ["0..3", "4..7"]
    assert [s.text for s in segments(browser, "qkv")] == [str(place) for place in range(8)] * 3
    widths = [s.size["width"] for s in segments(browser, "uneven")]
    assert widths[7] < widths[0] / 2  # 6 entries of 13
    assert [s.get_attribute("class") for s in segments(browser, "padded")].count("segment padding") == 1
    assert [s.text for s in segments(browser, "whole")] == ["whole"]
    focus(browser, segments(browser, "qkv")[0])
    assert "0:6 48:51 72:75" in tip(browser)
    assert len(report.findings) > 1
    assert plan.tree[HOSTILE].path in texts(browser, "#tensors .path")


def test_text_is_never_markup(page):
    browser = page("odd")
    assert browser.execute_script("return document.images.length") == 0
    assert HOSTILE in texts(browser, "#findings .path")
    assert [HOSTILE in text for text in texts(browser, "#findings details li")] == [True]
    search(browser, HOSTILE)
    assert rows(browser) == [HOSTILE]


def test_findings_by_severity(page, odd):
    _, report = odd
    browser = page("odd")
    for severity in ("error", "warning"):
        browser.execute_script(f"document.querySelector('#findings input[value={severity}]').click()")
        shown = [e for e in browser.find_elements(By.CSS_SELECTOR, "#findings .findings > li") if e.is_displayed()]
        assert {e.get_attribute("data-severity") for e in shown} == {severity}
        assert len(shown) <= sum(finding.severity == severity for finding in report.findings)


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("name", ["llama", "odd"])
def test_nothing_overflows(page, name, width):
    browser = page(name, width=width)
    browser.execute_script("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    inner, outer = browser.execute_script(
        "return ['scrollWidth', 'clientWidth'].map((name) => document.documentElement[name])"
    )
    assert inner <= outer <= width


COLORS = """
const context = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
const paint = (colors) => {
  context.clearRect(0, 0, 1, 1);
  for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
  return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
};
const hasText = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
const seen = {};
for (const element of document.querySelectorAll('body *')) {
  if (!hasText(element) || !element.checkVisibility()) continue;
  const around = [];
  for (let other = element; other; other = other.parentElement) around.unshift(getComputedStyle(other).backgroundColor);
  const color = getComputedStyle(element).color;
  seen[[color, ...around]] ??= [element.className || element.tagName, paint([...around, color]), paint(around)];
}
return Object.values(seen);
"""
"""Of all texts that can be seen their colors and those behind them, as they are painted."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["llama", "odd"])
def test_all_texts_can_be_read(page, name, scheme):
    """They stand out from what is behind them by 4.5 to 1: WCAG 2.2, 1.4.3."""
    browser = page(name, scheme=scheme)
    browser.execute_script("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    found = browser.execute_script(COLORS)
    assert len(found) > 20
    for what, color, ground in found:
        low, high = sorted((luminance(color), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (what, color, ground)
    behind = luminance(browser.execute_script(COLORS)[0][2])
    assert behind < 0.05 if scheme == "dark" else behind > 0.8


def luminance(color):
    """The relative luminance of red, green and blue from 0 to 255: WCAG 2.2."""
    parts = (part / 255 for part in color)
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
