# SPDX-License-Identifier: Apache-2.0
"""The evidence runner, a program of a few lines in place of the training command: what runs, when, and what stays."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.evidence.__main__ import ROOT, main
from moeapps.evidence.cells import CellError, read_cells, write_cell
from moeapps.evidence.evidence import Evidence
from moeapps.evidence.grid import Cell, Grid, GridError, Ladder, Variant
from tests.evaluation.evidence_common import WIN, evidence, fill, place, result, toy


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return fill(tmp_path)


# --- running ---


def test_grid_runs_every_cell_and_writes_results_and_page(repository: Path) -> None:
    runs, _ = evidence(repository, toy())
    assert runs.run() == 0

    data = json.loads((repository / "benchmarks/results/toy.json").read_text())
    first, second = data["claims"]
    assert first["verdict"] == "supported"
    assert first["diff_mean"] == pytest.approx(0.1)
    assert first["ci95"] == pytest.approx([0.1, 0.1])
    assert first["seeds"] == [[1, 1], [2, 2], [3, 3]]
    assert first["system"] == pytest.approx([0.61, 0.62, 0.63])
    assert (first["flops_ratio"], first["params_ratio"]) == (1.0, 1.0)
    assert (second["rule"], second["verdict"]) == ("non-inferiority(0.01)", "supported")
    assert data["variants"]["moe"]["mean"] == {"unseen/miou": pytest.approx(0.62)}
    assert "**supported**" in (repository / "docs/evidence.md").read_text()


def test_cell_file_tells_what_ran(repository: Path) -> None:
    runs, _ = evidence(repository, toy({"dense": Variant(flags=("--burn", "0.5"), pairs=2)}, ()))
    runs.run()
    files = sorted(path.name for path in runs.cells_folder.iterdir())
    cell = json.loads((runs.cells_folder / "dense-s1-d1.json").read_text())
    assert files == ["dense-s1-d1.json", "dense-s2-d2.json"]
    names = ("kitchen/miou", "hall/miou", "street/miou", "seen/miou", "unseen/miou")
    assert cell["metrics"] == dict.fromkeys(names, 0.51)
    assert (cell["config_hash"], cell["commit"], cell["params_active"]) == ("abc", "f00", 500)
    assert 0.5 <= cell["cpu_s"] < 5
    assert not (runs.work / "cells/dense-s1-d1/runs").exists(), "runs of finished cells are removed"


def test_a_rerun_skips_finished_cells(repository: Path) -> None:
    runs, _ = evidence(repository, toy({"dense": Variant(pairs=2)}, ()))
    runs.run()
    stamps = [path.stat().st_mtime_ns for path in sorted(runs.cells_folder.iterdir())]
    (runs.cells_folder / "dense-s2-d2.json").unlink()
    again, _ = evidence(repository, runs.grid)
    again.command = (sys.executable, str(repository / "fake.py"))
    again.run()
    assert (runs.cells_folder / "dense-s1-d1.json").stat().st_mtime_ns == stamps[0]
    assert (runs.cells_folder / "dense-s2-d2.json").stat().st_mtime_ns > stamps[1]


def test_a_failing_cell_is_reported_with_its_log_and_does_not_stop_the_others(repository: Path) -> None:
    grid = toy(
        {
            "moe": Variant(flags=("--crash",), pairs=2),
            "mute": Variant(flags=("--silent",), pairs=1),
            "dense": Variant(pairs=2),
        },
        (),
    )
    runs, console = evidence(repository, grid)
    assert runs.run() == 3
    text = console.export_text()
    assert "moe-s1-d1: FAILED, exit status 1" in text
    assert "out of luck" in text
    assert "mute-s1-d1: FAILED, the run left 0 metrics/test.json" in text
    assert {cell.variant for cell in runs.read()} == {"dense"}


def test_only_runs_what_matches(repository: Path) -> None:
    runs, _ = evidence(repository, toy())
    runs.run(only="den*")
    assert {cell.variant for cell in runs.read()} == {"dense"}
    claims = json.loads((repository / "benchmarks/results/toy.json").read_text())["claims"]
    assert claims[0]["verdict"] == "not tested (3 of 6 cells are not run)"
    with pytest.raises(GridError, match="matches no variant"):
        runs.run(only="nothing")


def test_a_cell_that_hangs_is_stopped(repository: Path) -> None:
    runs, console = evidence(repository, toy({"dense": Variant(flags=("--hang",), pairs=1)}, ()))
    assert runs.run(timeout_s=1.0) == 1
    assert "stopped after 1 s" in console.export_text()


def test_interruption_stops_the_cells_and_keeps_what_is_finished(repository: Path) -> None:
    """Ctrl-C in the middle of a grid, sent to a real process, and the grid taken up again."""
    script = (
        "import signal, sys, pathlib; sys.path.insert(0, sys.argv[1]); root = pathlib.Path.cwd()\n"
        # A process started in the background may inherit an ignored SIGINT; a person at a terminal does not.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from moeapps.evidence.evidence import Evidence, Place; from moeapps.evidence.grid import Grid, Variant\n"
        "variants = {'dense': Variant(pairs=2), 'late': Variant(flags=('--hang',), pairs=1)}\n"
        "place = Place(root, 'toy', pathlib.Path('benchmarks/results'))\n"
        "Evidence(Grid('toy', 'base.yaml', variants, ()), place, command=(sys.executable, 'fake.py')).run(jobs=3)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(ROOT)], cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    cells = repository / "benchmarks/results/toy/cells"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
        (repository / "hanging").exists() and len(list(cells.glob("*.json"))) == 2
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    assert sorted(path.name for path in cells.iterdir()) == ["dense-s1-d1.json", "dense-s2-d2.json"]

    grid = toy({"dense": Variant(pairs=2), "late": Variant(pairs=1)}, ())
    runs, console = evidence(repository, grid)
    assert runs.run() == 0
    assert len(runs.read()) == 3
    assert "dense-s1-d1: done" not in console.export_text()


def test_changed_configs_are_noticed_and_run_again_on_request(repository: Path) -> None:
    runs, console = evidence(repository, toy({"dense": Variant(("wide.yaml",), pairs=1)}, ()))
    runs.run()
    (repository / "wide.yaml").write_text("# a comment changes nothing\nmodel: {width: 8}\n")
    assert runs.stale() == []
    (repository / "wide.yaml").write_text("model: {width: 16}\n")
    assert [cell.stem for cell in runs.stale()] == ["dense-s1-d1"]
    old = runs.read()
    runs.run()
    assert runs.read() == old
    assert "stay as they are" in console.export_text()
    runs.run(redo_stale=True)
    assert runs.stale() == []


def test_a_claim_over_changed_and_unchanged_configs_is_not_tested(repository: Path) -> None:
    grid = toy({"moe": Variant(("wide.yaml",), ("--gain", "0.1")), "dense": Variant()}, (WIN,))
    runs, _ = evidence(repository, grid)
    runs.run()
    verdicts = [runs.summarise()["claims"][0]["verdict"]]
    (repository / "wide.yaml").write_text("model: {width: 16}\n")
    verdicts.append(runs.summarise()["claims"][0]["verdict"])
    (repository / "base.yaml").write_text("model: {depth: 3}\n")
    verdicts.append(runs.summarise()["claims"][0]["verdict"])
    assert verdicts[::2] == ["supported"] * 2
    assert verdicts[1].startswith("not tested (the cells of moe were made with configs that have changed since")


def test_missing_config_fails_before_anything_runs(repository: Path) -> None:
    runs, _ = evidence(repository, toy({"dense": Variant(("gone.yaml",), pairs=1)}, ()))
    with pytest.raises(GridError, match=r"cannot read gone\.yaml"):
        runs.run()


def test_a_committed_cell_without_the_new_fields_can_still_be_read() -> None:
    found = read_cells(Path("benchmarks/results/point_moe/cells"), "point_moe")

    assert found
    assert all(isinstance(cell.instruction_set, str) for cell in found.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, "sys', "not a whole cell file"),
        ("[]", "not a whole cell file"),
        ('{"format": 1}', "not a whole cell file"),
        (None, "has format 99"),
    ],
)
def test_a_corrupted_cell_is_a_clear_error(repository: Path, text: str | None, message: str) -> None:
    runs, _ = evidence(repository, toy())
    path = write_cell(runs.cells_folder, result("dense", 1, 0.5))
    path.write_text(path.read_text().replace('"format": 1', '"format": 99') if text is None else text)
    with pytest.raises(CellError, match=rf"dense-s1-d1\.json.*{message}.*delete the file"):
        runs.run()


def test_a_cell_under_another_name_and_a_cell_with_nan_are_errors(tmp_path: Path) -> None:
    path = write_cell(tmp_path, result("dense", 1, 0.5))
    text = path.read_text()
    path.rename(tmp_path / "dense-s2-d2.json")
    with pytest.raises(CellError, match="holds the cell toy/dense-s1-d1"):
        read_cells(tmp_path, "toy")
    (tmp_path / "dense-s2-d2.json").unlink()
    path.write_text(text.replace("0.5", "NaN", 1))
    with pytest.raises(CellError, match="not a finite number"):
        read_cells(tmp_path, "toy")


def test_half_written_files_are_not_cells(tmp_path: Path) -> None:
    write_cell(tmp_path, result("dense", 1, 0.5))
    (tmp_path / ".dense-s2-d2.json.123.tmp").write_text("{")
    assert len(read_cells(tmp_path, "toy")) == 1


@pytest.mark.medium
def test_a_cell_of_the_real_command_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    variants = {"toy": Variant(flags=("--trainer.max_epochs", "1"), pairs=1)}
    console = Console(record=True, width=200, file=io.StringIO())
    runs = Evidence(Grid("toy", str(ROOT / "tests/toy.yaml"), variants, ()), place(tmp_path), console=console)
    assert runs.run() == 0, console.export_text()
    cell = runs.read()[Cell("toy", 1, 1)]
    assert cell.domains == ["a", "b", "c", "u", "v"]
    assert {"unseen/accuracy", "validation/accuracy", "gap/accuracy", "u/loss"} <= cell.metrics.keys()
    assert cell.config_hash
    assert cell.units["u"]["accuracy"]


# --- what runs, and in which order ---


def test_ladder_runs_before_the_table_and_gives_a_curve(repository: Path) -> None:
    levels = {"weak": Variant(flags=("--gain", "0.0")), "strong": Variant(flags=("--gain", "0.3"))}
    ladder = Ladder(levels, "moe", "dense", "unseen/miou", "higher", "Domains disagree more and more.", pairs=2)
    variants = {"moe": Variant(pairs=2), "dense": Variant(pairs=2)}
    grid = toy(variants, (), ladder=ladder)
    assert [cell.variant.startswith("ladder-") for cell in grid.cells()] == [True] * 8 + [False] * 4
    assert "--gain" in grid.arguments(Cell("ladder-strong-moe", 1, 1))

    runs, _ = evidence(repository, grid)
    runs.run(only="ladder-weak-*")
    levels_found = json.loads((repository / "benchmarks/results/toy.json").read_text())["ladder"]["levels"]
    assert levels_found[0]["diff_mean"] == 0.0
    assert levels_found[1]["note"] == "not tested (4 of 4 cells are not run)"


def test_headline_pairs_run_first_and_every_prefix_is_balanced() -> None:
    ladder = Ladder({"strong": Variant(flags=("--gain", "0.3"))}, "moe", "dense", "unseen/miou", "higher", "", pairs=2)
    variants = {"same": Variant(pairs=2), "moe": Variant(pairs=4), "dense": Variant(pairs=4)}
    grid = toy(variants, (), ladder=ladder, headline=("moe", "dense"))
    order = [(cell.variant, cell.seed) for cell in grid.cells()]
    assert order[:8] == [(name, seed) for seed in (1, 2, 3, 4) for name in ("moe", "dense")]
    strong = [(f"ladder-strong-{name}", seed) for seed in (1, 2) for name in ("moe", "dense")]
    assert order[8:] == [*strong, ("same", 1), ("same", 2)]


def test_the_data_seed_goes_to_every_option_that_the_grid_names() -> None:
    words = toy(data_seed_flags=("--data.seed", "--data.world")).arguments(Cell("moe", 3, 5))
    assert words[words.index("--data.seed") + 1] == words[words.index("--data.world") + 1] == "5"
    assert words[words.index("--seed_everything") + 1] == "3"


def test_command_line_explains_unknown_systems(capsys) -> None:
    assert main(["nothing"]) == 2
    assert "no grid for 'nothing'" in capsys.readouterr().out
    assert main([]) == 2
