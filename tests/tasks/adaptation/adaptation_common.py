# SPDX-License-Identifier: Apache-2.0
"""A few small domains of digits, and writers of the folders and tables that readers are tested on."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tasks.adaptation.data.digits import DigitDomains
from tasks.adaptation.datamodule import AdaptationData

FEW: dict[str, list[str]] = {
    "seen": ["plain", "inverted", "pen"],
    "validation": ["stripes"],
    "unseen": ["turned_far", "colours"],
}
SMALL: dict[str, Any] = {"train_per_class": 3, "held_per_class": 1, "unseen_per_class": 2, "image_size": 12}


def small_data(cache: Path, **options: Any) -> AdaptationData:
    """Six domains: 30 training images, 10 held out, 20 of each validation split and unseen domain, 12 x 12."""
    given: dict[str, Any] = {"support": 4, "query": 5, "episodes_per_step": 2, "batch_size": 6, "eval_batch_size": 7}
    return AdaptationData(source=DigitDomains(**SMALL), cache_dir=cache, **{**FEW, **given, **options})


def write_picture(path: Path, level: int, *, size: int = 10, channels: int = 3) -> Path:
    """Write a picture of one grey level, so that it is known again wherever it turns up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size, size, 3) if channels == 3 else (size, size)
    Image.fromarray(np.full(shape, level, np.uint8)).save(path)
    return path


def write_folders(root: Path, counts: dict[str, dict[str, int]]) -> dict[str, dict[str, list[int]]]:
    """Write ``root/<domain>/<class>/<number>.png``; each picture has a level of its own.

    Args:
        root: folder.
        counts: domain -> class -> pictures.

    Returns:
        domain -> class -> levels.
    """
    levels: dict[str, dict[str, list[int]]] = {}
    level = 0
    for domain, classes in counts.items():
        for name, count in classes.items():
            for number in range(count):
                write_picture(root / domain / name / f"{number:03d}.png", level)
                levels.setdefault(domain, {}).setdefault(name, []).append(level)
                level += 1
    assert level <= 256
    return levels


def write_table(path: Path, rows: Sequence[dict[str, object]], *, index: bool = False) -> Path:
    """Write rows as CSV, after a column of their numbers without a name if asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*([""] if index else []), *rows[0]])
        writer.writerows([[*([number] if index else []), *row.values()] for number, row in enumerate(rows)])
    return path
