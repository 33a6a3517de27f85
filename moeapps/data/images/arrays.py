# SPDX-License-Identifier: Apache-2.0
"""The simplest format: one npz with ``x`` and ``y``, or two npy files; read and written.

``x`` is uint8 [N, H, W] or [N, H, W, C] (pixels) or float [N, C, H, W] (latents), ``y`` int64 [N]; an npz may hold
``names`` [K], the class name of each label.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeapps.bounds import check_npz
from moeapps.files import absent


class ImageFileError(ValueError):
    """A file of images or latents cannot be used; the message says which file, why, and what to do."""


MOST_CLASSES = 1_000_000
"""A larger label is damage: what is kept for each class would fill the memory."""


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """Turn what numpy answers a missing or damaged file with into one sentence."""
    if not path.is_file():
        raise ImageFileError(f"{absent(path)}; check the path")
    try:
        yield
    except ImageFileError:
        raise
    # numpy answers damage with nearly any error.
    except Exception as error:
        raise ImageFileError(f"{path} cannot be read ({error}); it is damaged or no {kind}: write it again") from error


def read_arrays(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    """Read arrays out of an npz file; pickled objects are refused.

    Args:
        path: the file.
        names: arrays to read; none means all. A name ending in ``?`` may be missing.

    Raises:
        ImageFileError: missing or damaged file, or an array that is not there.
    """
    # Opened here: numpy leaves a damaged file open.
    with _readable(path, "npz file"):
        check_npz(path)
    with _readable(path, "npz file"), open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
        there = list(file.files)
        wanted = [name.rstrip("?") for name in names if not name.endswith("?") or name[:-1] in there] or there
        missing = [name for name in wanted if name not in there]
        if missing:
            raise ImageFileError(f"{path} has no array {missing[0]!r} but {', '.join(there) or 'nothing'}")
        return {name: file[name] for name in wanted}


def read_array(path: Path) -> NDArray[Any]:
    """Read an npy file.

    Raises:
        ImageFileError: missing or damaged.
    """
    with _readable(path, "npy file"):
        check_npz(path)
        array: NDArray[Any] = np.load(path, allow_pickle=False)
        return array


def check_labels(label: NDArray[Any], count: int, where: Path, names: Sequence[str] | None = None) -> Tensor:
    """Return labels as int64 [N].

    Raises:
        ImageFileError: not one non-negative integer per image, or one that ``names`` has no name for.
    """
    if label.shape != (count,) or label.dtype.kind not in "iu" or (count and label.min() < 0):
        raise ImageFileError(
            f"{where}: labels {label.dtype} {label.shape} for {count} images; give {count} integers, 0 or more"
        )
    if count and label.max() >= MOST_CLASSES:
        raise ImageFileError(f"{where}: label {label.max()}; number the classes from 0, at most {MOST_CLASSES:,} fit")
    if names is not None and count and label.max() >= len(names):
        raise ImageFileError(f"{where}: label {label.max()} is out of range, names hold {len(names)} classes")
    return torch.from_numpy(label.astype(np.int64))


def class_names(names: NDArray[Any], where: Path) -> list[str]:
    """Return the names [K] of an npz file as text in Unicode's composed form, as names of folders are compared.

    Raises:
        ImageFileError: not one word or number per class.
    """
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise ImageFileError(f"{where}: names are {names.dtype} {names.shape}; give one word for each label, (K,)")
    words = np.strings.decode(names, "utf-8", "replace") if names.dtype.kind == "S" else names
    return [unicodedata.normalize("NFC", str(word)) for word in words]


def class_counts(label: Tensor, names: Sequence[str], where: str) -> dict[str, int]:
    """Return the number of rows of every class that has one.

    Args:
        label: int64 [N], below the number of names.
        names: name of each label.
        where: for messages.

    Raises:
        ImageFileError: no row, or two labels of one name.
    """
    if not len(label):
        raise ImageFileError(f"{where} is empty; fill it or take it out of the roles")
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ImageFileError(f"{where} gives the name {twice!r} to two labels; name each class once")
    each = torch.bincount(label, minlength=len(names)).tolist()
    return {name: count for name, count in zip(names, each, strict=True) if count}


def pixels_nchw(x: NDArray[Any], where: Path, level: int) -> Tensor:
    """Return uint8 [N, C, H, W] of uint8 [N, H, W] or [N, H, W, C].

    Args:
        x: pixels; the last of four channels is alpha.
        where: for messages.
        level: what shows through where alpha is less than 255, 0 to 255.

    Raises:
        ImageFileError: another type or shape.
    """
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3, 4)):
        raise ImageFileError(
            f"{where}: x is {x.dtype} {x.shape}; give uint8 (N, H, W) or (N, H, W, C) with C = 1, 3 or 4"
        )
    if x.ndim == 4 and x.shape[3] == 4:
        alpha = x[..., 3:].astype(np.uint16)
        x = ((x[..., :3] * alpha + np.uint16(level) * (255 - alpha) + 127) // 255).astype(np.uint8)
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    return tensor[:, None] if x.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()
