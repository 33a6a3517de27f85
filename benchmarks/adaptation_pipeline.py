# SPDX-License-Identifier: Apache-2.0
"""What ``make adaptation`` costs from nothing, data included: ``python -m benchmarks.adaptation_pipeline``.

Four stages and the test of ``configs/meta_dmoe.yaml``, one thread, held to eight minutes. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.timed import ROOT, timed
from moeapps.files import write_json
from moeapps.training.folders import newest_version

RESULTS = ROOT / "benchmarks" / "results" / "adaptation_pipeline.json"
MOST_SECONDS = 480.0
"""Of the clock, on two idle cores; agreed beforehand."""


def words_of_make() -> list[str]:
    """The words after ``moeapps`` that the Makefile's target runs."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^adaptation:.*\n.*/moeapps (.*) \$\(foreach stage,([^,]+),(.*)\)$", text, re.MULTILINE)
    assert recipe is not None
    stages = [recipe[3].replace("$(stage)", stage).split() for stage in recipe[2].split()]
    return [*recipe[1].split(), *(word for stage in stages for word in stage)]


def measure(flags: Sequence[str], work: Path) -> dict[str, Any]:
    """Run it in an empty folder with an empty cache; what it cost, and accuracy by role with and without adaptation.

    Args:
        flags: further words, for trying it out.
        work: an empty folder.
    """
    words = words_of_make()
    at = words.index("--stage")  # what follows belongs to the stages
    words[at:at] = flags
    own = {"MOEAPPS_RUNS": str(work / "runs"), "MOEAPPS_CACHE": str(work / "cache")}
    cost = timed(words, work / "log.txt", own)
    run = newest_version(work / "runs" / "meta_dmoe" / "curriculum")
    test = json.loads((run / "metrics" / "test.json").read_text(encoding="utf-8"))
    scores: dict[str, dict[str, list[float]]] = {}
    for row in test["rows"]:
        if row["metric"] in ("accuracy", "accuracy_before"):
            scores.setdefault(row["role"], {}).setdefault(row["metric"], []).append(row["value"])
    means = {role: {name: round(sum(v) / len(v), 4) for name, v in found.items()} for role, found in scores.items()}
    about = {key: test["header"][key] for key in ("seed", "commit", "config_hash", "machine", "versions")}
    command = " ".join(["moeapps", *words])
    return {"command": command, **cost, "most_seconds": MOST_SECONDS, "mean": means,
            "date": datetime.now(UTC).date().isoformat(), **about}  # fmt: skip


def main(args: list[str] | None = None) -> int:
    """Measure, write the results, and return 1 where it took too long."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptation_pipeline", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS, help="results file")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="overlays, to try it out")
    options = parser.parse_args(args)
    if options.config and options.json == RESULTS:
        parser.error("--config is for trying it out: give a --json of its own")
    flags = [word for file in options.config for word in ("--config", file)]
    with tempfile.TemporaryDirectory() as work:
        found = measure(flags, Path(work))
    write_json(options.json, found)
    print(f"{found['seconds']:.0f} s, {found['cpu_seconds']:.0f} of the processor; at most {MOST_SECONDS:.0f}")
    return int(found["seconds"] > MOST_SECONDS)


if __name__ == "__main__":
    raise SystemExit(main())
