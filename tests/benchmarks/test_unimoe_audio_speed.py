# SPDX-License-Identifier: Apache-2.0
"""The speed of UniMoE-Audio is measured as the page says; no clock is trusted here but the committed one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import unimoe_audio_speed as speed

TINY = ["--config", "configs/debug/tiny.yaml", "--config", "configs/debug/unimoe_audio.yaml"]


@pytest.mark.medium
def test_a_measurement_is_complete(tmp_path: Path) -> None:
    speed.main([*TINY, "--pairs", "1", "--seconds", "0.2", "--json", str(tmp_path / "speed.json")])
    report = json.loads((tmp_path / "speed.json").read_text())

    step, settled = report["step_over_dense"], report["step_over_dense_at_budget"]
    assert 0 < step["experts_per_row"] <= 7  # p = 0.7 of nine columns
    assert settled["experts_per_row"] == pytest.approx(speed.BUDGET, abs=0.1)
    for row in (step, settled):
        assert len(row["pairs"]) == 1
        assert row["gate"] == 1.3
    assert set(report["drawing"]["sound_per_second"]) == {"1", "16"}


def test_the_readme_states_the_committed_speed() -> None:
    report = json.loads(speed.RESULTS.read_text(encoding="utf-8"))
    drawing = report["drawing"]

    assert drawing["ok"]
    for row in (report[name] for name in report if name.startswith("step_over_dense")):
        assert row["ok"]
        assert row["ratio"] <= row["gate"] == 1.3
        assert len(row["pairs"]) == 9
    text = speed.README.read_text(encoding="utf-8")
    assert speed.sentence(report) in text
    told = " ".join(text.split())
    assert f"costs {report['step_over_dense']['ratio']:.2f} times the dense twin's" in told
    one, many = drawing["sound_per_second"].values()
    assert f"draws {one:.1f} seconds of sound per second, {many:.0f} with 16 clips at once" in told


def test_the_sentence_tells_the_step_at_the_budget_too() -> None:
    row = {"ratio": 1.184, "experts_per_row": 2.41}
    report = {
        "command": "python -m benchmarks.unimoe_audio_speed",
        "step_over_dense": {"ratio": 0.98, "experts_per_row": 4.4},
        "step_over_dense_at_budget": row,
        "drawing": {"sound_per_second": {"1": 5.0, "16": 45.0}},
    }
    told = " ".join(speed.sentence(report).split())
    assert "costs 0.98 times the dense twin's of equal active FLOPs (4.4 experts a row), and 1.18 times at 2.4" in told
