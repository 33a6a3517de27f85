# SPDX-License-Identifier: Apache-2.0
"""What a report page shows of a run of this task, from the files of its run alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moeapps.bounds import read_json
from moeapps.reporting.exhibits import Picture, Plot, Room, arrays_of, picture_of
from moeapps.reporting.knowledge import ExpertTable
from moeapps.reporting.plots import heat

METRICS = {
    "loss": "squared error of what the denoiser predicts of noisy images, the mean over all amounts of noise",
}
"""What the scores are that a page compares runs by."""
MOST_CLASSES = 60
MOST_GRIDS = 4


def expert_tables(folder: Path, layers: dict[str, int]) -> list[ExpertTable]:
    """Work by domain, with a name for the expert of samples without a class, where there is one: the last.

    Evaluation routes every image twice, once without its class: that expert has half of all work.
    """
    factors, routing = folder / "metrics" / "experts.json", folder / "metrics" / "routing_test.json"
    work = read_json(factors).get("work", {}) if factors.is_file() else {}
    routed = {len(tables["class"][0][0]) for tables in work.values() if "class" in tables}
    raw = read_json(routing)
    found = []
    for layer, number in layers.items():
        if routed == {number - 1}:
            names = [*map(str, range(number - 1)), "of no class"]
            own = raw["layers"][layer]
            table = ExpertTable(layer, "domain", raw["domains"], own["work"], names, told=own["mi_domain"])
            found.append(table)
    return found


def gallery(folder: Path) -> list[Room]:
    """Images drawn for every class, how they came to be, and where in an image each expert works."""
    rooms = []
    judged = folder / "metrics" / "generation.json"
    told: dict[str, Any] = read_json(judged) if judged.is_file() else {}
    kept = folder / "gallery" / "samples.npz"
    if kept.is_file():
        share = told.get("generation", {}).get("class_accuracy")
        text = "Four images of each class, drawn from noise; nothing was picked."
        text += "" if share is None else f" A judge trained on real images knows the class of {share:.0%} of all drawn."
        rooms.append(Room("Drawn images", text, _classes(kept, told.get("classes", {})), small=True))
    grids = sorted((folder / "figures").glob("samples-epoch_*.png"), key=lambda file: int(file.stem.split("_")[-1]))
    if grids:
        chosen = [grids[k] for k in sorted({round(k) for k in np.linspace(0, len(grids) - 1, MOST_GRIDS)})]
        shown = [
            Picture(
                f"Epoch {file.stem.split('_')[-1]}",
                picture_of(file, 700),
                "Drawn images of each class, below its name",
            )
            for file in chosen
        ]
        rooms.append(Room("While it trained", "The same noise and classes, later and later in training.", shown))
    places = _places(folder / "metrics" / "experts.json")
    if places:
        text = "For each place of an image, the share of its tokens that each expert takes; bright is much."
        rooms.append(Room("Where in an image experts work", text, places))
    return rooms


def _classes(file: Path, accuracy: dict[str, float | None]) -> list[Picture]:
    image, name = arrays_of(file, "image", "name")
    found = []
    for word in list(dict.fromkeys(name.tolist()))[:MOST_CLASSES]:
        own = image[name == word][:4]
        gap = np.full((own.shape[1], 1, 3), 255, np.uint8)
        strip = np.concatenate([part for one in own for part in (one, gap)][:-1], axis=1)
        share = accuracy.get(str(word))
        caption = "" if share is None else f"{share:.0%} recognised"
        found.append(Picture(str(word), picture_of(strip), f"Drawn images of {word}", caption, pixelated=True))
    return found


def _places(file: Path) -> list[Plot]:
    """One map per expert, of every layer that has such a table."""
    raw: dict[str, Any] = read_json(file) if file.is_file() else {}
    found = []
    for layer, tables in raw.get("work", {}).items():
        if "place" not in tables:
            continue
        work_PE = np.asarray(tables["place"], dtype=np.float64).sum(0)
        side = round(len(work_PE) ** 0.5)
        if side * side != len(work_PE):
            continue
        share_PE = work_PE / np.maximum(work_PE.sum(1, keepdims=True), 1e-300)
        maps = share_PE.T.reshape(-1, side, side)
        wide = np.full((side, len(maps) * (side + 1) - 1), np.nan)
        for e, one in enumerate(maps):
            wide[:, e * (side + 1) : e * (side + 1) + side] = one
        trace = heat(wide.tolist(), [], [], hoverongaps=False)
        trace = {key: value for key, value in trace.items() if key not in ("x", "y")}
        ticks = [e * (side + 1) + (side - 1) / 2 for e in range(len(maps))]
        layout: dict[str, Any] = {
            "xaxis": {"tickvals": ticks, "ticktext": [f"expert {e}" for e in range(len(maps))], "showgrid": False},
            "yaxis": {"autorange": "reversed", "showticklabels": False, "scaleanchor": "x", "showgrid": False},
        }
        text = f"Maps of an image, one for each of {len(maps)} experts of {layer}: share of tokens at each place"
        found.append(Plot(f"Layer {layer}", [trace], layout, text, height=240))
    return found
