# SPDX-License-Identifier: Apache-2.0
"""A README's table of variants, written from the committed cells of a system and held to them by a test."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeapps.evidence.cells import CellResult, read_cells
from moeapps.evidence.grid import Cell
from moeapps.files import write_text

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- evidence:begin -->\n).*?(<!-- evidence:end -->)", re.DOTALL)


@dataclass(frozen=True)
class Column:
    """A column: its title, the metric it shows, and the format of a number."""

    title: str
    metric: str
    format: str


@dataclass(frozen=True)
class EvidenceTable:
    """Rows are variants, columns are metrics; a number is an average over the pairs of seeds that all rows have.

    Args:
        system: Name of the grid.
        readme: File, relative to the repository, whose block between ``<!-- evidence:begin -->`` and its end it is.
        rows: Variants of the grid and their names in the table.
        columns: What is shown of each.
        average: How the values of the pairs become one number.
    """

    system: str
    readme: str
    rows: Mapping[str, str]
    columns: Sequence[Column]
    average: Callable[[Sequence[float]], float]

    @property
    def path(self) -> Path:
        """The README."""
        return ROOT / self.readme

    def cells(self) -> dict[Cell, CellResult]:
        """The committed cells of the grid."""
        return read_cells(ROOT / "benchmarks" / "results" / self.system / "cells", self.system)

    def averages(self, cells: Mapping[Cell, CellResult], metric: str) -> dict[str, float]:
        """The average of a metric over the pairs of seeds that all rows have, by variant.

        Raises:
            ValueError: There is no such pair.
        """
        pairs = {name: {(c.seed, c.data_seed) for c in cells if c.variant == name} for name in self.rows}
        common = set.intersection(*pairs.values())
        if not common:
            raise ValueError(
                f"no pair of seeds has all of {list(self.rows)}; run python -m benchmarks.evidence {self.system} first"
            )
        values: dict[str, list[float]] = {name: [] for name in self.rows}
        for cell, result in cells.items():
            if cell.variant in self.rows and (cell.seed, cell.data_seed) in common:
                values[cell.variant].append(result.value(metric))
        return {name: self.average(found) for name, found in values.items()}

    def markdown(self, cells: Mapping[Cell, CellResult]) -> str:
        """The lines between the two marks."""
        shown = [(column, self.averages(cells, column.metric)) for column in self.columns]
        lines = [
            "| | " + " | ".join(column.title for column in self.columns) + " |",
            "|---" * (len(self.columns) + 1) + "|",
        ]
        for name, title in self.rows.items():
            lines.append(f"| {title} | " + " | ".join(f"{v[name]:{c.format}}" for c, v in shown) + " |")
        return "\n".join(lines) + "\n"

    def written(self) -> str:
        """What the README has between the two marks."""
        found = BLOCK.search(self.path.read_text(encoding="utf-8"))
        if found is None:
            raise ValueError(f"{self.readme} has no block between <!-- evidence:begin --> and <!-- evidence:end -->")
        return found[0].split("\n", 1)[1].rsplit("\n", 1)[0] + "\n"

    def write(self) -> None:
        """Rewrite the block."""
        block = self.markdown(self.cells())
        text = self.path.read_text(encoding="utf-8")
        write_text(self.path, BLOCK.sub(lambda found: found[1] + block + found[2], text))
