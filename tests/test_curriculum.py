# SPDX-License-Identifier: Apache-2.0
"""A chain of stages: each from the one before, left alone when done, resumed when cut, refused when stale."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from moeapps.cli import main as moeapps
from moeapps.commands.curriculum import Done, main, plan, settings_digest
from moeapps.commands.messages import UsageError
from moeapps.evaluation.results import read_results
from moeapps.evaluation.xeval import build_matrix

pytestmark = pytest.mark.usefixtures("no_routing_figures")

FIRST = "# Toy: the first stage.\ntrainer: {max_epochs: 1}\n"
ROUTER = """# Toy: the second stage, the router alone.
model:
  init_args:
    start: {class_path: moeapps.training.stages.FromCheckpoint, init_args: {path: runs/elsewhere}}
    trained: ["*.router.*"]
trainer: {max_epochs: 2}
"""
WHOLE = ROUTER.replace('    trained: ["*.router.*"]\n', "").replace("second stage, the router alone", "third stage")


class PressInTest(L.Callback):
    """Interrupt the test after a training; not where nothing was left to train."""

    def __init__(self) -> None:
        self.trained = False

    def on_train_start(self, *args: Any) -> None:
        self.trained = True

    def on_test_start(self, *args: Any) -> None:
        if self.trained:
            raise KeyboardInterrupt


class PressAtStart(L.Callback):
    """Interrupt a training of two epochs that begins before it has a checkpoint, once.

    Args:
        mark: file that says it was.
    """

    def __init__(self, mark: str) -> None:
        self.mark = Path(mark)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.max_epochs == 2 and trainer.global_step == 0 and not self.mark.exists():
            self.mark.touch()
            raise KeyboardInterrupt


@pytest.fixture
def stages(tmp_path: Path) -> list[str]:
    """Files of three stages."""
    files = []
    for number, text in enumerate((FIRST, ROUTER, WHOLE)):
        file = tmp_path / f"toy_{number}.yaml"
        file.write_text(text, encoding="utf-8")
        files.append(str(file))
    return files


def words(stages: list[str], *common: str, own: dict[int, list[str]] | None = None) -> list[str]:
    found = ["--config", "tests/toy.yaml", *common]
    for number, file in enumerate(stages):
        found += ["--stage", file, *(own or {}).get(number, [])]
    return found


def toy(tmp_path: Path, name: str) -> Path:
    return tmp_path / "runs" / "toy" / name


def done(tmp_path: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((toy(tmp_path, name) / "stage.json").read_text())
    return found


def state(folder: Path, name: str = "last") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return found


def moved(a: Path, b: Path) -> list[str]:
    one, two = state(a)["state_dict"], state(b)["state_dict"]
    return [key for key in one if not torch.equal(one[key], two[key])]


@pytest.mark.medium
def test_each_stage_starts_from_the_one_before_and_the_last_is_tested_and_counts_all(
    tmp_path: Path, stages: list[str]
) -> None:
    assert main(words(stages)) == 0

    folders = [toy(tmp_path, name) / "version_0" for name in ("curriculum_stage0", "curriculum_stage1", "curriculum")]
    assert moved(folders[0], folders[1]) == ["net.moe.router.score.weight"]
    assert len(moved(folders[1], folders[2])) > 1
    assert [(folder / "metrics" / "test.json").is_file() for folder in folders] == [False, False, True]
    header = json.loads((folders[2] / "metrics" / "test.json").read_text())["header"]
    costs = [state(folder)["callbacks"]["MoESummary"]["train_flops"] for folder in folders]
    assert costs[0] < costs[1] < costs[2] == header["train_flops"]
    assert header["started_from"]["path"] == [str(folders[1] / "checkpoints" / "last.ckpt")]


@pytest.mark.medium
def test_chains_that_differ_by_their_seeds_are_one_variant_also_when_their_first_stages_have_gone(
    tmp_path: Path, stages: list[str]
) -> None:
    for seed in ("1", "2"):
        assert main(words(stages[:2], f"--name=s{seed}", "--seed_everything", seed)) == 0
    last = [toy(tmp_path, name) / "version_0" for name in ("s1", "s2")]

    def hashes(file: str) -> list[str]:
        found = [json.loads((folder / file).read_text()) for folder in last]
        return [about.get("header", about)["variant_hash"] for about in found]

    trained = hashes("run.json")
    assert trained[0] == trained[1]
    for name in ("s1_stage0", "s2_stage0"):
        shutil.rmtree(toy(tmp_path, name))
    assert moeapps(["test", "--run", str(last[0])]) == 0
    assert hashes("metrics/test.json") == trained
    assert len(build_matrix([read_results(folder) for folder in last]).variants) == 1


@pytest.mark.medium
def test_stages_that_are_done_are_left_alone_and_one_that_was_cut_goes_on(
    tmp_path: Path, stages: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C in step 13 of 18 of the second stage; the same words then end where an uninterrupted chain ends."""
    cut = {1: ["--trainer.callbacks+=tests.toy_callbacks.PressCtrlC"]}
    assert main(words(stages, "--name=cut", own=cut)) == 130
    assert "the same `moeapps curriculum` goes on with it" in caplog.text
    assert done(tmp_path, "cut_stage0")["run"] is not None
    assert done(tmp_path, "cut_stage1")["run"] is None
    assert not toy(tmp_path, "cut").exists()
    assert main(words(stages, "--name=cut", own=cut)) == 0
    assert main(words(stages, "--name=whole")) == 0

    assert sorted(path.name for path in toy(tmp_path, "cut_stage0").glob("version_*")) == ["version_0"]
    assert sorted(path.name for path in toy(tmp_path, "cut_stage1").glob("version_*")) == ["version_0", "version_1"]
    assert moved(Path(done(tmp_path, "cut")["run"]), Path(done(tmp_path, "whole")["run"])) == []
    before = done(tmp_path, "cut")
    assert main(words(stages, "--name=cut", own=cut)) == 0
    assert done(tmp_path, "cut") == before
    assert len(list(toy(tmp_path, "cut").glob("version_*"))) == 1


@pytest.mark.medium
def test_stages_of_other_settings_or_weights_are_refused_and_made_again_on_demand(
    tmp_path: Path, stages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(stages[:2])) == 0
    first = Path(stages[0])
    first.write_text(FIRST + "# a comment changes nothing\n", encoding="utf-8")
    assert main(words(stages[:2])) == 0

    first.write_text(FIRST + "seed_everything: 3\n", encoding="utf-8")
    capsys.readouterr()
    assert main(words(stages[:2])) == 2
    assert "stage 0" in (told := capsys.readouterr().err)
    assert "made by other settings; give another --name, or --redo" in told
    assert main([*words(stages[:2]), "--redo"]) == 0
    assert len(list(toy(tmp_path, "curriculum_stage0").glob("version_*"))) == 2
    assert len(list(toy(tmp_path, "curriculum").glob("version_*"))) == 2  # its source was another one

    record = toy(tmp_path, "curriculum") / "stage.json"
    held = Done.read(record)
    assert held is not None
    held.source = "0" * 16
    held.write(record)
    assert main(words(stages[:2])) == 2
    assert "other weights of the stage before" in capsys.readouterr().err


@pytest.mark.medium
def test_stages_that_were_moved_are_done(tmp_path: Path, stages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(words(stages[:2])) == 0
    (tmp_path / "runs").rename(tmp_path / "moved")
    monkeypatch.setenv("MOEAPPS_RUNS", str(tmp_path / "moved"))
    assert main(words(stages[:2])) == 0

    assert len(list((tmp_path / "moved").rglob("version_*"))) == 2  # nothing was made again


@pytest.mark.medium
def test_a_stage_that_was_cut_in_its_test_is_tested_and_done(tmp_path: Path, stages: list[str]) -> None:
    cut = {0: ["--trainer.callbacks+=test_curriculum.PressInTest"]}
    assert main(words(stages[:1], own=cut)) == 130
    assert not (toy(tmp_path, "curriculum") / "version_0" / "metrics" / "test.json").exists()
    assert main(words(stages[:1], own=cut)) == 0

    again = toy(tmp_path, "curriculum") / "version_1"
    assert done(tmp_path, "curriculum")["run"] == str(again)
    assert (again / "metrics" / "test.json").is_file()
    assert moved(again.with_name("version_0"), again) == []
    assert main(words(stages[:1], own=cut)) == 0
    assert len(list(again.parent.glob("version_*"))) == 2


@pytest.mark.medium
def test_a_stage_made_again_never_goes_on_from_the_run_of_other_settings(tmp_path: Path, stages: list[str]) -> None:
    """The new run is cut before it has a checkpoint; only the old one's are there."""
    press = ["--trainer.callbacks+=test_curriculum.PressAtStart", f"--trainer.callbacks.mark={tmp_path / 'mark'}"]
    assert main(words(stages[:1], *press)) == 0
    Path(stages[0]).write_text(FIRST.replace("1", "2"), encoding="utf-8")
    assert main([*words(stages[:1], *press), "--redo"]) == 130
    assert done(tmp_path, "curriculum")["first"] == 1
    assert main(words(stages[:1], *press)) == 0

    run = Path(done(tmp_path, "curriculum")["run"])
    assert json.loads((run / "run.json").read_text())["continued_from"] is None
    assert state(run)["global_step"] == 18


def test_the_record_of_a_stage_from_before_it_named_its_first_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_text('{"settings": "a", "source": null, "run": "b", "checkpoint": "c"}')

    assert Done.read(tmp_path / "stage.json") == Done("a", None, "b", "c", first=0)


@pytest.mark.medium
def test_a_checkpoint_that_is_gone_or_another_one_is_told(
    tmp_path: Path, stages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(stages[:1])) == 0
    checkpoint = toy(tmp_path, "curriculum") / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes() + b"x")
    assert main(words(stages[:1])) == 2
    assert "is not the one that the stage ended with" in capsys.readouterr().err
    checkpoint.unlink()
    assert main(words(stages[:1])) == 2
    assert "its checkpoint is gone" in capsys.readouterr().err
    assert main([*words(stages[:1]), "--redo"]) == 0  # as both lines say
    assert done(tmp_path, "curriculum")["run"] == str(toy(tmp_path, "curriculum") / "version_1")
    assert main(words(stages[:1])) == 0


def test_files_come_first_then_common_options_then_those_of_the_stage(tmp_path: Path, stages: list[str]) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("# More.\n", encoding="utf-8")
    own = {1: ["--trainer.max_epochs=9", "--config", str(more)]}
    plans = plan(words(stages, "--trainer.max_epochs=5", "--name", "x", own=own))

    assert plans[1].words == (
        *("fit", "--config", "tests/toy.yaml", "--config", stages[1], "--config", str(more)),
        *("--trainer.max_epochs=5", "--trainer.max_epochs=9"),
    )
    assert [stage.folder for stage in plans] == [toy(tmp_path, name) for name in ("x_stage0", "x_stage1", "x")]


def test_settings_are_what_files_and_words_say(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: 1\nb: 2\n", encoding="utf-8")
    first = settings_digest(["fit", "--config", str(file)])
    file.write_text("# why\nb: 2\na: 1\n", encoding="utf-8")
    assert settings_digest(["fit", f"--config={file}"]) == first
    assert settings_digest(["fit", "--config", str(file), "--x=1"]) != first
    file.write_text("a: 1\nb: 3\n", encoding="utf-8")
    assert settings_digest(["fit", "--config", str(file)]) != first


def test_wrong_words_are_told(tmp_path: Path, stages: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="give the stages in order"):
        plan(["--config", "tests/toy.yaml"])
    with pytest.raises(UsageError, match=r"there is no file absent\.yaml"):
        plan(words(["absent.yaml"]))
    with pytest.raises(UsageError, match="--stage needs a file after it"):
        plan(["--stage", "--name"])
    with pytest.raises(UsageError, match=r"must say how it starts; give model\.init_args\.start"):
        plan(words([stages[0], stages[0]]))
    with pytest.raises(UsageError, match="--name is for all stages; give it before the first --stage"):
        plan(words(stages, own={1: ["--name", "late"]}))
    assert main([]) == 2
    assert main(["--stage", "absent.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: --stage absent.yaml: there is no file")


@pytest.mark.medium
def test_chains_that_begin_alike_share_their_stages(tmp_path: Path, stages: list[str]) -> None:
    shared = tmp_path / "shared"
    longer = ["--trainer.max_epochs", "3"]

    assert main(words(stages, "--shared", str(shared), "--name", "one")) == 0
    made = sorted(path for path in shared.rglob("last.ckpt"))
    times = [path.stat().st_mtime_ns for path in made]
    assert main(words(stages, "--shared", str(shared), "--name", "two", own={2: longer})) == 0
    assert len(made) == 2
    assert [path.stat().st_mtime_ns for path in sorted(shared.rglob("last.ckpt"))] == times  # nothing was made again
    assert {path.name for path in (tmp_path / "runs" / "toy").iterdir()} == {"one", "two"}
    one, two = (state(toy(tmp_path, name) / "version_0") for name in ("one", "two"))
    assert (one["epoch"], two["epoch"]) == (1, 2)

    assert main(words(stages, "--shared", str(shared), "--name", "three", own={0: longer})) == 0
    assert len(list(shared.rglob("last.ckpt"))) == 4  # another first stage: both before the last are others


def test_what_stages_replace_of_an_overlay_for_all_of_them_is_told_with_the_flag_that_wins(
    tmp_path: Path, stages: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    overlay = tmp_path / "short.yaml"
    overlay.write_text("trainer: {max_epochs: 1, limit_train_batches: 2}\n")
    common = ["--config", str(overlay)]

    with caplog.at_level(logging.INFO, logger="moeapps"):
        plan(words(stages, *common))
        told = [record.getMessage() for record in caplog.records if "replaces" in record.getMessage()]
        caplog.clear()
        plan(words(stages, *common, "--trainer.max_epochs=1"))
        silent = [record.getMessage() for record in caplog.records if "replaces" in record.getMessage()]

    assert told == [  # the first stage says the same as the overlay
        f"stage {number} ({stages[number]}) replaces what {overlay} says: trainer.max_epochs=2 (there 1); a flag "
        "before the first --stage wins over stages: --trainer.max_epochs=1"
        for number in (1, 2)
    ]
    assert silent == []
