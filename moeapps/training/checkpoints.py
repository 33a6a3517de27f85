# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files that are whole or refused: written beside their place, renamed, and told by a digest beside them."""

from __future__ import annotations

import glob
import hashlib
import io
import logging
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from moeapps.bounds import ZIP_ERRORS
from moeapps.files import WholeFile, sha256_of
from moeapps.training.folders import RunError

log = logging.getLogger("moeapps")

PARTS = "parts"
"""Entry of a checkpoint of several processes: the folder beside it where each has written its part of the weights."""

SPLIT = "split_banks"
"""Entry of such a checkpoint: the names of the banks of experts that were cut in two, see `one_process_state`."""

RESUMED = ("interrupted.ckpt", "last.ckpt", "best.ckpt")
"""What a training goes on from, the newest first: an interruption ends a run, so that its checkpoint is the last."""

# Damaged headers may claim a password or another compression (RuntimeError), or sizes that there are not.


class CheckpointError(RunError):
    """A checkpoint that is damaged, or not there."""


def digest_file(path: Path) -> Path:
    """Return where the digest of a checkpoint is: in the form of `sha256sum`, so that `sha256sum -c` reads it."""
    # Lightning counts all files named hpc_ckpt_..., by all of their digits, to find the newest of a requeued job.
    name = path.name.replace("hpc_ckpt_", "hpc-ckpt-")
    return path.with_name(f"{name}.sha256")


def write_checkpoint(held: Any, path: Path) -> None:
    """Write a checkpoint and its digest; at every moment the file under that name is whole, the old one or the new.

    Args:
        held: what torch can save.
        path: file to write.

    Raises:
        CheckpointError: it cannot be written.
    """
    buffer = io.BytesIO()  # written to a file, torch hides the cause of a failure, such as a full disk
    torch.save(held, buffer)
    _write(buffer.getbuffer(), path)


def copy_checkpoint(old: Path, new: Path) -> None:
    """Copy a checkpoint, whole or not at all.

    Raises:
        CheckpointError: the old one is damaged, or the new one cannot be written.
    """
    check_whole(old)
    for folder in parts_folders(old):
        shutil.copytree(folder, new.parent / folder.name, dirs_exist_ok=True)
    _write(old.read_bytes(), new)


def parts_folders(path: Path) -> list[Path]:
    """Folders of the weights of a checkpoint that several processes have written, each its own part."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.parts-*"))


def _write(content: Any, path: Path) -> None:
    """Write file and digest.

    The digest moves first and still names what is replaced, so that a crash between the two moves loses nothing.
    """
    text = f"{hashlib.sha256(content).hexdigest()}  {path.name}\n"
    try:
        if path.is_file():
            text += f"# before: {sha256_of(path)}\n"
        with WholeFile(path) as temporary:
            temporary.write_bytes(content)
            digest_file(temporary).write_text(text, encoding="ascii")
    except OSError as error:
        kept = first_whole(path.parent) if path.parent.is_dir() else None
        told = f"{kept} is whole" if kept else "no earlier one is there"
        raise CheckpointError(f"cannot write the checkpoint {path} ({error.strerror or error}); {told}") from error


def read_checkpoint(path: Path | str, *, weights: bool = True) -> dict[str, Any]:
    """Read a checkpoint to the CPU; nothing but tensors and plain values is unpickled.

    Args:
        path: the file.
        weights: whether it must hold weights.

    Raises:
        CheckpointError: it is not there, damaged, or no checkpoint of a run.
    """
    path = Path(path)
    check_whole(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and key errors of a file that is none have no common class
        raise CheckpointError(
            f"{path} is no readable checkpoint ({type(error).__name__}); give one that `fit` wrote"
        ) from error
    if weights and isinstance(held, dict):
        _add_parts(held, path)
    if not isinstance(held, dict) or (weights and not isinstance(held.get("state_dict"), dict)):
        raise CheckpointError(f"{path} is no checkpoint of a run; give one that `fit` wrote")
    return held


def _add_parts(held: dict[str, Any], path: Path) -> None:
    """Add the weights that lie in parts beside a checkpoint, whole, as one process would have written them."""
    if PARTS not in held or "state_dict" in held:
        return
    from moeapps.moe.surgery import one_process_state
    from moeapps.training.parts import read_parts

    try:
        state = read_parts(path.parent / Path(str(held[PARTS])).name, "state_dict")
        held["state_dict"] = one_process_state(state, held[SPLIT])
    except Exception as error:  # pickle, zip and key errors of a damaged file have no common class
        raise CheckpointError(
            f"the parts of {path} are damaged ({type(error).__name__}: {error}); use another checkpoint of the run"
        ) from error


def check_whole(path: Path) -> None:
    """Compare a checkpoint with its digest; without one (a copy, another program's) with the sums of its zip entries.

    Raises:
        CheckpointError: it is not there or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; look for the run's others in {path.parent}")
    beside = digest_file(path)
    if beside.is_file():
        lines = beside.read_text(encoding="ascii", errors="replace").splitlines()
        if sha256_of(path) not in [line.removeprefix("# before: ")[:64] for line in lines]:
            raise CheckpointError(
                f"{path} is damaged: it is not what {beside.name} says was written; use another checkpoint of the run"
            )
    try:
        with zipfile.ZipFile(path) as entries:
            _refuse_compressed(entries, path)
            damaged = None if beside.is_file() else entries.testzip()
    except CheckpointError:
        raise
    except ZIP_ERRORS as error:
        raise CheckpointError(
            f"{path} is no readable checkpoint ({error}); use another checkpoint of the run"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged at {damaged}; use another checkpoint of the run")


def _refuse_compressed(entries: zipfile.ZipFile, path: Path) -> None:
    """Refuse what would unpack to more than the file's bytes: torch takes the memory before it reads."""
    size = path.stat().st_size
    if any(part.compress_type != zipfile.ZIP_STORED or part.file_size > size for part in entries.infolist()):
        raise CheckpointError(f"{path} is compressed, which torch does not do: it is damaged, or made to fill memory")


def first_whole(folder: Path, names: Sequence[str] = RESUMED) -> Path | None:
    """Return the first of a folder's checkpoints that is whole, and say in a line which ones were passed over."""
    passed: list[str] = []
    for path in (folder / name for name in names if (folder / name).is_file()):
        try:
            check_whole(path)
        except CheckpointError:
            passed.append(path.name)
            continue
        if passed:
            verb = "is" if len(passed) == 1 else "are"
            log.warning("%s in %s %s damaged; going on from %s", " and ".join(passed), folder, verb, path.name)
        return path
    return None


class WholeCheckpoints(TorchCheckpointIO):
    """How the trainer writes and reads checkpoints."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_checkpoint(checkpoint, Path(path))

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if not _is_remote(path):
            check_whole(Path(path))
        held: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
        if not _is_remote(path):
            _add_parts(held, Path(path))
        return held

    @override
    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        if not _is_remote(path):
            digest_file(Path(path)).unlink(missing_ok=True)
            for folder in parts_folders(Path(path)):
                shutil.rmtree(folder)


def _is_remote(path: Any) -> bool:
    return "://" in str(path)
