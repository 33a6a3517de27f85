# SPDX-License-Identifier: Apache-2.0
"""A search of learning rates: the mean over its seeds decides, up or down, and it goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.rates import RateSearch
from moeapps.evidence.cells import CellResult
from moeapps.evidence.grid import Cell, Variant
from tests.evaluation.evidence_common import result

# Bits of a network by rate and seed: 0.2 wins with the first seed alone, 0.1 by the mean over both.
BITS = {(0.1, 7): 3.0, (0.1, 8): 1.0, (0.2, 7): 2.5, (0.2, 8): 2.5, (0.4, 7): 9.0, (0.4, 8): 9.0}
RAN: list[tuple[str, int]] = []


class Table:
    """A runner that looks results up."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def run(self, cells: list[Cell], on_result: Callable[[CellResult], None], _: Any) -> None:
        for cell in cells:
            RAN.append((cell.variant, cell.seed))
            value = BITS[float(cell.variant.removeprefix("net-")), cell.seed]
            on_result(replace(result(cell.variant, cell.seed, 0.0), metrics={"validation/bits": value}))


def search(path: Path, **options: Any) -> RateSearch:
    kept, rest = ("validation/bits",), {"direction": "lower", **options}
    return RateSearch("toy", "x", {"net": Variant()}, kept[0], (0.1, 0.2), (0.4,), kept, 7, (), path, **rest)


def best(tmp_path: Path, **options: Any) -> dict[str, float]:
    RAN.clear()
    found = search(tmp_path / "rates.json", **options)
    assert found.run(tmp_path, make=Table) == 0  # type: ignore[arg-type]
    written: dict[str, Any] = json.loads(found.path.read_text())
    assert written["best"] == found.best(written["runs"])
    return written["best"]  # type: ignore[no-any-return]


def test_one_seed_and_the_mean_over_two_may_choose_differently(tmp_path: Path) -> None:
    assert best(tmp_path) == {"net": 0.2}
    assert RAN == [("net-0.1", 7), ("net-0.2", 7), ("net-0.4", 7)]  # the highest was the best: one higher was tried
    assert best(tmp_path, more_seeds=(8,)) == {"net": 0.1}
    assert RAN == [("net-0.1", 8), ("net-0.2", 8)]  # what was there already is kept


def test_a_metric_that_is_better_when_higher(tmp_path: Path) -> None:
    assert best(tmp_path, direction="higher", more_seeds=(8,)) == {"net": 0.4}
