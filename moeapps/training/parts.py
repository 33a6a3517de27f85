# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in parts, by torch.distributed.checkpoint: written by n processes, read by m, or by one.

The checkpoint itself stays a file, ``best.ckpt``, with everything but the large states; it names a folder beside it,
``best.ckpt.parts-<number>``, that torch has written. The folder is complete before the file names it, and the one that
it replaces goes last, so that at every moment the file is whole.

torch unpickles what it reads there; here nothing but tensors, plain values and torch's own descriptions of them are.
"""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from typing_extensions import override

# Whole names, one by one: a module also holds what it imports, and pickle follows dots.
_DESCRIPTIONS = (
    *("Metadata", "StorageMeta", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata"),
    *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
)
_NAMES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _DESCRIPTIONS),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
}


def save_parts(states: dict[str, Any], folder: Path) -> None:
    """Write state dicts, each process its part; all must call this."""
    save(states, checkpoint_id=str(folder))


def load_parts(states: dict[str, Any], folder: Path) -> None:
    """Fill the tensors of state dicts in place, each process its part; all must call this.

    Raises:
        ValueError: a part is damaged or gone, or of another network.
    """
    _load(states, _Reader(str(folder)))


def read_parts(folder: Path, name: str) -> dict[str, Tensor]:
    """Read one of the states whole, in one process without any other.

    Raises:
        ValueError: a part is damaged or gone.
    """
    reader = _Reader(str(folder))
    held = reader.read_metadata()
    places = cast(dict[str, tuple[Any, ...]], held.planner_data)
    wanted = {
        key: torch.empty(about.size, dtype=about.properties.dtype)
        for key, about in held.state_dict_metadata.items()
        if places[key][0] == name and isinstance(about, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is meant
        _load(wanted, reader, no_dist=True)
    return {".".join(map(str, places[key][1:])): value for key, value in wanted.items()}


def _load(states: dict[str, Any], reader: FileSystemReader, *, no_dist: bool = False) -> None:
    try:
        load(states, storage_reader=reader, planner=_Planner(), no_dist=no_dist)
    except CheckpointException as error:  # no Exception, so that it would pass everywhere
        causes = [failure[0] for failure in error.failures.values()]
        told = str(causes[0]) or type(causes[0]).__name__ if causes else str(error)
        raise ValueError(f"{reader.path}: {told}") from error


class _Unpickler(pickle.Unpickler):
    """Builds torch's descriptions of tensors, and nothing else."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint")


class _Reader(FileSystemReader):
    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content = (Path(self.path) / ".metadata").read_bytes()
        held = cast(Metadata, _Unpickler(io.BytesIO(content)).load())
        held.storage_meta = held.storage_meta or StorageMeta()
        held.storage_meta.load_id = self.load_id
        return held


class _Planner(DefaultLoadPlanner):
    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        found = torch.load(value, weights_only=True)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], found)
        else:
            self.state_dict[name] = found
