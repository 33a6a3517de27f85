# SPDX-License-Identifier: Apache-2.0
"""A run folder belongs to one run, and no name leads out of runs/<system>/."""

from __future__ import annotations

import csv
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeapps.cli import main
from moeapps.commands.run import run
from moeapps.training.folders import RunError, claim_version, newest_version, run_place
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


def unbegun(folder: Path) -> Path:
    """A version as a training leaves it that is killed in its first second."""
    version = claim_version(folder)
    for name in ("run.json", "config.yaml", "events.out.tfevents.1"):
        (version / name).write_text("{}")
    return version


def test_a_version_that_came_nowhere_hides_no_earlier_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unbegun(tmp_path)
    assert newest_version(tmp_path) == newest_version(tmp_path, trained=True) == tmp_path / "version_0"
    assert not caplog.messages
    for number, name in ((1, "checkpoints/best.ckpt"), (2, "metrics/test.json")):
        file = unbegun(tmp_path) / name
        file.parent.mkdir()
        file.touch()
        assert newest_version(tmp_path) == tmp_path / f"version_{number}"
    unbegun(tmp_path)
    caplog.clear()

    for _ in range(2):  # and is told once
        assert newest_version(tmp_path) == tmp_path / "version_2"
        assert newest_version(tmp_path, trained=True) == tmp_path / "version_1"
    assert caplog.messages == [
        f"{tmp_path}: version_3 has no checkpoint and no results; version_2 is taken",
        f"{tmp_path}: version_3 has no checkpoint; version_1 is taken",
    ]


@pytest.mark.medium
def test_every_command_takes_the_run_that_an_early_death_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "runs" / "toy" / "base"
    run(FIT)
    good = place / "version_0" / "checkpoints" / "best.ckpt"
    named, page = ["--run", str(place)], tmp_path / "page.html"
    for words in (
        ["test", *named],
        ["validate", *named],
        ["predict", *named],
        ["export", str(place), "--out", str(tmp_path / "out")],
        ["report", str(place), "-o", str(page)],
        ["fit", *named, "--trainer.max_epochs", "2", "--test_after_fit", "false"],
    ):
        early = unbegun(place)
        caplog.clear()
        assert main(words) == 0, words
        told = [line for line in caplog.messages if "is taken" in line]
        assert len(told) == 1
        assert told[0].startswith(f"{place}: {early.name} has no checkpoint")
    assert (place / "version_0" / "metrics" / "test.json").is_file()
    resumed = json.loads((place / "version_7" / "run.json").read_text())
    assert resumed["continued_from"] == str(good.with_name("last.ckpt").resolve())

    assert main(["test", "--run", str(place / "version_6")]) == 2
    assert f"give --run {place / 'version_7'}, which has one" in capsys.readouterr().err


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


@pytest.mark.medium
def test_an_error_before_the_first_step_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "runs" / "toy" / "base"
    run(FIT)
    wider = ["--model.init_args.net.init_args.width", "16"]
    held = place / "version_0" / "checkpoints" / "last.ckpt"

    for words in (["fit", "--run", str(place)], ["fit", *TOY, "--ckpt_path", str(held)]):
        assert main([*words, *wider]) == 2
    for command in ("test", "validate", "predict"):
        assert main([command, *TOY, "--ckpt_path", str(held), *wider]) == 2
    assert "the weights are of another network" in capsys.readouterr().err
    assert [path.name for path in place.iterdir()] == ["version_0"]

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    # Within a step there may be what says why.
    monkeypatch.setattr("tests.toy.ToyTask.shared_step", fail)
    with pytest.raises(ZeroDivisionError):
        run([*FIT, "--trainer.num_sanity_val_steps", "0"])
    assert sorted(path.name for path in place.iterdir()) == ["version_0", "version_1"]
    # What is tried before a training is no step of it.
    with pytest.raises(ZeroDivisionError):
        run(FIT)
    assert sorted(path.name for path in place.iterdir()) == ["version_0", "version_1"]
