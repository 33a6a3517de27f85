# SPDX-License-Identifier: Apache-2.0
"""Predicted trajectories as npz files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter

from moeapps.files import write_arrays
from moeapps.training.run import run_dir


class TrajectoryWriter(BasePredictionWriter):
    """Write ``predictions/<domain>.npz`` in ``predict``.

    Arrays: ``X`` predicted and ``truth`` [S, N, T, D], ``t`` [S, T] seconds, ``names``, ``env``, ``family``, ``expert``
    [S], ``context`` [S, c]. Further batches of a domain get a number.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch (padding batches of a multi-process run are left out)."""
        folder, data = run_dir(trainer), cast(Any, trainer).datamodule
        if folder is None or prediction is None or data.is_padding("predict", dataloader_idx, batch_idx):
            return
        domain = prediction["domain"]
        number = batch_idx * trainer.world_size + trainer.global_rank
        steps = np.arange(prediction["x"].shape[2])
        arrays = {
            "X": prediction["x"],
            "truth": prediction["truth"],
            "t": prediction["dt"].numpy()[:, None] * steps,
            "names": data.names_of(prediction["env"], domain),
            **{key: prediction[key] for key in ("env", "family", "expert", "context")},
        }
        name = domain if number == 0 else f"{domain}-{number}"
        write_arrays(folder / "predictions" / f"{name}.npz", **arrays)
