# SPDX-License-Identifier: Apache-2.0
"""What chooses best.ckpt, and what happens where nothing has a label."""

from __future__ import annotations

import csv
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moeapps.commands.run import run
from moeapps.training.scores import ScoreRow, ScoreTable
from moeapps.training.selection import select
from tasks.recommendation.metrics import RankingScores
from tests.toy import TOY, ToyTask

FIT = ["fit", *TOY, "--trainer.max_epochs", "3", "--trainer.accelerator", "cpu"]


def table(**scorable: int) -> ScoreTable:
    roles = {"a": "seen", "b": "seen", "v": "validation", "w": "validation"}
    scores = [ScoreRow(name, roles[name], "acc", 0.5, 9, "max") for name in scorable]
    return ScoreTable(scores, {}, {}, scorable)


@pytest.mark.parametrize(
    ("v", "w", "key"), [(3, 2, "validation"), (3, 1, "seen"), (0, 0, "seen"), (9, 0, "validation")]
)
def test_the_validation_role_chooses_if_its_domains_together_have_enough(v: int, w: int, key: str) -> None:
    found = select("val/validation/acc", table(a=3, b=4, v=v, w=w), minimum=5, unit="users")

    assert found.key == f"val/{key}/acc"
    assert (found.reason is None) == (key == "validation")
    if found.reason:
        assert "val/seen/acc (7 scorable users)" in found.reason
        assert f"there are {v + w} in v, w" in found.reason
        assert "needs 5" in found.reason


def test_without_a_validation_domain_the_seen_ones_choose() -> None:
    found = select("val/validation/acc", table(a=3, b=0), minimum=1, unit="items")

    assert found.key == "val/seen/acc"
    assert found.reason is not None
    assert "no validation domain" in found.reason


def test_a_monitor_that_names_another_role_is_as_the_user_wants_it() -> None:
    assert select("val/seen/loss", table(v=0), minimum=5, unit="items").key == "val/seen/loss"
    assert select("my/metric", table(v=0), minimum=5, unit="items").key == "my/metric"


@pytest.mark.parametrize("why", ["none", "few"])
def test_a_run_selects_by_the_seen_domains_where_validation_is_too_small(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MOEAPPS_RUNS", str(tmp_path))
    monkeypatch.setattr(ToyTask, "monitor_minimum", 1 if why == "none" else 25)  # the domain has 24 items
    roles = ["--data.init_args.validation", "[]"] if why == "none" else []
    with caplog.at_level(logging.INFO, logger="moeapps"):
        done = run([*FIT, *roles])

    folder = tmp_path / "toy" / "base" / "version_0"
    with (folder / "metrics.csv").open() as stream:
        logged = [float(row["val/seen/accuracy"]) for row in csv.DictReader(stream) if row.get("val/seen/accuracy")]
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    assert float(done.trainer.checkpoint_callback.best_model_score) == pytest.approx(max(logged))  # type: ignore[union-attr]
    lines = [r.getMessage() for r in caplog.records if "best.ckpt is chosen by val/seen/accuracy" in r.getMessage()]
    assert len(lines) == 1


def unlabelled(monkeypatch: pytest.MonkeyPatch, stages: set[str]) -> None:
    """Take the labels of some stages away from the toy."""
    step = ToyTask.shared_step

    def shared_step(self: ToyTask, batch: Any, stage: Any) -> Any:
        out = step(self, batch, stage)
        if stage in stages:
            out.labelled, out.loss = 0, out.loss * 0 if stage == "train" else out.loss * math.nan
        return out

    monkeypatch.setattr(ToyTask, "shared_step", shared_step)


def test_an_undefined_score_chooses_no_epoch_and_the_last_weights_are_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEAPPS_RUNS", str(tmp_path))
    monkeypatch.setattr(ToyTask, "monitor", "val/validation/loss")
    monkeypatch.setattr(ToyTask, "monitor_mode", "min")
    unlabelled(monkeypatch, {"val"})

    done = run(FIT)

    folder = tmp_path / "toy" / "base" / "version_0"
    assert not (folder / "checkpoints" / "best.ckpt").exists()
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in done.model.state_dict().items():
        if name in last:
            assert torch.equal(last[name], value), name
    rows = json.loads((folder / "metrics" / "test.json").read_text())["rows"]
    assert all(row["value"] is not None for row in rows)


def test_training_without_a_single_known_label_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEAPPS_RUNS", str(tmp_path))
    unlabelled(monkeypatch, {"train"})

    # 72 items in batches of 8: the first epoch has 9.
    with pytest.raises(ValueError, match="no item of the first 9 training batches has a known label"):
        run([*FIT, "--trainer.num_sanity_val_steps", "0"])
    monkeypatch.setattr("moeapps.training.task.PATIENCE", 4)
    with pytest.raises(ValueError, match="no item of the first 4 training batches"):
        run(FIT)


def test_scorable_users_are_those_with_both_classes_in_a_task() -> None:
    user = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    label = torch.tensor([[1, 0], [0, 0], [1, 1], [1, 1], [0, 1], [0, 0], [1, 0]]).float()
    mask = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [1, 0], [1, 1]]).bool()
    scores = RankingScores(["x", "y"])
    scores.update(torch.randn(7, 2), label, mask, user)

    scores.compute()

    # User 0 has both in x; 1 has positives alone; the negative of 2 in y is hidden; 3 has one row.
    assert scores.scorable == 1
