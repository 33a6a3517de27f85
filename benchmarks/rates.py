# SPDX-License-Identifier: Apache-2.0
"""The learning rate of every network of an evidence grid, each chosen by itself before anything is compared.

Every network trains once per rate (and seed) with the very configs of the evidence, but with seeds of its own; where
the highest rate is the best one, further rates are tried too. What counts is one metric on the VALIDATION domain;
nothing else is read. All runs are written to one file; interrupted, the same command goes on. The best rates are then
written into the configs by hand, and a test holds them to the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from benchmarks.evidence.__main__ import ROOT
from moeapps.evaluation.statistics import Direction
from moeapps.evidence.cells import CellResult, describe_machine
from moeapps.evidence.evidence import to_json
from moeapps.evidence.grid import Grid, Variant
from moeapps.evidence.runner import Failure, Runner
from moeapps.files import write_text

Runs = Mapping[str, Mapping[str, float]]
RATE = "--model.init_args.optimizer.lr"


@dataclass(frozen=True)
class RateSearch:
    """A search.

    Args:
        system: name of the system.
        command: the words that run it, for the file.
        models: name -> variant of the evidence, without a rate.
        metric: what a rate is judged by.
        rates: what every network is trained with.
        further: higher rates, in order, tried while the highest so far is the best.
        kept: metrics that are written.
        seed: seed of model and data, used nowhere else.
        data_seed_flags: options that receive the data seed.
        path: the results.
        direction: which way the metric is better.
        more_seeds: further seeds, where one would choose by chance: a rate is then judged by the mean over all.
    """

    system: str
    command: str
    models: Mapping[str, Variant]
    metric: str
    rates: tuple[float, ...]
    further: tuple[float, ...]
    kept: tuple[str, ...]
    seed: int
    data_seed_flags: tuple[str, ...]
    path: Path
    direction: Direction = "higher"
    more_seeds: tuple[int, ...] = ()

    @staticmethod
    def name(model: str, rate: float) -> str:
        """Name of a rate's first run."""
        return f"{model}-{rate:g}"

    def names(self, model: str, rate: float) -> list[str]:
        """Names of a rate's runs, one per seed."""
        return [self.run_name(self.name(model, rate), seed) for seed in (self.seed, *self.more_seeds)]

    def run_name(self, name: str, seed: int) -> str:
        """Name of a run of one seed."""
        return name if seed == self.seed else f"{name}-s{seed}"

    def done(self, runs: Runs, model: str, rate: float) -> bool:
        """Whether all runs of a rate are there."""
        return all(name in runs for name in self.names(model, rate))

    def grid(self) -> Grid:
        """One variant per network and rate."""
        variants = {
            self.name(model, rate): Variant(
                variant.overlays,
                (*variant.flags, f"{RATE}={rate:g}"),
                pairs=1 + len(self.more_seeds),
                data_seed_flags=variant.data_seed_flags,
                stages=variant.stages,
            )
            for model, variant in self.models.items()
            for rate in (*self.rates, *self.further)
        }
        seeds, flags = tuple((seed, seed) for seed in (self.seed, *self.more_seeds)), self.data_seed_flags
        return Grid(self.system, f"configs/{self.system}.yaml", variants, claims=(), seeds=seeds, data_seed_flags=flags)

    def score(self, runs: Runs, model: str, rate: float) -> float:
        """What a rate is judged by; more is better."""
        value = mean(runs[name][self.metric] for name in self.names(model, rate))
        return -value if self.direction == "lower" else value

    def missing(self, runs: Runs, model: str) -> list[float]:
        """Rates that are still to be tried: the given ones, then higher ones while the highest is the best."""
        if waiting := [rate for rate in self.rates if not self.done(runs, model, rate)]:
            return waiting
        top = max(self.rates)
        for rate in self.further:
            lower = (r for r in (*self.rates, *self.further) if r < top)
            if self.score(runs, model, top) < max(self.score(runs, model, r) for r in lower):
                return []
            if not self.done(runs, model, rate):
                return [rate]
            top = rate
        return []

    def best(self, runs: Runs) -> dict[str, float]:
        """The rate with the highest score of every network for which no rate is left to try."""
        found = {}
        for model in self.models:
            tried = [rate for rate in (*self.rates, *self.further) if self.done(runs, model, rate)]
            if not self.missing(runs, model):
                found[model] = max(tried, key=lambda rate: self.score(runs, model, rate))
        return found

    def run(self, root: Path = ROOT, *, jobs: int = 1, make: type[Runner] = Runner) -> int:
        """Run what is missing, write, print; give 1 if a run failed."""
        runs: dict[str, dict[str, float]] = json.loads(self.path.read_text())["runs"] if self.path.exists() else {}
        console, failures, grid = Console(highlight=False), list[Failure](), self.grid()

        def finished(result: CellResult) -> None:
            name = self.run_name(result.variant, result.seed)
            runs[name] = {**{metric: result.metrics[metric] for metric in self.kept}, "cpu_s": result.cpu_s}
            about: dict[str, Any] = {
                **{"command": self.command, "machine": describe_machine(), "seed": self.seed},
                **({"more_seeds": list(self.more_seeds)} if self.more_seeds else {}),
                **{"rates": [*self.rates, *self.further], "metric": self.metric, "best": self.best(runs)},
            }
            write_text(self.path, to_json({**about, "runs": dict(sorted(runs.items()))}))
            console.print(f"{name}: {runs[name]}")

        def failed(failure: Failure) -> None:
            failures.append(failure)
            console.print(f"{failure.cell.stem}: FAILED, {failure.reason}\n{failure.tail}", markup=False)

        while wanted := {self.name(model, rate) for model in self.models for rate in self.missing(runs, model)}:
            cells = [
                cell
                for cell in grid.cells()
                if cell.variant in wanted and self.run_name(cell.variant, cell.seed) not in runs
            ]
            make(grid, root, root / "runs" / "evidence" / f"{self.system}_rates", jobs=jobs).run(
                cells, finished, failed
            )
            if failures:
                break
        return min(1, len(failures))
