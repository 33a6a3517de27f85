# SPDX-License-Identifier: Apache-2.0
"""Scans as streams: whole scans one after another on a disk, written by ``moeapps data optimize``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from moeapps.data.domain import SPLITS_OF, DomainDataModule
from moeapps.data.stream_writing import StreamPart, StreamPlan
from moeapps.data.streaming import INDEX, Columns, StreamedRows, StreamError, read_about, split_folder
from tasks.point_cloud.data.public import PublicScans
from tasks.point_cloud.data.readers.scan import RawScan, Scaling, ScanReader, ScanRef, Split
from tasks.point_cloud.data.sources import PointSource

_POINTS = ("xyz", "label", "color", "normal", "intensity")


class StreamReader(ScanReader):
    """Scans of one domain out of a stream, in metres as they were written.

    Args:
        root: folder that ``moeapps data optimize`` has written.
        domain: which of its domains.

    Raises:
        StreamError: no stream of scans, or a damaged one.
    """

    layout: ClassVar[str] = "a stream as `moeapps data optimize` writes it"
    source: ClassVar[str] = "your own data; docs/data.md describes streams"

    def __init__(self, root: Path | str, domain: str) -> None:
        super().__init__(root, None, Scaling())
        self.domain = domain
        self._streams: dict[Split, StreamedRows] = {}

    @cached_property
    def _about(self) -> dict[str, Any]:
        return read_about(self.root, "scans")

    @cached_property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Class names in index order."""
        names = self._about["facts"].get("names", {}).get(self.domain)
        if not isinstance(names, list) or not names:
            raise StreamError(f"{self.root} has no class names of domain {self.domain!r}; write the stream again")
        return tuple(str(name) for name in names)

    def _stream(self, split: Split) -> StreamedRows:
        if split not in self._streams:
            folder = split_folder(self.root, self._about, self.domain, split)
            # A scan is large and read at random: none is held, the data set holds the one it cuts.
            self._streams[split] = StreamedRows(folder, partial(_Block, names=self.names, path=str(folder)), window=1)
        return self._streams[split]

    @override
    def find(self, split: Split) -> list[ScanRef]:
        stream = self._stream(split)
        names = self._about["splits"][f"{self.domain}/{split}"].get("names")
        if not isinstance(names, list) or len(set(map(str, names))) != len(stream):
            raise StreamError(f"{stream.folder} has not one name for each scan; write the stream again")
        return [ScanRef(str(name), stream.folder / INDEX) for name in names]

    @override
    def read(self, ref: ScanRef) -> RawScan:
        split: Any = ref.points.parent.name
        number = self._about["splits"][f"{self.domain}/{split}"]["names"].index(ref.name)
        block: _Block = self._stream(split).block(number)
        return block.scan


class _Block:
    """A block of one row: a scan.

    Args:
        columns: what was written of it.
        names: class names.
        path: what to call its file.

    Raises:
        ValueError: arrays that do not fit together, or labels without a name.
    """

    def __init__(self, columns: Columns, names: tuple[str, ...], path: str) -> None:
        arrays = {name: columns[name].numpy() for name in _POINTS if name in columns}
        told, origin, count = columns["told"].tolist(), columns["origin"].tolist(), len(columns["xyz"])
        if any(len(array) != count for array in arrays.values()) or columns["xyz"].shape != (count, 3):
            raise ValueError("arrays of different lengths")
        if count and not -1 <= int(columns["label"].min()) <= int(columns["label"].max()) < len(names):
            raise ValueError("a label without a name")
        self.scan = RawScan(
            names=names, path=path, labelled=bool(told[0]), step=float(told[1]), origin=tuple(origin), **arrays
        )

    def __len__(self) -> int:
        return 1


def plan(data: DomainDataModule, own: Mapping[str, PointSource]) -> StreamPlan:
    """Say how scans become a stream: those of every domain that a reader reads; simulated ones are made where needed.

    Raises:
        ValueError: no such domain.
    """
    read = {name: source for name, source in own.items() if isinstance(source, PublicScans)}
    roles = {role: [name for name in names if name in read] for role, names in data.roles.items()}
    parts, names = {}, {}
    for role, domains in roles.items():
        for domain in domains:
            names[domain] = list(read[domain].label_set)
            for split in SPLITS_OF[role]:
                refs = read[domain].reader.scans(split)
                parts[domain, split] = StreamPart(
                    len(refs),
                    partial(_blocks, read[domain], refs, domain),
                    about=partial(dict[str, Any], names=[ref.name for ref in refs]),
                )
    if not parts:
        raise ValueError(
            "no domain is read by tasks.point_cloud.data.public.PublicScans; streams hold scans out of files"
        )

    def overlay(root: Path) -> dict[str, Any]:
        def reading(domain: str, source: PublicScans) -> dict[str, Any]:
            reader = {"class_path": f"{__name__}.{StreamReader.__qualname__}"}
            reader |= {"init_args": {"root": str(root), "domain": domain}}  # type: ignore[dict-item]
            options = {"reader": reader, "voxel": source.voxel, "indoor": source.indoor, "optional": source.optional}
            return {"class_path": f"{PublicScans.__module__}.{PublicScans.__qualname__}", "init_args": options}

        return {
            "class_path": f"{type(data).__module__}.{type(data).__qualname__}",
            "init_args": {
                "own": {domain: reading(domain, read[domain]) for domain in names},
                **{role: list(domains) for role, domains in data.roles.items()},
            },
        }

    return StreamPlan("scans", {"names": names}, roles, parts, overlay)


def _blocks(source: PublicScans, refs: list[ScanRef], domain: str) -> Iterator[tuple[int, Columns]]:
    for ref in refs:
        raw = source.read(ref, domain)
        if raw.names != source.label_set:
            raise ValueError(f"scan {ref.name} of {domain!r} has other class names than its domain; give one list")
        arrays: dict[str, Tensor] = {
            name: torch.from_numpy(getattr(raw, name).copy()) for name in _POINTS if getattr(raw, name) is not None
        }
        told = torch.tensor([float(raw.labelled), raw.step], dtype=torch.float64)
        yield 1, {**arrays, "told": told, "origin": torch.tensor(raw.origin, dtype=torch.float64)}
