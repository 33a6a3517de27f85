# SPDX-License-Identifier: Apache-2.0
"""The race with other projects: fair pairs, rows that cannot be raced are told, and the page is computed.

Peers are faked: no package is installed and no clock is trusted here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers import page, race, tables
from benchmarks.peers.environment import ROOT, Environment, pinned, python_with, tree_with_race
from benchmarks.peers.rows import HEADINGS, Race, Row, all_rows


class Clock:
    """CPU time that only works advance."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, list[str]()

    def process_time(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        costs = iter(seconds)

        def run() -> None:
            self.order.append(name)
            self.now += next(costs, seconds[-1])

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(race, "time", clock)
    return clock


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_sides_take_turns_and_the_median_pair_counts(clock: Clock) -> None:
    ours = clock.work("ours", 9.0, 9.0, 1.0, 2.0, 3.0)  # the first call and the one that sets the repeats do not count
    found = race.paired(Race(ours, clock.work("theirs", 4.0), "nothing"), pairs=3)

    assert found["pairs"] == [0.25, 0.5, 0.75]
    assert found["ratio"] == 0.5
    assert found["spread"] == [0.25, 0.75]
    assert (found["our_ms"], found["their_ms"]) == (2000.0, 4000.0)
    assert clock.order[4:] == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]


def test_short_work_is_repeated_and_a_call_that_is_worth_less_costs_more(clock: Clock) -> None:
    both = [clock.work(name, seconds) for name, seconds in (("ours", 0.01), ("theirs", 0.02))]
    found = race.paired(Race(*both, equal="", factor=1.5), pairs=1)

    assert clock.order.count("ours") == 2 + round(race.SAMPLE_S / 0.02)
    assert found["ratio"] == 0.75
    assert (found["our_ms"], found["their_ms"]) == (10.0, 20.0)


def test_the_limit_is_the_products_at_the_peak_or_the_floor(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.limits.product_flops", lambda work: 8_000_000)
    work = clock.work("ours", 0.1)

    counted = race.with_limit({"our_ms": 10.0}, Race(work, work, ""), peak=4.0)
    assert (counted["mflops"], counted["limit_ms"], counted["over_limit"]) == (8.0, 2.0, 5.0)
    floored = race.with_limit({"our_ms": 10.0}, Race(work, work, "", clock.work("floor", 0.004)), peak=4.0)
    assert (floored["limit_ms"], floored["over_limit"]) == (4.0, 2.5)
    assert "mflops" not in floored


# --- the environment --------------------------------------------------------------------------------------------------

PIP = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
  *pip*broken*) echo "ERROR: no version of broken fits"; exit 1;;
  *pip*) exit 0;;
  *) exec {python} "$@";;
esac
"""


@pytest.fixture
def fake(tmp_path: Path) -> Environment:
    """An environment whose pip installs nothing, and fails for one package."""
    folder, requirements = tmp_path / "peers", tmp_path / "requirements.txt"
    (folder / "bin").mkdir(parents=True)
    (folder / "made").touch()
    python = folder / "bin" / "python"
    python.write_text(PIP.format(log=tmp_path / "log", python=sys.executable))
    python.chmod(0o755)
    requirements.write_text("# what is raced\nbroken==1.0\nwell==2.0  # this one comes\n")
    return Environment(folder, requirements)


def test_a_package_is_installed_once_in_its_pinned_version_and_one_that_fails_says_why(
    fake: Environment, tmp_path: Path
) -> None:
    assert fake.missing(["well"]) == fake.missing(["well"]) == ""
    assert fake.missing(["well", "broken"]) == "broken==1.0 is not installable here: no version of broken fits"
    log = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[-1] for line in log] == ["well==2.0", "broken==1.0"]


def test_a_requirement_without_a_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("loose>=1\n")

    with pytest.raises(ValueError, match="'loose>=1' pins no version; write name==version"):
        pinned(tmp_path / "r.txt")


def test_who_needs_a_package_gets_the_reason_as_an_error(fake: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.environment.Environment", lambda folder: fake)

    with pytest.raises(RuntimeError, match=r"broken==1\.0 is not installable here"):
        python_with(["broken"], fake.folder)
    assert python_with(["well"], fake.folder) == fake.python


def test_rows_of_a_peer_that_does_not_install_say_so_and_fail_nothing(fake: Environment) -> None:
    (row,) = peers.measure([Row("a / b", "ranking", "b", ["broken"], "x:y", gate=1.0)], fake, 1)

    assert row["absent"] == "broken==1.0 is not installable here: no version of broken fits"
    assert row["ok"] is None
    assert peers.problems([row]) == []


def test_rows_of_a_process_that_dies_say_so_and_fail(fake: Environment) -> None:
    (row,) = peers.measure([Row("no such row", "ranking", "b", ["well"], "x:y")], fake, 1)

    assert "KeyError" in row["failed"]
    assert peers.problems([row]) == [f"race broke: no such row: {row['failed']}"]


def test_a_race_that_breaks_does_not_stop_the_next(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Race:
        raise ImportError("no module of theirs")

    work = clock.work("work", 0.5)
    made = {"first": broken, "second": lambda: Race(work, work, "all", work)}
    fakes = [
        SimpleNamespace(name=name, race=make, gate=None, packages=(), shared=("torch",)) for name, make in made.items()
    ]
    monkeypatch.setattr(race, "all_rows", lambda: fakes)
    monkeypatch.setattr("benchmarks.limits.peak_gflops", lambda: 100.0)

    assert race.main(["--pairs", "2", "first", "second"]) == 0

    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["failed"] == "ImportError: no module of theirs"
    assert (second["ratio"], second["peak_gflops"], second["limit_ms"]) == (1.0, 100.0, 500.0)
    assert set(second["versions"]) == {"torch"}


# --- the result -------------------------------------------------------------------------------------------------------


def a_row(name: str, **values: Any) -> dict[str, Any]:
    return {"name": name, "group": "ranking", "peer": "p", "gate": None, "ok": None, **values}


def test_missed_gates_and_broken_races_fail_the_command_and_absent_peers_do_not() -> None:
    rows = [
        a_row("far", gate=1.5, ok=False, ratio=1.6),
        a_row("near", gate=1.5, ok=True, ratio=1.4),
        a_row("gone", absent="nowhere"),
        a_row("torn", failed="it broke"),
    ]

    assert peers.problems(rows) == ["gate missed: far: 1.6 > 1.5", "race broke: torn: it broke"]
    gated = Row("r", "ranking", "p", gate=1.5)
    assert [peers.described(gated, {"ratio": ratio})["ok"] for ratio in (1.5, 1.51)] == [True, False]


def test_a_row_that_got_dearer_by_more_than_a_tenth_fails_the_command(
    fake: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = {"same": {"ratio": 1.0, "spread": [1.0, 1.0]}, "worse": {"ratio": 0.5, "spread": [0.4, 0.6]}}
    again = iter([0.5, 0.6, 0.5, 0.55, 0.5, 0.4, 0.5, 0.5])  # then, now; twice for each row that seems worse

    def raced(rows: list[Row], *_: object) -> dict[str, Any]:
        if len(rows) == 1:
            return {rows[0].name: {"ratio": next(again)}}
        return {**then, "lucky": then["worse"], "new": {"failed": "it has no such reader"}}

    monkeypatch.setattr(peers, "raced", raced)
    ratios = {"same": 1.1, "worse": 0.56, "lucky": 0.56, "new": 7.0}
    now = [*(a_row(name, ratio=ratio) for name, ratio in ratios.items()), a_row("gone", absent="no")]
    rows = [Row(row["name"], "ranking", "p") for row in now]

    found = peers.with_before(rows, now, fake, 9, Path())

    # Worse: the middle of 1.12, 0.6 / 0.5 and 0.55 / 0.5; lucky: of 1.12, 0.4 / 0.5 and 0.5 / 0.5.
    assert [row.get("over_before") for row in found] == [1.1, 1.12, 1.0, None, None]
    assert (found[1]["before"], found[1]["before_spread"]) == (0.5, [0.4, 0.6])
    assert found[3]["not_before"] == "it has no such reader"
    assert peers.problems(found) == ["worse than before: worse: 1.12 > 1.1"]


def test_the_tree_of_before_has_its_own_code_and_benchmarks_and_todays_race(tmp_path: Path) -> None:
    before = tmp_path / "before"
    for file in ("moeapps/__init__.py", "benchmarks/steps.py", "benchmarks/peers/race.py"):
        (before / file).parent.mkdir(parents=True, exist_ok=True)
        (before / file).write_text("old = True")

    tree = tree_with_race(before, tmp_path / "tree")

    assert (
        (tree / "moeapps" / "__init__.py").read_text() == (tree / "benchmarks" / "steps.py").read_text() == "old = True"
    )
    for file in ("benchmarks/peers/race.py", "benchmarks/limits.py"):
        assert (tree / file).resolve() == ROOT / file
    with pytest.raises(FileNotFoundError, match="give a checkout of this project"):
        tree_with_race(tmp_path, tmp_path / "other")


def test_rows_that_were_not_raced_now_are_kept_and_those_no_longer_listed_are_not(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    rows = [a_row("old", ratio=1.0), a_row("same", ratio=2.0), a_row("gone")]
    path.write_text(json.dumps({"cpu": "A", "rows": rows}))
    wanted = [Row(name, "ranking", "p") for name in ("same", "new", "old")]

    new = [a_row("new", ratio=3.0), a_row("same", ratio=4.0)]
    found = peers.merged(path, new, wanted, {"cpu": "A"})

    assert [(row["name"], row["ratio"]) for row in found] == [("same", 4.0), ("new", 3.0), ("old", 1.0)]
    assert [row["name"] for row in peers.merged(path, new, wanted, {"cpu": "B"})] == ["same", "new"]


def test_the_page_shows_ratios_limits_and_why_a_row_has_none() -> None:
    measured = {"spread": [1.4, 1.9], "our_ms": 3.0, "limit_ms": 1.5, "over_limit": 2.0, "equal": "all is equal"}
    rows = [
        a_row("a / b", ratio=1.6, gate=1.5, ok=False, before=1.55, versions={"b": "7"}, **measured),
        a_row("c / d", absent="it is nowhere"),
    ]
    machine = {"machine": "a machine", "cpu": "AVX9", "python": "3", "torch": "2"}

    text = page.block({"command": "go", "pairs": 9, "machine": machine, "rows": rows})

    assert "| a / b | **1.60** | 1.40 to 1.90 | 1.55 | 1.50 | 3.0 | 1.5 | 2.0 |" in text
    assert "| c / d | not measured |" in text
    assert "- c / d: it is nowhere." in text
    assert "AVX9" in text
    assert "b 7" in text


def test_the_committed_result_has_every_row_and_the_page_is_computed_from_it(tmp_path: Path) -> None:
    report = json.loads(peers.RESULTS.read_text(encoding="utf-8"))
    copy = tmp_path / "performance.md"
    copy.write_text(page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")

    page.write_page(page=copy)

    assert copy.read_text(encoding="utf-8") == page.PAGE.read_text(encoding="utf-8")
    assert [row["name"] for row in report["rows"]] == [row.name for row in all_rows()]
    for row, wanted in zip(report["rows"], all_rows(), strict=True):
        assert row["gate"] == wanted.gate
        assert row["group"] in HEADINGS
        if wanted.absent:
            assert row["absent"] == wanted.absent
            continue
        assert len(row["pairs"]) == report["pairs"]
        assert row["ratio"] == sorted(row["pairs"])[report["pairs"] // 2]
        assert row["limit_ms"] > 0
        assert {name: row["versions"][name] for name in wanted.packages} == {
            name: pinned()[name] for name in wanted.packages
        }


# --- both sides of readers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["films", "reviews", "clips", "images"])
def test_both_sides_of_a_reader_read_the_whole_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, number in (("RATINGS", 400), ("FILMS", 50), ("ROWS", 80)):
        monkeypatch.setattr(tables, size, number)

    made: Race = getattr(tables, name)()
    ours: Any = made.ours()
    theirs: Any = made.theirs()

    if name == "clips":
        assert [row.file for row in ours] == [row["file"] for row in theirs]
    elif name == "images":
        assert sum(len(own.files) for _, own in ours._domains.values()) == len(theirs)
    else:
        assert (ours.user == theirs[0]).all()
        assert (ours.item == theirs[1]).all()
        assert (ours.rating == theirs[2]).all()


def test_every_row_names_a_function_that_exists() -> None:
    for row in all_rows():
        assert bool(row.make) != bool(row.absent), row.name
        if row.make:
            module, function, *_ = row.make.split(":")
            assert callable(getattr(__import__(f"benchmarks.peers.{module}", fromlist=["_"]), function))


def test_a_missed_gate_is_explained_by_other_ways_and_the_floor(clock: Clock) -> None:
    ours, theirs, way = clock.work("ours", 3.0), clock.work("theirs", 1.0), clock.work("way", 2.0)
    entry = Race(ours, theirs, "all", clock.work("floor", 0.25), ways={"another way": way})
    found = race.with_limit(race.paired(entry, 3), entry, 100.0)

    assert race.with_tries(found, entry, 3.0, 3) == found
    missed = race.with_tries(found, entry, 1.5, 3)
    assert (missed["tried"], missed["limit"]) == ({"another way": 2.0}, {"decoding alone": 0.25})
