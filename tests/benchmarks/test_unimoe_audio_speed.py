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

    step = report["step_over_dense"]
    assert 0 < step["experts_per_row"] <= 7  # p = 0.7 of nine columns
    assert len(step["pairs"]) == 1
    assert step["gate"] == 1.3
    assert set(report["drawing"]["sound_per_second"]) == {"1", "16"}


def test_the_readme_states_the_committed_speed() -> None:
    report = json.loads(speed.RESULTS.read_text(encoding="utf-8"))
    step, drawing = report["step_over_dense"], report["drawing"]

    assert step["ok"]
    assert drawing["ok"]
    assert len(step["pairs"]) == 9
    told = " ".join(Path("tasks/audio/README.md").read_text(encoding="utf-8").split())
    assert f"costs {step['ratio']:.2f} times the dense twin's" in told
    one, many = drawing["sound_per_second"].values()
    assert f"draws {one:.1f} seconds of sound per second, {many:.0f} with 16 clips at once" in told
