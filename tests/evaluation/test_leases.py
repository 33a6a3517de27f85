# SPDX-License-Identifier: Apache-2.0
"""Processes that share a grid: no cell runs twice at a time, and none is lost with a process that died."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from moeapps.evidence.evidence import Evidence, Place, Shard
from moeapps.evidence.grid import Cell, Grid, Variant
from moeapps.evidence.leases import Leases, _born

ROOT = Path(__file__).resolve().parents[2]
CELL = Cell("moe", 1, 1)
# Notes its cell in a log, then works for a moment; a hanging one waits until it is stopped, the first time alone.
FAKE = """
import json, os, pathlib, sys, time
word = lambda name: sys.argv[sys.argv.index(name) + 1]
with open("log.txt", "a") as log:
    log.write(word("--name") + "\\n")
if "--hang" in sys.argv and not pathlib.Path("hanging").exists():
    pathlib.Path("pid").write_text(str(os.getpid()))
    pathlib.Path("pid").rename("hanging")
    time.sleep(600)
time.sleep(0.2)
row = {"domain": "a", "role": "seen", "metric": "loss", "value": 1.0, "n": 4, "direction": "min"}
folder = pathlib.Path(os.environ["MOEAPPS_RUNS"]) / "toy" / word("--name") / "version_0" / "metrics"
folder.mkdir(parents=True)
(folder / "test.json").write_text(json.dumps({"header": {}, "rows": [row]}))
"""
GRID = "system: toy\nconfig: base.yaml\nseeds: 4\nvariants:\n  moe: {}\n  dense: {}\n"
# A process of a grid: what `moeapps evidence grid.yaml` does, with the program above in place of moeapps.
PROCESS = """
import argparse, sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from rich.console import Console
from moeapps.commands.evidence import parser, run_grid
from moeapps.evidence import checks
from moeapps.evidence.reading import read_grid
checks.check_words = lambda file, root: None  # the words are of no system
options = parser().parse_args(["grid.yaml", "--jobs", "1", *sys.argv[2:]])
sys.exit(run_grid(read_grid(Path("grid.yaml")), options, console=Console(), command=(sys.executable, "fake.py")))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("name: x\n")
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "grid.yaml").write_text(GRID)
    return tmp_path


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(ROOT), *words],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    return text


def runs(folder: Path) -> Counter[str]:
    return Counter((folder / "log.txt").read_text().split())


# --- shards ---


@pytest.mark.parametrize("of", [1, 2, 3, 8, 11])
def test_shards_part_the_cells(of: int) -> None:
    cells = Grid("toy", "x", {"moe": Variant(pairs=5), "dense": Variant(pairs=3)}, ()).cells()
    parts = [Shard(number, of).part(cells) for number in range(1, of + 1)]
    assert sorted(c.stem for part in parts for c in part) == sorted(c.stem for c in cells)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2", "1/0", "1/2/3"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="give i/n with i from 1 to n"):
        Shard.parse(text)


def test_a_shard_runs_its_part_and_the_last_one_writes_the_results(folder: Path) -> None:
    grid = Grid("toy", "base.yaml", {"moe": Variant(pairs=2), "dense": Variant(pairs=2)}, ())
    command, console = (sys.executable, str(folder / "fake.py")), Console(file=io.StringIO())
    evidence = Evidence(grid, Place(folder, "grid"), command=command, console=console)
    evidence.run(shard=Shard(1, 2))
    assert set(runs(folder)) == {cell.stem for cell in grid.cells()[::2]}
    assert not (folder / "evidence" / "grid.json").exists()
    evidence.run(shard=Shard(2, 2))
    assert json.loads((folder / "evidence" / "grid.json").read_text())["cells"] == 4
    assert runs(folder) == dict.fromkeys([cell.stem for cell in grid.cells()], 1)


# --- processes ---


@pytest.mark.medium
def test_processes_that_race_run_every_cell_once(folder: Path) -> None:
    """Three processes of the whole grid and two of the same shard."""
    processes = [start(folder) for _ in range(3)] + [start(folder, "--shard", "1/2") for _ in range(2)]
    for process in processes:
        finish(process)
    assert runs(folder) == {f"{name}-s{seed}-d{seed}": 1 for name in ("moe", "dense") for seed in (1, 2, 3, 4)}
    assert json.loads((folder / "evidence" / "grid.json").read_text())["cells"] == 8
    assert list((folder / "runs" / "evidence" / "grid" / "leases").iterdir()) == []


@pytest.mark.medium
def test_the_cell_of_a_killed_process_is_taken_over_and_no_other_is_run_again(folder: Path) -> None:
    text = GRID.replace("seeds: 4", "seeds: 2").replace("dense: {}", "dense: {flags: [--hang]}")
    (folder / "grid.yaml").write_text(text)
    first = start(folder)
    deadline = time.monotonic() + 120
    while not (folder / "hanging").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    first.kill()  # no chance to clean up
    first.communicate()
    orphan = int((folder / "hanging").read_text())
    deadline = time.monotonic() + 10
    while _born(orphan) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _born(orphan) is None, "its cell ends with it"

    finish(start(folder))

    counted = runs(folder)
    assert counted.pop("dense-s1-d1") == 2
    assert counted == {"moe-s1-d1": 1, "moe-s2-d2": 1, "dense-s2-d2": 1}


# --- one lease ---


def age(folder: Path, seconds: float, **owner: object) -> None:
    """Make every lease that old, and of somebody else."""
    for path in folder.glob("*.lease"):
        told = json.loads(path.read_text()) | {"place": "another machine"} | owner
        path.write_text(json.dumps(told))
        then = time.time() - seconds
        os.utime(path, (then, then))


def test_a_lease_is_one_processs_and_is_taken_over_after_its_time(tmp_path: Path) -> None:
    first, second = (Leases(tmp_path, lambda cell: False, lease_s=60) for _ in range(2))
    assert first.take(CELL)
    assert not second.take(CELL)
    age(tmp_path, 50)
    assert not second.take(CELL)
    assert second.running(CELL)
    age(tmp_path, 70)
    assert not second.running(CELL)
    assert second.take(CELL)
    assert not first.take(CELL)
    first._renewed -= 60
    assert first.renew() == [CELL], "the one that slept learns that it has lost its cell"
    first.release(CELL)
    assert second.running(CELL)
    second.release(CELL)
    assert list(tmp_path.iterdir()) == []


def test_a_dead_process_of_this_machine_loses_its_lease_at_once(tmp_path: Path) -> None:
    first, second = (Leases(tmp_path, lambda cell: False) for _ in range(2))
    assert first.take(CELL)
    path = next(tmp_path.iterdir())
    told = json.loads(path.read_text())
    assert told["pid"] == os.getpid()
    path.write_text(json.dumps({**told, "born": "1"}))  # the number is now another process's
    assert second.take(CELL)


def test_a_lease_that_is_renewed_never_grows_old(tmp_path: Path) -> None:
    first, second = (Leases(tmp_path, lambda cell: False, lease_s=60) for _ in range(2))
    assert first.take(CELL)
    age(tmp_path, 70)
    first._renewed -= 60
    assert first.renew() == []
    assert not second.take(CELL)


def test_a_half_written_lease_belongs_to_somebody_until_its_time_is_over(tmp_path: Path) -> None:
    leases = Leases(tmp_path, lambda cell: False, lease_s=60)
    path = tmp_path / f"{CELL.stem}.0.lease"
    path.touch()
    assert not leases.take(CELL)
    os.utime(path, (0, 0))
    assert leases.take(CELL)


def test_a_finished_cell_is_never_taken_though_nobody_holds_it(tmp_path: Path) -> None:
    answers = iter([False, True])  # finished by another process between the first look and the lease
    leases = Leases(tmp_path, lambda cell: next(answers))
    assert not leases.take(CELL)
    assert list(tmp_path.iterdir()) == []


def test_a_cell_whose_name_begins_alike_is_another_one(tmp_path: Path) -> None:
    leases = Leases(tmp_path, lambda cell: False)
    assert leases.take(Cell("moe", 1, 1))
    assert leases.take(Cell("moe", 1, 11))
    assert leases.take(Cell("moe.0", 1, 1))


def test_of_many_that_see_a_dead_lease_at_once_one_gets_the_cell(tmp_path: Path) -> None:
    for turn in range(20):
        folder = tmp_path / str(turn)
        dead = Leases(folder, lambda cell: False, lease_s=60)
        assert dead.take(CELL)
        age(folder, 70)
        barrier, won = threading.Barrier(8), []

        def race(folder: Path = folder, barrier: threading.Barrier = barrier, won: list[int] = won) -> None:
            leases = Leases(folder, lambda cell: False, lease_s=60)
            barrier.wait()
            if leases.take(CELL):
                won.append(1)

        threads = [threading.Thread(target=race) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [1]
