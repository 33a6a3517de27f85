# SPDX-License-Identifier: Apache-2.0
"""Contrast over its weight, temperature and mask rate: ``python -m benchmarks.aw_moe_contrast``.

On both logs AW-MoE trains without contrast, with masking alone, and with every setting of the grid below, with seeds
that the evidence does not use. A setting is judged on the VALIDATION domain by list-AUC on histories cut to three
(the long tail that the loss is for), beside list-AUC on whole histories. All settings are written to
benchmarks/results/aw_moe_contrast.json; interrupted, the same command goes on.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.evidence.__main__ import ROOT
from benchmarks.grids import load_grid
from moeapps.evidence.cells import CellResult, describe_machine
from moeapps.evidence.evidence import to_json
from moeapps.evidence.grid import Grid, Variant
from moeapps.evidence.runner import Failure, Runner
from moeapps.files import write_text

EVIDENCE = load_grid("aw_moe")
RESULTS = Path(__file__).parent / "results" / "aw_moe_contrast.json"
SEEDS = ((101, 101), (102, 102))
PAIRS = {"": 1, "ml_": 2}  # of the seeds, on each log: the generated one has less noise
WEIGHTS, TEMPERATURES, MASKS = (0.005, 0.05), (0.1, 0.5), (0.1, 0.3, 0.5)
AUC, CUT, GAP = "list_auc", "list_auc_truncated", "truncation_gap"
KEPT = (AUC, CUT, GAP, "gate_same", "gate_between")

Runs = Mapping[str, Mapping[str, float]]


def settings() -> dict[str, Variant]:
    """Name -> variant, on both logs."""
    found = {}
    for log, pairs in PAIRS.items():
        ours, masking = (EVIDENCE.variants[f"{log}{name}"] for name in ("aw_moe", "mask_augmentation"))
        contrast = replace(EVIDENCE.variants[f"{log}contrast"], flags=ours.flags)  # the rate, and nothing else
        found[f"{log}without"] = replace(ours, pairs=pairs)
        found[f"{log}masking"] = replace(masking, pairs=pairs)
        for weight, temperature, mask in itertools.product(WEIGHTS, TEMPERATURES, MASKS):
            options = {"contrast_weight": weight, "temperature": temperature, "mask_probability": mask}
            flags = tuple(f"--model.init_args.{name}={value:g}" for name, value in options.items())
            name = f"{log}w{weight:g}_t{temperature:g}_p{mask:g}"
            found[name] = replace(contrast, flags=(*contrast.flags, *flags), pairs=pairs)
    return found


def means(runs: Runs) -> dict[str, dict[str, float]]:
    """Means over the seeds of each setting that has all of them."""
    found = {}
    for name, setting in settings().items():
        mine = [runs[key] for key in (f"{name}-s{seed}" for seed, _ in SEEDS) if key in runs]
        if len(mine) == setting.pairs:
            found[name] = {metric: statistics.fmean(run[metric] for run in mine) for metric in KEPT}
    return found


def best(runs: Runs) -> dict[str, str]:
    """The setting with contrast whose cut histories rank best, on each log that is complete."""
    found = means(runs)
    chosen = {}
    for log, prefix in (("taste_types", "w"), ("ml100k", "ml_w")):
        mine = [name for name in settings() if name.startswith(prefix)]
        if all(name in found for name in mine):
            chosen[log] = max(mine, key=lambda name: found[name][CUT])
    return chosen


def main(root: Path = ROOT, path: Path = RESULTS, *, jobs: int = 1, make: type[Runner] = Runner) -> int:
    """Run what is missing, write, print."""
    runs: dict[str, dict[str, float]] = json.loads(path.read_text())["runs"] if path.exists() else {}
    console, failures = Console(highlight=False), list[Failure]()
    grid = Grid(
        "aw_moe", "configs/aw_moe.yaml", settings(), claims=(), seeds=SEEDS, data_seed_flags=EVIDENCE.data_seed_flags
    )

    def finished(result: CellResult) -> None:
        name = f"{result.variant}-s{result.seed}"
        runs[name] = {metric: result.metrics[f"validation/{metric}"] for metric in KEPT} | {"cpu_s": result.cpu_s}
        about: dict[str, Any] = {
            **{"command": "python -m benchmarks.aw_moe_contrast", "machine": describe_machine()},
            **{"seeds": [seed for seed, _ in SEEDS], "judged_by": f"validation/{CUT}", "best": best(runs)},
        }
        write_text(path, to_json({**about, "means": means(runs), "runs": dict(sorted(runs.items()))}))
        console.print(f"{name}: {runs[name]}")

    def failed(failure: Failure) -> None:
        failures.append(failure)
        console.print(f"{failure.cell.stem}: FAILED, {failure.reason}\n{failure.tail}", markup=False)

    cells = [cell for cell in grid.cells() if f"{cell.variant}-s{cell.seed}" not in runs]
    make(grid, root, root / "runs" / "evidence" / "aw_moe_contrast", jobs=jobs).run(cells, finished, failed)
    return min(1, len(failures))


if __name__ == "__main__":
    sys.exit(main())
