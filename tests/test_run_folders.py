# SPDX-License-Identifier: Apache-2.0
"""A run folder belongs to one run, and no name leads out of runs/<system>/."""

from __future__ import annotations

import csv
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeapps.cli import main
from moeapps.commands.run import run
from moeapps.training.run import RunError, claim_version, newest_version, run_place
from tests.toy import FAST, TOY, ToyData

pytestmark = pytest.mark.usefixtures("no_routing_figures")

FIT = ["fit", *TOY, "--trainer.max_epochs", "1", "--trainer.enable_model_summary", "false", "--test_after_fit", "false"]


def test_claims_made_at_once_are_all_different(tmp_path: Path) -> None:
    claimed: list[Path] = []
    begin = threading.Barrier(8)

    def claim() -> None:
        begin.wait()
        claimed.extend(claim_version(tmp_path / "home" / "base") for _ in range(20))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(int(path.name.removeprefix("version_")) for path in claimed) == list(range(160))
    assert all(path.is_dir() for path in claimed)


def test_a_version_that_is_claimed_and_empty_is_not_the_newest_where_there_is_another(tmp_path: Path) -> None:
    first = claim_version(tmp_path)
    assert newest_version(tmp_path) == first
    (first / "config.yaml").touch()
    second = claim_version(tmp_path)
    assert newest_version(tmp_path) == first
    (second / "config.yaml").touch()
    assert newest_version(tmp_path) == second


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot make a run folder .*set MOEAPPS_RUNS"):
        claim_version(tmp_path / "file" / "base")


OUTSIDE = ["", ".", "..", "../x", "a/../../x", "/tmp/x", "a//b", "a/", "a\\b", "C:x", "a\nb", "a\x00b", "~/../.."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    for system, variant in ((name, "base"), ("home", name)):
        with pytest.raises(RunError, match=r"is no name for a folder below .*MOEAPPS_RUNS"):
            run_place(system, variant)
    assert run_place("home", "grid/a.b-1_c", tmp_path) == tmp_path / "home" / "grid" / "a.b-1_c"


@pytest.mark.medium
def test_the_command_line_refuses_them_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyData, "prepare_data", lambda self: pytest.fail("data were prepared"))
    named = tmp_path / "named.yaml"
    named.write_text("name: ../../elsewhere\n")
    for words, told in (
        (["--name", "../elsewhere"], "name: '../elsewhere' is no name"),
        (["--system", "/tmp"], "system: '/tmp' is no name"),
        (["--config", str(named)], "name: '../../elsewhere' is no name"),
        (["--trainer.default_root_dir", str(tmp_path)], "trainer.default_root_dir: .* is not used"),
    ):
        assert main([*FIT, *words]) == 2
        error = capsys.readouterr().err
        assert told.split(": .*")[0] in error
        assert "MOEAPPS_RUNS=FOLDER" in error
    assert main(["curriculum", *TOY, "--name", "../elsewhere", "--stage", "tests/toy.yaml"]) == 2
    assert "name: '../elsewhere' is no name" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["named.yaml"]


@pytest.mark.medium
def test_a_run_that_begins_while_another_prepares_its_data_gets_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "toy" / "base"
    there: list[list[str]] = []

    def prepare(self: ToyData) -> None:
        there.append(sorted(path.name for path in folder.iterdir()))
        if len(there) == 1:
            run([*FIT, "--seed_everything", "1"])

    monkeypatch.setattr(ToyData, "prepare_data", prepare)
    run([*FIT, "--seed_everything", "2"])

    assert there == [["version_0"], ["version_0", "version_1"]]
    assert sorted(path.name for path in folder.iterdir()) == ["version_0", "version_1"]
    for name, seed in (("version_0", 2), ("version_1", 1)):
        assert yaml.safe_load((folder / name / "config.yaml").read_text())["seed_everything"] == seed
        with (folder / name / "metrics.csv").open() as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
        assert {row["epoch"] for row in rows} == {"0"}
        assert (folder / name / "checkpoints" / "last.ckpt").is_file()
        assert len(list((folder / name).glob("events.out*"))) == 1


@pytest.mark.medium
def test_a_run_that_never_began_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ToyData) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ToyData, "prepare_data", fail)
    with pytest.raises(ZeroDivisionError):
        run(FIT)
    monkeypatch.undo()
    assert main(["fit", *FAST]) == 0

    assert not list((tmp_path / "runs").rglob("version_*"))
