# SPDX-License-Identifier: Apache-2.0
"""Write a stream: the rows of every domain and split of a data module as blocks in litdata's chunks."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import yaml
from safetensors.torch import save_file

from moeapps.data.domain import Role, Split
from moeapps.data.streaming import ABOUT, COUNT, FORMAT, ROWS, Columns, StreamError, litdata_streaming, pack
from moeapps.files import write_json, write_text

OVERLAY = "data.yaml"
CHUNK_BYTES = 64_000_000
_LARGEST = 2_000_000_000
"""Places in a chunk are numbers of 32 bits."""


@dataclass(frozen=True)
class StreamPart:
    """One domain and split.

    Attributes:
        rows: how many there are, or scans, for the progress bar.
        blocks: makes the blocks, each with its number of rows.
        kept: columns of all rows that a reader keeps in memory (labels), each [rows, ...]; asked for after the blocks.
        about: what a reader must know of it beside, plain values; asked for after the blocks.
    """

    rows: int
    blocks: Callable[[], Iterator[tuple[int, Columns]]]
    kept: Callable[[], Columns] = dict
    about: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class StreamPlan:
    """What a data module writes into a stream.

    Attributes:
        kind: latents, scans, impressions or lists.
        facts: what a reader must know of all of it, plain values.
        roles: domains per role.
        parts: (domain, split) -> rows.
        overlay: root of the stream -> the ``data`` of a config that reads it.
    """

    kind: str
    facts: dict[str, Any]
    roles: Mapping[Role, list[str]]
    parts: dict[tuple[str, Split], StreamPart]
    overlay: Callable[[Path], dict[str, Any]] = field(default=lambda root: {})


@runtime_checkable
class Streamable(Protocol):
    """A data module that can be written as a stream."""

    def prepare_data(self) -> None:
        """Fetch or make what is missing."""

    def stream_plan(self) -> StreamPlan:
        """Say what is written.

        Raises:
            ValueError: this data cannot be streamed.
        """


def write_stream(
    plan: StreamPlan, root: Path, *, advance: Callable[[str, int], object] | None = None, chunk_bytes: int = CHUNK_BYTES
) -> Path:
    """Write a stream; it has its name once it is whole. Returns the overlay that reads it.

    Args:
        plan: what is written.
        root: folder to make.
        advance: told what is being written and how many rows more are.
        chunk_bytes: bytes of a file, about.

    Raises:
        StreamError: the folder is there already, a block is too large, or litdata is not installed.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise StreamError(f"{root} is there already; give a folder that is new or empty, or remove it")
    root.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}-"))
    try:
        splits = {}
        for (domain, split), part in plan.parts.items():
            name = f"{domain}/{split}"

            def one_more(rows: int, name: str = name) -> None:
                if advance is not None:
                    advance(name, rows)

            _write_part(part, made / domain / split, one_more, chunk_bytes)
            splits[name] = part.about()
        about = {"format": FORMAT, "kind": plan.kind, "facts": plan.facts, "roles": dict(plan.roles), "splits": splits}
        overlay = yaml.safe_dump({"data": plan.overlay(root)}, sort_keys=False)
        told = f"# Reads this stream: --config {root / OVERLAY} after a config of its task."
        write_text(made / OVERLAY, f"{told}\n{overlay}")
        write_json(made / ABOUT, about)
        made.chmod(0o755)  # temporary folders are for their owner alone
        made.replace(root)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return root / OVERLAY


def _write_part(part: StreamPart, folder: Path, advance: Callable[[int], object], chunk_bytes: int) -> None:
    cache = litdata_streaming().Cache(str(folder), chunk_bytes=chunk_bytes)
    counts = []
    with warnings.catch_warnings():
        # A block larger than a chunk should be has a chunk of its own, which is no fault.
        warnings.filterwarnings("ignore", message="An item was larger than the target chunk size")
        for number, (rows, block) in enumerate(part.blocks()):
            packed = pack(block)
            if len(packed) > _LARGEST:
                raise StreamError(
                    f"{folder}: block {number} has {len(packed):,} bytes, at most {_LARGEST:,} are written"
                )
            cache[number] = packed
            counts.append(rows)
            advance(rows)
        if not counts:
            raise StreamError(f"{folder.parent.name}/{folder.name} has no row; leave it out of the roles")
        cache.done()
        cache.merge()
    save_file({COUNT: torch.tensor(counts), **part.kept()}, folder / ROWS)
    for file in folder.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
