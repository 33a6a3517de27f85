# SPDX-License-Identifier: Apache-2.0
"""Leave one domain out: which trainings there are, and what their table says, counted by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from scipy import stats

from moeapps.cli import main
from moeapps.evaluation.statistics import Interval
from moeapps.evidence.folds import FoldRow, Setting, fold_cells, fold_grid, fold_rows
from moeapps.evidence.grid import Cell, GridError
from moeapps.reporting.matrix_files import latex_interval
from moeapps.reporting.screen import bracketed
from tests.evaluation.evidence_common import result

SETTING = Setting("toy", ("A b", "c", "d"), "acc", "max")
SYSTEM = {"A b": [0.5, 0.7], "c": [0.6, 0.4], "d": [0.9, 0.8]}  # domain -> score of two seeds
RIVAL = {"A b": [0.4, 0.5], "c": [0.6, 0.5], "d": [0.8, 0.8]}


def grid(*baseline: str) -> object:
    return fold_grid(SETTING, ["toy.yaml", "over.yaml"], baseline, (4, 5), "x").grid


def test_every_seen_domain_is_left_out_once_per_seed_and_side() -> None:
    file = fold_grid(SETTING, ["toy.yaml", "over.yaml"], ("rival.yaml",), (4, 5), "moeapps xeval ...")
    assert file.name == "toy-over-against-rival-leave-one-out"
    assert len(file.grid.cells()) == 3 * 2 * 2
    words = file.grid.arguments(Cell("baseline-without-a_b", 5, 5))
    assert "--data.init_args.seen=[c,d]" in words
    assert "--data.init_args.unseen=[A b]" in words
    configs = [words[i + 1] for i, word in enumerate(words) if word == "--config"]
    assert configs == ["toy.yaml", "over.yaml", "rival.yaml"]
    assert words[words.index("--seed_everything") + 1] == words[words.index("--data.init_args.seed") + 1] == "5"
    assert "rival.yaml" not in file.grid.arguments(Cell("system-without-a_b", 5, 5))


def test_one_seen_domain_cannot_be_left_out() -> None:
    with pytest.raises(GridError, match="trains on c alone; leaving one domain out needs two"):
        fold_grid(Setting("toy", ("c",), "acc", "max"), ["toy.yaml"], (), (1,), "x")


def done(**sides: dict[str, list[float]]) -> dict[Cell, object]:
    slugs = {"A b": "a_b"}
    cells = [
        result(f"{side}-without-{slugs.get(domain, domain)}", seed, 0.0, metrics={f"{domain}/acc": value})
        for side, table in sides.items()
        for domain, values in table.items()
        for seed, value in zip((4, 5), values, strict=True)
    ]
    return {cell.cell: cell for cell in cells}


@pytest.mark.parametrize(("direction", "worst"), [("max", [0.5, 0.4]), ("min", [0.9, 0.8])])
def test_mean_and_worst_are_taken_within_each_seed(direction: str, worst: list[float]) -> None:
    setting = Setting("toy", SETTING.seen, "acc", direction)  # type: ignore[arg-type]
    rows = {r.domain: r for r in fold_rows(setting, grid("rival.yaml"), done(system=SYSTEM, baseline=RIVAL))}  # type: ignore[arg-type]
    assert list(rows) == ["A b", "c", "d", "mean", "worst"]
    means = [(0.5 + 0.6 + 0.9) / 3, (0.7 + 0.4 + 0.8) / 3]
    for name, values in (("mean", means), ("worst", worst), ("c", [0.6, 0.4])):
        low, high = stats.t.interval(0.95, 1, loc=sum(values) / 2, scale=stats.sem(values))
        assert (rows[name].system.low, rows[name].system.high) == pytest.approx((low, high))
    paired = stats.ttest_rel(SYSTEM["A b"], RIVAL["A b"]).confidence_interval(0.95)
    assert rows["A b"].difference is not None
    assert (rows["A b"].difference.low, rows["A b"].difference.high) == pytest.approx((paired.low, paired.high))
    head, lines = fold_cells(setting, list(rows.values()), bracketed)
    assert head == ["left out", "toy", "baseline", "difference"]
    assert lines[0][3].startswith("+0.1500 [")
    one = Interval(0.5, math.nan, math.nan, 1)
    cells = fold_cells(setting, [FoldRow("a_b", one, one, Interval(-0.1, -0.2, 0.0, 2))], latex_interval)[1]
    assert cells == [["a_b", "0.5000", "0.5000", r"-0.1000 \pm 0.1000"]]


def test_missing_and_stale_cells_are_told() -> None:
    cells = done(system=SYSTEM)
    assert math.isnan(fold_rows(SETTING, fold_grid(SETTING, ["t.yaml"], (), (4,), "x").grid, cells)[0].system.low)  # type: ignore[arg-type]
    stale = [Cell("system-without-c", 5, 5), Cell("of-another-grid", 5, 5)]
    with pytest.raises(GridError, match=r"1 of 6 cells were made with configs that .* \(system-without-c"):
        fold_rows(SETTING, grid(), cells, stale)  # type: ignore[arg-type]
    del cells[Cell("system-without-c", 5, 5)]
    with pytest.raises(GridError, match=r"1 of 6 cells are not run \(system-without-c-s5-d5"):
        fold_rows(SETTING, grid(), cells)  # type: ignore[arg-type]


def test_runs_and_folds_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["xeval", "runs/x", "--leave-one-out", "a.yaml"]) == 2
    assert main(["xeval"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("error: --leave-one-out trains its own runs")
    assert told[1].startswith("error: no run given")


@pytest.mark.medium
def test_folds_of_a_config_are_trained_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "toy.yaml").write_text((root / "tests" / "toy.yaml").read_text())
    (tmp_path / "short.yaml").write_text("trainer: {max_epochs: 1}\ndata: {init_args: {seen: [a, c]}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.delenv("MOEAPPS_RUNS", raising=False)
    words = ["xeval", "--leave-one-out", "toy.yaml", "short.yaml", "--seeds", "1"]

    assert main([*words, "--shard", "1/2"]) == 0
    assert "1 of 2 cells are not run yet" in capsys.readouterr().out
    assert main([*words, "--out", "out"]) == 0

    assert re.search(r"^worst +0\.\d{4}$", capsys.readouterr().out, re.MULTILINE)
    table = (tmp_path / "out" / "leave_one_out.md").read_text()
    assert table.startswith("# accuracy on the domain left out (larger is better)")
    assert [line.split("|")[1].strip() for line in table.splitlines()[4:]] == ["a", "c", "mean", "worst"]
    paper = (tmp_path / "out" / "leave_one_out.tex").read_text().splitlines()
    assert paper[0].startswith("% accuracy on the domain left out")
    assert [line.split(" & ")[0] for line in paper[5:-2]] == ["a", "c", "mean", "worst"]
    assert {path.stem for path in (tmp_path / "evidence" / "toy-short-leave-one-out" / "cells").iterdir()} == {
        "system-without-a-s1-d1",
        "system-without-c-s1-d1",
    }
