"""Which models of transformers can be split as they declare: ``python -m benchmarks.transformers_coverage``.

Each type is built on the meta device from its default configuration, cut to a few layers; its schedule is planned for
several numbers of ranks, and followed with inputs that are made from the configuration.
"""

from __future__ import annotations

import argparse
import io
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from attrs import field, frozen

from shardplan.functional.frontends.tp_plan.schedule import schedule_from_tp_plan
from shardplan.functional.frontends.transformers_models import NUM_LAYERS, declared_model, model_types
from shardplan.functional.plan import plan_build
from shardplan.specs.equality import in_words
from shardplan.specs.errors import PlanError
from shardplan.specs.mesh import Mesh

if TYPE_CHECKING:
    from torch import nn

A = TypeVar("A")
R = TypeVar("R")

TENSOR = (2, 4, 8)
"""Numbers of ranks along ``tensor`` that are tried."""

HEADING = "# Models of transformers that can be split as they declare"

_PRELOAD = [
    *("torch", "torch._inductor", "torch._export", "transformers.modeling_utils"),
    *("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
    *("shardplan.functional.frontends.tp_plan.schedule", "shardplan.functional.frontends.graph.schedule"),
    *("shardplan.functional.frontends.shrink.shrink", "shardplan.functional.verify"),
]
"""Modules that the server of processes imports once."""


@frozen
class Covered:
    """What became of one model type.

    Args:
        model_type: The type.
        cls: The model's class.
        num_rules: Rules of its plan.
        errors: By number of ranks, what the plan was refused with; empty where it was planned.
        unfollowed: By number of ranks, what the law ``equal`` could not follow; empty where it holds.
        lost: Why there is no outcome: it took too long, or its process ended.
    """

    model_type: str
    cls: str = ""
    num_rules: int = 0
    errors: tuple[str, ...] = field(default=(), converter=tuple)
    unfollowed: tuple[tuple[str, ...], ...] = field(default=(), converter=tuple)
    lost: str = ""


def cover(model_type: str, tensor: Sequence[int] = TENSOR) -> Covered | None:
    """Plan one model type for several numbers of ranks; None if it declares no plan, or cannot be built."""
    logging.disable(logging.WARNING)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        model = declared_model(model_type)
        if model is None:
            return None
        outcomes = [_plan(model, num) for num in tensor]
    errors, unfollowed = zip(*outcomes, strict=True)
    return Covered(model_type, type(model).__name__, len(vars(model)["_tp_plan"]), errors, unfollowed)


def _plan(model: nn.Module, num: int) -> tuple[str, tuple[str, ...]]:
    """Return what planning is refused with, and what the law of equality could not follow."""
    sch = schedule_from_tp_plan(model, Mesh(tensor=num))
    try:
        plan = plan_build(sch, init_weights=False)
    except PlanError as error:
        return str(error), ()
    assert plan.equality is not None, "models of transformers have a configuration"
    return "", tuple(in_words(plan.equality.unfollowed))


def cover_all(types: Iterable[str], *, jobs: int = 1, timeout: float = 300) -> Iterator[Covered]:
    """Return what became of each type that declares a plan, each planned in a process of its own."""
    found = outcomes_apart(cover, list(types), _lost, jobs=jobs, timeout=timeout)
    return (outcome for outcome in found if outcome is not None)


def _lost(model_type: str, cause: str) -> Covered:
    return Covered(model_type, lost=cause)


def outcomes_apart(
    work: Callable[[A], R | None],
    asked: Sequence[A],
    lost: Callable[[A, str], R],
    *,
    jobs: int,
    timeout: float,
) -> Iterator[R | None]:
    """Return what some work gives for each argument, each in a process of its own that inherits imported modules.

    Args:
        work: The work.
        asked: Its arguments.
        lost: Makes an outcome for an argument whose process took too long, or ended without one.
        jobs: Processes at a time.
        timeout: Seconds for one process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(partial(_apart, context, timeout, work, lost), asked)


def _apart(
    context: multiprocessing.context.ForkServerContext,
    timeout: float,
    work: Callable[[A], R | None],
    lost: Callable[[A, str], R],
    argument: A,
) -> R | None:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, work, lost, argument), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(timeout) else lost(argument, f"it took more than {timeout:.0f} s")
    except EOFError:
        return lost(argument, "its process ended without an outcome")
    finally:
        process.kill()
        process.join()


def _send(
    pipe: multiprocessing.connection.Connection,
    work: Callable[[A], R | None],
    lost: Callable[[A, str], R],
    argument: A,
) -> None:
    try:
        pipe.send(work(argument))
    except Exception as error:  # noqa: BLE001  whatever a model's code raises is reported
        pipe.send(lost(argument, f"{type(error).__name__}: {error}"[:300]))


def table(outcomes: Sequence[Covered], tensor: Sequence[int] = TENSOR) -> str:
    """Return the outcomes as Markdown: counts, one line a type, and the errors of those that were refused."""
    found = [outcome for outcome in outcomes if not outcome.lost]
    planned = [sum(not outcome.errors[place] for outcome in found) for place in range(len(tensor))]
    holding = [
        sum(not outcome.errors[place] and not outcome.unfollowed[place] for outcome in found) for place in range(len(tensor))
    ]
    lines = [
        HEADING,
        "",
        "Written by `python -m benchmarks.transformers_coverage --write docs/coverage.md`.",
        "",
        f"Counted are the {len(outcomes)} model types of transformers {_version()} that declare a tensor-parallel plan and",
        "build on the meta device from their default configuration, as the first of these that builds: causal language",
        f"model, image-text model, sequence-to-sequence model, bare model. Each is cut to {NUM_LAYERS} layers where that is",
        "possible, and planned with `schedule_from_tp_plan` and `plan_build(init_weights=False)`, with inputs that are made",
        "from its configuration. *holds*: planned, and the law `equal` holds, forward and backward; *not followed*:",
        "planned, and the law says what nobody could follow.",
        "",
        "| ranks along `tensor` | " + " | ".join(map(str, tensor)) + " |",
        "|---|" + "---|" * len(tensor),
        "| planned | " + " | ".join(map(str, planned)) + " |",
        "| of these, the law `equal` holds | " + " | ".join(map(str, holding)) + " |",
        "| refused | " + " | ".join(str(len(found) - num) for num in planned) + " |",
        "",
        "| model type | class | rules | " + " | ".join(map(str, tensor)) + " |",
        "|---|---|---|" + "---|" * len(tensor),
        *(_row(outcome, tensor) for outcome in outcomes),
        "",
        "## Not followed",
        "",
        *(line for outcome in outcomes for line in _not_followed(outcome, tensor)),
        "",
        "## Refused",
        "",
        *(line for outcome in outcomes for line in _refusals(outcome, tensor)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def replace_part(page: str, heading: str, part: str) -> str:
    """Return a page with another part from a heading to the next heading of its level, at the end if it has none."""
    parts = [old for old in re.split(r"(?m)^(?=# )", page) if old]
    if not any(old.startswith(heading) for old in parts):
        parts.append(heading)
    return "\n".join(part if old.startswith(heading) else old.strip("\n") + "\n" for old in parts)


def _row(outcome: Covered, tensor: Sequence[int]) -> str:
    cells = [f"`{outcome.lost}`"] * len(tensor) if outcome.lost else _answers(outcome)
    return f"| {outcome.model_type} | {outcome.cls} | {outcome.num_rules} | {' | '.join(cells)} |"


def _answers(outcome: Covered) -> list[str]:
    pairs = zip(outcome.errors, outcome.unfollowed, strict=True)
    return ["refused" if error else "not followed" if unfollowed else "holds" for error, unfollowed in pairs]


def _not_followed(outcome: Covered, tensor: Sequence[int]) -> Iterator[str]:
    """Iterate over what nobody could follow, the first of it, once for all numbers of ranks with the same."""
    ranks: dict[tuple[str, ...], list[int]] = {}
    for num, unfollowed in zip(tensor, outcome.unfollowed, strict=False):
        if unfollowed:
            ranks.setdefault(unfollowed, []).append(num)
    for (first, *others), nums in ranks.items():
        more = f", and {len(others)} more" if others else ""
        yield f"- {outcome.model_type}, {', '.join(map(str, nums))} ranks: {first}{more}"


def _refusals(outcome: Covered, tensor: Sequence[int]) -> Iterator[str]:
    for num, error in zip(tensor, outcome.errors, strict=False):
        if error:
            yield from (f"{outcome.model_type}, {num} ranks:", "", "```text", error, "```", "")


def _version() -> str:
    import transformers  # only a test dependency

    return transformers.__version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one type")
    parser.add_argument("--write", type=Path, help="file that takes the table")
    options = parser.parse_args(arguments)
    outcomes: list[Covered] = []
    for outcome in cover_all(options.types or model_types(), jobs=options.jobs, timeout=options.timeout):
        outcomes.append(outcome)
        states = outcome.lost or " ".join(_answers(outcome))
        print(f"{outcome.model_type}: {states}", file=sys.stderr, flush=True)
    text = table(outcomes)
    if options.write:
        options.write.write_text(replace_part(options.write.read_text(), HEADING, text))
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
