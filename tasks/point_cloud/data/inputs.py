# SPDX-License-Identifier: Apache-2.0
"""A scan of one's own, a file or arrays, as what `PointCloudData` makes batches of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tasks.point_cloud.data.limits import check_scan
from tasks.point_cloud.data.public import to_arrays
from tasks.point_cloud.data.readers.own import OwnLabels, read_own_scan
from tasks.point_cloud.data.readers.scan import RawScan, Scaling
from tasks.point_cloud.data.readers.values import make_scan
from tasks.point_cloud.data.scans import ScanArrays

_COLUMNS = "an array (R, 3) of x, y, z or (R, 4) with intensity, or a mapping of xyz, color and intensity"


def scan_of(inputs: Any, voxel: float) -> ScanArrays:
    """Read one scan without labels.

    Args:
        inputs: a .npy, .npz, .ply, .las or .laz file; an array [R, 3] of metres, [R, 4] with an intensity in [0, 1]; or
            a mapping of ``xyz`` and, where they were measured, ``color`` and ``intensity``.
        voxel: edge of the network's voxels, metres.

    Raises:
        ValueError: another form, a damaged file, or coordinates that the voxels cannot hold.
    """
    raw, name = _raw(inputs)
    check_scan(raw.xyz, voxel, raw.step, name, "inputs", "give metres")
    return to_arrays(raw, name, voxel)


def _raw(inputs: Any) -> tuple[RawScan, str]:
    if isinstance(inputs, str | Path):
        path = Path(inputs)
        if not path.is_file():
            raise ValueError(f"{path}: no such file; give a .npy, .npz, .ply, .las or .laz file, or {_COLUMNS}")
        return read_own_scan(path, OwnLabels(names=("any",)), labelled=False), path.stem
    if isinstance(inputs, Mapping):
        arrays = {str(key): np.asarray(value) for key, value in inputs.items()}
        if "xyz" not in arrays or set(arrays) - {"xyz", "color", "intensity"}:
            raise ValueError(f"a scan of {', '.join(arrays) or 'nothing'}; give {_COLUMNS}")
    else:
        rows = np.asarray(inputs)
        if rows.ndim != 2 or rows.shape[1] not in (3, 4):
            raise ValueError(f"a scan of shape {rows.shape}; give {_COLUMNS}")
        arrays = {"xyz": rows[:, :3], **({"intensity": rows[:, 3]} if rows.shape[1] == 4 else {})}
    scaling = Scaling(1.0, 1.0, False, where="in the inputs")
    return make_scan("inputs", ("any",), scaling, **arrays), "inputs"
