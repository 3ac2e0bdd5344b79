"""Measure the time and memory from a model on meta to local shards with values, several ways side by side.

``python benchmarks/consolidate.py --markdown benchmarks.md --json benchmarks.json`` takes about half an hour on two cores.
Ranks are processes on this machine that talk over gloo on loopback, with one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import asdict
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from models import Case
    from report import Planning, Sample
    from same import Sameness

MODELS = ("llama", "small")
WAYS = (
    "local",
    "scatter",
    "broadcast",
    "classic",
    "same_seed",
    "dtensor",
    "fsdp2",
    "zero_init",
    "fill",
    "normal",
)
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

_progress = Console(stderr=True, highlight=False, soft_wrap=True)


def main() -> None:
    """Measure, print tables, and write what is asked for."""
    arguments = _arguments()
    os.environ.update(ENVIRONMENT)  # libraries read it when they are imported, which is why that comes after

    import torch
    from models import CASES, TINY
    from report import Report, as_markdown, as_tables, machine

    torch.set_num_threads(1)
    cases = {name: CASES[name]() for name in arguments.models}
    tiny = {name: TINY[name]() for name in arguments.models}
    first = _first_use(next(iter(tiny.values())), arguments.ways)
    planning = list(_plan(cases, arguments.ranks, first))
    same = _compare(tiny, arguments.ways)
    samples = list(_sample(cases, tiny, arguments.ranks, arguments.ways, arguments.repeat))
    report = Report(machine(), planning, first, same, samples)

    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(report), indent=1))
    if arguments.markdown:
        arguments.markdown.write_text(as_markdown(report))
    console = Console()
    console.width = max(console.width, 150)  # a terminal that is narrower wraps lines, and loses no figure
    for table in as_tables(report):
        console.print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which models")
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2, 4), default=[2, 4], help="numbers of processes")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what is compared")
    parser.add_argument("--repeat", type=int, default=5, help="timed samples of each, after one that counts messages")
    parser.add_argument("--json", type=Path, help="file for every sample")
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    return parser.parse_args()


def _first_use(case: Case, names: Sequence[str]) -> dict[str, float]:
    """Plan and execute each strategy once in this process, so that ranks inherit what is loaded or compiled."""
    from sample import first_use
    from ways import STRATEGIES

    first: dict[str, float] = {}
    for way in [name for name in STRATEGIES if name in names]:
        try:
            first[way] = first_use(case, way)
        except ValueError as error:  # a strategy that is refused
            _progress.print(f"{way}: {error}", markup=False)
    return first


def _plan(cases: Mapping[str, Case], ranks: Sequence[int], names: Iterable[str]) -> Iterator[Planning]:
    """Time what is done before, on a laptop; the plan itself is made again for each job."""
    from report import Planning
    from ways import plan_for

    for way in names:
        for model, case in cases.items():
            for num_ranks in ranks:
                start = time.perf_counter()
                plan = plan_for(case, num_ranks, way)
                seconds = time.perf_counter() - start
                assert plan is not None, "strategies have a plan"
                yield Planning(model, num_ranks, way, seconds, len(plan.steps))


def _compare(tiny: Mapping[str, Case], names: Sequence[str]) -> dict[str, dict[str, Sameness]]:
    """Find which ways give the same weights whatever the number of ranks."""
    from same import compare
    from ways import WAYS

    same: dict[str, dict[str, Sameness]] = {model: {} for model in tiny}
    for model, case in tiny.items():
        for way in [name for name in names if not WAYS[name].is_floor]:
            try:
                same[model][way] = compare(case, way)
                _progress.print(f"{model} {way}: {same[model][way]}", markup=False)
            except (RuntimeError, ValueError) as error:
                _progress.print(f"{model} {way}: {error}", markup=False)
    return same


def _sample(
    cases: Mapping[str, Case], tiny: Mapping[str, Case], ranks: Sequence[int], names: Sequence[str], repeat: int
) -> Iterator[Sample]:
    """Go round all ways ``repeat`` times, so that what disturbs the machine disturbs them all; the first round counts."""
    from report import Sample
    from sample import Job, take
    from ways import plan_for

    for model, case in cases.items():
        for num_ranks in ranks:
            jobs: dict[str, tuple[Job, Job]] = {}
            for way in names:
                try:
                    plans = [plan_for(c, num_ranks, way) for c in (case, tiny[model])]
                except ValueError as error:
                    yield Sample.failed(model, num_ranks, way, 0, str(error))
                    continue
                jobs[way] = (Job(way, case, plans[0]), Job(way, tiny[model], plans[1]))
            for repetition in range(repeat + 1):
                for way, (job, warm_up) in list(jobs.items()):
                    try:
                        outcomes = take(job, warm_up, num_ranks, count=repetition == 0)
                    except RuntimeError as error:
                        del jobs[way]  # it would fail again
                        sample = Sample.failed(model, num_ranks, way, repetition, str(error))
                    else:
                        sample = Sample.of(model, num_ranks, way, repetition, outcomes)
                    _progress.print(str(sample), markup=False)
                    yield sample


if __name__ == "__main__":
    main()
