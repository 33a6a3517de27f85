# SPDX-License-Identifier: Apache-2.0
"""Files that the evaluation of guided diffusion (ADM) reads: samples and reference statistics as npz.

Samples: ``arr_0`` uint8 [N, H, W, 3], ``arr_1`` labels. Statistics: ``mu`` [d] and ``sigma`` [d, d], and ours besides:
``extractor`` (whose features), ``n`` (of how many images). (docs/papers/promoe.md, file formats)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeapps.data.images.arrays import ImageFileError, check_labels, read_arrays
from moeapps.data.images.batch import from_uint8, to_uint8
from moeapps.files import write_arrays
from tasks.image_diffusion.report.quality import Gaussian


@dataclass(frozen=True)
class AdmFile:
    """What such a file holds; what it does not hold is None.

    Attributes:
        image: float32 [N, 3, H, W] in [-1, 1].
        label: int64 [N].
        statistics: mean and covariance of features.
        extractor: whose features.
    """

    image: Tensor | None = None
    label: Tensor | None = None
    statistics: Gaussian | None = None
    extractor: str = ""


def to_nhwc(image: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return uint8 [N, H, W, 3] of images [N, 1 or 3, H, W] in [-1, 1]; grey is repeated.

    Raises:
        ValueError: another number of channels.
    """
    if image.ndim != 4 or image.shape[1] not in (1, 3):
        raise ValueError(f"images of shape {list(image.shape)} have no uint8 form; give [N, 1 or 3, H, W]")
    nhwc = to_uint8(image.detach().cpu()).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    array: np.ndarray[Any, np.dtype[np.uint8]] = nhwc.contiguous().numpy()
    return array


def write_adm(
    path: Path,
    *,
    image: Tensor | None = None,
    label: Tensor | None = None,
    statistics: Gaussian | None = None,
    extractor: str = "",
) -> Path:
    """Write samples, statistics or both; see `AdmFile`. An older file is replaced.

    Raises:
        ValueError: images that are neither grey nor colour.
    """
    arrays: dict[str, Any] = {}
    if image is not None:
        arrays["arr_0"] = to_nhwc(image)
    if label is not None:
        arrays["arr_1"] = label.cpu().numpy()
    if statistics is not None:
        arrays |= {"mu": statistics.mean.numpy(), "sigma": statistics.cov.numpy(), "n": np.int64(statistics.num)}
        arrays["extractor"] = np.array(extractor)
    return write_arrays(path, **arrays)


def read_adm(path: Path) -> AdmFile:
    """Read samples and statistics.

    Raises:
        ImageFileError: damaged, neither images nor statistics, or arrays of other types and shapes.
    """
    arrays = read_arrays(path, "arr_0?", "arr_1?", "mu?", "sigma?", "n?", "extractor?")
    image = label = statistics = None
    if "arr_0" in arrays:
        pixels = arrays["arr_0"]
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ImageFileError(f"{path}: arr_0 is {pixels.dtype} {pixels.shape}; it must be uint8 (N, H, W, 3)")
        image = from_uint8(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
        if "arr_1" in arrays:
            label = check_labels(arrays["arr_1"], len(image), path)
    if "mu" in arrays:
        mu, sigma = arrays["mu"], arrays.get("sigma")
        if sigma is None or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ImageFileError(f"{path}: mu {mu.shape} needs a sigma of shape {(len(mu), len(mu))}")
        num = int(arrays["n"]) if "n" in arrays else 0
        statistics = Gaussian(torch.from_numpy(mu).double(), torch.from_numpy(sigma).double(), num)
    if image is None and statistics is None:
        raise ImageFileError(f"{path} has neither images (arr_0) nor statistics (mu, sigma)")
    return AdmFile(image, label, statistics, str(arrays.get("extractor", "")))
