# SPDX-License-Identifier: Apache-2.0
"""What a report page shows of a run of this task, from the files of its run alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeapps.bounds import read_json
from moeapps.reporting.exhibits import Cloud, Colouring, Room, Table, arrays_of
from moeapps.reporting.figures import FAINT, colour

METRICS = {
    "miou": "mean over the classes present of hits / (hits + misses + false alarms), at the raw points",
}
"""What the scores are that a page compares runs by."""
MOST_DOMAINS = 9
MOST_CLASSES = 12


def gallery(folder: Path) -> list[Room]:
    """Scans to turn, and scores by class."""
    rooms = []
    files = sorted((folder / "gallery").glob("*.npz"))[:MOST_DOMAINS]
    if files:
        text = (
            "One scan of each domain. Colour its points by what they are, by what the model says, and by the expert "
            "that worked on them in one MoE layer; drag to turn. The eight commonest classes have colours of their own."
        )
        rooms.append(Room("Scans", text, [_scan(file) for file in files]))
    tables = folder / "metrics" / "per_class.json"
    if tables.is_file():
        raw = read_json(tables)["domains"]
        text = "Which classes are told apart, and how many points of each the test has; no score without any."
        rooms.append(Room("Classes", text, [_classes(name, table) for name, table in raw.items()]))
    return rooms


def _scan(file: Path) -> Cloud:
    names = ("position", "truth", "prediction", "expert", "name", "title", "note")
    position, truth, prediction, expert, classes, title, note = arrays_of(file, *names)
    words = [str(name) for name in classes]
    palette = _palette(truth, len(words))
    right = float(np.mean(truth == prediction)) if len(truth) else 0.0
    colourings = [Colouring("truth", truth, words, palette), Colouring("prediction", prediction, words, palette)]
    if (expert >= 0).any():
        experts = range(int(expert.max()) + 1)
        own = [colour(e) for e in experts]
        colourings.append(Colouring("expert", expert, [f"expert {e}" for e in experts], own))
    return Cloud(str(title), position, colourings, f"{note}; {right:.0%} of these {len(truth):,} points are right.")


def _palette(truth: npt.NDArray[np.integer], num_classes: int) -> list[str]:
    """Colours of the classes with the most points, grey for the others: more colours than eight are not told apart."""
    count = np.bincount(truth[truth >= 0], minlength=num_classes)
    rank = np.argsort(np.argsort(-count, kind="stable"))
    return [colour(int(place)) if place < 8 else FAINT for place in rank]


def _classes(name: str, table: dict[str, Any]) -> Table:
    rows = sorted(table["classes"], key=lambda row: -row["support"])[:MOST_CLASSES]
    cells = [[str(row["class"]), row["iou"], row["accuracy"], str(row["support"])] for row in rows]
    return Table(f"{name} ({table['role']})", ("class", "IoU", "accuracy", "points"), cells)
