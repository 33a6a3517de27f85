# SPDX-License-Identifier: Apache-2.0
"""Predicted trajectories as npz files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from moeapps.files import write_arrays
from moeapps.training.callbacks import PredictionWriter


class TrajectoryWriter(PredictionWriter):
    """Write ``predictions/<domain>.npz`` in ``predict``.

    Arrays: ``X`` predicted and ``truth`` [S, N, T, D], ``t`` [S, T] seconds, ``names``, ``env``, ``family``, ``expert``
    [S], ``context`` [S, c]. Further batches of a domain get a number.
    """

    def written(self, domain: str) -> str:
        """One file per batch."""
        return rf"{re.escape(domain)}(?:-\d+)?\.npz"

    def save(self, folder: Path, domain: str, number: int, prediction: Any, data: Any) -> None:
        """Write one batch of environments."""
        steps = np.arange(prediction["x"].shape[2])
        arrays = {
            "X": prediction["x"],
            "truth": prediction["truth"],
            "t": prediction["dt"].numpy()[:, None] * steps,
            "names": data.names_of(prediction["env"], domain),
            **{key: prediction[key] for key in ("env", "family", "expert", "context")},
        }
        name = domain if number == 0 else f"{domain}-{number}"
        write_arrays(folder / f"{name}.npz", **arrays)
