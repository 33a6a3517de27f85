# SPDX-License-Identifier: Apache-2.0
"""Whole runs of the toy system through the command line."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moeapps.cli import main
from moeapps.commands.run import run

pytestmark = pytest.mark.medium

TOY = ["--config", "tests/toy.yaml"]


def run_folder(tmp_path: Path, version: int = 0) -> Path:
    return tmp_path / "runs" / "toy" / "base" / f"version_{version}"


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that several tests look at, each at a copy of its own."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEAPPS_RUNS", str(folder / "runs"))
        patch.setenv("MPLBACKEND", "Agg")
        assert main(["fit", *TOY]) == 0
    return run_folder(folder)


@pytest.fixture
def trained(once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(once, run_folder(tmp_path)))


def test_fit_leaves_a_whole_run_folder(trained: Path) -> None:
    names = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}

    assert {
        "config.yaml",
        "run.json",
        "metrics.csv",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "metrics/test.json",
    } <= names
    assert any(name.startswith("events.out") for name in names)


def test_logged_keys_are_the_documented_ones(trained: Path) -> None:
    with (trained / "metrics.csv").open() as lines:
        header = set(next(csv.reader(lines)))

    assert {
        "train/loss",
        "train/lr",
        "val/a/accuracy",
        "val/v/loss",
        "val/seen/accuracy",
        "val/validation/accuracy",
    } <= header
    assert {"test/u/accuracy", "test/seen/accuracy", "test/unseen/accuracy", "test/gap/accuracy"} <= header
    assert not any("dataloader_idx" in key or key.startswith("val/u") for key in header)


def test_results_file_has_rows_and_header(trained: Path) -> None:
    results = json.loads((trained / "metrics" / "test.json").read_text())

    assert {row["domain"] for row in results["rows"]} == {"a", "b", "c", "v", "u"}
    assert set(results["rows"][0]) == {"domain", "role", "metric", "value", "n", "direction"}
    assert {"config_hash", "commit", "seed", "versions", "sources", "missing_domains"} <= set(results["header"])
    assert results["header"]["seed"] == 0
    assert len(results["units"]["u"]["accuracy"]) == 24
    summary = results["summary"]
    gap = summary["seen"]["accuracy"] - summary["unseen"]["accuracy"]
    assert summary["gap"]["accuracy"] == pytest.approx(gap)
    assert summary["gap"]["loss"] == pytest.approx(summary["unseen"]["loss"] - summary["seen"]["loss"])


def test_test_of_a_run_folder_repeats_the_numbers_in_place(trained: Path) -> None:
    first = json.loads((trained / "metrics" / "test.json").read_text())
    config = (trained / "config.yaml").read_text()

    assert main(["test", "--run", str(trained)]) == 0

    again = json.loads((trained / "metrics" / "test.json").read_text())
    assert again["rows"] == first["rows"]
    for key in ("config_hash", "variant_hash", "seeds", "continued_from"):
        assert again["header"][key] == first["header"][key], key
    # 72 items in batches of 8, three epochs; a later test tells the step of the checkpoint it tests.
    assert first["header"]["global_step"] == 27
    assert again["header"]["global_step"] in (9, 18, 27)
    assert first["header"]["continued_from"] is None
    assert first["header"]["seeds"] == {"seed_everything": 0, "data.init_args.seed": 0}
    assert {"instruction_set", "threads"} <= set(first["header"]["machine"])
    assert (trained / "config.yaml").read_text() == config
    assert main(["validate", "--run", str(trained)]) == 0
    assert (trained / "metrics" / "val.json").is_file()
    assert main(["predict", "--run", str(trained)]) == 0


@pytest.mark.usefixtures("no_routing_figures")
def test_results_tell_the_step_of_the_tested_weights_and_a_continuation_where_it_came_from(tmp_path: Path) -> None:
    flat = [*TOY, "--model.optimizer.lr", "1e-12", "--model.net.norm", "false"]  # the first epoch stays the best
    run(["fit", *flat, "--trainer.max_epochs", "2"])
    last = run_folder(tmp_path) / "checkpoints" / "last.ckpt"
    run(["fit", *flat, "--trainer.max_epochs", "3", "--ckpt_path", os.path.relpath(last)])
    run(["fit", *flat, "--trainer.max_epochs", "1", "--trainer.enable_checkpointing", "false"])

    def header(version: int) -> dict[str, Any]:
        found = json.loads((run_folder(tmp_path, version) / "metrics" / "test.json").read_text())["header"]
        return {key: found[key] for key in ("global_step", "tested_step", "continued_from")}

    # 9 steps an epoch.
    assert header(0) == {"global_step": 18, "tested_step": 9, "continued_from": None}
    assert header(1) == {"global_step": 27, "tested_step": 9, "continued_from": str(last)}
    assert header(2) == {"global_step": 9, "tested_step": 9, "continued_from": None}
    assert main(["test", "--run", str(run_folder(tmp_path, 1)), "--ckpt_path", "last"]) == 0
    assert header(1) == {"global_step": 27, "tested_step": 27, "continued_from": str(last)}
    with (run_folder(tmp_path) / "metrics.csv").open() as lines:
        steps = [int(line["step"]) for line in csv.DictReader(lines) if line.get("val/seen/accuracy")]
    assert steps == [8, 17], "the validation of a checkpoint is logged with the step before its own"


@pytest.mark.usefixtures("no_routing_figures")
def test_two_runs_with_one_seed_are_bit_equal(tmp_path: Path) -> None:
    first, second = run(["fit", *TOY]), run(["fit", *TOY])

    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert run_folder(tmp_path, 1).is_dir()
