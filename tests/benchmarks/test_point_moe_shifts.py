# SPDX-License-Identifier: Apache-2.0
"""The sweep of shifts: its levels, its scores and its files, on next to nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.point_moe_shifts import KNOBS, Knob, Level, ShiftError, load_run, main, report, score_level
from moeapps.cli import main as moeapps
from tasks.point_cloud.data.domains import DOMAINS, SEEN
from tasks.point_cloud.data.shifts import Shifted

pytestmark = pytest.mark.medium

CONFIGS = Path("configs")
DENSE = ["--config", str(CONFIGS / "baselines" / "point_moe_dense.yaml")]


def words(root: Path, domain: str) -> list[str]:
    return [
        *("fit", "--config", str(CONFIGS / "point_moe.yaml"), "--config", str(CONFIGS / "debug" / "tiny.yaml")),
        *("--config", str(CONFIGS / "debug" / "point_moe.yaml"), "--trainer.callbacks", "null"),
        *(f"--data.init_args.seen=[{domain}]", "--data.init_args.validation=[cad_room]", "--data.init_args.unseen=[]"),
        *("--data.init_args.cache_dir", str(root / "cache"), "--data.init_args.max_voxels", "4000"),
        *("--test_after_fit", "false", "--trainer.limit_train_batches", "1"),
        *("--model.init_args.net.init_args.enc_depths=[1,1]", "--model.init_args.net.init_args.enc_dims=[16,16]"),
        *("--model.init_args.net.init_args.dec_depths=[1]", "--model.init_args.net.init_args.dec_dims=[16]"),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A mixture and its dense twin after one step each."""
    root = tmp_path_factory.mktemp("shifts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEAPPS_RUNS", str(root / "runs"))
        assert moeapps(words(root, "drive64")) == 0
        assert moeapps([*words(root, "drive64"), *DENSE]) == 0
        yield root / "runs" / "point_moe" / "base", root / "runs" / "point_moe" / "dense"


def test_every_knob_changes_one_thing_from_one_unchanged_level() -> None:
    assert [knob.name for knob in KNOBS] == ["density", "dropout", "masking", "noise", "height", "beams"]
    for knob in KNOBS:
        assert knob.base in SEEN
        assert sum(not level.shift for level in knob.levels) == 1
        assert len({level.label for level in knob.levels}) == len(knob.levels) >= 3
        assert len({key for level in knob.levels for key in level.shift if key != "mask_size"}) == 1
        for level in knob.levels:
            described = Shifted(base=knob.base, **level.shift).describe()
            assert described.endswith("unchanged") is not bool(level.shift)


def test_unchanged_labels_are_those_of_the_sensor() -> None:
    labels = {knob.name: next(level.label for level in knob.levels if not level.shift) for knob in KNOBS}

    assert float(labels["height"]) == DOMAINS["drive64"].sensor.height
    assert float(labels["beams"]) == DOMAINS["drive64"].sensor.beams


def test_the_command_writes_scores_and_curves_of_every_run(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out, figure = tmp_path / "shifts.json", tmp_path / "figures" / "shifts.png"
    flags = ["--out", str(out), "--figure", str(figure), "--scenes", "1", "--knobs", "density", "beams"]

    assert main([*map(str, runs), *flags]) == 0

    results = json.loads(out.read_text())
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert [knob["name"] for knob in results["knobs"]] == ["density", "beams"]
    assert list(results["runs"]) == ["base", "dense"]
    levels = {knob.name: [level.label for level in knob.levels] for knob in KNOBS}
    points: dict[str, list[int]] = {}
    for run in results["runs"].values():
        for name, table in run["knobs"].items():
            assert [row["level"] for row in table] == levels[name]
            assert all(0 <= row[key] <= 1 for row in table for key in ("miou", "miou_all", "macc", "allacc"))
            assert all(row["scenes"] == [pytest.approx(row["miou"])] for row in table)  # one scene
            assert points.setdefault(name, [row["points"] for row in table]) == [row["points"] for row in table]
        unchanged = [run["knobs"][name][0] for name in ("density", "beams")]
        assert {**unchanged[0], "level": ""} == {**unchanged[1], "level": ""}  # the same scene
    assert points["density"] == sorted(points["density"], reverse=True)
    assert points["density"][1] == pytest.approx(points["density"][0] / 2, rel=0.05)
    assert points["beams"] == sorted(points["beams"], reverse=True)


def test_the_unchanged_level_is_the_ordinary_test(runs: tuple[Path, Path]) -> None:
    run = load_run(runs[0])
    scans = Shifted(base="drive64", scenes=1).scans("test", None)

    row = score_level(run, KNOBS[0], scans)

    folder = run.folder
    assert moeapps(["test", "--run", str(folder), "--trainer.limit_test_batches", "1.0"]) == 0
    rows = json.loads((folder / "metrics" / "test.json").read_text())["rows"]
    tested = {line["metric"]: line["value"] for line in rows if line["domain"] == "drive64"}
    for name in ("miou", "miou_all", "macc", "allacc"):
        assert row[name] == pytest.approx(tested[name], abs=2e-3)  # cached scans keep normals in half precision


def test_runs_that_cannot_be_swept_are_told(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--out", str(tmp_path / "a.json"), "--figure", str(tmp_path / "a.png")]

    assert main([str(tmp_path / "nowhere"), *flags]) == 2
    assert "finished run" in capsys.readouterr().err
    assert main([str(runs[0]), "--knobs", "noise", *flags]) == 2
    assert "does not know tls_office" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_two_runs_of_one_name_or_of_two_worlds_are_refused(runs: tuple[Path, Path]) -> None:
    run, other = load_run(runs[0]), load_run(runs[1])
    knob = Knob("density", "", "drive64", (Level("1"),))
    with pytest.raises(ShiftError, match="share a name"):
        report([run, run], [knob], 1)

    other.data.data_seed = 1
    with pytest.raises(ShiftError, match="data seeds"):
        report([run, other], [knob], 1)
