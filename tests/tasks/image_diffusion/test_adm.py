# SPDX-License-Identifier: Apache-2.0
"""Files for the evaluation of guided diffusion: what is written is read, in its own layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeapps.data.images.arrays import ImageFileError
from moeapps.data.images.batch import from_uint8
from moeapps.files import write_arrays
from tasks.image_diffusion.report.adm import read_adm, to_nhwc, write_adm
from tasks.image_diffusion.report.quality import Gaussian


def test_what_is_written_is_read(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (5, 3, 4, 4)).to(torch.uint8)
    label, statistics = torch.arange(5), Gaussian.of(torch.randn(9, 3))
    image = from_uint8(pixels)
    path = write_adm(tmp_path / "a.npz", image=image, label=label, statistics=statistics, extractor="judge")
    found = read_adm(path)

    assert found.image is not None
    assert torch.equal(found.image, from_uint8(pixels))
    assert found.label is not None
    assert torch.equal(found.label, label)
    assert found.statistics is not None
    assert torch.equal(found.statistics.mean, statistics.mean)
    assert torch.equal(found.statistics.cov, statistics.cov)
    assert (found.statistics.num, found.extractor) == (9, "judge")


def test_layout_is_that_of_the_published_evaluation(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 6)).to(torch.uint8)
    write_adm(tmp_path / "a.npz", image=from_uint8(pixels), statistics=Gaussian.of(torch.randn(9, 3)))

    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], pixels.permute(0, 2, 3, 1).numpy())
        assert file["mu"].shape == (3,)
        assert file["sigma"].shape == (3, 3)


def test_grey_is_repeated_and_values_beyond_the_range_are_cut() -> None:
    grey = to_nhwc(torch.tensor([-2.0, 0.0, 1.0, 5.0]).view(1, 1, 2, 2))

    assert grey.reshape(4, 3).tolist() == [[0] * 3, [128] * 3, [255] * 3, [255] * 3]
    with pytest.raises(ValueError, match="1 or 3"):
        to_nhwc(torch.zeros(1, 4, 2, 2))


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    for count in (2, 3):
        write_adm(tmp_path / "a.npz", image=torch.zeros(count, 1, 2, 2))
    found = read_adm(tmp_path / "a.npz").image

    assert found is not None
    assert len(found) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(2)}, "neither images"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, "must be uint8"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, "must be uint8"),
        ({"mu": np.zeros(3)}, "needs a sigma"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, "needs a sigma"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3, np.int64)}, "give 2 integers"),
    ],
)
def test_other_content_is_told(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "a.npz", **arrays)

    with pytest.raises(ImageFileError, match=message):
        read_adm(path)


def test_damaged_and_missing_files_are_told(tmp_path: Path) -> None:
    path = write_adm(tmp_path / "a.npz", image=torch.zeros(2, 1, 8, 8))
    path.write_bytes(path.read_bytes()[:150])

    with pytest.raises(ImageFileError, match=r"a\.npz cannot be read"):
        read_adm(path)
    with pytest.raises(ImageFileError, match="no file"):
        read_adm(tmp_path / "b.npz")
