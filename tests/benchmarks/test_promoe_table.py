# SPDX-License-Identifier: Apache-2.0
"""What the README says of ProMoE and its rivals is what the committed cells say."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.grids import load_grid
from benchmarks.promoe_table import TABLE

GRID = load_grid("promoe")
CELLS = TABLE.cells()
RESULTS: dict[str, Any] = json.loads(Path("benchmarks/results/promoe.json").read_text(encoding="utf-8"))
CLAIMS: dict[str, dict[str, Any]] = {claim["id"]: claim for claim in RESULTS["claims"]}


def gain(name: str, digits: int = 4) -> str:
    """The difference that a claim found, with its interval, as the README writes it."""
    return interval(CLAIMS[name], digits)


def interval(found: dict[str, Any], digits: int = 4) -> str:
    """A difference and its interval."""
    low, high = found["ci95"]
    return f"{found['diff_mean']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]".replace("-", "−")


def mean(variant: str, metric: str) -> float:
    """The mean of a metric over all pairs of seeds of a variant."""
    return statistics.fmean(result.value(metric) for cell, result in CELLS.items() if cell.variant == variant)


def sentences() -> tuple[str, ...]:
    """What the README says in numbers."""
    ten, twenty, thirty = (interval(level) for level in RESULTS["ladder"]["levels"])
    cost = {key: mean("promoe", f"seen/{key}") - mean("dense", f"seen/{key}") for key in ("conditional", "null")}
    told = TABLE.averages(CELLS, "seen/loss")
    return (
        f"the paired loss is {gain('C1a')} beside the dense twin",
        f"{cost['conditional']:+.4f} with a class, {cost['null']:+.4f} without".replace("-", "−"),
        f"Token choice does equally badly (ProMoE minus it {gain('C1c')})",
        f"beside chance it is {gain('C1e')}, which decides nothing",
        f"On the style never seen, without a label, it is {gain('C1f')} beside the dense twin",
        f"the loss is {gain('C1g')}, the Fréchet distance {gain('C1h', 1)}",
        f"{mean('promoe_long', 'generation/class_accuracy'):.2f} of the samples are of their class, "
        f"{mean('dense_long', 'generation/class_accuracy'):.2f} of the twin's",
        f"the loss is {gain('C1i')}: three pairs point the same way and decide nothing",
        f"contrastive loss: {gain('C2b')}; split: {gain('C2c')}",
        f"the least used one {mean('prototypes', 'experts/least'):.3f} of the mean work",
        f"cosine beside its sigmoid {gain('C3a')}, beside its softmax {gain('C3c')}",
        f"k-means {gain('C4a')}, token choice {gain('C4b')}",
        f"without a balance loss it is as good as with one, to 0.002 ({gain('C5b')})",
        f"domain {mean('promoe', 'experts/mi_domain'):.3f} ({mean('tc', 'experts/mi_domain'):.3f}), "
        f"class {mean('promoe', 'experts/mi_class'):.3f} ({mean('tc', 'experts/mi_class'):.3f}), "
        f"time {mean('promoe', 'experts/mi_time'):.3f} ({mean('tc', 'experts/mi_time'):.3f}), "
        f"place {mean('promoe', 'experts/mi_place'):.3f} ({mean('tc', 'experts/mi_place'):.3f})",
        f"{ten} with ten classes, {twenty} with twenty, {thirty} with thirty",
        f"when the domain is given, they tie with it ({told['domain']:.4f} against {told['dense']:.4f})",
    )


def test_the_table_of_the_readme_is_that_of_the_cells() -> None:
    assert TABLE.written() == TABLE.markdown(CELLS)
    assert set(TABLE.rows) <= set(GRID.variants)


def test_what_the_readme_concludes_is_what_was_found() -> None:
    told = " ".join(TABLE.path.read_text(encoding="utf-8").split())
    for sentence in sentences():
        assert sentence in told, sentence
    rates = re.search(r"0\.0015, 0\.003, 0\.005, 0\.008 and 0\.012 .*: ([\d., ]+) and ([\d., ]+)\. All", GRID.choice)
    assert rates is not None
    mixture, twin = ([float(value) for value in found.split(", ")] for found in rates.groups())
    assert min(mixture) == mixture[3]
    assert f"{min(twin):.3f} in place of {twin[3]:.3f}, seed 0" in told, "the page says whose rate all networks have"
    corrected = [claim["p_holm"] for claim in CLAIMS.values() if claim["p_holm"] is not None]
    assert min(CLAIMS["C1a"]["p_holm"], CLAIMS["C1i"]["p_holm"], *corrected) > 0.05, "neither is decided"
    verdicts = {name: claim["verdict"] for name, claim in CLAIMS.items()}
    assert [name for name, verdict in verdicts.items() if verdict == "supported"] == ["C5a", "C5b"]
    assert [n for n, verdict in verdicts.items() if verdict == "not supported"] == ["C1a", "C1b", "C1f", "C2a", "C6a"]
