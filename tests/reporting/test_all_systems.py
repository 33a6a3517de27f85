# SPDX-License-Identifier: Apache-2.0
"""The page of two finished runs of every system: what each test keeps for its gallery is there, in time and size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeapps.cli import main
from moeapps.reporting.view import read_run
from tests.reporting.made_runs import write
from tests.reporting.test_page import Reader
from tests.systems import BASES, tiny

pytestmark = pytest.mark.slow

ROOMS = {
    "aw_moe": {"Ranked lists, and what activated which expert"},
    "home": {"Ranked impressions", "Are the experts well?"},
    "meta_dmoe": {"What adaptation did"},
    "mixer": {"Families that the gate found", "Trajectories"},
    "point_moe": {"Scans", "Classes"},
    "promoe": {"Drawn images", "Where in an image experts work"},
    "unimoe_audio": {"Listen", "Where capacity goes"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Train every system for two steps and test it; the second run of each is a copy with another seed."""
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for base in BASES:
        words = [sys.executable, "-m", "moeapps", "fit", *tiny(base), "--name", "page"]
        variables = {**os.environ, "MOEAPPS_RUNS": str(folder)}
        done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        first = folder / base.stem / "page" / "version_0"
        second = first.with_name("version_1")
        shutil.copytree(first, second, ignore=shutil.ignore_patterns("checkpoints"))
        results = json.loads((second / "metrics" / "test.json").read_text())
        results["header"]["seed"] = results["header"]["seeds"]["seed_everything"] = 1
        write(second / "metrics" / "test.json", results)
        found += [first, second]
    return found


def test_every_system_fills_its_gallery(runs):
    for run in runs:
        view = read_run(run)
        assert view.notes == []
        assert ROOMS[view.system] <= {room.title for room in view.rooms}
        assert view.finding is not None
        assert view.finding.layers
    assert {read_run(run).system for run in runs} == set(ROOMS)


def test_two_runs_of_each_system_are_one_page_in_time_and_size(runs, tmp_path, capsys):
    file = tmp_path / "report.html"
    begin = time.process_time()
    assert main(["report", *map(str, runs), "-o", str(file)]) == 0
    assert time.process_time() - begin < 30
    assert file.stat().st_size < 25_000_000
    assert capsys.readouterr().err == ""
    read = Reader(file.read_text(encoding="utf-8"))
    assert "14 runs of 7 systems" in read.words
    for run in runs:
        view = read_run(run)
        assert all(room.title in read.words for room in view.rooms)
        assert view.finding.sentence in read.words
