# SPDX-License-Identifier: Apache-2.0
"""A run is found by its folder, or by the folder of its versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeapps.evaluation.results import read_results


def write_run(folder: Path, value: float) -> None:
    row = {"domain": "a", "role": "seen", "metric": "miou", "value": value, "n": 3, "direction": "max"}
    (folder / "metrics").mkdir(parents=True)
    (folder / "metrics" / "test.json").write_text(json.dumps({"header": {"main_metric": "miou"}, "rows": [row]}))


def test_the_folder_of_versions_stands_for_the_newest_by_number(tmp_path: Path) -> None:
    for number in (0, 9, 10):
        write_run(tmp_path / f"version_{number}", float(number))

    assert read_results(tmp_path).values["miou"]["a"] == 10.0
    assert read_results(tmp_path / "version_9").values["miou"]["a"] == 9.0


def test_a_run_that_was_not_tested_says_how_to_test_it(tmp_path: Path) -> None:
    (tmp_path / "version_0").mkdir()

    with pytest.raises(ValueError, match=r"moeapps test --run .*version_0"):
        read_results(tmp_path)


def test_a_run_that_does_not_exist_is_not_to_be_tested_but_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no run .*nowhere; train and test it first: lightning fit"):
        read_results(tmp_path / "nowhere")
