"""Which models of transformers train right as the frontends split them: ``python -m benchmarks.judged_families``.

Each type is built from its default configuration made small, with dropout; all ranks run beside the whole model
(``verify``): outputs, every gradient, weights after a step, and masks of dropout are compared.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import evolve, frozen

from benchmarks.transformers_coverage import outcomes_apart, replace_part
from shardplan.functional.frontends.graph.schedule import infer_schedule
from shardplan.functional.frontends.model_inputs import made_inputs
from shardplan.functional.frontends.shrink.shrink import shrink_config
from shardplan.functional.frontends.tp_plan.schedule import schedule_from_tp_plan
from shardplan.functional.frontends.transformers_models import declared_model, model_classes, model_types
from shardplan.functional.model.config_fields import changed, read_fields
from shardplan.functional.plan import plan_build
from shardplan.functional.verify import verify
from shardplan.specs.errors import PlanError
from shardplan.specs.mesh import Mesh

if TYPE_CHECKING:
    from torch import nn

    from shardplan.functional.schedule import Schedule

Frontend = Literal["tp_plan", "infer"]
Verdict = Literal["right", "differs", "refused", "not judged"]

INFERRED = (
    *(
        "albert",
        "bart",
        "bert",
        "big_bird",
        "biogpt",
        "blenderbot",
        "blip",
        "bloom",
        "clip",
        "codegen",
        "ctrl",
        "deberta-v2",
    ),
    *("deit", "dinov2", "distilbert", "electra", "falcon", "fnet", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "hubert"),
    *("layoutlm", "longt5", "m2m_100", "marian", "mbart", "modernbert", "mpnet", "mpt", "mt5", "openai-gpt", "opt"),
    *("pegasus", "persimmon", "rembert", "roberta", "roformer", "siglip", "stablelm", "t5", "vilt", "vit", "wav2vec2"),
    *("whisper", "xglm", "xlnet", "cohere", "deepseek_v2", "deepseek_v3", "gemma2", "gemma3_text", "gpt_neox", "gpt_oss"),
    *("granite", "llama", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe", "starcoder2"),
)
"""Types that ``infer_schedule`` splits: most declare no plan."""

OTHER_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"},
    "aya_vision": {"vision_config.num_attention_heads": 16},
    "glm4v_moe": {"text_config.num_attention_heads": 32},
    "glm4v_moe_text": {"num_attention_heads": 32},
    "qwen2_vl": {"vision_config.hidden_size": 8192},
    "step3p7": {"text_config.sliding_window": 512},
}
"""Values of published models for types that do not run with those that their configuration has by default."""

HEADING = "# Models of transformers that train as the whole model does"
_DROPOUT = 0.1
_BATCH, _LENGTH = 3, 11


@frozen
class Judged:
    """What became of one model type.

    Args:
        model_type: The type.
        frontend: What split it.
        tensor: Number of ranks along ``tensor``.
        cls: The model's class.
        verdict: Whether ranks compute what the whole model computes.
        cause: Where the difference begins, why the schedule is refused, or why it was not judged.
        given: Names of the inputs.
        refused: Why ``plan_build`` does not follow it with these inputs; without inputs it plans it.
    """

    model_type: str
    frontend: Frontend
    tensor: int
    cls: str = ""
    verdict: Verdict = "not judged"
    cause: str = ""
    given: tuple[str, ...] = ()
    refused: str = ""


def judge(asked: Judged) -> Judged | None:
    """Judge one model type; None if it declares no plan."""
    warnings.simplefilter("ignore")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        mesh = Mesh(tensor=asked.tensor)
        if asked.frontend == "tp_plan" and declared_model(asked.model_type) is None:
            return None
        try:
            model = small_model(asked.model_type, mesh)
        except PlanError as error:
            return evolve(asked, cause=_short(str(error.problems[0])))
        asked = evolve(asked, cls=type(model).__name__)
        inputs = made_inputs(model, _BATCH, _LENGTH)
        if inputs is None:
            return evolve(asked, cause="no inputs are found with which it runs")
        asked = evolve(asked, given=tuple(name for name in inputs if name != "use_cache"))
        return _judged(asked, model, inputs, mesh)


def _judged(asked: Judged, model: nn.Module, inputs: Mapping[str, Any], mesh: Mesh) -> Judged:
    try:
        sch: Schedule = (
            schedule_from_tp_plan(model, mesh)
            if asked.frontend == "tp_plan"
            else infer_schedule(model, mesh, example_inputs=inputs)
        )
        plan_build(sch, init_weights=False)
    except PlanError as error:
        return evolve(asked, verdict="refused", cause=_short(str(error.problems[0])))
    try:
        found = verify(sch, inputs)
    except PlanError as error:
        return evolve(asked, cause=_short(str(error.problems[0])))
    refused = f"plan_build refuses it with inputs: {found.refused[0]}" if found.refused else ""
    if found.first is not None:
        return evolve(asked, verdict="differs", cause=_short(f"{found.first.kind}: {found.first}"), refused=_short(refused))
    whole = "" if any(spec.shards for spec in sch.tree.values()) or mesh.tensor == 1 else "all of it stays whole"
    return evolve(asked, verdict="right", cause=whole, refused=_short(refused))


def small_model(model_type: str, mesh: Mesh) -> nn.Module:
    """Return a small model of a type on the meta device, with dropout everywhere.

    Raises:
        PlanError: If its default configuration builds no model.
    """
    from transformers import CONFIG_MAPPING  # only a test dependency

    config: Any = CONFIG_MAPPING[model_type]()
    others = OTHER_DEFAULTS.get(model_type, {})
    config = changed(config, {of: others[str(of)] for of in read_fields(config) if str(of) in others})
    width = getattr(config.get_text_config(), "hidden_size", None)
    config = changed(config, {of: width for of in read_fields(config) if of.name == "out_hidden_size" and width})
    config._attn_implementation = "eager"  # noqa: SLF001  as transformers documents
    small = shrink_config(config, mesh)
    rates = [of for of in read_fields(small) if re.search("drop|mask_.*prob", of.name) and isinstance(of.value, float)]
    dropping = changed(small, {of: 0.0 if re.search("path|layer|token|mask", of.name) else _DROPOUT for of in rates})
    for candidate in (dropping, small):  # some take no dropout
        for cls in model_classes(candidate):
            try:
                with torch.device("meta"):
                    return cls(candidate)
            except Exception:  # noqa: BLE001, S112  a constructor may raise anything; the next class is tried
                continue
    msg = f"{model_type} was built by shrink_config"
    raise AssertionError(msg)


def _short(text: str) -> str:
    """Return a cause in one line, without the numbers of layers, for a cell of a table."""
    text = re.sub(r"\.\d+(?=[.:\s])", ".*", " ".join(text.split())).replace("|", r"\|")
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 4]} ..."


_WIDTH = 240


def judge_all(asked: Sequence[Judged], *, jobs: int, timeout: float) -> Iterator[Judged]:
    """Return what became of each type, each judged in a process of its own."""
    found = outcomes_apart(judge, asked, _lost, jobs=jobs, timeout=timeout)
    return (outcome for outcome in found if outcome is not None)


def _lost(asked: Judged, cause: str) -> Judged:
    return evolve(asked, cause=_short(cause))


def table(outcomes: Sequence[Judged]) -> str:
    """Return the outcomes as Markdown: counts, then a line for each type."""
    columns = list(dict.fromkeys((outcome.frontend, outcome.tensor) for outcome in outcomes))
    lines = [
        HEADING,
        "",
        "Written by `python -m benchmarks.judged_families --write docs/coverage.md`.",
        "",
        "Each type is built from its default configuration made small (`shrink_config`), with dropout of 0.1, and split",
        "by a frontend; all ranks run beside the whole model in double precision (`verify`). *right*: outputs, every",
        "gradient, weights after a step and masks of dropout are those of the whole model. *refused*: `plan_build` does",
        "not plan it, even without inputs.",
        "",
        "| frontend, ranks along `tensor` | " + " | ".join(verdict for verdict in VERDICTS) + " |",
        "|---|" + "---|" * len(VERDICTS),
        *(_counts(outcomes, frontend, tensor) for frontend, tensor in columns),
        "",
    ]
    for frontend, title in (("tp_plan", "By their declared plan"), ("infer", "By `infer_schedule`")):
        chosen = [outcome for outcome in outcomes if outcome.frontend == frontend]
        if chosen:
            lines += [f"## {title}", "", *_rows(chosen), ""]
    return "\n".join(lines).rstrip() + "\n"


VERDICTS: tuple[Verdict, ...] = ("right", "differs", "refused", "not judged")


def _counts(outcomes: Sequence[Judged], frontend: str, tensor: int) -> str:
    found = Counter(outcome.verdict for outcome in outcomes if (outcome.frontend, outcome.tensor) == (frontend, tensor))
    return f"| {frontend}, {tensor} | " + " | ".join(str(found[verdict]) for verdict in VERDICTS) + " |"


def _rows(outcomes: Sequence[Judged]) -> Iterator[str]:
    ranks = sorted({outcome.tensor for outcome in outcomes})
    yield "| model type | class | inputs | " + " | ".join(map(str, ranks)) + " | |"
    yield "|---|---|---|" + "---|" * len(ranks) + "---|"
    for model_type in dict.fromkeys(outcome.model_type for outcome in outcomes):
        found = {outcome.tensor: outcome for outcome in outcomes if outcome.model_type == model_type}
        first = next(iter(found.values()))
        cells = " | ".join(found[num].verdict if num in found else "" for num in ranks)
        told = (text for outcome in found.values() for text in (outcome.cause, outcome.refused) if text)
        causes = "; ".join(dict.fromkeys(told))
        yield f"| {model_type} | {first.cls} | {', '.join(first.given)} | {cells} | {causes} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("types", nargs="*", help="model types; by default those that declare a plan, and 64 to infer")
    parser.add_argument("--frontend", choices=("tp_plan", "infer"), help="one frontend alone")
    parser.add_argument("--tensor", type=int, nargs="+", default=[2, 4], help="numbers of ranks along tensor")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one type")
    parser.add_argument("--write", type=Path, help="file that takes the table, in place of an older one")
    options = parser.parse_args(arguments)
    kinds: dict[Frontend, Callable[[], Sequence[str]]] = {"tp_plan": model_types, "infer": lambda: INFERRED}
    asked = [
        Judged(model_type, frontend, num)
        for frontend, known in kinds.items()
        if options.frontend in (None, frontend)
        for model_type in options.types or known()
        for num in options.tensor
    ]
    outcomes: list[Judged] = []
    for outcome in judge_all(asked, jobs=options.jobs, timeout=options.timeout):
        outcomes.append(outcome)
        told = (
            f"{outcome.frontend} {outcome.model_type} {outcome.tensor}: {outcome.verdict}  {outcome.cause} {outcome.refused}"
        )
        print(told, file=sys.stderr, flush=True)
    text = table(outcomes)
    if options.write:
        options.write.write_text(replace_part(options.write.read_text(), HEADING, text))
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
