# SPDX-License-Identifier: Apache-2.0
"""Data larger than memory: rows in blocks, in litdata's chunks on a disk (``moeapps data optimize`` writes them).

A stream is a folder: ``stream.json`` says what it holds, and ``<domain>/<split>/`` has litdata's ``index.json`` and
chunks, whose items are blocks of rows, and ``rows.safetensors`` with how many rows each block has. A block is bytes: a
checksum, then named tensors as safetensors. Pickles are neither written nor read, and nothing is unpacked before what
it promises was compared with the size of its file.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor
from typing_extensions import override

from moeapps.bounds import BoundError, read_json, require_file
from moeapps.data.domain import Split
from moeapps.data.gather import BatchDataset, gather

Columns = dict[str, Tensor]
"""Named tensors of some rows."""
ABOUT, INDEX, ROWS = "stream.json", "index.json", "rows.safetensors"
FORMAT = 1
COUNT = "rows in each block"
"""The one column of ``rows.safetensors`` that every stream has; the others are those that all rows keep in memory."""
_SPEC = '[1, {"type": null, "context": null, "children_spec": []}]'
"""litdata's words for an item that is one piece of bytes. Others may name modules to import, so they are refused."""
_CHUNK = re.compile(r"chunk-\d+-\d+\.bin")
_INDEX_BYTES = 200_000_000


class StreamError(ValueError):
    """A stream that is missing or damaged, or that was written by something else."""


def litdata_streaming() -> Any:
    """Import litdata, which then asks no index for newer versions of itself.

    Raises:
        StreamError: it is not installed.
    """
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
    try:
        import litdata.streaming as streaming
    except ImportError as error:
        raise StreamError(f"streams need litdata ({error}): pip install 'moeapps[stream]'") from error
    return streaming


def pack(block: Columns) -> bytes:
    """Make bytes of a block: CRC-32 as a little-endian uint32, then safetensors."""
    payload = save_tensors({name: column.contiguous() for name, column in block.items()})
    return struct.pack("<I", zlib.crc32(payload)) + payload


def unpack(packed: bytes | memoryview) -> Columns:
    """Return the block that was made into bytes.

    Raises:
        StreamError: damage.
    """
    payload = bytes(packed[4:])
    if len(packed) < 4 or struct.unpack("<I", packed[:4])[0] != zlib.crc32(payload):
        raise StreamError("its checksum is another one")
    try:
        return load_tensors(payload)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise StreamError(f"its tensors cannot be read ({error})") from error


def read_about(root: Path, kind: str) -> dict[str, Any]:
    """Return what ``stream.json`` says: ``facts`` of the data, ``roles`` of its domains, words on each split.

    Args:
        root: folder of the stream.
        kind: what its rows must be: latents, scans, impressions or lists.

    Raises:
        StreamError: no stream, damage, or rows of another kind.
    """
    path = root / ABOUT
    try:
        about = read_json(path, _INDEX_BYTES)
    except OSError as error:
        raise StreamError(
            f"{root} is no stream, {ABOUT} cannot be read ({error.strerror}); write one: moeapps data optimize "
            "CONFIG.yaml FOLDER"
        ) from error
    except BoundError as error:
        raise StreamError(str(error)) from error
    wanted = {"facts": dict, "roles": dict, "splits": dict}
    if not isinstance(about, dict) or not all(isinstance(about.get(key), kind_) for key, kind_ in wanted.items()):
        raise StreamError(f"{path} is not what `moeapps data optimize` writes; write the stream again")
    if about.get("format") != FORMAT or about.get("kind") != kind:
        raise StreamError(
            f"{path} has {str(about.get('kind'))[:40]} in format {str(about.get('format'))[:40]}, needed are {kind} in "
            f"format {FORMAT}; give a stream that was written for this task"
        )
    return about


def split_folder(root: Path, about: dict[str, Any], domain: str, split: Split) -> Path:
    """Return where a domain and split lies.

    Raises:
        StreamError: the stream has no such domain or split.
    """
    if f"{domain}/{split}" not in about["splits"]:
        held = ", ".join(map(str, about["splits"]))[:200]
        raise StreamError(f"{root} has no {split} split of domain {domain!r} but {held}; write them or change the role")
    return root / domain / split


class StreamedRows(BatchDataset):
    """Rows of one domain and split; the blocks used last are held.

    All state is the order of the rows, which a sampler decides (`moeapps.data.mixed_windows`): a resumed run reads on
    where it stopped, with any number of workers.

    Args:
        folder: ``<stream>/<domain>/<split>``.
        make: makes a batch of the columns of a block.
        window: blocks that are held, and whose rows may be shuffled together, >= 1.

    Raises:
        StreamError: something is missing or damaged, or holds other things than bytes.
        ValueError: a window below 1.
    """

    def __init__(self, folder: Path, make: Callable[[Columns], Any], window: int = 32) -> None:
        if window < 1:
            raise ValueError(f"window={window} is not allowed; use 1 or more blocks")
        self.folder, self.make, self.window = folder, make, window
        self.chunks = _read_index(folder)
        kept = _read_rows(folder / ROWS)
        self.sizes: list[int] = kept.pop(COUNT).tolist()
        self.kept = kept
        self.ends = list(accumulate(self.sizes))
        self.chunk_ends = list(accumulate(size for _, size, _ in self.chunks))
        if self.chunk_ends[-1] != len(self.sizes):
            raise StreamError(
                f"{folder / INDEX} has {self.chunk_ends[-1]} blocks, {ROWS} beside it {len(self.sizes)}; "
                "write the stream again"
            )
        wrong = next((name for name, column in kept.items() if len(column) != self.ends[-1]), None)
        if wrong is not None:
            raise StreamError(f"{folder / ROWS}: {wrong[:40]!r} has not one value for each row; write the stream again")
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._checked: set[int] = set()
        self._process = os.getpid()

    def __len__(self) -> int:
        return self.ends[-1]

    @override
    def batch(self, rows: Tensor) -> Any:
        return gather(rows, self.ends, self._take, self.join)

    def _take(self, number: int, rows: Tensor) -> Any:
        return self.block(number).take(rows)

    def block(self, number: int) -> Any:
        """Return all rows of a block as ``make`` makes them."""
        if self._process != os.getpid():  # a worker: open files have one position for all that inherited them
            self.__dict__.pop("_items", None)
            self._process = os.getpid()
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        while len(self._held) >= self.window:
            self._held.popitem(last=False)
        self._held[number] = self._read(number)
        return self._held[number]

    def _read(self, number: int) -> Any:
        chunk = bisect_right(self.chunk_ends, number)
        if chunk not in self._checked:
            _check_chunk(self.folder, *self.chunks[chunk])
            self._checked.add(chunk)
        path = self.folder / self.chunks[chunk][0]
        try:
            made = self.make(unpack(self._items[number]))
        except StreamError as error:
            raise StreamError(f"{path}: block {number} is damaged, {error}; write the stream again") from error
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OSError) as error:
            raise StreamError(f"{path}: block {number} cannot be used ({error}); write the stream again") from error
        if len(made) != self.sizes[number]:
            raise StreamError(
                f"{path}: block {number} has {len(made)} rows, {ROWS} says {self.sizes[number]}; write the stream again"
            )
        return made

    @cached_property
    def _items(self) -> Any:
        """The blocks as bytes, by number."""
        streaming = litdata_streaming()
        from litdata.streaming.resolver import Dir

        # As a Dir the path is taken as it is; as text some folders would mean places on other machines.
        return streaming.StreamingDataset(Dir(path=str(self.folder.resolve()), url=None))

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_held": OrderedDict()}
        state.pop("_items", None)
        return state


def _read_index(folder: Path) -> list[tuple[str, int, int]]:
    """Return file name, blocks and bytes of each chunk, after litdata's index was found to say nothing else."""
    path = folder / INDEX
    try:
        index = read_json(path, _INDEX_BYTES)
        config = dict(index["config"])
        chunks = [(part["filename"], part["chunk_size"], part["chunk_bytes"]) for part in index["chunks"]]
        # litdata reads the file itself, and would take these for chunks of another kind.
        fine = set(index) <= {"chunks", "config", "updated_at"} and all(
            type(name) is str and _CHUNK.fullmatch(name) and type(size) is int and type(held) is int
            for name, size, held in chunks
        )
    except OSError as error:
        raise StreamError(f"{path} cannot be read ({error.strerror}); write the stream again") from error
    except BoundError as error:
        raise StreamError(str(error)) from error
    except (TypeError, KeyError, ValueError, AttributeError):
        fine = False
    if not fine or not chunks or any(size < 1 or held < 1 for _, size, held in chunks):
        raise StreamError(f"{path} is damaged: it has no list of chunks; write the stream again")
    if len({name for name, _, _ in chunks}) < len(chunks):
        raise StreamError(f"{path} is damaged: it names a chunk twice; write the stream again")
    plain = {"data_format": ["bytes"], "data_spec": _SPEC, "item_loader": "PyTreeLoader", "types": "bytes"}
    without = ("compression", "compression_level", "encryption", "ipc_compression")
    if any(config.get(key) != value for key, value in plain.items()) or any(config.get(key) for key in without):
        raise StreamError(
            f"{path} has items of format {str(config.get('data_format'))[:60]}; only plain bytes are read, never "
            "pickles: write the stream by `moeapps data optimize`"
        )
    return chunks


def _read_rows(path: Path) -> Columns:
    """Return the rows of each block and the columns that are kept in memory."""
    try:
        require_file(path)
        held = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise StreamError(f"{path} cannot be read ({error}); write the stream again") from error
    count = held.get(COUNT)
    if count is None or count.ndim != 1 or count.dtype != torch.int64 or not len(count) or int(count.min()) < 1:
        raise StreamError(f"{path} does not say how many rows each block has; write the stream again")
    if any(column.ndim < 1 for column in held.values()) or int(count.max()) > 2**40:
        raise StreamError(f"{path} has columns that are not one value for each row; write the stream again")
    return held


def _check_chunk(folder: Path, name: str, blocks: int, size: int) -> None:
    """Compare the head of a chunk with its file: number of blocks, then where each begins and the last ends."""
    path = folder / name
    try:
        held = require_file(path)
        with open(path, "rb") as file:
            head = file.read(4 + 4 * (blocks + 1)) if 4 + 4 * (blocks + 1) <= held else b""
    except OSError as error:
        raise StreamError(f"{path} cannot be read ({error.strerror}); write the stream again") from error
    except BoundError as error:
        raise StreamError(str(error)) from error
    if held != size or not head:
        raise StreamError(f"{path} has {held:,} bytes, {INDEX} says {size:,}; it was cut off: write the stream again")
    count, *places = struct.unpack(f"<{blocks + 2}I", head)
    ordered = all(a < b for a, b in pairwise(places))
    if count != blocks or not ordered or places[0] != len(head) or places[-1] != held:
        raise StreamError(f"{path} is damaged: its blocks do not lie one after another; write the stream again")
