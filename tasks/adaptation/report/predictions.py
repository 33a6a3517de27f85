# SPDX-License-Identifier: Apache-2.0
"""Predicted logits as tables."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from typing_extensions import override

from moeapps.files import WholeFile
from moeapps.text import cell
from moeapps.training.callbacks import PredictionWriter


class LogitsWriter(PredictionWriter):
    """Write ``predictions/<domain>.csv`` in ``predict``; further batches of a domain get a number.

    Columns: ``domain``, ``draw`` of the support, ``index`` of the image in the test data of its domain, ``label``
    (empty where it is unknown), ``prediction`` (name of the class) and one logit per class, named after it; for
    measured values ``prediction`` is the value and there are no logits. ``prediction_before`` is that of the student
    without adaptation.
    """

    @override
    def written(self, domain: str) -> str:
        return rf"{re.escape(domain)}(?:-\d+)?\.csv"

    @override
    def save(self, folder: Path, domain: str, number: int, prediction: Any, data: Any) -> None:
        names: list[str] = data.facts["class_names"]
        measured = data.facts["target"] == "regression"
        head = ["domain", "draw", "index", "label", "prediction", "prediction_before"]
        path = folder / (f"{domain}.csv" if number == 0 else f"{domain}-{number}.csv")
        with WholeFile(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow([*head, *([] if measured else [f"logit_{name}" for name in names])])
            parts = (prediction[name].tolist() for name in ("index", "label", "logits", "before"))
            for index, label, logits, before in zip(*parts, strict=True):
                said = [_said(values, names, measured=measured) for values in (logits, before)]
                known = (label == label) if measured else label >= 0
                true = "" if not known else label if measured else names[label]
                told = [domain, prediction["draw"], index, true, *said, *([] if measured else logits)]
                rows.writerow(map(cell, told))


def _said(logits: list[float], names: list[str], *, measured: bool) -> str | float:
    return logits[0] if measured else names[max(range(len(logits)), key=logits.__getitem__)]
