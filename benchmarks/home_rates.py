# SPDX-License-Identifier: Apache-2.0
"""The learning rate of every network of HoME's one-pass evidence: ``python -m benchmarks.home_rates``.

Every network trains once per rate with the very configs of the evidence, but on a log of its own (seed 100); where the
highest rate is the best one, twice that rate is tried too. What counts is the expected GAUC, mean over all six tasks,
on the VALIDATION domain; nothing else is read. All runs are written to benchmarks/results/home_rates.json; interrupted,
the same command goes on. The best rates are then written into the configs by hand, and a test holds them to this file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.evidence.__main__ import ROOT, to_json
from benchmarks.evidence.cells import CellResult, describe_machine
from benchmarks.evidence.grid import Grid, Variant
from benchmarks.evidence.home import DATA_SEED_FLAGS, SETTING
from benchmarks.evidence.runner import Failure, Runner
from moeapps.files import write_text

RESULTS = Path(__file__).parent / "results" / "home_rates.json"
SEED = 100
RATES, FURTHER = (1e-3, 2e-3, 4e-3, 8e-3), (1.6e-2, 3.2e-2)
MODELS = ("home", "mmoe", "cgc", "ple", "layer_norm", "mmoe_layer_norm", "single_task", "adatt")
METRIC = "validation/gauc_expected"
KEPT = (METRIC, "validation.interaction/gauc_expected", "validation.watch/gauc_expected")
"""Mean over all tasks, over the rare ones, over the dense ones."""


Runs = Mapping[str, Mapping[str, float]]


def name(model: str, rate: float) -> str:
    """Name of a run."""
    return f"{model}-{rate:g}"


def grid() -> Grid:
    """One variant per network and rate: the setting of the evidence with the rate on top."""
    variants = {}
    for model in MODELS:
        overlays = SETTING if model == "home" else (*SETTING, f"configs/baselines/home_{model}.yaml")
        for rate in (*RATES, *FURTHER):
            flags = (f"--model.init_args.optimizer.lr={rate:g}",)
            variants[name(model, rate)] = Variant(overlays, flags, pairs=1)
    seeds = ((SEED, SEED),)
    return Grid("home", "configs/home.yaml", variants, claims=(), seeds=seeds, data_seed_flags=DATA_SEED_FLAGS)


def score(runs: Runs, model: str, rate: float) -> float:
    """What a rate is judged by."""
    return runs[name(model, rate)][METRIC]


def missing(runs: Runs, model: str) -> list[float]:
    """Rates that are still to be tried: the given ones, then higher ones while the highest is the best."""
    if waiting := [rate for rate in RATES if name(model, rate) not in runs]:
        return waiting
    top = max(RATES)
    for rate in FURTHER:
        if score(runs, model, top) < max(score(runs, model, r) for r in (*RATES, *FURTHER) if r < top):
            return []
        if name(model, rate) not in runs:
            return [rate]
        top = rate
    return []


def best(runs: Runs) -> dict[str, float]:
    """The rate with the highest score of every network for which no rate is left to try."""
    tried = {model: [r for r in (*RATES, *FURTHER) if name(model, r) in runs] for model in MODELS}
    done = [model for model in MODELS if not missing(runs, model)]
    return {model: max(tried[model], key=lambda rate: score(runs, model, rate)) for model in done}


def main(root: Path = ROOT, path: Path = RESULTS) -> int:
    """Run what is missing, write, print."""
    runs: dict[str, dict[str, float]] = json.loads(path.read_text())["runs"] if path.exists() else {}
    console, failures = Console(highlight=False), []
    rates = grid()

    def finished(result: CellResult) -> None:
        runs[result.variant] = {**{metric: result.metrics[metric] for metric in KEPT}, "cpu_s": result.cpu_s}
        about: dict[str, Any] = {
            **{"command": "python -m benchmarks.home_rates", "machine": describe_machine(), "seed": SEED},
            **{"rates": [*RATES, *FURTHER], "metric": METRIC, "best": best(runs)},
        }
        write_text(path, to_json({**about, "runs": dict(sorted(runs.items()))}))
        console.print(f"{result.variant}: {runs[result.variant]}")

    def failed(failure: Failure) -> None:
        failures.append(failure)
        console.print(f"{failure.cell.stem}: FAILED, {failure.reason}\n{failure.tail}", markup=False)

    while wanted := {name(model, rate) for model in MODELS for rate in missing(runs, model)}:
        cells = [cell for cell in rates.cells() if cell.variant in wanted]
        Runner(rates, root, root / "runs" / "evidence" / "home_rates", jobs=1).run(cells, finished, failed)
        if failures:
            break
    return min(1, len(failures))


if __name__ == "__main__":
    sys.exit(main())
