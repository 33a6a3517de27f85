# SPDX-License-Identifier: Apache-2.0
"""Labelled scans as plain arrays, and the one .npz file that keeps a split of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moeapps.bounds import ZIP_ERRORS, check_npz
from tasks.point_cloud.data.labels import IGNORE, label_index
from tasks.point_cloud.data.scene import Floats, Ints

UNLABELLED = 255


@dataclass(frozen=True)
class ScanArrays:
    """One scan.

    Attributes:
        name: unique name.
        pos: [R, 3] float32 metres.
        light: [R] float32 luminance or intensity in the sensor's own unit.
        up: [R] float32 |z| of the normal.
        label: [R] uint8 index into ``words``; 255: unlabelled.
        words: label names.
        origin: where ``pos`` zero lies in the frame of the scan's file, metres; `save_scans` does not keep it.
    """

    name: str
    pos: Floats
    light: Floats
    up: Floats
    label: npt.NDArray[np.uint8]
    words: tuple[str, ...]
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __len__(self) -> int:
        return len(self.pos)

    def target(self, label_set: Sequence[str]) -> Ints:
        """Return [R] int64 indices into ``label_set``, -1 for ignored points.

        Raises:
            ValueError: a label name is not in ``label_set``.
        """
        used = np.unique(self.label[self.label != UNLABELLED])
        if len(used) and used.max() >= len(self.words):
            raise ValueError(
                f"scan {self.name}: label {used.max()} has no name; the file lists {len(self.words)} names"
            )
        index = label_index(label_set, [self.words[i] for i in used], self.name)
        table = np.full(256, IGNORE, np.int64)
        for number in used:
            table[number] = index[self.words[number]]
        return table[self.label]


def save_scans(path: Path, scans: list[ScanArrays]) -> None:
    """Write scans of one split into one uncompressed .npz."""
    words = sorted({word for scan in scans for word in scan.words})
    tables = [
        np.array([words.index(w) for w in s.words] + [UNLABELLED] * (256 - len(s.words)), np.uint8) for s in scans
    ]
    sizes = np.array([len(s) for s in scans], np.int64)
    arrays = {
        "pos": np.concatenate([s.pos for s in scans]),
        "light": np.concatenate([s.light for s in scans]).astype(np.float32),
        "up": np.concatenate([s.up for s in scans]).astype(np.float16),
        "label": np.concatenate([table[s.label] for s, table in zip(scans, tables, strict=True)]),
        "size": sizes,
        "name": np.array([s.name for s in scans]),
        "words": np.array(words),
    }
    with open(path, "wb") as handle:
        np.savez(handle, **arrays)  # type: ignore[arg-type]


def load_scans(path: Path) -> list[ScanArrays]:
    """Read what :func:`save_scans` wrote.

    Raises:
        ValueError: the file is missing, cut short or not ours.
    """
    try:
        check_npz(path)
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as data:
            arrays = {key: data[key] for key in ("pos", "light", "up", "label", "size", "name", "words")}
    except ZIP_ERRORS as error:
        raise ValueError(
            f"cannot read scans from {path} ({error}); delete the file and it will be built anew"
        ) from error
    ends = np.cumsum(arrays["size"])
    words = tuple(str(word) for word in arrays["words"])
    return [
        ScanArrays(
            name=str(name),
            pos=arrays["pos"][end - size : end],
            light=arrays["light"][end - size : end],
            up=arrays["up"][end - size : end].astype(np.float32),
            label=arrays["label"][end - size : end],
            words=words,
        )
        for name, size, end in zip(arrays["name"], arrays["size"], ends, strict=True)
    ]
