# SPDX-License-Identifier: Apache-2.0
"""Measure what is missing, and write docs/reliability.md's section: ``python -m benchmarks.reliability [PART ...]``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.reliability import faults, memory
from benchmarks.reliability.counted import count_cases
from benchmarks.reliability.page import PAGE, write_page
from moeapps.files import write_json
from moeapps.training.run import git_commit, machine

RESULTS = Path("benchmarks") / "results" / "reliability.json"
RECORDS = Path("runs") / "fuzz"
SEEDS = (0, 1, 2)
Report = dict[str, Any]


class Results:
    """The file of results: every figure is written as soon as it is known.

    Args:
        file: where it is.
        again: measure also what the file has.
    """

    def __init__(self, file: Path, *, again: bool = False) -> None:
        self.file = file
        self.again = again
        self.report = read(file)

    def add(self, part: str, name: str, measure: Callable[[], Report]) -> None:
        """Measure one thing unless it is known; a failure is told and left out, and the next one is tried."""
        held: Report = self.report.setdefault(part, {})
        if name in held and not self.again:
            return
        print(f"{part}: {name}", flush=True)
        try:
            found = measure()
        except (RuntimeError, OSError) as error:
            print(f"error: {part} of {name}: {error}", file=sys.stderr, flush=True)
            return
        held[name] = {**found, "commit": git_commit()}
        self.write()

    def write(self) -> None:
        """Write the file with its entries in order."""
        ordered = {part: dict(sorted(held.items())) for part, held in sorted(self.report.items())}
        write_json(self.file, {**ordered, "machine": machine()})


def read(file: Path) -> Report:
    """Return what a file of results holds, nothing where there is none yet."""
    found: Report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def systems() -> list[str]:
    """Names of the base configs."""
    return sorted(path.stem for path in Path("configs").glob("*.yaml"))


def measure_faults(results: Results, only: Iterable[str], seeds: Iterable[int]) -> None:
    """Chains of struck processes."""
    for seed in seeds:
        for name, case in faults.cases().items():
            if case.system in only:
                results.add("faults", f"{name} {seed}", lambda case=case, seed=seed: faults.measure(case, seed))  # type: ignore[misc]


def measure_memory(what: memory.What, results: Results, only: Iterable[str]) -> None:
    """The peak of every base config, or what 2,000 steps leave behind."""
    for name in only:
        results.add(what, name, lambda name=name: memory.measure(what, name))  # type: ignore[misc]


def collect_fuzz(results: Results, records: Path) -> None:
    """Take over the records that ``make fuzz`` has written; those of before stay where there is no new one."""
    held: Report = results.report.setdefault("fuzz", {})
    for file in sorted(records.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        held[record.pop("reader")] = record
    results.write()


def main(args: list[str] | None = None) -> int:
    """Measure the named parts, or all, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=(__doc__ or "").split(":")[0])
    parts = ("faults", "peak", "leak", "fuzz", "tests", "page")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--only", nargs="+", default=systems(), metavar="SYSTEM", help="systems (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of the drawn faults (default 0 1 2)")
    parser.add_argument("--again", action="store_true", help="measure anew what the results have")
    options = parser.parse_args(args)
    if unknown := sorted({*options.parts} - {*parts}) or sorted({*options.only} - {*systems()}):
        parser.error(f"{unknown[0]!r} is none of {', '.join((*parts, *systems()))}")
    wanted = options.parts or parts
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    results = Results(RESULTS, again=options.again)
    if "faults" in wanted:
        measure_faults(results, options.only, options.seeds)
    for what in ("peak", "leak"):
        if what in wanted:
            measure_memory(what, results, options.only)
    if "fuzz" in wanted:
        collect_fuzz(results, RECORDS)
    if "tests" in wanted:
        results.report["tests"] = count_cases(PAGE)
        results.write()
    write_page(read(RESULTS), PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
