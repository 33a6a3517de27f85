# SPDX-License-Identifier: Apache-2.0
"""What a report page shows of a run of this task, from the files of its run alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeapps.bounds import read_json
from moeapps.reporting.exhibits import Plot, Room, arrays_of
from moeapps.reporting.figures import colour
from moeapps.reporting.knowledge import ExpertTable
from moeapps.reporting.plots import SYMBOLS, axes, words

METRICS = {
    "relative_mse_median": "squared error of a solved trajectory over the squared size of the true state, the "
    "mean over times; then the median over environments",
}
"""What the scores are that a page compares runs by."""
MOST_DOMAINS, MOST_STATES = 6, 3


def expert_tables(folder: Path, layers: dict[str, int]) -> list[ExpertTable]:
    """Trained environments by their hidden family, of metrics/partition.json; none without a gate."""
    file = folder / "metrics" / "partition.json"
    if not file.is_file() or not layers:
        return []
    raw = read_json(file)
    families = list(dict.fromkeys(raw["family"]))
    layer, num_experts = next(iter(layers.items()))
    work = [[0.0] * num_experts for _ in families]
    for family, expert in zip(raw["family"], raw["expert"], strict=True):
        if expert >= 0:
            work[families.index(family)][expert] += 1.0
    score = ("adjusted Rand index of experts and families", float(raw["ari"]))
    return [ExpertTable(layer, "hidden family", families, work, score=score)]


def gallery(folder: Path) -> list[Room]:
    """How the gate divides the environments, over training too, and reconstructed trajectories."""
    rooms = []
    file = folder / "metrics" / "partition.json"
    if file.is_file():
        raw = read_json(file)
        text = (
            "Training never sees which family an environment is of. Where experts and families agree, the dots of each "
            f"family have one colour; the adjusted Rand index of the two is {float(raw['ari']):.2f}, 1 at best."
        )
        rooms.append(Room("Families that the gate found", text, [*_contexts(raw), *_history(raw)]))
    files = sorted((folder / "gallery").glob("*.npz"))[:MOST_DOMAINS]
    if files:
        text = "Dots are the truth, lines what the model says from the first samples on; one colour for each state."
        plots = [plot for file in files for plot in _trajectories(file)]
        rooms.append(Room("Trajectories", text, plots))
    return rooms


def _contexts(raw: dict[str, Any]) -> list[Plot]:
    """Contexts in the plane of largest variance: colour is the expert, shape the hidden family."""
    context = np.asarray(raw["context"], dtype=np.float64)
    if context.ndim != 2 or not context.size:
        return []
    plane = _plane(context)
    traces = []
    families = list(dict.fromkeys(raw["family"]))
    family, expert = np.array([families.index(name) for name in raw["family"]]), np.array(raw["expert"])
    for f, e in sorted(set(zip(family.tolist(), expert.tolist(), strict=True))):
        chosen = np.flatnonzero((family == f) & (expert == e))
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": plane[chosen, 0].tolist(),
                "y": plane[chosen, 1].tolist(),
                "text": [words(raw["environments"][k]) for k in chosen],
                "name": f"{words(families[f])}: expert {e}",
                "marker": {"size": 11, "symbol": SYMBOLS[f % len(SYMBOLS)], "color": colour(max(e, 0))},
            }
        )
    layout = axes("first direction of the contexts", "second direction")
    text = "Contexts of the trained environments in a plane; the shape is the hidden family, the colour the expert"
    return [Plot("Map of the environments", traces, layout, text, "Shape: hidden family. Colour: expert.", 400)]


def _plane(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    centred = points - points.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    plane = np.zeros((len(points), 2))
    plane[:, : min(2, len(s))] = (u * s)[:, :2]
    return plane


def _history(raw: dict[str, Any]) -> list[Plot]:
    """The expert of every environment over training, environments ordered by family."""
    history = raw.get("history") or []
    if len(history) < 2:
        return []
    history = history[:: max(1, len(history) // 150)]
    order = sorted(range(len(raw["family"])), key=lambda k: raw["family"][k])
    experts = [[entry["expert"][k] for entry in history] for k in order]
    top = max(map(max, experts))
    scale = [[part / (top + 1), colour(e)] for e in range(top + 1) for part in (e, e + 1)]
    trace = {
        "type": "heatmap",
        "x": [entry["step"] for entry in history],
        "y": [f"{words(raw['family'][k])} {place}" for place, k in enumerate(order)],
        "z": experts,
        "colorscale": scale,
        "zmin": -0.5,
        "zmax": top + 0.5,
        "colorbar": {"title": {"text": "expert"}, "tickvals": list(range(top + 1))},
    }
    text = "The expert of every trained environment over training, environments of one family together"
    caption = "A band of one colour: all environments of a family share an expert."
    return [Plot("Experts over training", [trace], axes("training step", ""), text, caption, 400)]


def _trajectories(file: Path) -> list[Plot]:
    """One drawing of the few environments that the run kept of a domain."""
    names = ("truth", "prediction", "seconds", "name", "title", "given")
    truth, prediction, seconds, name, title, given = arrays_of(file, *names)
    traces: list[dict[str, Any]] = []
    shown_of = min(len(truth), 2)
    layout: dict[str, Any] = {"grid": {"rows": 1, "columns": shown_of, "pattern": "independent"}, "annotations": []}
    layout |= {"legend": {"y": 1.12}, "margin": {"t": 60}}
    for e in range(shown_of):
        which = "" if e == 0 else str(e + 1)
        layout |= {f"xaxis{which}": {"title": {"text": "seconds"}}, f"yaxis{which}": {}}
        layout["annotations"].append(_heading(str(name[e]), which))
        for d in range(min(truth.shape[2], MOST_STATES)):
            common = {"type": "scatter", "xaxis": f"x{which}", "yaxis": f"y{which}"}
            shown = e == 0
            said = prediction[e, int(given) - 1 :, d]
            traces.append(
                {
                    **common,
                    **{"mode": "markers", "x": seconds[e].tolist(), "y": _values(truth[e, :, d])},
                    **{"marker": {"size": 5, "color": colour(d), "opacity": 0.6}, "showlegend": shown},
                    "name": f"state {d}, truth",
                }
            )
            traces.append(
                {
                    **common,
                    **{"mode": "lines", "x": seconds[e, int(given) - 1 :].tolist(), "y": _values(said)},
                    **{"line": {"color": colour(d), "width": 2}, "showlegend": shown, "name": f"state {d}, model"},
                }
            )
    text = f"Truth and prediction of {shown_of} environments of {title}"
    return [Plot(str(title), traces, layout, text, height=330)]


def _heading(name: str, which: str) -> dict[str, Any]:
    place = {"xref": f"x{which} domain", "yref": f"y{which} domain", "x": 0, "y": 1.1}
    return {**place, "text": words(name), "showarrow": False, "xanchor": "left", "font": {"size": 11}}


def _values(numbers: Sequence[float] | npt.NDArray[np.floating]) -> list[float | None]:
    """Numbers up to the first that is not finite or has exploded."""
    found: list[float | None] = []
    for value in np.asarray(numbers, dtype=np.float64).tolist():
        if not np.isfinite(value) or abs(value) > 1e6:
            break
        found.append(value)
    return found
