# SPDX-License-Identifier: Apache-2.0
"""What a report page shows of a run of this task, from the files of its run alone."""

from __future__ import annotations

from pathlib import Path

from moeapps.bounds import read_json
from moeapps.reporting.knowledge import ExpertTable


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
