# SPDX-License-Identifier: Apache-2.0
"""What `make adaptation` costs is measured with the words of the Makefile; the committed figure is in its bound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import adaptation_pipeline as pipeline


def test_the_command_is_that_of_the_makefile() -> None:
    stages = ["student", "experts", "aggregator", "meta"]
    wanted = ["curriculum", "--config", "configs/meta_dmoe.yaml"]
    for stage in stages:
        wanted += ["--stage", f"configs/stages/meta_dmoe_{stage}.yaml"]
    assert pipeline.words_of_make() == wanted


def test_the_committed_figure_is_of_that_command_and_within_eight_minutes() -> None:
    found = json.loads(pipeline.RESULTS.read_text(encoding="utf-8"))
    assert found["command"].split()[1:] == pipeline.words_of_make()
    assert found["seconds"] <= 480
    assert not found["commit"].endswith("dirty")
    page = Path("tasks/adaptation/README.md").read_text(encoding="utf-8")
    assert f"it takes {found['seconds'] / 60:.1f} minutes of one core" in page
    assert found["mean"]["unseen"]["accuracy"] > found["mean"]["unseen"]["accuracy_before"]


@pytest.mark.slow
def test_it_is_run_from_nothing(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    words = ["--json", str(file), "--config", "configs/debug/tiny.yaml", "--config", "configs/debug/meta_dmoe.yaml"]
    assert pipeline.main(words) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert 0 < found["cpu_seconds"] < 480
    assert set(found["mean"]) == {"seen", "validation", "unseen"}
