# SPDX-License-Identifier: Apache-2.0
"""What a report page shows of a run of this task, from the files of its run alone."""

from __future__ import annotations

import math
from pathlib import Path

from moeapps.bounds import read_json
from moeapps.reporting.knowledge import ExpertTable


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
    return [ExpertTable(next(iter(layers)), "domain", list(shares), list(shares.values()), experts, rows=math.inf)]
