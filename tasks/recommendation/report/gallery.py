# SPDX-License-Identifier: Apache-2.0
"""What a report page shows of a run of this task, from the files of its run alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moeapps.bounds import read_json
from moeapps.reporting.knowledge import ExpertTable


def expert_tables(folder: Path, layers: dict[str, int]) -> list[ExpertTable]:
    """Weights of experts by task and category (several gates a level), or by what users like (one gate)."""
    found = []
    levels, gates = folder / "metrics" / "experts.json", folder / "metrics" / "gates.json"
    if levels.is_file():
        told: list[dict[str, Any]] = read_json(levels).get("levels", [])
        for layer, level in zip(layers, told, strict=False):
            if level.get("share"):
                found.append(
                    ExpertTable(layer, "gate", level["gates"], level["share"], level["experts"], rows=math.inf)
                )
    if gates.is_file() and layers:
        raw = read_json(gates)
        rows = [(f, w) for f, w in zip(raw["factors"], raw["mean_gate"], strict=True) if None not in w]
        # Weights may be below 0 where they are not normalised: their size is what an expert contributes.
        work = [[abs(value) for value in weights] for _, weights in rows]
        ari = raw.get("gate_ari")
        score = None if ari is None else ("adjusted Rand index of groups of gates and tastes", max(0.0, float(ari)))
        if rows:
            found.append(
                ExpertTable(next(iter(layers)), "taste", [f for f, _ in rows], work, rows=math.inf, score=score)
            )
    return found
