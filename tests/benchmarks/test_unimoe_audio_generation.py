# SPDX-License-Identifier: Apache-2.0
"""What the page says of the cost of a training and the sound of its clips is what was measured, within its bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import unimoe_audio_generation as generation

REPORT = generation.read(generation.RESULTS)
GOOD = {
    "cpu_seconds": 599.0,
    "quietest": -39.9,
    "loudness": -20.0,
    "real_domain_accuracy": 0.95,
    "domain_accuracy": 0.8,
}


def report_of(**changed: float) -> dict[str, Any]:
    """All parts as good as they must be, the second with changes."""
    rows = {name: dict(GOOD) for name in generation.names()}
    rows[generation.names()[1]] |= changed
    return {**generation.read(Path("nowhere")), "parts": rows}


def test_the_committed_numbers_are_of_all_parts_and_within_the_bounds() -> None:
    assert list(REPORT["parts"]) in ([], generation.names())
    assert generation.complaints(REPORT) == []
    for name, row in REPORT["parts"].items():
        assert row["command"] == " ".join(["moeapps", *generation.words_of(name)])
        assert row["seed"] == int(name[-1])
        assert row["how"]["per_domain"] == 40
        assert not row["commit"].endswith("dirty")
        assert row["machine"]["threads"] == 1
        assert row["machine"]["instruction_set"]
    assert generation.sentence(REPORT) in generation.README.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"cpu_seconds": 601.0}, "recordings-0: 601 CPU seconds, but it must be at most 600"),
        ({"quietest": -40.0}, "recordings-0: quietest is -40.000, but it must be above -40"),
        ({"loudness": -41.0}, "recordings-0: loudness is -41.000, but it must be above -40"),
        ({"real_domain_accuracy": 0.949}, "real_domain_accuracy is 0.949, but it must be at least 0.95"),
        ({"domain_accuracy": 0.799}, "domain_accuracy is 0.799, but it must be at least 0.8"),
        ({"domain_accuracy": float("nan")}, "domain_accuracy is nan"),
    ],
)
def test_a_missed_bound_is_told(changed: dict[str, float], told: str) -> None:
    assert generation.complaints(report_of()) == []
    (line,) = generation.complaints(report_of(**changed))
    assert told in line


def test_a_curriculum_may_take_twenty_five_minutes() -> None:
    report = report_of()
    report["parts"]["curriculum-0"]["cpu_seconds"] = 1500.0
    assert generation.complaints(report) == []
    report["parts"]["curriculum-0"]["cpu_seconds"] = 1501.0
    assert len(generation.complaints(report)) == 1


def test_the_sentence_tells_the_worst_run() -> None:
    told = " ".join(generation.sentence(report_of(cpu_seconds=360.0, quietest=-33.4, domain_accuracy=0.812)).split())
    assert "costs 10.0 CPU minutes on generated clips, 6.0 on recordings, the curriculum 10.0" in told
    assert "the quietest drawn clip has −40 dBFS, the median −20" in told
    assert "hears 0.80 of the drawn clips as their domain, and 0.95 of real test clips" in told


@pytest.mark.slow
@pytest.mark.parametrize("part", ["generated", "curriculum"])
def test_a_part_is_run_once_from_nothing(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--only", f"{part}-0", "--json", str(tmp_path / "r.json"), "--work", str(tmp_path / "runs")]
    words += ["--config", "configs/debug/tiny.yaml", "--config", "configs/debug/unimoe_audio.yaml"]

    assert generation.main(words) in (0, 1)  # two steps teach nothing; what is measured is complete all the same
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert list(report["parts"]) == [f"{part}-0"]
    row = report["parts"][f"{part}-0"]
    assert row["seed"] == 0
    assert row["cpu_seconds"] > 0
    assert row["clips"] == 8
    assert set(row["domains"]) == {"low_voice", "high_voice", "organ", "pluck"}
    assert row["quietest"] == min(found["quietest"] for found in row["domains"].values())
    assert f"--seed_everything 0 --name generation_{part}" in row["command"]
    capsys.readouterr()
    generation.main(words)
    assert "moeapps" not in capsys.readouterr().out


def test_a_part_that_fails_leaves_nothing_and_shows_its_last_lines(tmp_path: Path) -> None:
    words = ["--only", "generated-0", "--json", str(tmp_path / "r.json"), "--work", str(tmp_path / "runs")]

    with pytest.raises(RuntimeError, match=r"nowhere\.yaml"):
        generation.main([*words, "--config", "configs/nowhere.yaml"])
    assert not (tmp_path / "r.json").exists()
