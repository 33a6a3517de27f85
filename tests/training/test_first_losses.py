# SPDX-License-Identifier: Apache-2.0
"""What is told of a training's first steps is what was logged in them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from moeapps.commands.run import run
from moeapps.training.callbacks import FirstLosses

TOY = ["fit", "--config", "tests/toy.yaml", "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1"]
KEEP = ["--trainer.callbacks+=moeapps.training.callbacks.FirstLosses", "--trainer.callbacks.steps=12"]


@pytest.mark.usefixtures("no_routing_figures")
def test_the_summary_holds_running_means_of_the_logged_losses(tmp_path: Path) -> None:
    run([*TOY, *KEEP, "--trainer.callbacks.window=3"])

    folder = tmp_path / "runs" / "toy" / "base" / "version_0"
    with (folder / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")][:12]
    means = [sum(losses[i : i + 3]) / 3 for i in range(10)]
    found = json.loads((folder / "metrics" / "test.json").read_text())["summary"]["start"]
    expected = {"first": means[0], "peak": max(means), "rise": max(means) - means[0], "end": means[-1]}
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_window_of_more_steps_than_are_kept_is_refused() -> None:
    with pytest.raises(ValueError, match="steps=4, window=8"):
        FirstLosses(steps=4)
    assert FirstLosses().describe_results() == {}
