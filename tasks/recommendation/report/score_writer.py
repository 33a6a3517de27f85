# SPDX-License-Identifier: Apache-2.0
"""Outputs of a run: predicted probabilities as tables."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor

from moeapps.files import WholeFile
from moeapps.text import cell
from moeapps.training.callbacks.predictions import remove_earlier
from moeapps.training.run import run_dir
from moeapps.training.task import BaseTask
from tasks.recommendation.data.batch import Interactions

log = logging.getLogger("moeapps")

Form = Literal["auto", "parquet", "csv"]


class ScoreTable:
    """A table written batch by batch; ``close`` lets it appear under its name.

    Args:
        path: file to write, .parquet or .csv.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = WholeFile(path)
        self.temporary = self._whole.temporary
        self._parquet: Any = None
        # Open until close() or drop(): the batches of a whole domain go through it.
        self._text = (
            open(self.temporary, "w", encoding="utf-8", newline="") if path.suffix == ".csv" else None  # noqa: SIM115
        )
        self._rows = csv.writer(self._text) if self._text else None
        self._begun = False

    def write(self, columns: dict[str, Any]) -> None:
        """Append rows: name -> array [n]; the first call decides the columns."""
        if self._rows is not None:
            if not self._begun:
                self._rows.writerow(map(cell, columns))
            rows = zip(*(np.asarray(values).tolist() for values in columns.values()), strict=True)
            self._rows.writerows(map(cell, row) for row in rows)
        else:
            # Imported here: every fit imports this module, few predict.
            import pyarrow as pa
            import pyarrow.parquet as parquet

            table = pa.table(columns)
            if self._parquet is None:
                self._parquet = parquet.ParquetWriter(self.temporary, table.schema)
            self._parquet.write_table(table)
        self._begun = True

    def close(self) -> None:
        """Finish the file under its name."""
        self._shut()
        if self._begun:
            self._whole.finish()
        else:
            self._whole.drop()

    def drop(self) -> None:
        """Leave nothing behind."""
        self._shut()
        self._whole.drop()

    def _shut(self) -> None:
        for part in (self._text, self._parquet):
            if part is not None:
                part.close()


class ScoreWriter(L.Callback):
    """Write the answers of ``predict`` as predictions/<domain>.parquet or .csv, one row per impression.

    Columns: ``row`` (number in the source), ``user``, ``domain``, then one probability per task under the task's name.
    ``predict_step`` returns the probabilities [B, T], or a mapping with them under ``probability``. With several
    processes each writes its rows: <domain>.rank<k>.csv.

    Args:
        form: ``parquet`` or ``csv``; ``auto`` is Parquet.

    Raises:
        ValueError: unknown form.
    """

    def __init__(self, form: Form = "auto") -> None:
        if form not in ("auto", "parquet", "csv"):
            raise ValueError(f"form={form!r} is unknown; use auto, parquet or csv")
        self.ending = "csv" if form == "csv" else "parquet"
        self._open: tuple[str, ScoreTable] | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove what an earlier ``predict`` left, also in the other form or of another number of processes."""
        remove_earlier(trainer, cast(BaseTask, pl_module), self.written)

    def written(self, domain: str) -> str:
        """Return a regular expression of the names of the files of a domain."""
        return rf"{re.escape(domain)}(?:\.rank\d+)?\.(?:parquet|csv)"

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append one batch (padding batches of a multi-process run are left out)."""
        folder, task = run_dir(trainer), cast(BaseTask, pl_module)
        if folder is None or outputs is None or task.data.is_padding("predict", dataloader_idx, batch_idx):
            return
        domain = task.data.eval_domains("predict")[dataloader_idx]
        if self._open is None or self._open[0] != domain:
            self._close()
            rank = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
            self._open = (domain, ScoreTable(folder / "predictions" / f"{domain}{rank}.{self.ending}"))
        self._open[1].write(self.columns(outputs, batch, domain, task))

    def columns(self, outputs: Any, batch: Any, domain: str, task: BaseTask) -> dict[str, Any]:
        """Return the columns of a batch, name -> array."""
        found = outputs["probability"] if isinstance(outputs, Mapping) else outputs
        return score_columns(found, batch, domain, task.facts["tasks"])

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish the last file."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no half-written file."""
        if self._open is not None:
            self._open[1].drop()
            self._open = None

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            log.info("scores: %s", self._open[1].path)
            self._open = None


class ListWriter(ScoreWriter):
    """Write the answers for lists as predictions/<domain>.parquet or .csv, one row per candidate.

    Columns: ``row`` (number of the list in the source), ``user``, ``domain``, ``item`` (number of the candidate in the
    source), ``probability``, ``rank`` (1 is the first of its list).
    """

    def columns(self, outputs: Any, batch: Any, domain: str, task: BaseTask) -> dict[str, Any]:
        """Return the columns of a batch, without the padding of short lists."""
        score_BN, item_BN = outputs["probability"], outputs["item"]
        real_BN = batch.candidate_mask.cpu()
        order_BN = score_BN.masked_fill(~real_BN, -1.0).argsort(dim=1, descending=True, stable=True)
        rank_BN = torch.empty_like(order_BN).scatter_(
            1, order_BN, torch.arange(1, 1 + order_BN.shape[1]).expand_as(order_BN)
        )
        each = real_BN.sum(1)
        return {
            "row": outputs["row"].repeat_interleave(each).numpy(),
            "user": outputs["user"].repeat_interleave(each).numpy(),
            "domain": np.full(int(each.sum()), domain),
            "item": item_BN[real_BN].numpy(),
            "probability": score_BN[real_BN].float().numpy(),
            "rank": rank_BN[real_BN].numpy(),
        }


def score_columns(probability: Tensor, batch: Interactions, domain: str, tasks: list[str]) -> dict[str, Any]:
    """Return the columns of a batch as NumPy arrays.

    Raises:
        ValueError: not one probability per row and task.
    """
    if probability.shape != (len(batch), len(tasks)):
        raise ValueError(
            f"predictions of shape {tuple(probability.shape)} for {len(batch)} rows and {len(tasks)} tasks; "
            "predict_step must return probabilities [B, T]"
        )
    values = probability.detach().float().cpu().numpy()
    columns: dict[str, Any] = {
        "row": batch.row.cpu().numpy(),
        "user": batch.user.cpu().numpy(),
        "domain": np.full(len(batch), domain),
    }
    return columns | {name: values[:, t] for t, name in enumerate(tasks)}
