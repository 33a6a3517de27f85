# SPDX-License-Identifier: Apache-2.0
"""Latents as streams: in blocks on a disk, written by ``moeapps data optimize``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from moeapps.data.domain import SPLITS, DomainDataModule, Split
from moeapps.data.gather import Rows
from moeapps.data.stream_writing import StreamPart, StreamPlan
from moeapps.data.streaming import Columns, StreamedRows, StreamError, read_about, split_folder
from tasks.image_diffusion.data.readers.latent_files import LatentArrays, LatentDataset, LatentShards
from tasks.image_diffusion.data.source import ImageSource

ROWS_PER_BLOCK = 64


@dataclass
class StoredLatents(Rows):
    """What a block holds: float [B, C or 2C, h, w] latents or moments, and mirrored ones where there are any."""

    stored: Tensor
    flipped: Tensor | None = None


class LatentStream(LatentDataset):
    """Latents of one domain and split, read block by block; labels are in memory.

    Args:
        rows: the stream.
        label: int64 [N].
        channels: C.
        scale: factor.
        train: draw from the posterior, and mirror.
    """

    def __init__(self, rows: StreamedRows, label: Tensor, channels: int, scale: float, *, train: bool) -> None:
        super().__init__(label, channels, scale, train=train)
        self.rows, self.sizes, self.window = rows, rows.sizes, rows.window

    def stored(self, rows: Tensor, flip: Tensor) -> Tensor:
        """Return the rows, mirrored where ``flip``."""
        found: StoredLatents = self.rows.batch(rows)
        return found.stored if found.flipped is None else found.flipped.where(flip[:, None, None, None], found.stored)


class StreamedLatents(ImageSource):
    """Latents out of a stream.

    Args:
        root: folder that ``moeapps data optimize`` has written.
        window: blocks of 64 latents whose rows are shuffled together, and that are held in memory, for each domain.

    Raises:
        StreamError: no stream of latents, or a damaged one.
    """

    latent = True

    def __init__(self, *, root: Path, window: int = 32) -> None:
        self.root, self.window = Path(root).expanduser(), window
        self.about = read_about(self.root, "latents")
        self.domains = list(dict.fromkeys(name.rpartition("/")[0] for name in self.about["splits"]))
        self.default_roles = self.about["roles"]  # type: ignore[misc]
        facts = self.about["facts"]
        try:
            self.channels, self.image_size = int(facts["channels"]), int(facts["image_size"])
            self.class_names = [str(name) for name in facts["class_names"]]
            self.superclass = [int(number) for number in facts["superclass"]]
        except (KeyError, TypeError, ValueError) as error:
            raise StreamError(f"{self.root} describes no latents ({error}); write the stream again") from error

    @override
    def dataset(self, domain: str, split: Split, cache: Path | None) -> LatentStream:
        rows = StreamedRows(split_folder(self.root, self.about, domain, split), _made, self.window)
        label = rows.kept.get("label")
        scale = self.about["splits"][f"{domain}/{split}"].get("scale")
        if label is None or label.dtype != torch.int64 or not isinstance(scale, float):
            raise StreamError(f"{rows.folder} has no labels or no scale of latents; write the stream again")
        return LatentStream(rows, label, self.channels, scale, train=split == "train")

    @override
    def describe(self, domain: str) -> str:
        return f"stream {self.root.name}, {self.channels} x {self.image_size} x {self.image_size}"


def _made(columns: Columns) -> StoredLatents:
    return StoredLatents(**columns)


def plan(data: DomainDataModule, source: ImageSource) -> StreamPlan:
    """Say how latents become a stream, all splits of all roles: what an unseen domain gives for tuning is in its first.

    Raises:
        ValueError: images that are no latents.
    """
    parts = {}
    for domain in data.domain_names:
        for split in SPLITS:
            rows = data.get_dataset(domain, split)
            if not isinstance(rows, LatentDataset):
                raise ValueError(
                    f"{type(source).__name__} gives pixels; streams hold latents (configs/data/latents.yaml)"
                )
            parts[domain, split] = StreamPart(
                len(rows),
                partial(_blocks, rows),
                kept=partial(_labels, rows),
                about=partial(dict[str, Any], scale=float(rows.scale)),
            )
    facts = {name: getattr(source, name) for name in ("class_names", "superclass", "channels", "image_size")}

    def overlay(root: Path) -> dict[str, Any]:
        reader = {"class_path": f"{__name__}.{StreamedLatents.__qualname__}", "init_args": {"root": str(root)}}
        return {
            "class_path": f"{type(data).__module__}.{type(data).__qualname__}",
            "init_args": {"source": reader, **{role: list(names) for role, names in data.roles.items()}},
        }

    return StreamPlan("latents", facts, data.roles, parts, overlay)


def _labels(rows: LatentDataset) -> Columns:
    return {"label": rows.label}


def _blocks(rows: LatentDataset) -> Iterator[tuple[int, Columns]]:
    # All blocks of a split have mirrored latents, or none has: rows of several are joined to a batch.
    never = isinstance(rows, LatentArrays) or (isinstance(rows, LatentShards) and not rows.mirrored)
    for part in torch.arange(len(rows)).split(ROWS_PER_BLOCK):
        columns = {"stored": rows.stored(part, torch.zeros(len(part), dtype=torch.bool))}
        if not never:
            columns["flipped"] = rows.stored(part, torch.ones(len(part), dtype=torch.bool))
        yield len(part), columns
