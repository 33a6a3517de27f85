# SPDX-License-Identifier: Apache-2.0
"""Tables per class and domain: a hand-made example, both conventions of mIoU, and what a test writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeapps.training.scores import DomainScores
from tasks.point_cloud.metrics import confusion, segmentation_metrics
from tasks.point_cloud.report.tables import class_rows, domain_table, markdown, write_class_tables

NAMES = ["wall", "floor", "chair", "lamp"]
# rows are targets: 8 of 10 walls right, 1 of 2 floors, no chair in the truth but two said, no lamp at all
COUNTS = torch.tensor([[8, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


def test_rows_of_a_hand_made_example() -> None:
    rows = {row["class"]: row for row in class_rows(NAMES, COUNTS)}

    assert rows["wall"] == {"class": "wall", "support": 10, "predicted": 8, "iou": 8 / 10, "accuracy": 8 / 10}
    assert rows["floor"] == {"class": "floor", "support": 2, "predicted": 2, "iou": 1 / 3, "accuracy": 1 / 2}
    assert rows["chair"] == {"class": "chair", "support": 0, "predicted": 2, "iou": None, "accuracy": None}
    assert rows["lamp"] == {"class": "lamp", "support": 0, "predicted": 0, "iou": None, "accuracy": None}


def test_both_conventions_of_miou_follow_from_the_rows() -> None:
    table = domain_table("seen", NAMES, COUNTS)
    present = [row["iou"] for row in table["classes"] if row["iou"] is not None]

    assert table["miou"] == pytest.approx(sum(present) / len(present))
    assert table["miou_all"] == pytest.approx(sum(present) / len(NAMES))
    assert table["macc"] == pytest.approx((8 / 10 + 1 / 2) / 2)
    assert table["allacc"] == pytest.approx(9 / 12)
    assert table["points"] == sum(row["support"] for row in table["classes"]) == 12
    assert sum(row["predicted"] for row in table["classes"]) == 12


class Trainer(SimpleNamespace):
    __hash__ = object.__hash__


def task(folder: Path | None, **facts: Any) -> Any:
    """What ``write_class_tables`` reads of a task, with two scans counted per domain."""
    domains = {"room": "seen", "hall": "unseen"}
    held = DomainScores(domains, lambda name: segmentation_metrics(len(NAMES)))
    generator = torch.Generator().manual_seed(0)
    parts = []
    for domain in domains:
        for _ in range(2):
            pred, target = (
                torch.randint(0, 4, (50,), generator=generator),
                torch.randint(-1, 3, (50,), generator=generator),
            )
            held.update(domain, torch.tensor(0.0), 1, (pred[:9], target[:9], pred, target), {})
            parts.append((domain, confusion(pred, target, 4)))
    trainer = Trainer(is_global_zero=True, log_dir=folder, barebones=folder is None)
    data = SimpleNamespace(eval_domains=lambda stage: list(domains))
    return SimpleNamespace(
        scores={"test": held}, data=data, label_sets=dict.fromkeys(domains, NAMES), trainer=trainer
    ), parts


def test_counts_are_summed_over_scans_at_the_raw_points(tmp_path: Path) -> None:
    double, parts = task(tmp_path)

    write_class_tables(double, double.label_sets)

    written = json.loads((tmp_path / "metrics" / "per_class.json").read_text())["domains"]
    for domain in ("room", "hall"):
        expected = sum(counts for name, counts in parts if name == domain)
        assert written[domain] == json.loads(json.dumps(domain_table(written[domain]["role"], NAMES, expected)))
        values = double.scores["test"].metrics[double.scores["test"].index[domain]].compute()
        for name in ("miou", "miou_all", "macc", "allacc"):
            assert written[domain][name] == pytest.approx(float(values[name]))
    assert written["hall"]["role"] == "unseen"


def test_nothing_is_written_where_there_is_no_run_folder(tmp_path: Path) -> None:
    double, _ = task(None)

    write_class_tables(double, double.label_sets)

    assert not list(tmp_path.iterdir())


def test_the_readable_table_shows_absent_classes_as_a_dash() -> None:
    text = markdown({"room": domain_table("seen", NAMES, COUNTS)})

    assert "| room | seen | 12 | 56.7 | 28.3 | 65.0 | 75.0 |" in text
    assert "| wall | 80.0 | 80.0 | 10 | 8 |" in text
    assert "| chair | - | - | 0 | 2 |" in text
