# SPDX-License-Identifier: Apache-2.0
"""What a report page shows of a run of this task, from the files of its run alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moeapps.bounds import read_json
from moeapps.reporting.exhibits import Picture, Plot, Room, arrays_of, picture_of
from moeapps.reporting.figures import COLOURS, FAINT
from moeapps.reporting.knowledge import ExpertTable
from moeapps.reporting.plots import axes, words

METRICS = {
    "accuracy": "share of images answered right by the student after it has adapted to unlabelled images of the domain",
    "pearson": "correlation of the student's answers with the measured values, after it has adapted to such images",
}
"""What the scores are that a page compares runs by."""
MOST_IMAGES = 24


def expert_tables(folder: Path, layers: dict[str, int]) -> list[ExpertTable]:
    """How much the aggregator attends to each expert in each domain, of metrics/adaptation.json.

    Every expert works on every image; what differs is how much of it the aggregator takes.
    """
    file = folder / "metrics" / "adaptation.json"
    if not file.is_file() or not layers:
        return []
    raw = read_json(file)
    shares = {name: told["attention"] for name, told in raw["domains"].items() if told.get("attention")}
    if not shares:
        return []
    experts = [name or str(number) for number, name in enumerate(raw["experts"])]
    layer, work, story = next(iter(layers)), list(shares.values()), adaptation_story(raw["domains"])
    return [ExpertTable(layer, "domain", list(shares), work, experts, rows=math.inf, always=True, story=story)]


def adaptation_story(domains: dict[str, dict[str, Any]]) -> str:
    """Say how evenly the aggregator attends to experts, and what that does to a student in unseen domains.

    Args:
        domains: of metrics/adaptation.json.

    Returns:
        A clause; what a file does not hold is left out of it.
    """
    shares = [share for told in domains.values() for share in told.get("attention") or ()]
    pairs = [pair for told in domains.values() if told["role"] == "unseen" and (pair := _pair(told)) is not None]
    found = []
    if shares:
        found.append(f"each gets {100 * min(shares):.0f} % to {100 * max(shares):.0f} % of the attention in any domain")
    if pairs:
        before, after = (100 * sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        found.append(f"adapting to what they say takes accuracy in unseen domains from {before:.0f} % to {after:.0f} %")
    return "; ".join(found)


def gallery(folder: Path) -> list[Room]:
    """Images whose answer adaptation changed, and what it did to each domain."""
    rooms = []
    file = folder / "metrics" / "adaptation.json"
    if file.is_file():
        domains = read_json(file)["domains"]
        text = "Open circles: the student before it saw a few unlabelled images of the domain. Filled ones: after."
        rooms.append(Room("What adaptation did", text, _gains(domains)))
    kept = folder / "gallery" / "changed.npz"
    if kept.is_file():
        image, *columns = arrays_of(kept, "image", "kind", "domain", "label", "before", "after")
        for wanted, title, text in (
            ("mended", "Mended images", "Wrong before adaptation to their domain, right after it."),
            ("spoilt", "Spoilt images", "Right before adaptation to their domain, wrong after it."),
        ):
            rows = [k for k, kind in enumerate(columns[0].tolist()) if kind == wanted][:MOST_IMAGES]
            shown = [_image(image[k], *(str(column[k]) for column in columns[1:])) for k in rows]
            rooms.append(Room(title, text, shown, small=True))
    return rooms


def _image(pixels: Any, domain: str, label: str, before: str, after: str) -> Picture:
    text = f"A picture of {label} in {domain}: taken for {before} before adaptation, for {after} after it"
    return Picture(domain, picture_of(pixels), text, f"a {label}: {before}, then {after}", pixelated=True)


def _gains(domains: dict[str, dict[str, Any]]) -> list[Plot]:
    """Accuracy of each domain before and after."""
    known = {name: told for name, told in domains.items() if _pair(told) is not None}
    if not known:
        return []
    rows = [f"{words(name)} ({words(told['role'])})" for name, told in known.items()]
    pairs = [_pair(told) for told in known.values()]
    lines: dict[str, list[Any]] = {"x": [], "y": []}
    for row, pair in zip(rows, pairs, strict=True):
        lines["x"] += [*(pair or ()), None]
        lines["y"] += [row, row, None]
    dots = {"type": "scatter", "mode": "markers", "y": rows}
    traces: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", **lines, "line": {"color": FAINT, "width": 3}, "showlegend": False},
        {**dots, "x": [p[0] for p in pairs if p], "name": "before", "marker": _dot("circle-open")},
        {**dots, "x": [p[1] for p in pairs if p], "name": "after", "marker": _dot("circle")},
    ]
    layout = axes("accuracy", "", margin={"l": 150})
    layout["yaxis"] |= {"autorange": "reversed"}
    text = "Accuracy of every domain before and after adaptation"
    return [Plot("Accuracy before and after", traces, layout, text, height=60 + 26 * len(rows))]


def _dot(symbol: str) -> dict[str, Any]:
    return {"symbol": symbol, "size": 10, "color": COLOURS[0], "line": {"width": 2}}


def _pair(told: dict[str, Any]) -> tuple[float, float] | None:
    before, after = told.get("accuracy_before"), told.get("accuracy")
    return None if before is None or after is None else (float(before), float(after))
