# SPDX-License-Identifier: Apache-2.0
"""Predictions for a scan as a file that point-cloud viewers open."""

from __future__ import annotations

import colorsys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.point_cloud.data.readers.las import write_las
from tasks.point_cloud.data.readers.ply import PlyFormat, write_ply

NOTHING = 255
"""Class or expert of a point about which nothing was said (viewers show it; -1 fits no unsigned field)."""


@dataclass(frozen=True, eq=False)
class PointPrediction:
    """Class and expert of every point of one scan.

    Args:
        xyz: float [R, 3] in the scan's own frame, metres.
        label: int64 [R], index into ``names``; -1 for none.
        names: class names, at most 255.
        expert: int64 [R], id of the expert with the largest weight in one layer, at most 254; -1 for none; or None.

    Raises:
        ValueError: shapes disagree, or an index does not fit.
    """

    xyz: NDArray[np.floating]
    label: NDArray[np.int64]
    names: tuple[str, ...]
    expert: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        columns = [("label", self.label, min(len(self.names), NOTHING))]
        if self.expert is not None:
            columns.append(("expert", self.expert, NOTHING))
        for name, column, limit in columns:
            if column.shape != (len(self.xyz),):
                raise ValueError(f"{name} of shape {column.shape} beside {len(self.xyz)} points; give one per point")
            if len(column) and not -1 <= int(column.min()) <= int(column.max()) < limit:
                raise ValueError(f"{name} {int(column.min())}..{int(column.max())}; allowed are -1..{limit - 1}")

    def class_byte(self) -> NDArray[np.uint8]:
        """Return the class per point, 255 for none."""
        return np.where(self.label < 0, NOTHING, self.label).astype(np.uint8)

    def expert_byte(self) -> NDArray[np.uint8]:
        """Return the expert per point, 255 for none."""
        expert = np.full(len(self.xyz), -1) if self.expert is None else self.expert
        return np.where(expert < 0, NOTHING, expert).astype(np.uint8)


def name_color(name: str) -> tuple[int, int, int]:
    """Return a fixed colour for a class name: the same name has the same colour in every domain."""
    number = zlib.crc32(name.encode("utf-8"))
    hue, saturation, value = number % 360 / 360, (0.55, 0.75, 0.95)[number // 360 % 3], (0.7, 0.95)[number // 1080 % 2]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def class_colors(names: tuple[str, ...]) -> NDArray[np.uint8]:
    """Return uint8 [C + 1, 3]: a colour per name, and grey for points without a class in the last row."""
    return np.array([*(name_color(name) for name in names), (128, 128, 128)], np.uint8)


def write_prediction_ply(
    path: Path, prediction: PointPrediction, *, layout: PlyFormat = "binary_little_endian"
) -> None:
    """Write points coloured by class with the properties ``class`` and ``expert`` (uchar, 255 for none).

    The header's comments name the classes. Coordinates far from zero are written as doubles.
    """
    far = bool(len(prediction.xyz)) and float(np.abs(prediction.xyz).max()) > 10_000.0
    xyz = prediction.xyz.astype(np.float64 if far else np.float32)
    color = class_colors(prediction.names)[prediction.label]
    vertex = {
        **dict(zip("xyz", xyz.T, strict=True)),
        **dict(zip(("red", "green", "blue"), color.T, strict=True)),
        "class": prediction.class_byte(),
        "expert": prediction.expert_byte(),
    }
    comments = tuple(f"class {index} {name}" for index, name in enumerate(prediction.names))
    write_ply(path, vertex, layout=layout, comments=comments)


def write_prediction_las(path: Path, prediction: PointPrediction, *, scale: float = 0.001) -> None:
    """Write points coloured by class as LAS 1.4 with the extra dimensions ``class`` and ``expert`` (255 for none).

    The standard field "classification" holds the same number as ``class``: an index into the class names, not an
    ASPRS code. LAS has no place for names that viewers would show, so a text file of the same stem lists them.

    Args:
        path: file to write.
        prediction: what to write.
        scale: resolution of the stored coordinates, metres.

    Raises:
        ValueError: the scan is too wide for the resolution.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    color = class_colors(prediction.names)[prediction.label].astype(np.uint16)
    write_las(
        path,
        prediction.xyz,
        classification=prediction.class_byte(),
        rgb=color * 257,
        extra={"class": prediction.class_byte(), "expert": prediction.expert_byte()},
        point_format=7,
        scale=scale,
    )
    lines = [f"{index} {name}" for index, name in enumerate(prediction.names)]
    path.with_suffix(".classes.txt").write_text("\n".join([*lines, f"{NOTHING} none"]) + "\n", encoding="utf-8")


def write_prediction(path: Path, prediction: PointPrediction) -> None:
    """Write a prediction in the format of the path's ending, ``.ply`` or ``.las``.

    Raises:
        ValueError: another ending.
    """
    match path.suffix.lower():
        case ".ply":
            write_prediction_ply(path, prediction)
        case ".las":
            write_prediction_las(path, prediction)
        case suffix:
            raise ValueError(f"{path.name}: predictions are not written as {suffix!r}; use .ply or .las")
