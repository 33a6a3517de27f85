# SPDX-License-Identifier: Apache-2.0
"""Images of one's own, files or arrays, as an episode without labels.

Shape legend: N images, C channels, H x H pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeapps.data.images.batch import ImageBatch, from_uint8
from moeapps.data.images.pictures import ENDINGS
from moeapps.data.numbers import real_numbers
from moeapps.files import is_clutter
from tasks.adaptation.data.readers.files import ImageForm


def images_of(inputs: Any, size: int, channels: int, form: ImageForm | None = None) -> Tensor:
    """Read images: float32 [N, C, H, H] as the network sees them.

    Args:
        inputs: a folder of pictures or one picture; a list of such files; or an array [N, C, H, H], uint8 or numbers in
            [-1, 1].
        size: H.
        channels: C.
        form: how the files of the training data become images, where they were files.

    Raises:
        ValueError: no image, or arrays of another form.
    """
    paths = _paths(inputs)
    if paths is not None:
        own = ImageForm(size=size, channels=channels) if form is None else form
        image = torch.stack([own.read(path) for path in paths])
    else:
        array = torch.from_numpy(real_numbers(inputs, "images").copy())
        if array.shape[1:] != (channels, size, size) or not len(array):
            raise ValueError(f"images of shape {tuple(array.shape)}; give (images, {channels}, {size}, {size})")
        if array.dtype != torch.uint8 and not array.is_floating_point():
            # 0 and 1 could be black and white, or two levels of 255.
            raise ValueError(f"images of {array.dtype}; give uint8 pixels, or floats: pixels / 127.5 - 1")
        image = from_uint8(array) if array.dtype == torch.uint8 else array.float()
        if not image.isfinite().all() or (form is None and image.abs().max() > 1):
            raise ValueError("numbers beyond -1 to 1; give uint8 pixels, or pixels / 127.5 - 1")
    return image if form is None else form.finished(image)


def unlabelled(image: Tensor, domain: int, *, measured: bool) -> ImageBatch:
    """Images without a label."""
    row = torch.arange(len(image))
    label = torch.full((len(image),), torch.nan) if measured else torch.full_like(row, -1)
    return ImageBatch(image, label, torch.full_like(row, domain), row)


def _paths(inputs: Any) -> list[Path] | None:
    """The files that are meant; None for arrays."""
    if isinstance(inputs, str | Path):
        path = Path(inputs)
        if path.is_dir():
            found = sorted(each for each in path.iterdir() if each.suffix.lower() in ENDINGS and not is_clutter(each))
            if not found:
                raise ValueError(f"{path} holds no picture; allowed are {', '.join(ENDINGS)}")
            return found
        return [path]
    if isinstance(inputs, Sequence) and inputs and all(isinstance(each, str | Path) for each in inputs):
        return [Path(each) for each in inputs]
    return None
