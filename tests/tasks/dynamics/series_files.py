# SPDX-License-Identifier: Apache-2.0
"""Tiny writers of the formats that the readers of series take."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.dynamics.data.source import Floats


def write_ts(path: Path, series: Sequence[Floats], labels: Sequence[str], name: str = "series") -> None:
    """Write a .ts file that `read_ts` gives back.

    Args:
        path: file to write.
        series: one [T, D] array per series.
        labels: class of each series, words without spaces.
        name: name of the problem.
    """
    classes = " ".join(dict.fromkeys(labels))
    lengths = {len(values) for values in series}
    lines = [f"@problemName {name}", "@timeStamps false", f"@dimensions {series[0].shape[1]}"]
    lines += [f"@equalLength {str(len(lengths) == 1).lower()}", f"@classLabel true {classes}", "@data"]
    for values, label in zip(series, labels, strict=True):
        channels = [",".join("?" if np.isnan(v) else repr(float(v)) for v in channel) for channel in values.T]
        lines.append(":".join([*channels, label]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_csv(path: Path, x: Floats, channels: Sequence[str], dt: float) -> None:
    """Write the trajectories [N, T, D] of one environment, nan as empty cells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["trajectory", "time", *channels])
        for n, trajectory in enumerate(x):
            for t, sample in enumerate(trajectory):
                writer.writerow([n, repr(t * dt), *["" if np.isnan(v) else repr(float(v)) for v in sample]])


def write_npz(path: Path, x: Floats, t: Floats, parameters: Any = None) -> None:
    """Write a file that `read_npz` gives back, with its bounds (and parameters) where families are told apart.

    Args:
        path: file to write.
        x: [S, N, T, D] or [F, S, N, T, D].
        t: [T] or [F, T].
        parameters: anything that json can say.
    """
    np.savez(path, X=x, t=t)
    if x.ndim == 5:
        np.save(path.with_name(path.stem + "_bounds.npy"), np.abs(x).max(axis=(2, 3), keepdims=True))
    if parameters is not None:
        path.with_name(path.stem + "_envs.json").write_text(json.dumps(parameters), encoding="utf-8")
