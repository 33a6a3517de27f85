# SPDX-License-Identifier: Apache-2.0
"""Read what a run's test left behind: metrics/test.json."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moeapps.training.run import newest_version

Direction = Literal["max", "min"]


@dataclass(frozen=True)
class RunResults:
    """The test of one run.

    Args:
        path: the run folder.
        header: config hash, commit, seed, versions, sources, parameters ... as written.
        roles: domain -> role, in the order of the file.
        values: metric -> domain -> value (NaN where the file says null).
        counts: domain -> number of test items.
        directions: metric -> ``max`` (larger is better) or ``min``.
        units: metric -> domain -> values per test unit, where the task gives them.
    """

    path: Path
    header: dict[str, Any]
    roles: dict[str, str]
    values: dict[str, dict[str, float]]
    counts: dict[str, int]
    directions: dict[str, Direction]
    units: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        """``system/name``: runs of one variant differ by their seeds."""
        return f"{self.header.get('system') or '?'}/{self.header.get('name') or '?'}"

    @property
    def seed(self) -> int | None:
        """The seed of the run, None where the file does not say."""
        seed = self.header.get("seed")
        return seed if isinstance(seed, int) else None


def read_results(path: Path, stage: str = "test") -> RunResults:
    """Read metrics/<stage>.json of a run folder.

    Args:
        path: the run folder, runs/<system>/<name> for its newest version, or the file itself.
        stage: ``test`` or ``val``.

    Raises:
        ValueError: there is no such file, or it is not a results file.
    """
    file = path if path.suffix == ".json" else newest_version(path) / "metrics" / f"{stage}.json"
    folder = path.parent.parent if path.suffix == ".json" else file.parents[1]
    if not file.is_file():
        names = sorted({str(inside.parents[2]) for inside in path.glob(f"*/*/metrics/{stage}.json")})
        if names:
            raise ValueError(f"{path} is the folder of a system; give its runs: {' '.join(names)}")
        if not path.exists():
            raise ValueError(
                f"there is no run {path}; train and test it first: lightning fit --config FILE --name NAME"
            )
        raise ValueError(f"{folder} has no metrics/{stage}.json; make it with: moeapps test --run {folder}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        rows = raw["rows"]
        values: dict[str, dict[str, float]] = {}
        for row in rows:
            value = math.nan if row["value"] is None else float(row["value"])
            values.setdefault(row["metric"], {})[row["domain"]] = value
        units: dict[str, dict[str, list[float]]] = {}
        for domain, metrics in raw.get("units", {}).items():
            for metric, numbers in metrics.items():
                units.setdefault(metric, {})[domain] = [math.nan if x is None else float(x) for x in numbers]
        return RunResults(
            folder,
            raw["header"],
            {row["domain"]: row["role"] for row in rows},
            values,
            {row["domain"]: int(row["n"]) for row in rows},
            {row["metric"]: row["direction"] for row in rows},
            units,
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no results file of this suite ({error!r}); run the test again") from error
