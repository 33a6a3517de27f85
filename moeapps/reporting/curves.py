# SPDX-License-Identifier: Apache-2.0
"""Curves of a run's training, from its metrics.csv."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

from moeapps.bounds import require_file
from moeapps.reporting.plots import Series

LARGEST = 400_000_000
MOST = 300
"""Points of a curve: more are not to be seen; every k-th and the last are kept."""
ROLES = ("seen", "validation", "unseen")


@dataclass(frozen=True)
class Curves:
    """What was logged, name -> steps and values.

    Args:
        loss: training loss, and its parts.
        scores: role of domains -> the main metric at every validation.
        routing: number (``load_cv``, ``entropy``, ``dead``, ``mi_domain``) -> layer -> values at every validation.
    """

    loss: dict[str, Series] = field(default_factory=dict)
    scores: dict[str, Series] = field(default_factory=dict)
    routing: dict[str, dict[str, Series]] = field(default_factory=dict)


def read_curves(folder: Path, metric: str) -> Curves:
    """Read metrics.csv of a run folder; nothing where there is none.

    Args:
        folder: of the run.
        metric: the one whose course at validations is shown.

    Raises:
        ValueError: the file is too large or no table of numbers.
    """
    file = folder / "metrics.csv"
    if not file.is_file():
        return Curves()
    if require_file(file) > LARGEST:
        raise ValueError(f"{file} has more than {LARGEST:,} bytes; it is no file of a run")
    found = _columns(file, metric)
    curves = Curves()
    for name in sorted(found, key=lambda name: (name != "train/loss", name)):
        series, parts = _thinned(found[name]), name.split("/")
        if parts[0] == "train":
            curves.loss[name.removeprefix("train/")] = series
        elif parts[0] == "val":
            curves.scores[parts[1]] = series
        else:
            curves.routing.setdefault(parts[-1], {})["/".join(parts[1:-1])] = series
    return curves


def _wanted(name: str, metric: str) -> bool:
    if name.startswith("train/"):
        return name.startswith("train/loss")
    if name.startswith("val/"):
        return name in (f"val/{role}/{metric}" for role in ROLES)
    return name.startswith("moe/") and name.rpartition("/")[2] in ("load_cv", "entropy", "dead", "mi_domain")


def _columns(file: Path, metric: str) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = csv.reader(stream)
            head = next(rows, [])
            wanted = {place: name for place, name in enumerate(head) if _wanted(name, metric)}
            step = head.index("step") if wanted else 0
            for row in rows:
                for place, name in wanted.items():
                    if place < len(row) and row[place]:
                        value = float(row[place])
                        if math.isfinite(value):
                            found.setdefault(name, []).append((float(row[step]), value))
    except (ValueError, csv.Error, IndexError) as error:
        raise ValueError(f"{file} is not a table of numbers ({error}); its curves are left out") from error
    return found


def _thinned(points: list[tuple[float, float]]) -> Series:
    every = max(1, -(-len(points) // MOST))
    kept = points[::every]
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return [x for x, _ in kept], [y for _, y in kept]
