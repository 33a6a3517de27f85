# SPDX-License-Identifier: Apache-2.0
"""Vectors for class names, so that label sets of different data sets meet in one space.

A provider answers ``encode(names) -> [n, dim]`` with unit rows. The vector of a name depends on the name alone, never
on which other names are asked for. Names are compared in lower case with ``_`` and ``-`` read as a space.

The paper uses CLIP ViT-B/16 text vectors; no trained weights ship here. `TaxonomyText` stands in for them by a
hand-written tree of things, `ClipFileText` reads real ones.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moeapps.bounds import check_npz


class TextVectors(ABC):
    """What `LanguageHead` asks of a provider of text vectors.

    Attributes:
        dim: length of the vectors.
    """

    dim: int

    @abstractmethod
    def encode(self, names: Sequence[str]) -> Tensor:
        """Unit vectors of class names: float32 [len(names), dim]."""


def normalise_name(name: str) -> str:
    """Lower case, one space between words, ``_`` and ``-`` read as a space."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _paths(tree: object, above: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each name of a nested mapping with the path of categories that ends in it."""
    if isinstance(tree, dict):
        for category, below in tree.items():
            yield from _paths(below, (*above, category))
    elif isinstance(tree, list):
        for name in tree:
            yield name, (*above, name)


@cache
def taxonomy() -> dict[str, tuple[str, ...]]:
    """The tree of ``taxonomy.json``: name -> categories from the most general to the name itself."""
    tree = json.loads(Path(__file__).with_name("taxonomy.json").read_text(encoding="utf-8"))
    paths: dict[str, tuple[str, ...]] = {}
    for name, path in _paths(tree):
        if name in paths:
            raise ValueError(f"taxonomy.json names {name!r} twice: keep one place for it")
        paths[name] = path
    return paths


@cache
def _taxonomy_vectors() -> Tensor:
    """Rows with inner products K = shared depth / sqrt(depth * depth), in float64.

    K counts shared ancestors, so it is positive semi-definite; its symmetric root V sqrt(L) Vᵀ does not depend on the
    sign or rotation of eigenvectors, hence not on the machine. Its rows have unit length because K has a unit diagonal.
    """
    paths = list(taxonomy().values())
    shared = torch.zeros(len(paths), len(paths), dtype=torch.float64)
    for i, a in enumerate(paths):
        for j, b in enumerate(paths):
            shared[i, j] = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    depth = shared.diagonal()
    values, vectors = torch.linalg.eigh(shared / (depth[:, None] * depth).sqrt())
    root: Tensor = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
    return root


class TaxonomyText(TextVectors):
    """Fixed vectors from a hand-written tree of things: synonyms lie close, siblings nearer than strangers.

    cos(a, b) = depth of the last shared category / sqrt(depth of a * depth of b), a categories-only kernel; unrelated
    names are orthogonal. Needs no file and no training.

    Example:
        >>> road, driveable, chair = TaxonomyText().encode(["road", "driveable surface", "chair"])
        >>> round(float(road @ driveable), 2), round(abs(float(road @ chair)), 2)
        (0.83, 0.0)
    """

    def __init__(self) -> None:
        self._index = {name: i for i, name in enumerate(taxonomy())}
        self.dim = len(self._index)

    def encode(self, names: Sequence[str]) -> Tensor:
        """Unit vectors of class names: float32 [len(names), dim].

        Raises:
            ValueError: A name is not in the tree.
        """
        missing = [name for name in names if normalise_name(name) not in self._index]
        if missing:
            raise ValueError(
                f"the taxonomy does not know {missing}: add them to tasks/point_cloud/nets/taxonomy.json, "
                "rename the classes, or use ClipFileText or RandomText"
            )
        rows = [self._index[normalise_name(name)] for name in names]
        return F.normalize(_taxonomy_vectors()[rows], dim=-1).float()


class RandomText(TextVectors):
    """Control without meaning: an independent random direction per name, drawn from a hash of the name.

    Directions are orthogonal up to chance: cosines have standard deviation 1/sqrt(dim).

    Args:
        dim: length of the vectors, >= 1.
        seed: draws other directions.
    """

    def __init__(self, dim: int = 256, seed: int = 0) -> None:
        if dim < 1:
            raise ValueError(f"dim={dim}: a vector has at least one entry")
        self.dim = dim
        self.seed = seed

    def encode(self, names: Sequence[str]) -> Tensor:
        """Unit vectors of class names: float32 [len(names), dim]."""
        rows = []
        for name in names:
            digest = hashlib.sha256(f"{self.seed}:{normalise_name(name)}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            rows.append(torch.randn(self.dim, generator=generator))
        return F.normalize(torch.stack(rows), dim=-1) if rows else torch.zeros(0, self.dim)


class ClipFileText(TextVectors):
    """Text vectors made elsewhere, read from an ``.npz`` file with ``names`` [n] and ``vectors`` [n, dim].

    `write_text_file` makes such a file from the output of any text encoder.

    Args:
        path: the file.
        names: names that will be asked for; given, their absence is an error now and not in training.

    Raises:
        ValueError: The file is missing, has another layout, or lacks one of ``names``.
    """

    def __init__(self, path: Path, names: Sequence[str] = ()) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"no text vectors at {self.path}: write them with write_text_file, or use TaxonomyText")
        check_npz(self.path)
        with np.load(self.path, allow_pickle=False) as data:
            if not {"names", "vectors"} <= set(data.files):
                raise ValueError(f"{self.path} holds {data.files}, expected arrays 'names' [n] and 'vectors' [n, dim]")
            keys, vectors = [str(name) for name in data["names"]], torch.from_numpy(data["vectors"]).float()
        if vectors.ndim != 2 or len(keys) != len(vectors):
            raise ValueError(f"{self.path}: {len(keys)} names but vectors of shape {tuple(vectors.shape)}")
        self._vectors = F.normalize(vectors, dim=-1)
        self._index = {normalise_name(name): i for i, name in enumerate(keys)}
        self.dim = vectors.shape[1]
        self.encode(names)

    def encode(self, names: Sequence[str]) -> Tensor:
        """Unit vectors of class names: float32 [len(names), dim].

        Raises:
            ValueError: A name is not in the file.
        """
        missing = [name for name in names if normalise_name(name) not in self._index]
        if missing:
            raise ValueError(
                f"{self.path} has no vectors for {missing}: encode these names too and write the file again"
            )
        return self._vectors[[self._index[normalise_name(name)] for name in names]]


def write_text_file(path: Path, names: Sequence[str], vectors: Tensor) -> None:
    """Write the file that `ClipFileText` reads.

    Args:
        path: ends in ``.npz``.
        names: n class names.
        vectors: [n, dim], any scale.
    """
    if vectors.ndim != 2 or len(names) != len(vectors):
        raise ValueError(f"{len(names)} names but vectors of shape {tuple(vectors.shape)}: give one row per name")
    np.savez(path, names=np.array(list(names)), vectors=vectors.detach().cpu().float().numpy())
