# SPDX-License-Identifier: Apache-2.0
"""Race the named rows in this process: ``python -m benchmarks.peers.race --pairs 9 NAME...`` in the peers' environment.

Prints one line of JSON per row, so that what was measured is kept when a later row fails. All threads of the process
count: other projects may start some of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
import warnings
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from benchmarks.peers.rows import Race, Work, all_rows

SAMPLE_S = 0.1
"""Short calls are repeated until a sample takes so many CPU seconds."""
MOST_REPEATS, FLOOR_SAMPLES = 40, 5


def sample_s(work: Work, repeats: int) -> float:
    """CPU seconds of one call, all threads of the process included, the mean of some calls."""
    start = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - start) / repeats


def paired(race: Race, pairs: int) -> dict[str, Any]:
    """Time both sides by turns, the order alternating; the median of the pairs' ratios counts."""
    race.ours(), race.theirs()
    slower = max(sample_s(race.ours, 1), sample_s(race.theirs, 1))
    repeats = max(1, min(MOST_REPEATS, round(SAMPLE_S / max(slower, 1e-6))))
    seconds = []
    for pair in range(pairs):
        order = (race.theirs, race.ours) if pair % 2 else (race.ours, race.theirs)
        spent = {id(work): sample_s(work, repeats) for work in order}
        seconds.append((spent[id(race.ours)], spent[id(race.theirs)]))
    ratios = [race.factor * ours / theirs for ours, theirs in seconds]
    ours_s, theirs_s = (statistics.median(side) for side in zip(*seconds, strict=True))
    return {
        "ratio": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "pairs": [round(ratio, 3) for ratio in ratios],
        "our_ms": round(1e3 * ours_s, 2),
        "their_ms": round(1e3 * theirs_s, 2),
        "equal": race.equal,
    }


def with_limit(found: dict[str, Any], race: Race, peak: float) -> dict[str, Any]:
    """Add what cannot be undercut, and how far from it we are: the products of ours at the measured peak, or the floor.

    Args:
        found: what `paired` gave.
        race: both sides.
        peak: of matrix products, in 1e9 operations per second.
    """
    from benchmarks.limits import product_flops

    if race.floor is not None:
        race.floor()
        limit = {"limit_ms": 1e3 * statistics.median(sample_s(race.floor, 1) for _ in range(FLOOR_SAMPLES))}
    else:
        flops = product_flops(race.ours)
        limit = {"mflops": round(flops / 1e6, 1), "limit_ms": flops / peak / 1e6}
    limit["over_limit"] = round(found["our_ms"] / limit["limit_ms"], 2)
    return {**found, **limit, "limit_ms": round(limit["limit_ms"], 3)}


def with_tries(found: dict[str, Any], race: Race, gate: float | None, pairs: int) -> dict[str, Any]:
    """Add what other ways of ours cost over theirs, and what the floor alone does, where the gate is missed."""
    if gate is None or found["ratio"] <= gate or not race.ways:
        return found
    tried = {name: paired(replace(race, ours=way), pairs)["ratio"] for name, way in race.ways.items()}
    return {**found, "tried": tried, "limit": {"decoding alone": round(found["limit_ms"] / found["their_ms"], 3)}}


def main(args: list[str] | None = None) -> int:
    """Race and print; a row that fails says why and does not stop the others."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.race", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--ratios", action="store_true", help="no limits and tries, which older code cannot count")
    parser.add_argument("names", nargs="+")
    options = parser.parse_args(args)
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    peak = 0.0
    if not options.ratios:
        from benchmarks.limits import peak_gflops

        peak = peak_gflops()
    rows = {row.name: row for row in all_rows()}
    for name in options.names:
        print(name, file=sys.stderr, flush=True)
        try:
            torch.manual_seed(0)
            race = rows[name].race()
            found = paired(race, options.pairs)
            if not options.ratios:
                found = with_limit(found, race, peak)
                found = with_tries(found, race, rows[name].gate, max(1, options.pairs // 3))
        except Exception:
            found = {"failed": traceback.format_exc(limit=-1).strip().splitlines()[-1]}
            traceback.print_exc()
        row = rows[name]
        versions = {package: version(package) for package in (*row.packages, *row.shared)}
        print(json.dumps({"name": name, "versions": versions, "peak_gflops": round(peak, 1), **found}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
