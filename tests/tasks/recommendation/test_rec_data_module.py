# SPDX-License-Identifier: Apache-2.0
"""Loaders of a log in memory, a whole run with sparse tables, and what it leaves behind."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from moeapps.training.optim import OptimizerConfig
from tasks.recommendation.data.batch import Interactions
from tasks.recommendation.datamodule import RecommendationData
from tasks.recommendation.metrics import gauc
from tasks.recommendation.report.score_writer import ScoreTable, ScoreWriter, score_columns
from tests.tasks.recommendation.rec_common import LinearTask, make_batch, small_log
from tests.tasks.recommendation.test_rec_batch import assert_equal


def module(cache: Path, **options: Any) -> RecommendationData:
    return RecommendationData(source=small_log(), batch_size=50, cache_dir=cache, **options)


def test_training_batches_are_the_rows_the_sampler_names(tmp_path: Path) -> None:
    data = module(tmp_path, mixing="balanced")
    loader = data.train_dataloader()
    tables = [data.get_dataset(name, "train").table for name in data.roles["seen"]]  # type: ignore[attr-defined]
    everything = Interactions.cat(tables)

    for batch, rows in zip(loader, list(data._sampler or []), strict=True):
        assert_equal(batch, everything.take(torch.tensor(rows)))


def test_evaluation_reads_every_row_once_in_order(tmp_path: Path) -> None:
    data = module(tmp_path)
    for name, loader in zip(data.eval_domains("test"), data.test_dataloader(), strict=True):
        batches = list(loader)
        assert torch.cat([batch.row for batch in batches]).tolist() == list(range(500))
        assert_equal(Interactions.cat(batches), data.get_dataset(name, "test").table)  # type: ignore[attr-defined]


def test_example_batch_and_loader_processes_work(tmp_path: Path) -> None:
    data = module(tmp_path, num_workers=1)

    assert len(data.example_batch(3)) == 3
    assert sum(len(batch) for batch in data.train_dataloader()) == 2400


@pytest.fixture
def run(tmp_path: Path) -> tuple[L.Trainer, LinearTask, RecommendationData]:
    data = module(tmp_path / "cache")
    task = LinearTask(facts=data.facts, optimizer=OptimizerConfig(lr=0.02))
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(tmp_path, name="run"),
        callbacks=[ScoreWriter("csv")],
        gradient_clip_val=0.5,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        use_distributed_sampler=False,
    )
    trainer.fit(task, datamodule=data)
    return trainer, task, data


@pytest.mark.filterwarnings("ignore:.*custom batch sampler `ShardedBatches` for prediction")
def test_a_run_with_sparse_tables_learns_clips_tests_and_predicts(
    run: tuple[L.Trainer, LinearTask, RecommendationData],
) -> None:
    trainer, task, data = run
    trainer.test(task, datamodule=data, verbose=False)
    folder = Path(str(trainer.log_dir))
    results = json.loads((folder / "metrics" / "test.json").read_text())
    values = {(row["domain"], row["metric"]): row["value"] for row in results["rows"]}

    assert values["angle_00", "gauc_click"] > 0.6
    table = data.get_dataset("angle_00", "test").table  # type: ignore[attr-defined]
    task.eval()
    with torch.no_grad():
        logits = task.head(task.encoder(table))
    wanted = float(gauc(logits[:, 0], table.label[:, 0], table.user, table.mask[:, 0]))
    assert values["angle_00", "gauc_click"] == pytest.approx(wanted, abs=1e-6)

    (folder / "predictions").mkdir()
    for name in ("angle_00.rank1.csv", "angle_00.parquet"):  # of an earlier predict: more processes, the other form
        (folder / "predictions" / name).touch()
    trainer.predict(task, datamodule=data, return_predictions=False)
    with open(folder / "predictions" / "angle_00.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["row", "user", "domain", *data.facts["tasks"]]
    assert [int(row["row"]) for row in rows] == list(range(500))
    assert [int(row["user"]) for row in rows] == table.user.tolist()
    np.testing.assert_allclose([float(row["follow"]) for row in rows], logits[:, 5].sigmoid(), rtol=1e-5)
    assert sorted(path.stem for path in (folder / "predictions").iterdir()) == sorted(data.domain_names)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_scores_are_appended_and_renamed_when_whole(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"d.{ending}"
    table = ScoreTable(path)
    for seed in (0, 1):
        table.write(score_columns(torch.full((6, 2), 0.25), make_batch(seed=seed), "d", ["x", "y"]))
        assert not path.exists()
    table.close()

    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if ending == "parquet":
        import pyarrow.parquet as parquet

        read = parquet.read_table(path).to_pydict()
    else:
        with open(path, newline="") as file:
            read = {name: list(column) for name, *column in zip(*csv.reader(file), strict=True)}
    assert [int(value) for value in read["row"]] == [*range(6), *range(6)]
    assert {float(value) for value in read["x"]} == {0.25}
    dropped = ScoreTable(tmp_path / f"e.{ending}")
    dropped.write(score_columns(torch.zeros(6, 2), make_batch(), "d", ["x", "y"]))
    dropped.drop()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_wrong_scores_are_told() -> None:
    with pytest.raises(ValueError, match=r"shape \(6,\) for 6 rows and 2 tasks"):
        score_columns(torch.zeros(6), make_batch(), "d", ["x", "y"])
    with pytest.raises(ValueError, match="form='json'"):
        ScoreWriter("json")  # type: ignore[arg-type]


def test_rows_without_any_label_and_tasks_without_positives_have_defined_results(tmp_path: Path) -> None:
    data = module(tmp_path)
    batch = data.example_batch(40)
    batch.mask[:] = False
    batch.mask[:5] = True
    batch.label[:, 5] = 0
    task = LinearTask(facts=data.facts)

    out = task.shared_step(batch, "val")
    metrics = task.configure_metrics("angle_00")
    metrics.update(*out.metric_args)
    values = metrics.compute()

    assert torch.isfinite(out.loss)
    assert math.isnan(float(values["gauc_follow"]))
    assert math.isnan(float(values["calibration_follow"]))
    assert torch.isfinite(values["logloss_follow"])
