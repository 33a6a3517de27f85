# SPDX-License-Identifier: Apache-2.0
"""Clips of a domain kept in one file of the cache: 16-bit waves, prompts, names; and the sources that keep them so."""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from moeapps.bounds import ZIP_ERRORS, check_npz
from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import Split
from moeapps.files import write_arrays
from tasks.audio.data.prompt import Prompt
from tasks.audio.data.source import AudioSource, Clip


class KeptAudio(AudioSource):
    """Base class of collections whose clips are read or made once; a file of the cache keeps those of a domain."""

    @abstractmethod
    def read(self, domain: str, cache: Path | None) -> dict[Split, list[Clip]]:
        """Return the clips of all splits of a domain anew."""

    @override
    def prepare(self, cache: Path | None) -> None:
        from rich.progress import track

        wanted = [name for name in self.role_of if not self._path(name, cache).exists()]
        for name in track(wanted, "keeping clips", transient=True, disable=not wanted):
            self._file(name, cache)

    @override
    def clips(self, domain: str, split: Split, cache: Path | None) -> list[Clip]:
        return load_clips(self._file(domain, cache), split)

    def _path(self, domain: str, cache: Path | None) -> Path:
        return cache_dir("audio", root=cache) / f"{domain}-{config_hash(self.identity(domain))}.npz"

    def _file(self, domain: str, cache: Path | None) -> Path:
        return build_once(self._path(domain, cache), lambda path: save_clips(path, self.read(domain, cache)))


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
    try:
        return _clips(*arrays.values())
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it, it is made anew") from error


def _clips(samples: Any, lengths: Any, about: Any) -> list[Clip]:
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
    except ZIP_ERRORS as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it, it is made anew") from error
