# SPDX-License-Identifier: Apache-2.0
"""What reader and writer of LAS share: record layouts, types of extra bytes, and the cloud in memory.

Source: ASPRS, LAS Specification 1.4 - R15, tables 7 - 17 (point formats) and 24 (extra bytes).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

_OLD = [
    ("xyz", "<i4", (3,)),
    ("intensity", "<u2"),
    ("returns", "u1"),
    ("classification", "u1"),
    ("angle", "i1"),
    ("user", "u1"),
]
_NEW = [
    ("xyz", "<i4", (3,)),
    ("intensity", "<u2"),
    ("returns", "u1"),
    ("flags", "u1"),
    ("classification", "u1"),
    ("user", "u1"),
]
_SOURCE, _TIME, _RGB, _NIR = ("source", "<u2"), ("time", "<f8"), ("rgb", "<u2", (3,)), ("nir", "<u2")
_WAVE = ("wave", "V29")
_OLD_BASE = [*_OLD, _SOURCE]
_NEW_BASE = [*_NEW, ("angle", "<i2"), _SOURCE, _TIME]
FORMATS: list[list[Any]] = [
    _OLD_BASE,
    [*_OLD_BASE, _TIME],
    [*_OLD_BASE, _RGB],
    [*_OLD_BASE, _TIME, _RGB],
    [*_OLD_BASE, _TIME, _WAVE],
    [*_OLD_BASE, _TIME, _RGB, _WAVE],
    _NEW_BASE,
    [*_NEW_BASE, _RGB],
    [*_NEW_BASE, _RGB, _NIR],
    [*_NEW_BASE, _WAVE],
    [*_NEW_BASE, _RGB, _NIR, _WAVE],
]
EXTRA_TYPES = ["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f4", "<f8"]
RESERVED = {
    "xyz",
    "intensity",
    "returns",
    "classification",
    "flags",
    "angle",
    "user",
    "source",
    "time",
    "rgb",
    "nir",
    "wave",
    "pad",
}
"""Names that an extra attribute may not take."""


class LasError(ValueError):
    """A file is not LAS, is damaged, or needs something this reader lacks."""


@dataclass(frozen=True)
class LasCloud:
    """Points of one LAS file.

    Attributes:
        pos: [N, 3] float64 coordinates in the unit of the file.
        intensity: [N] uint16.
        classification: [N] uint8 ASPRS class.
        return_number: [N] uint8, first is 1.
        num_returns: [N] uint8 echoes of the pulse.
        rgb: [N, 3] uint16, or None.
        extra: further per-point attributes by name.
        scale: coordinate resolution of the file (x, y, z).
    """

    pos: npt.NDArray[np.float64]
    intensity: npt.NDArray[np.uint16]
    classification: npt.NDArray[np.uint8]
    return_number: npt.NDArray[np.uint8]
    num_returns: npt.NDArray[np.uint8]
    rgb: npt.NDArray[np.uint16] | None = None
    extra: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    scale: tuple[float, float, float] = (0.001, 0.001, 0.001)

    def __len__(self) -> int:
        return len(self.pos)
