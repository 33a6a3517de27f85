# SPDX-License-Identifier: Apache-2.0
"""A grid of three variants with two claims, finished cells made up on the spot, and a program that makes some."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from moeapps.evidence.cells import CellResult
from moeapps.evidence.evidence import Evidence, Place
from moeapps.evidence.grid import Cell, Claim, Grid, Variant

WIN = Claim("C1", "Experts help on unseen domains.", "unseen/miou", "higher", "moe", "dense")
TIE = Claim("C2", "Experts do not hurt.", "seen/miou", "higher", "same", "dense", "non-inferiority", 0.01)


def toy(variants: dict[str, Variant] | None = None, claims: tuple[Claim, ...] = (WIN, TIE), **changes: Any) -> Grid:
    default = {"moe": Variant(flags=("--gain", "0.1")), "dense": Variant(), "same": Variant()}
    return Grid("toy", "base.yaml", variants or default, claims, **{"show": ("unseen/miou",), **changes})


def result(variant: str, seed: int, value: float, **changes: Any) -> CellResult:
    """A finished cell made up on the spot."""
    plain = CellResult(
        system="toy", variant=variant, seed=seed, data_seed=seed, definition="d", config_hash="h", commit="c",
        params_total=1000, params_active=500, flops_per_token=2000.0,
        metrics={"unseen/miou": value, "seen/miou": value}, domains=["kitchen", "street"],
        cpu_s=60.0, machine="toy machine", train_flops=6_000_000,
    )  # fmt: skip
    return replace(plain, **changes)


def results(**values: list[float]) -> dict[Cell, CellResult]:
    found = [result(name, seed, value) for name, row in values.items() for seed, value in enumerate(row, start=1)]
    return {cell.cell: cell for cell in found}


# Scores 0.5 + 0.01*seed for every variant, plus --gain; --burn, --crash, --hang, --silent misbehave.
FAKE = """
import json, os, pathlib, sys, time
word = lambda name, other=None: sys.argv[sys.argv.index(name) + 1] if name in sys.argv else other
seed, gain = int(word("--seed_everything")), float(word("--gain", 0.0))
print("training", word("--name"), flush=True)
if "--crash" in sys.argv:
    sys.exit("out of luck")
while time.process_time() < float(word("--burn", 0.0)):
    pass
time.sleep(float(os.environ.get("PAUSE", 0.0)))
if "--hang" in sys.argv:
    pathlib.Path("hanging").touch()
    time.sleep(60)
drift = float(os.environ.get("DRIFT", 0.0))
rows = [
    {"domain": d, "role": r, "metric": "miou", "value": 0.5 + 0.01 * seed + gain + drift, "n": 4, "direction": "max"}
    for d, r in (("kitchen", "seen"), ("hall", "seen"), ("street", "unseen"))
]
header = {"config_hash": "abc", "commit": "f00", "seed": seed, "params_total": 1000, "params_active": 500,
          "flops_per_token": float(word("--flops", 2000.0)), "train_flops": 6000000, "versions": {"python": "3"},
          "machine": {"instruction_set": os.environ.get("KERNELS", "AVX2"), "threads": 1}}
folder = pathlib.Path(os.environ["MOEAPPS_RUNS"]) / word("--system") / word("--name") / "version_0" / "metrics"
folder.mkdir(parents=True)
if "--silent" not in sys.argv:
    assert os.environ["OMP_NUM_THREADS"] == "1"
    (folder / "test.json").write_text(json.dumps({"header": header, "rows": rows}))
"""


def fill(folder: Path) -> Path:
    """Write configs of the grid and the program in place of the training command."""
    (folder / "base.yaml").write_text("model: {depth: 2}\n")
    (folder / "wide.yaml").write_text("model: {width: 8}\n")
    (folder / "fake.py").write_text(FAKE)
    return folder


def evidence(repository: Path, grid: Grid) -> tuple[Evidence, Console]:
    console = Console(record=True, width=200, file=io.StringIO(), highlight=False)
    command = (sys.executable, str(repository / "fake.py"))
    return Evidence(grid, place(repository), command=command, console=console), console


def place(repository: Path) -> Place:
    return Place(repository, "toy", Path("benchmarks/results"), Path("docs/evidence.md"))
