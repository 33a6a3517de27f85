# SPDX-License-Identifier: Apache-2.0
"""The seen/unseen matrix against arithmetic by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moeapps.cli import main
from moeapps.evaluation.results import read_results
from moeapps.evaluation.statistics import paired_t_interval
from moeapps.evaluation.xeval import build_matrix, cells
from moeapps.reporting.matrix import markdown, rich_tables
from tests.evaluation.xeval_common import write_run


def test_columns_are_domains_means_worst_and_gap(tmp_path: Path) -> None:
    run = read_results(write_run(tmp_path / "r", [0.9, 0.7, 0.6, 0.5, 0.3]))

    found = cells(run, "acc")
    assert found["mean seen"] == pytest.approx(0.8)
    assert found["mean unseen"] == pytest.approx(0.4)
    assert found["worst unseen"] == 0.3
    assert found["gap"] == pytest.approx(0.4)


def test_where_smaller_is_better_worst_and_gap_turn_round(tmp_path: Path) -> None:
    run = read_results(write_run(tmp_path / "r", [0.1, 0.3, 0.4, 0.5, 0.7], direction="min"))

    found = cells(run, "acc")
    assert found["worst unseen"] == 0.7
    assert found["gap"] == pytest.approx(0.4)


def test_a_missing_number_is_left_out(tmp_path: Path) -> None:
    run = read_results(write_run(tmp_path / "r", [0.9, None, 0.6, 0.5, 0.3]))

    assert cells(run, "acc")["mean seen"] == 0.9


def test_differences_over_seeds_are_paired_t(tmp_path: Path) -> None:
    ours = [write_run(tmp_path / f"m{s}", [0.9 + s / 100, 0.8, 0.6, 0.5, 0.4], seed=s) for s in range(3)]
    base = [write_run(tmp_path / f"d{s}", [0.8, 0.8, 0.6, 0.5, 0.4], variant="dense", seed=s) for s in (2, 1, 0)]

    matrix = build_matrix([read_results(p) for p in ours], [read_results(p) for p in base])

    found = {d.column: d for d in matrix.differences}
    expected = paired_t_interval([0.9, 0.91, 0.92], [0.8, 0.8, 0.8])
    assert found["a"].interval.mean == pytest.approx(expected.mean)
    assert found["a"].interval.low == pytest.approx(expected.low)
    assert (found["a"].over, found["a"].better) == ("seeds", True)
    assert found["gap"].better is False  # seen got better, unseen did not
    assert found["u"].better is None
    assert matrix.variants["toy/moe"]["a"].mean == pytest.approx(0.91)


def test_differences_of_one_pair_of_runs_are_those_of_the_table(tmp_path: Path) -> None:
    left = {"u": {"acc": [1.0, 1.0, 1.0, 0.0]}, "w": {"acc": [0.4, 0.4]}, "a": {"acc": [0.9, 0.9]}}
    right = {"u": {"acc": [0.0, 0.0, 0.0, 0.0]}, "w": {"acc": [0.2, 0.4]}, "a": {"acc": [1.0, 0.0, 1.0]}}
    one = read_results(write_run(tmp_path / "m", [0.9, 0.8, 0.6, 0.75, 0.4], units=left))
    other = read_results(write_run(tmp_path / "d", [2 / 3, 0.9, 0.6, 0.0, 0.3], variant="dense", units=right))

    matrix = build_matrix([one], [other])

    found = {d.column: d for d in matrix.differences}
    table = [row.cells for row in matrix.rows]
    assert set(found) == set(matrix.columns)
    for column, difference in found.items():
        assert difference.interval.mean == pytest.approx(table[0][column] - table[1][column])
        assert (difference.over, difference.better) == ("units", None)
    # Intervals stand where both runs have the same units; the mean of seen domains has none, as "b" tells no units.
    assert {c for c, d in found.items() if math.isfinite(d.interval.low)} == {"u", "w", "mean unseen"}
    assert found["u"].interval.n == 4
    assert found["mean unseen"].interval.n == 6
    assert found["u"].interval.low <= 0.75 <= found["u"].interval.high
    assert matrix.rows[0].intervals["u"].mean == 0.75


def test_one_seed_is_never_called_better_and_the_last_sentence_says_so(tmp_path: Path) -> None:
    sure = {"u": {"acc": [1.0] * 9}, "w": {"acc": [1.0] * 9}}
    one = read_results(write_run(tmp_path / "m", [0.9, 0.8, 0.6, 1.0, 1.0], units=sure))
    worse = {"u": {"acc": [0.0] * 9}, "w": {"acc": [0.0] * 9}}
    other = read_results(write_run(tmp_path / "d", [0.8, 0.8, 0.6, 0.0, 0.0], variant="dense", units=worse))

    text = markdown(build_matrix([one], [other]))

    assert "ahead" not in text
    assert not {"| better |", "| worse |"} & set(text.split("\n"))
    assert "better |" not in text
    assert "| mean seen | +0.0500 | 1 pair of runs | none: one seed |" in text
    assert "| mean unseen | +1.0000 [1.0000, 1.0000] | 18 units | none: one seed |" in text
    closing = [line for line in text.splitlines() if "One seed decides nothing" in line]
    assert len(closing) == 1
    assert "+0.0500 acc on mean seen and +1.0000 acc on mean unseen" in closing[0]


def test_units_that_tell_another_score_than_the_table_give_no_interval(tmp_path: Path) -> None:
    units = {"u": {"acc": [0.655, 0.655]}, "w": {"acc": [0.3, 0.5, None]}}
    run = read_results(write_run(tmp_path / "m", [0.9, 0.8, 0.6, 0.647, 0.4], units=units))

    assert set(build_matrix([run]).rows[0].intervals) == {"w"}


def test_a_pooled_score_has_an_interval_of_itself(tmp_path: Path) -> None:
    # Two scans, two classes: pooled 1/2 * (3/6 + 4/5); scan by scan it would be 1/2 * (1/2 * (1/4 + 1) + 1) = 0.8125.
    parts = {"u": {"acc": [[[1, 4, 3], [1, 1, 1]], [[2, 2, 2], [3, 4, 3]]]}}
    run = read_results(write_run(tmp_path / "m", [0.9, 0.8, 0.6, 0.65, 0.4], parts=parts))

    interval = build_matrix([run]).rows[0].intervals["u"]

    assert (interval.mean, interval.n) == (0.65, 2)
    # Of a sample of two there are three kinds: one scan twice (0.625), the other twice (0.875), or both (0.65).
    assert (interval.low, interval.high) == (pytest.approx(0.625), pytest.approx(0.875))


def test_means_of_a_difference_are_over_the_domains_that_both_have(tmp_path: Path) -> None:
    one = read_results(write_run(tmp_path / "m", [0.9, None, 0.6, 0.5, 0.3]))
    other = read_results(write_run(tmp_path / "d", [0.7, 0.1, 0.6, 0.5, 0.3], variant="dense"))

    matrix = build_matrix([one], [other])

    found = {d.column: d.interval.mean for d in matrix.differences}
    assert found["mean seen"] == pytest.approx(0.2)
    assert "b" not in found
    assert any("Not every run has acc of b" in note for note in matrix.notes)


@pytest.mark.parametrize("width", [60, 200])
def test_tables_fit_and_markdown_says_the_same(tmp_path: Path, width: int) -> None:
    run = read_results(write_run(tmp_path / "r", [0.9, 0.7, 0.6, 0.5, 0.3]))
    matrix = build_matrix([run])

    assert rich_tables(matrix, width)[0].row_count == (1 if width == 200 else 11)
    text = markdown(matrix)
    assert all(part in text for part in ("u (unseen)", "worst unseen", "0.4000", "larger is better"))


def test_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "m", [0.9, 0.7, 0.6, 0.5, 0.3])
    other = write_run(tmp_path / "d", [0.8, 0.7, 0.6, 0.5, None], variant="dense")

    assert main(["xeval", str(one), "--baseline", str(other), "--out", str(tmp_path / "out")]) == 0

    assert "toy/moe" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "xeval.json").read_text())
    assert written["metric"] == "acc"
    assert [row["variant"] for row in written["rows"]] == ["toy/moe", "toy/dense"]
    assert written["rows"][1]["cells"]["w"] is None
    assert (tmp_path / "out" / "xeval.md").read_text().startswith("# acc")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: ["xeval", str(p / "nothing")], "there is no run"),
        (lambda p: ["xeval", str([p / "bare", (p / "bare").mkdir()][0])], "moeapps test --run"),
        (lambda p: ["xeval", str(write_run(p / "toy" / "moe" / "version_0", [1] * 5).parents[1])], "toy/moe"),
        (
            lambda p: ["xeval", str(write_run(p / "r", [1] * 5)), str(write_run(p / "s", [1] * 5, system="other"))],
            "several systems (other, toy)",
        ),
        (lambda p: ["xeval", str(write_run(p / "r", [1, 1, 1, 1, 1])), "--metric", "f1"], "has no metric 'f1'"),
        (lambda p: ["xeval", str(write_run(p / "r", [1, 1, 1, 1, 1])), "--baseline",
                    str(write_run(p / "x", [1, 1, 1, 1, 1], variant="x")),
                    str(write_run(p / "y", [1, 1, 1, 1, 1], variant="y"))], "mixes the variants"),
    ],
)  # fmt: skip
def test_wrong_runs_are_told(make: Any, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(make(tmp_path)) == 2
    assert text in capsys.readouterr().err


def test_a_damaged_results_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "test.json").write_text('{"rows": [{}]}')

    with pytest.raises(ValueError, match="run the test again"):
        read_results(tmp_path)
