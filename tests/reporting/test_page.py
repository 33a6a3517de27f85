# SPDX-License-Identifier: Apache-2.0
"""The report page, read as HTML without a browser: what it holds and must not hold, and where its numbers are from."""

from __future__ import annotations

import csv
import inspect
import json
import re
import sys
import time
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from moeapps.cli import main
from moeapps.reporting.knowledge import ExpertTable
from moeapps.reporting.page import curve_plots, expert_table, rounded
from moeapps.reporting.view import group, read_run
from moeapps.training.task import BaseTask
from tests.reporting.made_runs import DOMAINS, layer, tone, write, write_run, write_scan

HOSTILE = "<script>alert(1)</script>\"'{{7*7}}&</style>"


class Reader(HTMLParser):
    """Elements with their attributes, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "link", "img", "br", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in {*self._open[-1:], "" if "script" not in self._open and "style" not in self._open else "code"}:
            self.text.setdefault(tag, []).append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.text[""]).split())


def page(tmp_path: Path, *runs: Path, code: int = 0) -> tuple[str, Reader]:
    file = tmp_path / "out" / "report.html"
    assert main(["report", *map(str, runs), "-o", str(file)]) == code
    text = file.read_text(encoding="utf-8")
    return text, Reader(text)


def own_part(text: str) -> str:
    """The page without plotly's script."""
    scripts = re.split(r"<script>", text)
    longest = max(scripts, key=len)
    return text.replace(longest[: longest.index("</script>")], "")


def test_a_page_needs_no_network(tmp_path):
    text, read = page(tmp_path, write_run(tmp_path / "a"))
    for name, attributes in read.elements:
        for key in ("src", "href", "action", "poster", "data", "srcset", "formaction", "xlink:href"):
            value = attributes.get(key, "#")
            assert value.startswith(("#", "data:")), (name, key, value[:80])
    own = own_part(text)
    assert not re.search(r"https?://|//cdn|@import|url\(", own)
    policy = next(a["content"] for a in read.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_the_script_of_plotly_is_embedded_once(tmp_path):
    text, _ = page(tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1))
    assert text.count("plotly.js v") == 1
    assert len(text) < 25_000_000


def test_the_first_screen_says_who_won_and_what_experts_learned(tmp_path):
    system = write_run(tmp_path / "moe")
    twin = write_run(tmp_path / "dense", name="dense", scores=(0.82, 0.8, 0.65, 0.5), layers={})
    _, read = page(tmp_path, system, twin)
    assert (
        "In 1 of 2 MoE layers the experts specialise, most by domain in layer 2: the expert tells 46 % of it"
        in read.words
    )
    assert "est on seen domains: toy/dense (one seed decides nothing)" in read.words
    assert "best on validation, unseen domains: toy/base (one seed decides nothing)" in read.words


def numbers_of(value) -> set[float]:
    if isinstance(value, dict):
        return set().union(*map(numbers_of, value.values()), set())
    if isinstance(value, list):
        return set().union(*map(numbers_of, value), set())
    return {float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def test_every_score_and_cost_on_the_page_stands_in_the_files_of_its_run(tmp_path):
    folder = write_run(tmp_path / "a")
    _, read = page(tmp_path, folder)
    results = json.loads((folder / "metrics" / "test.json").read_text())
    shown = [float(a["value"]) for a in read.all("data")]
    # Means of roles, worst and gap by hand: (0.81 + 0.79) / 2, 0.7, 0.613, 0.613, 0.8 - 0.613.
    derived = {0.8, 0.7, 0.613, 0.187}
    routing = json.loads((folder / "metrics" / "routing_test.json").read_text())
    # Of the experts: 4 of them, none dead or idle, load even and 1 each.
    counted = {4.0, 0.0, 1.0}
    known = numbers_of(results) | numbers_of(routing) | counted
    assert [x for x in shown if x not in known and not any(abs(x - y) < 1e-12 for y in derived)] == []
    for value in (0.81, 0.79, 0.7, 0.613, 4321, 1234, 987654321, 77, 12.75, 0.456, 0.69):
        assert value in shown


def test_drawings_hold_the_numbers_of_the_run(tmp_path):
    folder = write_run(tmp_path / "a")
    text, _ = page(tmp_path, folder)
    found = [json.loads(part) for part in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text)]
    scores, curves = found[0]["data"], {t["name"]: t for figure in found[1:] for t in figure["data"]}
    assert scores[0]["y"] == [0.81, 0.79, 0.7, 0.613]
    assert scores[0]["x"] == [f"{name} ({role})" for name, role in DOMAINS.items()]
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert curves["loss"]["y"] == [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert curves["unseen"]["y"] == pytest.approx([0.42, 0.44])
    assert curves["net.blocks.1.ffn"]["y"] == pytest.approx([0.28, 0.26])


def test_intervals_are_those_of_the_comparison(tmp_path):
    folder = write_run(tmp_path / "a")
    _, read = page(tmp_path, folder)
    from moeapps.evaluation.results import read_results
    from moeapps.evaluation.xeval import unit_intervals
    from moeapps.reporting.verdict import number

    for interval in unit_intervals(read_results(folder), "accuracy").values():
        assert f"[{number(interval.low)}, {number(interval.high)}]" in read.words


def test_names_out_of_files_are_shown_and_never_obeyed(tmp_path):
    domains = {HOSTILE: "seen", "b": "unseen"}
    own = {f"net.{HOSTILE}": layer([[90.0, 1.0], [1.0, 90.0]], 0.9)}
    folder = write_run(tmp_path / "a", system=HOSTILE, name=HOSTILE, domains=domains, scores=(0.5, 0.6), layers=own)
    write(folder / "config.yaml", f"system: toy\n# {HOSTILE}\n")
    text, read = page(tmp_path, folder)
    assert "alert(1)</script>" not in text
    assert "<script>alert" not in text
    assert [a for _, a in read.elements if any(key.startswith("on") for key in a)] == []
    assert "49" not in re.sub(r"[\d.]*\d{3,}", "", read.words).split()
    assert read.words.count(HOSTILE) > 3
    drawn = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, flags=re.DOTALL)
    assert all("<" not in part for part in drawn)
    # Plotly takes tags in text for markup: names reach it escaped once more.
    assert json.loads(drawn[0])["data"][0]["x"][0].startswith("&lt;script&gt;")


def test_elements_for_screen_readers_belong_together(tmp_path):
    _, read = page(tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b", system="other"))
    known = [a["id"] for _, a in read.elements if "id" in a]
    assert len(known) == len(set(known))
    tabs = [a for a in read.all("button") if a.get("role") == "tab"]
    assert len(tabs) >= 5
    for tab in tabs:
        assert tab["aria-controls"] in known
    for _, attributes in read.elements:
        if attributes.get("role") in ("tablist", "region", "img", "group"):
            assert attributes["aria-label"]
        if attributes.get("role") == "tabpanel":
            assert attributes["aria-labelledby"] in known
    assert all(a["alt"] for a in read.all("img"))
    assert read.all("html")[0]["lang"] == "en"
    assert [name for name, _ in read.elements].count("h1") == 1


def test_galleries_show_scans_and_clips(tmp_path):
    scans = write_run(tmp_path / "pm", system="point_moe", task="tasks.point_cloud.module.PointCloudTask")
    write_scan(scans / "gallery" / "north.npz")
    clips = write_run(tmp_path / "audio", system="unimoe_audio", task="tasks.audio.module.AudioTask")
    for stem in ("north-0", "north-0-real"):
        tone(clips / "samples" / "test" / f"{stem}.wav")
        write(clips / "samples" / "test" / f"{stem}.txt", "speech: <i>ba</i>")
    _, read = page(tmp_path, scans, clips)
    sounds = read.all("audio")
    assert len(sounds) == 2
    assert all(a["src"].startswith("data:audio/wav;base64,") and a["aria-label"] for a in sounds)
    assert [a["data-colouring"] for a in read.all("button") if "data-colouring" in a] == ["0", "1", "2"]
    assert "speech: <i>ba</i>" in read.words
    assert "scan_0;" in read.words


def test_an_interrupted_run_and_a_damaged_one_are_notes_on_the_page(tmp_path, capsys):
    whole = write_run(tmp_path / "whole")
    stopped = write_run(tmp_path / "stopped", name="stopped", seed=1)
    (stopped / "metrics" / "test.json").unlink()
    damaged = write_run(tmp_path / "damaged", name="damaged", seed=2)
    write(damaged / "metrics" / "test.json", "{")
    _, read = page(tmp_path, whole, stopped, damaged)
    assert "This run has no test results (interrupted, or not tested yet)" in read.words
    assert "results left out:" in read.words
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 2
    assert all(line.startswith("note: ") for line in told)


def test_a_run_without_the_metric_is_told_and_the_others_are_shown(tmp_path):
    whole = write_run(tmp_path / "whole")
    other = write_run(tmp_path / "other", name="other")
    text = (other / "metrics" / "test.json").read_text()
    write(other / "metrics" / "test.json", text.replace('"metric": "accuracy"', '"metric": "loss"'))
    _, read = page(tmp_path, whole, other)
    assert "2 runs are not compared:" in read.words
    assert "has no metric 'accuracy'" in read.words


def test_systems_may_be_mixed(tmp_path):
    _, read = page(tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b", system="other"))
    assert "2 runs of 2 systems" in read.words
    assert read.words.count("Scores by domain") == 2
    assert "Who won where" not in read.words  # one variant each: nobody won


def test_a_system_is_called_by_its_published_name(tmp_path):
    told = write_run(tmp_path / "told", system="told")
    write(told / "run.json", {"system": "told", "about": "ToLD: experts that tell."})
    sentence = write_run(tmp_path / "said", system="said")
    write(sentence / "run.json", {"system": "said", "about": "experts that say something and no name"})
    old = write_run(tmp_path / "old", system="home")  # its run.json says nothing, yet its config is at hand
    unknown = write_run(tmp_path / "unknown", system="nowhere")
    runs = [read_run(folder) for folder in (told, sentence, old, unknown)]
    assert [(one.title, one.about) for one in group(runs)] == [
        ("ToLD", "experts that tell"),
        ("said", "experts that say something and no name"),
        ("HoME", "a hierarchy of multi-gate experts ranks for six behaviours at once"),
        ("nowhere", ""),
    ]
    _, read = page(tmp_path, told, old)
    assert "ToLD told Experts that tell." in read.words
    assert "HoME home" in read.words


def test_a_long_sentence_is_shown_whole(tmp_path):
    names = [f"{'a_long_name_of_a_domain_' * 6}{k}" for k in range(4)]
    folder = write_run(tmp_path / "a", domains=dict(zip(names, DOMAINS.values(), strict=True)))
    sentence = read_run(folder).finding.sentence
    assert len(sentence) > 400
    assert sentence in page(tmp_path, folder)[1].words


def test_one_validation_is_no_curve(tmp_path):
    folder = write_run(tmp_path / "a")
    write(folder / "metrics.csv", "step,train/loss,val/seen/accuracy\n0,2.5,\n1,1.5,\n1,,0.5\n")
    assert [plot.title for plot in curve_plots(read_run(folder))] == ["Training loss"]


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [(0.02038, -0.0137, 0.0204, "0.020"), (-0.0001, -0.0137, 0.02, "0.000"), (12.4, 0.0, 31.0, "12"), (1, 1, 1, "1.0")],
)
def test_numbers_of_a_shaded_table_have_two_digits_of_the_largest(value, low, high, text):
    assert rounded(value, low, high) == text


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics/routing_test.json", "{"),
        ("metrics.csv", "step,train/loss\n0,much\n"),
        ("run.json", "[]"),
        ("metrics/experts.json", "[1"),
    ],
)
def test_a_damaged_part_costs_itself_alone(tmp_path, file, text):
    folder = write_run(tmp_path / "a")
    write(folder / file, text)
    _, read = page(tmp_path, folder)
    assert "left out" in read.words
    assert "0.613" in read.words


def test_a_damaged_configuration_is_told(tmp_path):
    whole, damaged = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)
    write(damaged / "config.yaml", "a: [\n")
    _, read = page(tmp_path, whole, damaged)
    assert "config.yaml left out:" in read.words
    assert "0.613" in read.words


def test_a_damaged_gallery_costs_itself_alone(tmp_path):
    folder = write_run(tmp_path / "pm", system="point_moe", task="tasks.point_cloud.module.PointCloudTask")
    write(folder / "gallery" / "north.npz", "no archive")
    _, read = page(tmp_path, folder)
    assert "samples left out:" in read.words
    assert "0.613" in read.words


@pytest.mark.parametrize("kind", ["missing", "empty", "untested"])
def test_nothing_to_show_is_one_line_and_exit_code_2(tmp_path, capsys, kind):
    folder = tmp_path / "run"
    if kind != "missing":
        folder.mkdir()
    if kind == "untested":
        write(folder / "config.yaml", "system: toy\n")
    assert main(["report", str(folder), "-o", str(tmp_path / "report.html")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert not (tmp_path / "report.html").exists()


def test_nothing_of_a_run_is_imported(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "trap", task="trap.module.Task")
    write(folder / "module.py", "raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(folder)
    page(tmp_path, folder)
    assert "trap" not in sys.modules
    assert "module" not in sys.modules


def test_the_help_says_what_is_written(capsys):
    assert main(["report", "--help"]) == 0
    told = capsys.readouterr().out
    assert "no code of a run is imported" in " ".join(told.split())


def test_two_runs_of_seven_systems_are_one_page_of_bounded_size_and_time(tmp_path):
    runs = []
    for k in range(7):
        for seed in (0, 1):
            run = write_run(tmp_path / f"{k}-{seed}", system=f"system_{k}", seed=seed)
            runs.append(run)
    begin = time.process_time()
    text, _ = page(tmp_path, *runs)
    assert time.process_time() - begin < 30
    assert len(text.encode()) < 25_000_000


def test_of_many_labels_those_are_shown_that_each_expert_takes_most_of():
    work = np.tile([10.0, 0.0, 0.0], (20, 1))
    work[15], work[17] = [1.0, 9.0, 0.0], [2.0, 0.0, 8.0]
    shown = expert_table(ExpertTable("net", "place", [f"place {k}" for k in range(20)], work.tolist()), 8)
    assert len(shown.rows) == 8
    assert {"place 15", "place 17"} <= {row[0] for row in shown.rows}
    assert all(max(column) > 0 for column in list(zip(*shown.rows, strict=True))[1:]), "no expert that works has only 0"
    assert "8 are shown" in shown.caption
    assert "12 are not" in shown.caption


def test_what_a_mask_forbids_is_hatched_and_no_zero(tmp_path):
    run = write_run(tmp_path / "a", task="tasks.recommendation.module.RankingTask")
    gates = {"gates": ["a", "b"], "experts": ["a.0", "b.0", "shared.0"]}
    level = {**gates, "share": [[0.6, 0.0, 0.4], [0.0, 0.004, 0.996]]}
    write(run / "metrics" / "experts.json", {"levels": [level], "work": {}})
    text, read = page(tmp_path, run)
    masked = [a for a in read.all("td") if a.get("class") == "masked"]
    assert len(masked) == 2 * text.count('role="region" aria-label="Experts by gate')
    assert len(masked) >= 2
    assert "hatched: the gate may not choose this expert" in read.words
    assert ">0</td>" in text, "a weight of 0.4 % is a zero, not a mask"


def test_every_task_says_what_the_score_is_that_its_runs_are_compared_by(tmp_path):
    for file in sorted(Path("tasks").glob("*/module.py")):
        task = import_module(f"tasks.{file.parent.name}.module")
        known = import_module(f"tasks.{file.parent.name}.report.gallery").METRICS
        kinds = [one for one in vars(task).values() if inspect.isclass(one) and issubclass(one, BaseTask)]
        assert {one.main_metric for one in kinds if one.__module__ == task.__name__} <= set(known), file
    run = write_run(tmp_path / "a", task="tasks.point_cloud.module.PointCloudTask")
    results = json.loads((run / "metrics" / "test.json").read_text().replace('"accuracy"', '"miou"'))
    write(run / "metrics" / "test.json", results)
    _, read = page(tmp_path, run)
    assert read.words.count("mean over the classes present of hits") == 2
