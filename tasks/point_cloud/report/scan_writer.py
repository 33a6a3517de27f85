# SPDX-License-Identifier: Apache-2.0
"""Write the scans of ``predict`` for viewers: whole scans coloured by class, with the expert of each point."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np

from moeapps.files import WholeFile, write_text
from moeapps.text import cell
from moeapps.training.callbacks import PredictionWriter
from moeapps.training.run import run_dir
from tasks.point_cloud.report.predictions import NOTHING, PointPrediction, class_colors, write_prediction

log = logging.getLogger("moeapps")

Format = Literal["ply", "las"]


class ScanWriter(PredictionWriter):
    """Join the tiles of each scan and write predictions/<domain>/<scan>.<format>.

    All raw points, in the order of the scan's file, in its own frame, in metres (its coordinates times ``unit``). Each
    file is written whole or not at all. ``classes.csv`` beside them lists id, name and colour of the classes.

    Args:
        formats: ``ply`` and ``las``, one or both.

    Raises:
        ValueError: no format, or one that cannot be written.
    """

    def __init__(self, formats: Sequence[Format] = ("ply", "las")) -> None:
        super().__init__()
        if not formats or set(formats) - {"ply", "las"}:
            raise ValueError(f"formats={list(formats)}: give one or both of ply and las")
        self.formats = tuple(dict.fromkeys(formats))
        self._tiles: list[dict[str, Any]] = []  # of the scan that is being joined

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse to share tiles of one scan between processes."""
        super().setup(trainer, pl_module, stage)
        if stage == "predict" and trainer.world_size > 1:
            raise ValueError(
                f"predict runs in {trainer.world_size} processes, but one must see all tiles of a scan to write it; "
                "add --trainer.devices 1 --trainer.num_nodes 1"
            )

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the rest of a run that was stopped, and remove what an earlier one left."""
        super().on_predict_start(trainer, pl_module)
        self._tiles = []

    def written(self, domain: str) -> str:
        """Scans, also in folders; their names are those of the data, whichever they were."""
        return rf"{re.escape(domain)}/(?:classes\.csv|(?:[^./][^/]*/)*[^./][^/]*\.(?:ply|las|classes\.txt))"

    def wrote(self, path: Path) -> bool:
        """By what is in the file, or beside it: what a viewer saved here is its user's."""
        if path.suffix == ".las":
            return path.with_suffix(".classes.txt").is_file()
        if path.suffix == ".txt":
            return path.with_name(path.name.removesuffix(".classes.txt") + ".las").is_file()
        with path.open("rb") as file:
            head = file.read(1000)
        return (b"\ncomment class 0 " if path.suffix == ".ply" else b"id,name,red,green,blue") in head

    def save(self, folder: Path, domain: str, number: int, prediction: Any, data: Any) -> None:
        """Take the tiles of one batch; the tiles of a scan follow one another, so that one scan is held at a time."""
        for tile in prediction:
            if self._tiles and _scan_of(self._tiles[0]) != _scan_of(tile):
                self._flush(folder)
            self._tiles.append(tile)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last scan."""
        folder = run_dir(trainer)
        if folder is not None:
            self._flush(folder / "predictions")

    def _flush(self, folder: Path) -> None:
        """Write the scan whose tiles are held."""
        tiles, self._tiles = self._tiles, []
        if not tiles:
            return
        domain, name = _scan_of(tiles[0])
        prediction, scan_points = joined(tiles)
        if len(prediction.xyz) < scan_points:
            log.warning(
                "scan %s of %s: %d of its %d points were answered (trainer.limit_predict_batches?); the others are "
                "not in its file", name, domain, len(prediction.xyz), scan_points,
            )  # fmt: skip
        place = folder / domain
        table = place / "classes.csv"
        if not table.exists():
            write_text(table, class_list(prediction.names))
        for suffix in self.formats:
            write_whole(place / f"{name}.{suffix}", prediction)


def _scan_of(tile: dict[str, Any]) -> tuple[str, str]:
    return str(tile["domain"]), str(tile["name"])


def joined(tiles: Sequence[dict[str, Any]]) -> tuple[PointPrediction, int]:
    """Join the tiles of one scan, as `PointCloudTask.predict_step` gives them, in the order of its rows.

    Returns:
        The prediction, and how many points the scan has.

    Raises:
        ValueError: two tiles hold the same point.
    """
    first, keys = tiles[0], ("raw_row", "xyz", "label", "expert")
    columns = {key: np.concatenate([tile[key].numpy() for tile in tiles]) for key in keys if first[key] is not None}
    rows = columns["raw_row"]
    order = np.argsort(rows, kind="stable")
    if (np.diff(rows[order]) == 0).any():
        raise ValueError(f"domain {first['domain']!r} has two scans called {first['name']!r}; rename one of the files")
    prediction = PointPrediction(
        xyz=columns["xyz"][order],
        label=columns["label"][order],
        names=tuple(first["names"]),
        expert=columns["expert"][order] if "expert" in columns else None,
    )
    return prediction, int(first["scan_points"])


def class_list(names: tuple[str, ...]) -> str:
    """Return the lines ``id,name,red,green,blue`` of the classes, and of 255: points without a prediction."""
    rows = zip([*range(len(names)), NOTHING], [*names, "none"], class_colors(names).tolist(), strict=True)
    quoted = ((number, str(cell(name)).replace('"', '""'), color) for number, name, color in rows)
    lines = [f'{number},"{name}",{",".join(map(str, color))}' for number, name, color in quoted]
    return "\n".join(["id,name,red,green,blue", *lines]) + "\n"


def write_whole(path: Path, prediction: PointPrediction) -> None:
    """Write a prediction, and what belongs to it, whole or not at all."""
    with WholeFile(path) as temporary:
        write_prediction(temporary, prediction)
