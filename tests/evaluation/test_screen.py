# SPDX-License-Identifier: Apache-2.0
"""Eight runs on a screen of 80 columns: nothing is cut, the numbers are those of the matrix; and the files beside."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console

from moeapps.cli import main
from moeapps.evaluation.results import read_results
from moeapps.evaluation.xeval import Matrix, build_matrix
from moeapps.reporting.matrix_files import csv_text, latex_text
from moeapps.reporting.screen import bracketed, number, plus_minus, score, screen_tables
from tests.evaluation.xeval_common import write_run

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("base", "dense", "ppt_classifier", "random")
DOMAINS = {
    **dict.fromkeys(("rgbd_room", "tls_office", "cad_room", "drive64", "drive32", "als"), "seen"),
    "drive16": "validation",
    **dict.fromkeys(("rgbd_house", "drive_front", "real_als"), "unseen"),
}


def eight(folder: Path, system: str = "point_moe") -> list[Path]:
    sizes = {"params_total": 1_522_286, "params_active": 1_350_254, "flops_per_token": 487_762, "train_flops": 3.27e12}
    return [
        write_run(
            folder / system / name / f"version_{seed}",
            [0.3 + 0.05 * i + 0.02 * seed * (i % 3) - 0.01 * k for i in range(len(DOMAINS))],
            variant=name,
            seed=seed,
            system=system,
            roles=DOMAINS,
            **sizes,
        )
        for k, name in enumerate(NAMES)
        for seed in (0, 1)
    ]


def matrix_of(paths: list[Path], base: int = 2) -> Matrix:
    runs = [read_results(path) for path in paths]
    return build_matrix(runs, runs[base : base + 2])


def lines_of(matrix: Matrix, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=500, record=True)
    for table in screen_tables(matrix, width):
        console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize("system", ["aw_moe", "home", "meta_dmoe", "mixer", "point_moe", "promoe", "unimoe_audio"])
def test_eight_runs_of_any_system_fit_80_columns_and_a_page(tmp_path: Path, system: str) -> None:
    lines = lines_of(matrix_of(eight(tmp_path, system)), 80)
    assert max(map(len, lines)) <= 80
    assert len(lines) < 60
    text = "\n".join(lines)
    for name in (*NAMES, *DOMAINS):
        assert re.search(rf"(?<!\w){name}(?!\w)", text), f"{name} is whole"
    assert lines[0].startswith(f"{system}: acc (larger is better")
    assert "1.52 M" in text
    assert "3.27 T" in text
    assert "difference to dense" in text


@pytest.mark.medium
def test_a_terminal_of_80_columns_cuts_no_number(tmp_path: Path) -> None:
    """A real pseudo-terminal, and the program as a user calls it."""
    paths = [str(path) for path in eight(tmp_path)]
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(PYTHONPATH=str(ROOT), TERM="xterm")
        os.environ.pop("COLUMNS", None)
        os.execv(sys.executable, [sys.executable, "-m", "moeapps", "xeval", *paths, "--baseline", *paths[2:4]])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
    found = b""
    try:
        while part := os.read(terminal, 65536):
            found += part
    except OSError:  # the program has closed its end
        pass
    _, status = os.waitpid(child, 0)
    text = re.sub(r"\x1b\[[0-9;]*m", "", found.decode()).replace("\r", "")
    assert os.waitstatus_to_exitcode(status) == 0, text
    assert max(len(line) for line in text.splitlines()) <= 80
    # By hand: (0.3 + 0.32)/2 on the worst unseen domain rgbd_house of two seeds, for instance, is 0.65 + 0.01.
    assert re.search(r"base +rgbd_house +\d of 2 +0\.6600 \[", text)
    assert "ppt_classifier" in text


def test_forms_tell_as_much_as_there_is_room_for(tmp_path: Path) -> None:
    matrix = matrix_of(eight(tmp_path))
    found = score(matrix, "point_moe/base", "mean unseen")
    assert found is not None
    half = (found.high - found.low) / 2
    assert bracketed(found) == f"{found.mean:.4f} [{found.low:.4f}, {found.high:.4f}]"
    assert plus_minus(found) == f"{found.mean:.3f} ±{half:.3f}"
    assert number(found) == f"{found.mean:.4f}"
    wide, narrow = "\n".join(lines_of(matrix, 250)), "\n".join(lines_of(matrix, 80))
    assert bracketed(found) in wide
    assert plus_minus(found) in narrow
    assert "gap" in wide


def test_eight_variants_come_in_three_tables_of_domains(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / str(k), [0.1 * (i + 1) for i in range(10)], variant=f"setting_{k}_of_8", roles=DOMAINS)
        for k in range(8)
    ]
    lines = lines_of(build_matrix([read_results(path) for path in paths]), 80)
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("acc by domain") for line in lines) == 3


def test_the_worst_domain_of_one_run_has_the_interval_of_its_units(tmp_path: Path) -> None:
    units = {"u": {"acc": [0.2, 0.4, 0.6, 0.4]}, "w": {"acc": [0.9, 0.9]}}
    matrix = build_matrix([read_results(write_run(tmp_path / "r", [0.9, 0.7, 0.6, 0.4, 0.9], units=units))])
    (row,) = matrix.rows
    assert row.worst == "u"
    assert row.interval("worst unseen") == row.intervals["u"]
    assert row.intervals["u"].low < 0.4 < row.intervals["u"].high
    assert re.search(r"moe +u +1 of 1 +0\.4000 \[.*\] +4 test units", "\n".join(lines_of(matrix, 80)))


def test_csv_and_latex_hold_the_numbers_of_the_matrix(tmp_path: Path) -> None:
    matrix = matrix_of(eight(tmp_path))
    rows = list(csv.DictReader(io.StringIO(csv_text(matrix))))
    means = {(r["variant"], r["column"]): float(r["value"]) for r in rows if r["kind"] == "mean"}
    assert means["point_moe/base", "rgbd_house"] == pytest.approx((0.65 + 0.65 + 0.02 * (7 % 3)) / 2)
    assert sum(r["kind"] == "run" for r in rows) == 8 * len(matrix.columns)
    assert {r["run"] for r in rows if r["kind"] == "difference"} == {"point_moe/dense"}
    flops = [r for r in rows if r["kind"] == "cost" and r["metric"] == "train_flops"]
    assert [float(r["value"]) for r in flops] == [3.27e12] * 4
    table = latex_text(matrix)
    assert table.count(r"\\") == 5
    assert r"point\_moe/ppt\_classifier & 2 & $" in table
    assert r"$3.27 \cdot 10^{12}$" in table
    assert latex_text(matrix_of(eight(tmp_path / "2", "a&b%"))).count(r"a\&b\%/") == 4


def test_all_files_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(path) for path in eight(tmp_path)]
    assert main(["xeval", *paths, "--select", "--full", "--out", str(tmp_path / "out")]) == 0
    assert "version_1" in capsys.readouterr().out, "every run for itself"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"xeval.{e}" for e in ("md", "json", "csv", "tex")}
    written = json.loads((tmp_path / "out" / "xeval.json").read_text())
    assert [choice["rule"] for choice in written["choices"]] == ["seen", "validation", "oracle"]
    assert written["costs"][0]["sizes"]["params_total"] == 1_522_286


def test_every_run_that_cannot_be_read_has_a_line_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, broken, cut = eight(tmp_path)[:3]
    (broken / "metrics" / "test.json").write_text('{"header": {}, "rows": [')
    (cut / "metrics" / "test.json").unlink()  # a run that was interrupted has no results
    assert main(["xeval", str(good), str(broken), str(cut), str(tmp_path / "none")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert "is not a results file of moeapps" in told[0]
    assert told[1].endswith(f"make it with: moeapps test --run {cut}")
    assert "there is no run" in told[2]
