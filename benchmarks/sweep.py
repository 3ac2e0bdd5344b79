"""Plan every model type of transformers that builds on meta from its default configuration: where do its values come from?

    python benchmarks/sweep.py               # all, with totals (minutes)
    python benchmarks/sweep.py llama gpt2    # some

A byte is *pointwise* if its tensor has an init program, so that every rank makes its own part.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from attrs import frozen
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING
from transformers.utils import logging

from shardplan.functional import create_schedule, plan_build
from shardplan.specs import InitProgram, Made, Mesh, PlanError
from shardplan.specs.steps import Allocate, EvaluateShard, Generate, TakeShard, TakeWhole

TIMEOUT_SECONDS = 60


@frozen
class Outcome:
    """What planning one model type gave.

    Args:
        model_type: Its name in transformers.
        error: Why it has no plan; "" if it has one.
        pointwise_bytes: Bytes of tensors with an init program.
        opaque: Bytes of the other ones, by cause.
        num_tensors: Tensors in all.
        num_once: Tensors among them that exactly one step makes.
    """

    model_type: str
    error: str = ""
    pointwise_bytes: int = 0
    opaque: tuple[tuple[str, str, int], ...] = ()
    num_tensors: int = 0
    num_once: int = 0

    @property
    def opaque_bytes(self) -> int:
        """Bytes of tensors that one rank makes whole."""
        return sum(num_bytes for *_, num_bytes in self.opaque)


def build(model_type: str) -> nn.Module | None:
    """Return the model of a type on meta, from its default configuration; None if that does not build."""
    try:
        with _limit(TIMEOUT_SECONDS), torch.device("meta"):
            config = CONFIG_MAPPING[model_type]()
            return MODEL_MAPPING[type(config)]._from_config(config)  # noqa: SLF001  transformers' name for it
    except Exception:  # noqa: BLE001  a default configuration that does not build is no concern of this script
        return None


def plan_type(model_type: str, model: nn.Module) -> Outcome:
    """Return what planning a model gives."""
    try:
        with _limit(TIMEOUT_SECONDS):
            plan = plan_build(create_schedule(model, Mesh()))
    except PlanError as error:
        return Outcome(
            model_type, error=f"{len(error.problems)} tensors, e.g. {error.problems[0].path}: {error.problems[0].cause}"
        )
    specs = [spec for spec in plan.tree.values() if isinstance(spec.source, (InitProgram, Made))]
    opaque = tuple((s.path, s.source.cause, s.num_bytes) for s in specs if isinstance(s.source, Made))
    making = (Allocate, EvaluateShard, Generate, TakeShard, TakeWhole)
    makers = Counter(plan.tree[path].path for step in plan.steps if isinstance(step, making) for path in step.paths)
    num_once = sum(makers[path] == 1 for path in plan.tree)
    pointwise = sum(spec.num_bytes for spec in specs if isinstance(spec.source, InitProgram))
    return Outcome(model_type, "", pointwise, opaque, len(plan.tree), num_once)


def sweep(model_types: list[str]) -> Iterator[Outcome]:
    """Iterate over the outcomes of all types that build."""
    for model_type in model_types:
        if (model := build(model_type)) is not None:
            yield plan_type(model_type, model)


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        msg = f"longer than {seconds} s"
        raise TimeoutError(msg)

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    """Print a line for each type that is not all pointwise, and the totals."""
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    outcomes: list[Outcome] = []
    causes: Counter[str] = Counter()
    for outcome in sweep(sys.argv[1:] or sorted(CONFIG_MAPPING.keys())):
        outcomes.append(outcome)
        if outcome.error:
            print(f"{outcome.model_type:30} no plan: {outcome.error}", flush=True)
        for path, cause, num_bytes in outcome.opaque:
            causes[cause] += num_bytes
            print(f"{outcome.model_type:30} {num_bytes:>12} bytes  {path}: {cause}", flush=True)
    planned = [outcome for outcome in outcomes if not outcome.error]
    pointwise, opaque = sum(o.pointwise_bytes for o in planned), sum(o.opaque_bytes for o in planned)
    print(f"\n{len(outcomes)} types build on meta, {len(planned)} are planned as they are")
    print(f"{100 * pointwise / (pointwise + opaque):.4f} % of {pointwise + opaque} bytes are pointwise")
    print(f"{sum(not o.opaque for o in planned)} types are pointwise altogether")
    for cause, num_bytes in causes.most_common(20):
        print(f"{num_bytes:>14} bytes  {cause}")


if __name__ == "__main__":
    main()
