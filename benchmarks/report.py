"""From samples to tables: medians, paired ratios, and what machine they are from."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from attrs import field, frozen
from models import CASES
from rich.box import SIMPLE
from rich.table import Table
from ways import WAYS

if TYPE_CHECKING:
    from same import Sameness
    from sample import Outcome

MIB = 2**20
BASES = ("broadcast", "dtensor")
"""Ways that others are held against."""


@frozen
class Planning:
    """What planning took, once: the schedule, its verbs and the plan."""

    model: str
    num_ranks: int
    way: str
    seconds: float
    num_steps: int


@frozen
class Sample:
    """The worst of all ranks in one run of one way.

    Args:
        model: Name of the model.
        num_ranks: Number of processes.
        way: Name of the way.
        repetition: Samples of one repetition are neighbours in time; in 0 collectives were counted, its time is void.
        seconds: Of the slowest rank.
        peak_bytes: Of the rank that took most, above its start.
        held_bytes: Of the rank that holds most.
        num_collectives: Counted in repetition 0.
        sent_bytes: From rank to rank, all together; counted in repetition 0.
        failure: Why there are no figures.
    """

    model: str
    num_ranks: int
    way: str
    repetition: int
    seconds: float = 0.0
    peak_bytes: int = 0
    held_bytes: int = 0
    num_collectives: int = 0
    sent_bytes: int = 0
    failure: str = field(default="")

    @classmethod
    def of(cls, model: str, num_ranks: int, way: str, repetition: int, outcomes: Sequence[Outcome]) -> Sample:
        """Return the worst of what all ranks saw."""
        return cls(
            model,
            num_ranks,
            way,
            repetition,
            max(outcome.seconds for outcome in outcomes),
            max(outcome.peak_bytes for outcome in outcomes),
            max(outcome.held_bytes for outcome in outcomes),
            max(outcome.num_collectives for outcome in outcomes),
            max(outcome.sent_bytes for outcome in outcomes),
        )

    @classmethod
    def failed(cls, model: str, num_ranks: int, way: str, repetition: int, failure: str) -> Sample:
        """Return a sample without figures."""
        return cls(model, num_ranks, way, repetition, failure=failure)

    def __str__(self) -> str:
        told = self.failure or f"{self.seconds:.3f} s, peak {self.peak_bytes / MIB:.0f} MiB"
        return f"{self.model} {self.num_ranks} ranks, {self.repetition} {self.way}: {told}"


@frozen
class Report:
    """All that was measured.

    Args:
        machine: What it was measured on, by name.
        planning: What was done before.
        first_use: Seconds of the first execution of a tiny plan in a process, with all that is loaded or compiled.
        same: Which weights do not depend on the number of ranks, by model and way.
        samples: What was timed.
    """

    machine: Mapping[str, str]
    planning: Sequence[Planning]
    first_use: Mapping[str, float]
    same: Mapping[str, Mapping[str, Sameness]]
    samples: Sequence[Sample]


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ": ?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    libraries = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    return {
        "CPU": cpu.partition(": ")[2],
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 2**30:.0f} GiB",
        "Python": platform.python_version(),
        **libraries,
    }


def as_tables(report: Report) -> Iterator[Table]:
    """Iterate over the tables for a terminal."""
    for title, header, rows in _tables(report):
        table = Table(title=title, box=SIMPLE)
        for column in header:
            table.add_column(column, justify="left" if column == header[0] else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        yield table


def as_markdown(report: Report) -> str:
    """Return all tables, under a header that names the machine."""
    lines = ["# From a model on meta to local shards", "", *_notes(report)]
    for title, header, rows in _tables(report):
        lines += ["", f"## {title}", "", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
        lines += [_line(row) for row in rows]
    return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _notes(report: Report) -> list[str]:
    repetitions = max((sample.repetition for sample in report.samples), default=0)
    return [
        "Measured by `benchmarks/consolidate.py`: "
        + ", ".join(f"{key} {value}" for key, value in report.machine.items())
        + ";",
        f"gloo on loopback and one thread a process. Medians of {repetitions} interleaved samples, each in fresh",
        "processes, after a tiny model has gone the same way in them.",
        "",
        *(f"- **{way.label}**: {way.about}." for way in WAYS.values()),
        "",
        "- **seconds**: the slowest rank's, from a barrier to the last value; in brackets the least and the most.",
        "- **/ broadcast**, **/ dtensor**: the median of the ratios to the sample of that way in the same repetition.",
        "- **peak**: most anonymous memory above the start, worst rank (`VmHWM` less mapped files); freed memory that",
        "  the C library keeps counts.",
        "- **held**: storages of the local shards, worst rank.",
        "- **collectives**, **sent**: counted where torch hands them to the process group, in a run that is not timed;",
        "  sent is what leaves one rank for another, all ranks together.",
        "- **same**: tensors of a tiny model that are bit for bit the same on 1, 2 and 4 ranks.",
        "- **twins**: split random tensors of it of which two ranks hold the same values.",
        "",
        "The time of shardplan's ways is that of `execute`: ranks agree on the plan, check the model, make groups, copy the",
        "module, and register the hooks of split layers. Planning comes before, and is timed below.",
    ]


def _tables(report: Report) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    header = ["", "seconds", *(f"/ {base}" for base in BASES)]
    header += ["peak MiB", "held MiB", "collectives", "sent MiB", "same", "twins"]
    for model in CASES:
        for num_ranks in sorted({sample.num_ranks for sample in report.samples}):
            chosen = [s for s in report.samples if (s.model, s.num_ranks) == (model, num_ranks)]
            rows = [_row(way, chosen, report.same[model].get(way)) for way in WAYS if any(s.way == way for s in chosen)]
            if rows:
                yield f"{model}, {num_ranks} ranks", header, rows
    failed = [sample for sample in report.samples if sample.failure]
    if failed:
        rows = [[f"{s.model}, {WAYS[s.way].label}", f"{s.num_ranks}", " ".join(s.failure.split())[-80:]] for s in failed]
        yield "Failed", ["", "ranks", "why"], rows
    if report.planning:
        rows = [[f"{p.model}, `{p.way}`", f"{p.num_ranks}", f"{p.seconds:.3f}", f"{p.num_steps}"] for p in report.planning]
        yield "Planning, once", ["", "ranks", "seconds", "steps"], rows
        header = ["", "seconds"]
        rows = [[f"`{way}`", f"{seconds:.3f}"] for way, seconds in report.first_use.items()]
        yield "First execution of a tiny plan in a process", header, rows


def _row(way: str, samples: Sequence[Sample], same: Sameness | None) -> list[str]:
    mine = [sample for sample in samples if sample.way == way]
    if any(sample.failure for sample in mine):
        return [WAYS[way].label, "failed", *["-"] * 8]
    timed = [sample.seconds for sample in mine if sample.repetition]
    counted = next(sample for sample in mine if not sample.repetition)
    peak = median(sample.peak_bytes for sample in mine if sample.repetition or len(mine) == 1)
    return [
        WAYS[way].label,
        f"{median(timed):.3f} ({min(timed):.3f} to {max(timed):.3f})" if timed else "-",
        *(_ratio(mine, [sample for sample in samples if sample.way == base]) for base in BASES),
        f"{peak / MIB:.0f}",
        f"{counted.held_bytes / MIB:.0f}",
        f"{counted.num_collectives}",
        f"{counted.sent_bytes / MIB:.0f}",
        f"{same.num_same} of {same.num_tensors}" if same else "-",
        f"{same.num_twins} of {same.num_random}" if same else "-",
    ]


def _ratio(mine: Sequence[Sample], bases: Sequence[Sample]) -> str:
    seconds = {sample.repetition: sample.seconds for sample in bases if sample.repetition and not sample.failure}
    ratios = [s.seconds / seconds[s.repetition] for s in mine if s.repetition in seconds]
    return f"{median(ratios):.2f}" if ratios else "-"
