"""Draw mutants, plan and judge them, and print what became of them."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

from attrs import asdict

from tests.mutants.draw import draw
from tests.mutants.judge import judge, unjudged
from tests.mutants.page import by_kind, by_subject, page
from tests.mutants.run import run_all


def main():
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--num", type=int, default=3000, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw: the same seed, the same mutants")
    parser.add_argument("--jobs", type=int, default=1, help="processes that judge them")
    parser.add_argument("--list", type=Path, help="write what was found of each mutant, a line of JSON each")
    parser.add_argument("--write", type=Path, help="write the page")
    given = parser.parse_args()
    mutants = draw(given.num, given.seed)
    with (given.list or Path("/dev/null")).open("w", encoding="utf-8") as listing:

        def note(outcome):
            noted.append(outcome)
            listing.write(json.dumps(asdict(outcome) | {"cell": outcome.cell}) + "\n")
            listing.flush()
            sys.stderr.write(f"\r{len(noted)} of {len(mutants)}")

        noted = []
        outcomes = run_all(judge, mutants, given.jobs, unjudged, note)
    sys.stdout.write(f"\n{by_kind(outcomes)}\n\n{by_subject(outcomes)}\n")
    if given.write:
        given.write.write_text(page(outcomes, given.num, given.seed), encoding="utf-8")


if __name__ == "__main__":
    main()
