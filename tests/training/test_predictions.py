# SPDX-License-Identifier: Apache-2.0
"""What predict leaves in a run folder: the answers of the last call for each domain, and whatever is not its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moeapps.cli import main
from moeapps.training.callbacks import PredictionWriter
from tasks.adaptation.report.predictions import LogitsWriter
from tasks.audio.report.writer import ClipWriter
from tasks.dynamics.report.predictions import TrajectoryWriter
from tasks.point_cloud.report.scan_writer import ScanWriter
from tasks.recommendation.report.score_writer import ListWriter, ScoreWriter
from tests.toy import TOY


class Lines(PredictionWriter):
    """Write a line per answer; further batches of a domain get a number."""

    def written(self, domain: str) -> str:
        return rf"{domain}(-\d+)?\.txt"

    def save(self, folder: Path, domain: str, number: int, prediction: Any, data: Any) -> None:
        folder.mkdir(exist_ok=True)
        name = domain if number == 0 else f"{domain}-{number}"
        (folder / f"{name}.txt").write_text("\n".join(map(str, prediction.tolist())))


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.medium
@pytest.mark.usefixtures("no_routing_figures")
def test_a_later_predict_replaces_the_files_of_its_domains_and_no_others(tmp_path: Path) -> None:
    """24 items per domain: five batches of each at first, then one of two domains."""
    words = ["--trainer.max_epochs", "1", "--test_after_fit", "false", "--trainer.enable_model_summary", "false"]
    assert main(["fit", *TOY, *words]) == 0
    run = tmp_path / "runs" / "toy" / "base" / "version_0"
    assert main(["predict", "--run", str(run), "--data.eval_batch_size", "5"]) == 0
    place = run / "predictions"
    assert files(place) == sorted(f"{domain}/0000{k}.pt" for domain in "abcvu" for k in range(5))
    own = ["00001.pt", "a.pt", "a/00001.txt", "a/best/00001.pt", "a/notes.pt"]
    for name in own:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("mine")
    assert main(["predict", "--run", str(run), "--data.eval_batch_size", "24", "--data.predict", "[a,u]"]) == 0

    kept = [f"{domain}/0000{k}.pt" for domain in "bcv" for k in range(5)]
    assert files(place) == sorted([*kept, "a/00000.pt", "u/00000.pt", *own])
    assert len(torch.load(place / "a" / "00000.pt")) == 24
    assert all((place / name).read_text() == "mine" for name in own)


@pytest.mark.parametrize(
    ("writer", "written", "other"),
    [
        (PredictionWriter, ["d-1/00000.pt", "d-1/123456.pt"], ["d-1.pt", "d-1/a.pt", "d-1/a/0.pt", "d-10/00000.pt"]),
        (TrajectoryWriter, ["d-1.npz", "d-1-2.npz"], ["d.npz", "d-2.npz", "d-1-a.npz", "d-1.csv", "d-1/0.npz"]),
        (LogitsWriter, ["d-1.csv", "d-1-12.csv"], ["d.csv", "d-1-.csv", "d-1.csv.bak", "d-1/0.csv"]),
        (ClipWriter, ["d-1/batch-00/03.wav", "d-1/batch-00/index.html"], ["d-1/03.wav", "d-1/batch-0/a.wav"]),
        (ScanWriter, ["d-1/a.ply", "d-1/x/a.las", "d-1/a.classes.txt"], ["d-1.ply", "d-1/a.txt", "d-1/.a/a.ply"]),
        (ScoreWriter, ["d-1.csv", "d-1.parquet", "d-1.rank3.csv"], ["d.csv", "d-1-1.csv", "d-1.rank.csv"]),
        (ListWriter, ["d-1.csv"], ["d-1.txt"]),
    ],
)  # fmt: skip
def test_the_names_that_a_writer_gives_are_known(writer: Any, written: list[str], other: list[str]) -> None:
    pattern = writer().written("d-1")

    assert all(re.fullmatch(pattern, name) for name in written)
    assert not any(re.fullmatch(pattern, name) for name in other)


@pytest.mark.medium
@pytest.mark.usefixtures("no_routing_figures")
def test_a_domain_whose_name_is_that_of_a_batch_of_another_keeps_its_answers(tmp_path: Path) -> None:
    roles = ["--data.seen", "[a]", "--data.validation", "[a-1]", "--data.unseen", "[]"]
    writer = ["--trainer.callbacks+=test_predictions.Lines"]
    words = ["--trainer.max_epochs", "1", "--test_after_fit", "false", "--trainer.enable_model_summary", "false"]
    assert main(["fit", *TOY, *roles, *words]) == 0
    run = tmp_path / "runs" / "toy" / "base" / "version_0"
    assert main(["predict", "--run", str(run), *writer, "--data.predict", "[a-1]", "--data.eval_batch_size", "24"]) == 0
    assert main(["predict", "--run", str(run), *writer, "--data.predict", "[a]", "--data.eval_batch_size", "24"]) == 0

    assert files(run / "predictions") == ["a-1.txt", "a.txt"]
