# SPDX-License-Identifier: Apache-2.0
"""``moeapps fid-stats``: statistics of images, for Fréchet distances."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeapps.data.domain import Split
from moeapps.data.images.batch import from_uint8
from moeapps.data.images.folders import files_below
from moeapps.data.images.pictures import ENDINGS, read_image
from tasks.image_diffusion.datamodule import ImageData
from tasks.image_diffusion.report.adm import read_adm, write_adm
from tasks.image_diffusion.report.inception import InceptionFeatures
from tasks.image_diffusion.report.judge import get_judge
from tasks.image_diffusion.report.judgement import Extractor
from tasks.image_diffusion.report.quality import Gaussian, frechet_distance


def main(words: Sequence[str], task: Any, data: ImageData) -> int:
    """Write mean and covariance of features as the ADM evaluation reads them.

    Args:
        words: options, see ``--help``.
        task: the task of the run, which is not asked.
        data: the set whose images are described, and whose judge makes the features.

    Raises:
        ValueError: an unknown domain, no image, a damaged file, other features on the two sides of a distance.
    """
    parser = argparse.ArgumentParser(
        prog="moeapps fid-stats",
        description="Statistics of images (mu, sigma, n, extractor) as npz; features of the judge of the data, "
        "or of Inception.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--images", type=Path, help="folder of images or npz with arr_0, in place of the data set's own"
    )
    parser.add_argument("--domain", action="append", default=[], help="domain of the data set (default: all seen ones)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="train", help="split of the data set")
    parser.add_argument("--inception", type=Path, help="local weight file of the FID's Inception network")
    parser.add_argument("--keep-images", action="store_true", help="also write the images, arr_0 uint8")
    parser.add_argument("--against", type=Path, help="npz of statistics: print the Fréchet distance to them")
    parser.add_argument("--out", type=Path, required=True, help="npz file to write")
    options = parser.parse_args(words)
    inception = None if options.inception is None else InceptionFeatures(options.inception)
    data.prepare_data()
    image = _own(options.images, data) if options.images is not None else _data(data, options.domain, options.split)
    extractor: Extractor = inception or get_judge(data)
    statistics = Gaussian.of(extractor.features(image))
    kept = image if options.keep_images else None
    write_adm(options.out, image=kept, statistics=statistics, extractor=extractor.key)
    print(f"{statistics.num} images, features of {extractor.key}: {options.out}")
    if options.against is not None:
        other = read_adm(options.against)
        if other.statistics is None or other.extractor != extractor.key:
            raise ValueError(
                f"{options.against} has statistics of {other.extractor or 'nobody knows whose'} features, these are of "
                f"{extractor.key}; make both with one extractor"
            )
        distance = frechet_distance(statistics, other.statistics)
        print(f"Fréchet distance to {options.against} ({other.statistics.num} images): {distance:.4f}")
    return 0


def _data(data: ImageData, domains: Sequence[str], split: Split) -> Tensor:
    names = list(domains) or data.present("seen")
    return torch.cat([data.images(name, split).image for name in names])


def _own(path: Path, data: ImageData) -> Tensor:
    """Images of a folder or npz with the shape the data's judge takes."""
    channels, size = int(data.facts["channels"]), int(data.facts["image_size"])
    if data.facts["latent"]:
        raise ValueError("--images takes pictures, and this data set holds latents; leave --images out")
    if path.is_dir():
        files = sorted(files_below(path, ENDINGS, "--images"))
        if not files:
            raise ValueError(f"{path} holds no image; allowed endings: {', '.join(ENDINGS)}")
        pixels = np.stack([read_image(file, size, channels) for file in files])
        return from_uint8(torch.from_numpy(pixels))
    image = read_adm(path).image
    if image is None:
        raise ValueError(f"{path} has no images (arr_0)")
    if tuple(image.shape[2:]) != (size, size):
        raise ValueError(f"{path}: images of {tuple(image.shape[2:])} pixels, the data set has {size} x {size}")
    return image.mean(1, keepdim=True) if channels == 1 else image
