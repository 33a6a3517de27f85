# SPDX-License-Identifier: Apache-2.0
"""The toy's rows as a stream: small blocks in small chunks, so that a few rows lie in many files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from moeapps.data.domain import SPLITS_OF, Split
from moeapps.data.gather import Rows
from moeapps.data.stream_writing import StreamPart, StreamPlan, write_stream
from moeapps.data.streaming import Columns, StreamedRows, read_about, split_folder
from tests.toy import ToyData

PER_BLOCK = 5


@dataclass
class Points(Rows):
    x: Tensor
    y: Tensor
    domain: Tensor


def points(columns: Columns) -> Points:
    return Points(**columns)


def blocks(rows: TensorDataset) -> Iterator[tuple[int, Columns]]:
    for part in torch.arange(len(rows)).split(PER_BLOCK):
        yield len(part), dict(zip(("x", "y", "domain"), rows[part], strict=True))


def toy_plan(data: ToyData) -> StreamPlan:
    parts: dict[tuple[str, Split], StreamPart] = {}
    for role, names in data.roles.items():
        for name in names:
            for split in SPLITS_OF[role]:
                rows: Any = data.get_dataset(name, split)
                parts[name, split] = StreamPart(
                    len(rows),
                    partial(blocks, rows),
                    kept=lambda rows=rows: {"label": rows.tensors[1]},
                    about=lambda name=name: {"says": name},
                )
    return StreamPlan("toys", {"num_classes": 2}, data.roles, parts)


def write_toys(root: Path, chunk_bytes: int = 600, **options: Any) -> Path:
    write_stream(toy_plan(ToyData(**options)), root, chunk_bytes=chunk_bytes)
    return root


class ToyStream(ToyData):
    """The toy's data out of a stream."""

    def __init__(self, *, root: Path, window: int = 2, **options: Any) -> None:
        super().__init__(**options)
        self.root, self.window = Path(root), window

    def dataset(self, domain: str, split: Split) -> Any:
        self.sources[domain] = "stream"
        about = read_about(self.root, "toys")
        return StreamedRows(split_folder(self.root, about, domain, split), points, self.window)

    def collate(self, items: Points | list[Points]) -> tuple[Tensor, Tensor, Tensor]:
        batch = items if isinstance(items, Points) else Points.cat(items)
        return batch.x, batch.y, batch.domain
