# SPDX-License-Identifier: Apache-2.0
"""Clips of a domain kept in one file of the cache: 16-bit waves, prompts, names."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeapps.bounds import check_npz
from moeapps.data.domain import Split
from moeapps.files import write_arrays
from tasks.audio.data.prompt import Prompt
from tasks.audio.data.source import Clip

SPLITS: tuple[Split, ...] = ("train", "val", "test")


def save_clips(path: Path, splits: dict[Split, list[Clip]]) -> None:
    """Write the clips of all splits of one domain; samples are rounded to 16 bits."""
    arrays: dict[str, Any] = {}
    for split, clips in splits.items():
        waves = torch.cat([torch.empty(0), *(clip.wave for clip in clips)])
        arrays[f"{split}_wave"] = (waves * 32767).round().to(torch.int16).numpy()
        arrays[f"{split}_length"] = np.array([len(clip.wave) for clip in clips], np.int64)
        arrays[f"{split}_about"] = json.dumps([[clip.name, clip.ends, vars(clip.prompt)] for clip in clips])
    write_arrays(path, **arrays)


def load_clips(path: Path, split: Split) -> list[Clip]:
    """Read the clips of one split.

    Raises:
        ValueError: the file is damaged.
    """
    arrays = load_arrays(path, f"{split}_wave", f"{split}_length", f"{split}_about")
    samples, lengths, about = arrays.values()
    waves = (torch.from_numpy(samples).float() / 32767).split(lengths.tolist())
    entries = json.loads(str(about))
    return [Clip(wave, Prompt(**prompt), name, ends) for wave, (name, ends, prompt) in zip(waves, entries, strict=True)]


def load_arrays(path: Path, *names: str) -> dict[str, Any]:
    """Read arrays of an npz file of the cache, all of them where none is named.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        check_npz(path)
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in names or file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it, it is made anew") from error
