# SPDX-License-Identifier: Apache-2.0
"""What the README says of ten minutes on digits, clothes and animals is what was measured, and meets its gates."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest

from benchmarks import promoe_tri28 as tri28
from benchmarks.promoe_table import TABLE
from benchmarks.system_share import build

REPORT: dict[str, Any] = json.loads(tri28.RESULTS.read_text(encoding="utf-8"))
TINY = ["--config", "configs/debug/tiny.yaml", "--config", "configs/debug/promoe.yaml"]


def test_the_recipe_meets_its_gates_and_a_worse_one_would_not() -> None:
    assert tri28.complaints(REPORT) == []
    for key, direction, bound in tri28.GATES.values():
        worse = {**REPORT["variants"]["recipe"], key: bound + (1 if direction == "at most" else -1) * 1e-3}
        assert len(tri28.complaints({"variants": {"recipe": worse}})) == 1
    assert tri28.complaints({"variants": {}}) == ["recipe is not run"]


def test_the_readme_has_the_table_of_the_results() -> None:
    assert tri28.table(REPORT) in tri28.README.read_text(encoding="utf-8")


def test_what_was_run_is_what_the_file_says_now() -> None:
    assert set(REPORT["variants"]) <= set(tri28.VARIANTS)
    for name, row in REPORT["variants"].items():
        assert (row["text"], tuple(row["flags"])) == tri28.VARIANTS[name]
        assert row["how"] == {"num_images": 600, "cfg": 4.0, "steps": 25, "solver": "euler", "seed": 0}
    assert [(r["solver"], r["steps"], r["cfg"]) for r in REPORT["samplers"]] in ([], list(tri28.SAMPLERS))


@pytest.mark.medium
@pytest.mark.parametrize("name", tri28.VARIANTS)
def test_the_flags_of_a_variant_are_understood(name: str) -> None:
    task, _ = build("promoe", [*tri28.VARIANTS[name][1], *TINY])
    assert task.net is not None


def test_what_the_readme_says_made_it_work_is_what_was_measured() -> None:
    classes = {name: row["generation/class_accuracy"] for name, row in REPORT["variants"].items()}
    drawn = {(r["solver"], r["steps"], r["cfg"]): r for r in REPORT["samplers"]}
    sampler = {key: row["generation/class_accuracy"] for key, row in drawn.items()}
    distance = {key: row["generation/frechet"] for key, row in drawn.items()}
    told = " ".join(tri28.README.read_text(encoding="utf-8").split())
    cells = TABLE.cells()
    seen = {
        name: statistics.fmean(r.value("seen/loss") for c, r in cells.items() if c.variant == name)
        for name in ("promoe_long", "promoe_narrow")
    }
    for sentence in (
        f"half the width leaves a loss of {seen['promoe_narrow']:.2f} in place of {seen['promoe_long']:.2f}",
        f"at 1.5e-3 only {classes['rate_1.5e-3']:.2f} of the classes are right instead of {classes['recipe']:.2f}",
        f"without warm-up and decay {classes['constant']:.2f}",
        f"times shifted towards noise give {classes['shift_2']:.2f}",
        f"10 Euler steps give {sampler['euler', 10, 4.0]:.2f}, 50 give {sampler['euler', 50, 4.0]:.2f}, Heun's 13 "
        f"{sampler['heun', 13, 4.0]:.2f}",
        f"with 2, samples are nearest to real images (Fréchet distance {distance['euler', 25, 2.0]:.0f}; "
        f"{distance['euler', 25, 4.0]:.0f} at 4) and {sampler['euler', 25, 2.0]:.2f} of their class",
    ):
        assert sentence in told, sentence
