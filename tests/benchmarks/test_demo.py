# SPDX-License-Identifier: Apache-2.0
"""The demo: what is finished stays, what fails costs itself alone, and what is said does not hang on one seed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import demo
from benchmarks.demo import Part, beside_the_twin, families_of_all_seeds

PARTS = [Part(name, name, "demo", (f"configs/{name}.yaml",)) for name in ("mixer", "home", "promoe")]
# A training that fails where its config is home.yaml, and else leaves results; it keeps what it was called with.
PROGRAM = """
import json, os, sys
from pathlib import Path
root = Path(os.environ["MOEAPPS_RUNS"])
with open(root / "calls", "a") as calls:
    print(*sys.argv[1:], file=calls)
if sys.argv[1] == "report":
    sys.exit(0)
folder = Path(sys.argv[3]) if sys.argv[2] == "--run" else root / Path(sys.argv[3]).stem / "demo" / "version_0"
print("epoch 1/1  batch 2/2  train/loss 1  0.1 s")
if folder.parent.parent.name == "home":
    sys.exit("the disk is full")
(folder / "metrics").mkdir(parents=True, exist_ok=True)
(folder / "metrics" / "test.json").write_text(json.dumps({"header": {}, "summary": {}}))
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(demo, "COMMAND", (sys.executable, str(program)))
    monkeypatch.setenv("MOEAPPS_RUNS", str(tmp_path))
    return tmp_path


def calls(runs: Path) -> list[str]:
    return sorted((runs / "calls").read_text().splitlines())


def test_a_part_that_fails_costs_neither_the_others_nor_the_page(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.main(PARTS) == 1

    out = capfd.readouterr().out
    assert len(calls(runs)) == 4
    report = next(line for line in calls(runs) if line.startswith("report"))
    assert str(runs / "mixer" / "demo" / "version_0") in report
    assert str(runs / "promoe" / "demo" / "version_0") in report
    assert "home" not in report.split("-o")[0].replace(str(runs), "")
    assert "home failed" in out
    assert "the disk is full" in (runs / "demo" / "home-demo.log").read_text()
    assert out.splitlines()[-1] == str((runs / "demo" / "report.html").resolve())


def test_what_is_finished_is_not_run_again_and_what_was_interrupted_goes_on(
    runs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = runs / "promoe" / "demo" / "version_0"
    (kept / "checkpoints").mkdir(parents=True)
    (kept / "checkpoints" / "interrupted.ckpt").write_text("half")
    (kept / "config.yaml").write_text("{}")
    done = runs / "mixer" / "demo" / "version_0" / "metrics"
    done.mkdir(parents=True)
    (done / "test.json").write_text("{}")

    early = kept.with_name("version_1")  # killed in its first second
    early.mkdir()
    (early / "config.yaml").write_text("{}")

    assert demo.main([PARTS[0], PARTS[2]]) == 0

    trained = [line for line in calls(runs) if line.startswith("fit")]
    assert trained == [f"fit --run {kept}"]
    assert "is there already" in capfd.readouterr().out
    assert demo.main([PARTS[0], PARTS[2]]) == 0
    assert [line for line in calls(runs) if line.startswith("fit")] == trained


def test_what_is_left_of_a_run_that_wrote_no_config_begins_anew(runs: Path) -> None:
    left = runs / "promoe" / "demo" / "version_0" / "checkpoints"
    left.mkdir(parents=True)
    (left / "interrupted.ckpt").write_text("half")

    assert PARTS[2].words() == ["fit", "--config", "configs/promoe.yaml", "--name", "demo"]


def results(value: float) -> dict[str, Any]:
    return {"summary": {"seen": {"miou": value}}}


def claim(mean: float, low: float, high: float, direction: str = "higher") -> dict[str, Any]:
    return {
        **{"metric": "seen/miou", "system": [0.5, 0.6], "baseline": [0.52, 0.59], "direction": direction},
        **{"diff_mean": mean, "ci95": [low, high]},
    }


@pytest.mark.parametrize("here", [-0.2, 0.0, 0.2])
def test_where_seeds_decide_nothing_no_run_of_the_demo_does(here: float) -> None:
    told = beside_the_twin(results(0.5 + here), results(0.5), claim(-0.005, -0.03, 0.02))

    assert "says neither that experts pay here nor that they do not" in told
    assert "-0.020 to +0.010" in told
    assert f"{here:+.3f} of this run" in told
    assert ("beyond those of the other seeds" in told) == (here != 0.0)


@pytest.mark.parametrize(
    ("interval", "direction", "word"),
    [
        ((0.01, 0.03), "higher", "experts pay"),
        ((-0.03, -0.01), "higher", "experts lose"),
        ((-0.03, -0.01), "lower", "experts pay"),
        ((0.01, 0.03), "lower", "experts lose"),
    ],
)
@pytest.mark.parametrize("here", [-0.1, 0.1])
def test_where_seeds_decide_the_run_of_the_demo_changes_nothing(
    interval: tuple[float, float], direction: str, word: str, here: float
) -> None:
    told = beside_the_twin(results(0.5 + here), results(0.5), claim(sum(interval) / 2, *interval, direction))

    assert f"{word} here, whatever this one run says" in told


def test_families_are_counted_over_the_committed_seeds() -> None:
    files = Path("benchmarks/results/mixer/cells").glob("robust-s*.json")
    found = [json.loads(file.read_text())["metrics"]["partition/ari"] for file in files]

    told = families_of_all_seeds()

    assert f"With {len(found)} other seeds" in told
    assert f"all families {sum(value > 1 - 1e-9 for value in found)} times" in told
    assert f"{min(found):.2f} at worst" in told
    whole = sum(value > 1 - 1e-9 for value in found)
    assert f"1.00 with {whole} of {len(found)} seeds" in Path("README.md").read_text()


def merged(*files: str) -> dict[str, Any]:
    """What config files say together, later ones last."""

    def into(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        both = {key: into(old[key], new[key]) for key in new if isinstance(new[key], dict) and key in old}
        return {**old, **new, **both}

    found: dict[str, Any] = {}
    for file in files:
        found = into(found, yaml.safe_load(Path(file).read_text()))
    return found


def test_the_demo_trains_point_moe_as_the_committed_seeds_did() -> None:
    grid = yaml.safe_load(Path("benchmarks/grids/point_moe.yaml").read_text())
    setting, flags = grid["templates"]["setting"], grid["templates"]["long"]
    assert {"point_moe_long", "dense_long"} <= set(grid["variants"])
    told = merged(*setting)
    for flag in flags:
        option, _, value = flag.removeprefix("--trainer.").partition("=")
        told["trainer"][option] = int(value)
    shown = merged("configs/demo/point_moe.yaml", "configs/data/real_als.yaml")

    for silent in ("callbacks", "enable_progress_bar"):
        told["trainer"].pop(silent, None)
        shown["trainer"].pop(silent, None)
    assert shown == told
    assert [config for config in demo.MOE.configs if config not in setting] == [
        "configs/point_moe.yaml",
        "configs/demo/point_moe.yaml",
    ]
