# SPDX-License-Identifier: Apache-2.0
"""Every row of docs/official_code.md is computed anew, and its error is at most what the page says."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from official_common import ERRORS, furthest, part

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "official_code.md"
for module in sorted(HERE.glob("official_*.py")):
    importlib.import_module(module.stem)


def stated() -> dict[str, float]:
    """Part -> largest error, from the page's table."""
    rows = [line.strip("|").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    return {cells[0].strip(): float(cells[3]) for cells in rows if cells[0].strip() != "part"}


def test_every_row_of_the_page_is_computed_and_every_computation_has_a_row() -> None:
    assert set(stated()) == set(ERRORS)


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_error_is_at_most_what_the_page_says(name: str) -> None:
    error = ERRORS[name]()

    assert error <= stated()[name], f"{name}: measured {error:.1e}"


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_the_page_promises_equality_and_no_slack(name: str) -> None:
    """Rows in float64 differ by rounding alone; those in float32 are the four that the page names."""
    single = "contrastive" in name or name.startswith(("position table", "rectified flow"))

    assert stated()[name] <= (1e-5 if single else 1e-12)


def test_errors_see_outputs_and_gradients() -> None:
    x = torch.ones(3, requires_grad=True)

    assert furthest(x * 2, x * 2.5) == pytest.approx(0.2)
    assert furthest(x * 2, 2 * x.detach() + 0 * x, [x]) > 0.1
    assert furthest(x * 2, x + x, [x]) == 0
    with pytest.raises(AssertionError, match="MMoE"):
        part("MMoE")(lambda: 0.0)
