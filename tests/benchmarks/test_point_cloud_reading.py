# SPDX-License-Identifier: Apache-2.0
"""The benchmark of reading measures what it says; no clock is trusted here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import point_cloud_reading as reading
from tasks.point_cloud.data.readers import OwnLabels, write_own_labels, write_own_scan

RESULTS = Path("benchmarks/results/point_cloud_reading.json")


@pytest.mark.parametrize("ending", reading.ENDINGS)
def test_each_format_holds_the_same_scan_and_gives_a_first_tile(ending: str, tmp_path: Path) -> None:
    write_own_labels(tmp_path / "town" / "labels.yaml", OwnLabels(reading.NAMES))
    write_own_scan(tmp_path / "town" / "test" / f"a{ending}", reading.town(20_000))

    row = reading.first_tile(tmp_path)

    assert row["points"] == 20_000
    assert row["tiles"] > 1
    assert 0 < row["first_tile_points"] < 20_000
    assert row["cpu_s"] >= 0


def test_the_committed_file_says_which_formats_meet_the_gates() -> None:
    report = json.loads(RESULTS.read_text(encoding="utf-8"))

    assert (
        report["gate"] == {"cpu_s": reading.MOST_SECONDS, "peak_gb": reading.MOST_GB} == {"cpu_s": 20.0, "peak_gb": 1.5}
    )
    assert tuple(report["rows"]) == reading.ENDINGS
    for row in report["rows"].values():
        assert row["points"] == 5_000_000
        assert row["ok"] == (row["cpu_s"] <= 20.0 and row["peak_gb"] <= 1.5)
        assert row["peak_gb"] <= 1.5
    assert report["rows"][".las"]["ok"]
    assert len({row["tiles"] for row in report["rows"].values()}) == 1
