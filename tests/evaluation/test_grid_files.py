# SPDX-License-Identifier: Apache-2.0
"""Grids as YAML files: what is read, what is refused and in which line, and that no committed cell became stale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from benchmarks.grids import given, list_systems, load_file, load_grid, without
from moeapps.cli import main as moeapps
from moeapps.evidence.checks import check_words
from moeapps.evidence.grid import Claim, GridError, Ladder, Variant
from moeapps.evidence.reading import read_grid
from moeapps.evidence.summary import summarise
from tests.evaluation.evidence_common import results

ROOT = Path(__file__).resolve().parents[2]
FULL = """
system: toy
config: base.yaml
seeds: [1, [2, 7], 3]
pairs: 2
data_seed_flags: [--data.seed]
flags: [--all=1]
templates:
  setting: &setting [a.yaml, b.yaml]
  lower: &lower {metric: seen/loss, direction: lower, margin: 1}
variants:
  moe: {overlays: *setting, pairs: 3}
  dense: {overlays: [first.yaml, *setting], flags: ['--x=[1,2]'], data_seed_flags: []}
  chain: {stages: [[0.yaml], [1.yaml, --y=2]]}
headline: [moe]
ladder:
  system: chain
  baseline: dense
  metric: seen/loss
  direction: lower
  text: Harder and harder.
  pairs: 2
  levels: {easy: {}, hard: {flags: [--hard=1], overlays: [h.yaml]}}
claims:
  C1: {<<: *lower, text: One., system: moe, baseline: dense}
  C2: {<<: *lower, text: Two., system: moe, baseline_value: 2, rule: exact, margin: 0.5, match: none}
  C3: {text: Three., untested: no data}
show: [seen/loss]
settings_tried: 4
choice: By eye.
"""
MINIMAL = "system: toy\nconfig: base.yaml\nvariants:\n  moe: {}\n  dense:\n    overlays: [dense.yaml]\n"


def write(folder: Path, text: str, **files: str) -> Path:
    for name, content in {"base": "seed_everything: 1\n", "dense": "name: dense\n", **files}.items():
        (folder / f"{name}.yaml").write_text(content, encoding="utf-8")
    path = folder / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- what is read ---


def test_every_key_is_read_and_lists_in_lists_are_laid_flat(tmp_path: Path) -> None:
    file = read_grid(write(tmp_path, FULL))
    grid = file.grid
    assert (grid.seeds, grid.flags, grid.data_seed_flags) == (((1, 1), (2, 7), (3, 3)), ("--all=1",), ("--data.seed",))
    assert grid.variants == {
        "moe": Variant(("a.yaml", "b.yaml"), pairs=3),
        "dense": Variant(("first.yaml", "a.yaml", "b.yaml"), ("--x=[1,2]",), 2, ()),
        "chain": Variant(pairs=2, stages=(("0.yaml",), ("1.yaml", "--y=2"))),
    }
    assert grid.claims == (
        Claim("C1", "One.", "seen/loss", "lower", "moe", "dense", margin=1.0),
        Claim("C2", "Two.", "seen/loss", "lower", "moe", None, "exact", 0.5, "none", baseline_value=2.0),
        Claim("C3", "Three.", untested="no data"),
    )
    levels = {"easy": Variant(), "hard": Variant(("h.yaml",), ("--hard=1",))}
    assert grid.ladder == Ladder(levels, "chain", "dense", "seen/loss", "lower", "Harder and harder.", 2)
    assert (grid.headline, grid.show, grid.settings_tried, grid.choice) == (("moe",), ("seen/loss",), 4, "By eye.")
    assert (file.results, file.page) == (Path("evidence"), Path("evidence/evidence.md"))


def test_what_is_left_out_has_the_value_that_the_page_says(tmp_path: Path) -> None:
    file = read_grid(write(tmp_path, MINIMAL))
    assert file.grid.seeds == ((1, 1), (2, 2), (3, 3))
    assert [variant.pairs for variant in file.grid.variants.values()] == [3, 3]
    assert file.grid.data_seed_flags == ("--data.init_args.seed",)
    assert file.command == f"moeapps evidence {file.path}"


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        (MINIMAL + "claim: {}\n", 7, "unknown key 'claim'; allowed are system, config"),
        (MINIMAL + "  moe: {}\n", 7, "'moe' stands in line 4 already"),
        (MINIMAL + "    overlay: [x.yaml]\n", 7, "unknown key 'overlay'; allowed are overlays, flags"),
        (MINIMAL + "    flags: --x=1\n", 7, "flags: given '--x=1', wanted a list of words"),
        (MINIMAL + "    flags:\n      - --x=1\n      - 3\n", 9, "3 is no text to YAML"),
        (MINIMAL + "    pairs: 9\n", 5, "variant 'dense' asks for 9 pairs; the grid has 3 seeds"),
        (MINIMAL + "  Moe: {}\n", 7, "variant 'Moe': use lower case"),
        (MINIMAL + "  1: {}\n", 7, "the name 1 is no text to YAML"),
        (MINIMAL + "seeds: [[1, 2, 3]]\n", 7, "neither a seed nor a pair"),
        (MINIMAL + "seeds: 0\n", 7, "seeds: given 0"),
        (MINIMAL + "headline: [mo]\n", 7, "the headline names variant 'mo'; defined are moe, dense"),
        (MINIMAL + "ladder: {system: moe}\n", 7, "the ladder lacks levels, baseline"),
        (MINIMAL + "claims:\n  C1: {text: X., metric: a/b, system: mo, baseline: moe}\n", 8, "names variant 'mo'"),
        (MINIMAL + "claims:\n  C1: {metric: a/b, system: dense, baseline: moe}\n", 8, "say in 'text'"),
        (MINIMAL + "claims:\n  C1:\n    text: X.\n    direction: up\n", 10, "given 'up', allowed are higher, lower"),
        (MINIMAL + "claims:\n  C1:\n    text: X.\n    margin: much\n", 10, "given 'much', wanted a number"),
        (MINIMAL + "claims:\n  C1:\n    text: X.\n    clustered: 1\n", 10, "given 1, wanted true or false"),
        (MINIMAL + "claims:\n  C1:\n    text: X.\n    metric: a/b\n    system: moe\n", 8, "either a baseline variant"),
        ("system: toy\nconfig: base.yaml\n", 1, "the key 'variants' is missing"),
        ("system: toy\n\tconfig: x\n", 2, "found character"),
        ("[1, 2]\n", 1, "given list, wanted keys"),
    ],
)
def test_what_is_wrong_in_a_grid_is_told_with_its_line(tmp_path: Path, text: str, line: int, told: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(GridError) as caught:
        read_grid(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "overlay", "told"),
    [
        ("", None, "grid.yaml, line 6: dense: there is no config 'over.yaml'"),
        ("", "name: a\nmodle: {}\n", "over.yaml, line 2: unknown key 'modle'"),
        ("", "name: a\ndata: {init_args: {sede: 1}}\n", "over.yaml, line 2: data: unknown option 'sede'"),
        ("", "a: [1\nb: 2\n", "over.yaml, line 2: while parsing a flow sequence"),
        ("--trainer.max_epoch=1", "name: a\n", "grid.yaml, line 7: dense: unknown key 'trainer.max_epoch'"),
    ],
)
def test_a_wrong_overlay_is_one_line_with_file_and_line_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    overlay: str | None,
    told: str,
) -> None:
    text = "system: home\nconfig: configs/home.yaml\nvariants:\n  home: {}\n  dense:\n    overlays: [over.yaml]\n"
    (tmp_path / "grid.yaml").write_text(text + f"    flags: [{flags}]\n")
    if overlay is not None:
        (tmp_path / "over.yaml").write_text(overlay)
    monkeypatch.chdir(tmp_path)

    assert moeapps(["evidence", "grid.yaml"]) == 2

    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"error: {told}")
    assert not (tmp_path / "runs").exists()


def test_a_missing_grid_and_a_wrong_shard_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, MINIMAL)
    assert moeapps(["evidence", "none.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no grid none.yaml (No such file")
    assert moeapps(["evidence", "grid.yaml", "--shard", "0/2"]) == 2
    assert capsys.readouterr().err.startswith("error: --shard 0/2: give i/n with i from 1 to n")


# --- our own ---


@pytest.mark.parametrize("system", list_systems())
def test_no_committed_cell_is_stale(system: str) -> None:
    """The digest of every variant is that of its cells: nothing that made them has changed since."""
    file = load_file(system)
    cells = [json.loads(path.read_text()) for path in (ROOT / file.results / system / "cells").glob("*.json")]
    now = {name: file.grid.definition(name, ROOT) for name in file.grid.all_variants}
    stale = [f"{c['variant']}-s{c['seed']}" for c in cells if now.get(c["variant"], c["definition"]) != c["definition"]]
    assert cells
    assert stale == []


@pytest.mark.parametrize("system", list_systems())
def test_words_and_files_of_our_grids_can_be_right(system: str) -> None:
    check_words(load_file(system), ROOT)


def test_options_of_a_variant_are_found_and_left_out() -> None:
    variant = Variant(("a.yaml",), ("--x=1", "--xy=2", "--x=3"), 8)
    assert (given(variant, "--x"), given(variant, "--y")) == ("3", None)
    assert without(variant, "--x") == Variant(("a.yaml",), ("--xy=2",), 1)
    assert load_grid("home") is load_grid("home")


# --- the interval, and a grid of one's own ---


def test_the_interval_of_a_claim_is_the_paired_t_of_scipy(tmp_path: Path) -> None:
    text = MINIMAL + "seeds: 5\nclaims:\n  C1: {text: X., metric: unseen/miou, system: moe, baseline: dense}\n"
    moe, dense = [0.61, 0.58, 0.66, 0.70, 0.59], [0.55, 0.57, 0.61, 0.60, 0.58]
    claim = summarise(read_grid(write(tmp_path, text)).grid, results(moe=moe, dense=dense))["claims"][0]
    known = stats.ttest_rel(moe, dense).confidence_interval(0.95)
    assert claim["ci95"] == pytest.approx([known.low, known.high], rel=1e-9)
    assert claim["verdict"] == ("supported" if known.low > 0 else "inconclusive")


OWN = """
system: mine
config: mine.yaml
seeds: 1
variants:
  long: {flags: [--trainer.max_epochs=2]}
  short: {overlays: [short.yaml]}
claims:
  C1: {text: Two epochs cost more., metric: train_flops, system: long, baseline: short, rule: exact, match: none}
"""


@pytest.mark.medium
def test_a_grid_of_a_package_of_ones_own_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "toy.py").write_text((ROOT / "tests" / "toy.py").read_text())
    (tmp_path / "mine.yaml").write_text((ROOT / "tests" / "toy.yaml").read_text().replace("tests.toy", "mine.toy"))
    (tmp_path / "short.yaml").write_text("trainer: {max_epochs: 1}\n")
    (tmp_path / "grid.yaml").write_text(OWN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("MOEAPPS_RUNS", None)

    command = [sys.executable, "-m", "moeapps", "evidence", "grid.yaml", "--jobs", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    claim = json.loads((tmp_path / "evidence" / "grid.json").read_text())["claims"][0]
    assert claim["verdict"] == "supported"
    assert claim["train_flops_ratio"] == 2.0
    page = (tmp_path / "evidence" / "evidence.md").read_text()
    assert "## grid" in page.splitlines(), "a system may have several grids: each has its own name"
    assert "`moeapps evidence grid.yaml`" in page
    assert {path.name for path in (tmp_path / "evidence" / "grid" / "cells").iterdir()} == {
        "long-s1-d1.json",
        "short-s1-d1.json",
    }
