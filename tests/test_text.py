# SPDX-License-Identifier: Apache-2.0
"""Names out of files are shown as they are, in a terminal, in Markdown, HTML and figures."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from moeapps.cli import main
from moeapps.evaluation.results import read_results
from moeapps.evaluation.xeval import build_matrix
from moeapps.reporting.matrix import markdown as markdown_of
from moeapps.reporting.matrix import rich_tables
from moeapps.text import VisibleLines, cell, figure_text, html_text, lines, markdown, plain
from tasks.adaptation.report.predictions import LogitsWriter
from tasks.point_cloud.report.scan_writer import class_list
from tasks.recommendation.report.explanations import explanation_table
from tasks.recommendation.report.score_writer import ScoreTable

FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r\n =1", "\uff1d1", '=HYPERLINK("http://x")']
# What a terminal obeys: colours, a new title of its window, a bell, backspaces; and marks that turn the reading round.
COMMANDS = "\x1b[31m\x1b]0;title\x07\x08\x9b2J\u202e\u2066\u200b\r\x00"
HOSTILE = f"{COMMANDS}[red]a[/red] [/]|<script>alert(1)</script>[l](http://x)![i](y)`c`**b** $\\frac{{ &lt; \\"


def a_run(folder: Path, name: str, metric: str = "accuracy") -> Path:
    (folder / "metrics").mkdir(parents=True)
    rows = [
        {"domain": domain, "role": role, "metric": metric, "value": 0.5, "n": 3, "direction": "max"}
        for domain, role in (("a", "seen"), ("b", "unseen"))
    ]
    header = {"system": "toy", "name": name, "seed": 0, "main_metric": metric}
    (folder / "metrics" / "test.json").write_text(json.dumps({"header": header, "rows": rows}))
    return folder


def test_a_terminal_is_given_no_commands() -> None:
    shown = plain(HOSTILE)
    assert shown.isprintable()
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", shown)
    assert "[red]a[/red]" in shown
    assert "\\x1b[31m" in shown
    assert lines(f"{COMMANDS}\n\tb").splitlines()[-1] == "\tb"
    assert len(plain("x" * 10_000)) < 250
    record = logging.LogRecord("moeapps", logging.INFO, "", 0, "class %s", (COMMANDS,), None)
    assert "\x1b" not in VisibleLines("%(message)s").format(record)


def test_plain_names_stay_as_they_are() -> None:
    for name in ("home/base seed 3", "miou_all", "Zürich", "点云", "a-b_c.d", "0.5000 [0.4000, 0.6000]"):
        assert plain(name) == markdown(name) == html_text(name) == figure_text(name) == lines(name) == name


def test_tables_of_runs_show_names_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k in range(2):
        a_run(tmp_path / str(k), f"{k} {HOSTILE}", f"m[bold]{COMMANDS}")
    matrix = build_matrix([read_results(tmp_path / str(k)) for k in range(2)], [], None)
    stream = io.StringIO()
    for table in rich_tables(matrix, 4000):
        Console(file=stream, width=4000, force_terminal=False).print(table)
    assert "[red]a[/red] [/]" in stream.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", stream.getvalue())

    assert main(["xeval", str(tmp_path / "0"), "--baseline", str(tmp_path / "1")]) == 0
    shown = capsys.readouterr()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown.out + shown.err)


def test_markdown_shows_names_as_they_are(tmp_path: Path) -> None:
    runs = [read_results(a_run(tmp_path / str(k), f"{k} {HOSTILE}")) for k in range(2)]
    text = markdown_of(build_matrix(runs[:1], runs[1:], None))

    assert "<script" not in text
    assert not re.search(r"\]\(http|!\[i\]\(|(?<!\\)`c|(?<!\\)\*\*b|(?<!\\)\$", text)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in tables[:3]}
    assert len(columns) == 1  # no name began a cell
    assert markdown("a|b\n<i>") == "a\\|b\\\\n&lt;i&gt;"
    assert markdown("_a_ b_c __d__") == "\\_a\\_ b_c \\_\\_d\\_\\_"


def test_pages_and_figures_show_names_as_they_are(tmp_path: Path) -> None:
    assert html_text("<img src=x onerror='y'>\"") == "&lt;img src=x onerror=&#x27;y&#x27;&gt;&quot;"
    figure = Figure()
    figure.subplots().set_title(figure_text(HOSTILE))  # a formula that is none would raise here
    figure.savefig(tmp_path / "a.png")


def begins_a_formula(text: str) -> bool:
    """As spreadsheets and the advice of OWASP have it: one of = + - @, also the wide ones, after blanks."""
    number = re.fullmatch(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", text)
    return text.strip()[:1] in {*"=+-@", *"\uff1d\uff0b\uff0d\uff20"} - {""} and not number


def test_a_cell_is_no_formula_and_numbers_stay() -> None:
    assert all(begins_a_formula(name) and not begins_a_formula(str(cell(name))) for name in FORMULAS)
    kept = ["a=b", "", "-1.5", "+2e-3", "-.5", "home/base", "\u70b9\u4e91", 3, -0.25, None]
    assert [cell(value) for value in kept] == kept


def test_written_tables_hold_no_formulas(tmp_path: Path) -> None:
    """Names of classes, items, domains and tasks come from files; a spreadsheet would run those that are formulas."""
    names = [f"{text} {k}" for k, text in enumerate(FORMULAS)]
    data = SimpleNamespace(facts={"class_names": names, "target": "classification"})
    size = len(names)
    answers = {"draw": 0, "index": torch.arange(size), "label": torch.arange(size)}
    answers |= {"logits": -torch.eye(size), "before": torch.eye(size)}
    LogitsWriter.save(LogitsWriter.__new__(LogitsWriter), tmp_path, "a", 0, answers, data)
    (tmp_path / "classes.csv").write_text(class_list(tuple(names)))
    scores = ScoreTable(tmp_path / "scores.csv")
    scores.write({"row": np.arange(size), "domain": np.array(names), "=task": -np.arange(size) / 4})
    scores.close()
    sample = SimpleNamespace(
        parts=-torch.ones(1, 1, 2), gate=torch.ones(1, 2), row=[0], user=[1], item=[2], history_item=torch.ones(1, 1)
    )
    text = explanation_table(sample, lambda item: names[item])  # type: ignore[arg-type]
    (tmp_path / "explanations.csv").write_text(text)

    for name in ("a.csv", "classes.csv", "scores.csv", "explanations.csv"):
        with open(tmp_path / name, newline="") as stream:
            cells = [text for row in csv.reader(stream) for text in row]
        assert sum(text.startswith("'") for text in cells) >= (2 if name == "explanations.csv" else size), name
        assert [text for text in cells if begins_a_formula(text)] == [], name
