# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: the old one or the new one at every moment, and nothing in between is ever read."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from moeapps.training.checkpoints import (
    CheckpointError,
    WholeCheckpoints,
    check_whole,
    copy_checkpoint,
    digest_file,
    first_whole,
    read_checkpoint,
    write_checkpoint,
)


def held(value: float) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((8,), value)}, "epoch": 3}


def value_of(path: Path) -> float:
    return float(read_checkpoint(path)["state_dict"]["w"][0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_checkpoint(held(1.0), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_the_digest_beside_a_checkpoint_is_the_one_that_sha256sum_reads(path: Path) -> None:
    line = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  last.ckpt"

    assert digest_file(path).read_text().splitlines() == [line]
    assert sorted(file.name for file in path.parent.iterdir()) == ["last.ckpt", "last.ckpt.sha256"]


def test_every_single_bit_flip_is_refused(path: Path) -> None:
    whole, passed = path.read_bytes(), []
    with path.open("r+b", buffering=0) as file:
        for bit in range(8 * len(whole)):
            file.seek(bit // 8)
            file.write(bytes([whole[bit // 8] ^ 1 << bit % 8]))
            try:
                check_whole(path)
                passed.append(bit)
            except CheckpointError:
                file.seek(bit // 8)
                file.write(whole[bit // 8 : bit // 8 + 1])

    assert len(whole) > 500
    assert passed == []
    assert value_of(path) == 1.0


def test_every_length_but_the_whole_one_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"last\.ckpt is damaged"):
            read_checkpoint(path)


def test_without_a_digest_the_sums_of_the_zip_entries_are_compared(path: Path) -> None:
    digest_file(path).unlink()
    assert value_of(path) == 1.0
    whole, flipped = path.read_bytes(), 0
    with zipfile.ZipFile(path) as entries:
        held = [entries.read(info) for info in entries.infolist()]
    with path.open("r+b", buffering=0) as file:
        for content in (content for content in held if len(content) > 8):  # the weights and what names them
            begin = whole.index(content)
            for bit in range(8 * begin, 8 * (begin + len(content)), 3):
                file.seek(bit // 8)
                file.write(bytes([whole[bit // 8] ^ 1 << bit % 8]))
                with pytest.raises(CheckpointError, match="is damaged at"):
                    check_whole(path)
                file.seek(bit // 8)
                file.write(whole[bit // 8 : bit // 8 + 1])
                flipped += 1

    assert flipped > 500
    path.write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match="is no readable checkpoint"):
        check_whole(path)


def test_a_crash_between_the_two_moves_leaves_the_old_checkpoint_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if Path(target).suffix == ".ckpt":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(held(2.0), path)
    monkeypatch.undo()

    assert hashlib.sha256(path.read_bytes()).hexdigest() not in digest_file(path).read_text().splitlines()[0]
    assert value_of(path) == 1.0
    write_checkpoint(held(2.0), path)
    assert value_of(path) == 2.0


def test_a_file_that_cannot_be_written_whole_costs_nothing_and_the_last_whole_one_is_named(path: Path) -> None:
    before, other = resource.getrlimit(resource.RLIMIT_FSIZE), path.with_name("best.ckpt")
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))  # as a full disk: the write breaks off in the file
    try:
        with pytest.raises(CheckpointError, match=r"best\.ckpt \(File too large\); .*last\.ckpt is whole"):
            write_checkpoint(held(2.0), other)
        with pytest.raises(CheckpointError, match=r"last\.ckpt is whole"):
            write_checkpoint(held(2.0), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert value_of(path) == 1.0
    assert sorted(file.name for file in path.parent.iterdir()) == ["last.ckpt", "last.ckpt.sha256"]


def test_nothing_is_written_to_the_folder_of_temporary_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    monkeypatch.setenv("TMPDIR", "/nowhere")
    WholeCheckpoints().save_checkpoint(held(4.0), str(path))

    assert value_of(path) == 4.0


def test_a_folder_that_was_deleted_is_made_again(path: Path) -> None:
    shutil.rmtree(path.parent)
    write_checkpoint(held(5.0), path)

    assert value_of(path) == 5.0


def test_the_trainer_reads_whole_checkpoints_only_and_removes_the_digest_too(path: Path) -> None:
    plugin = WholeCheckpoints()
    assert plugin.load_checkpoint(path)["epoch"] == 3

    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        plugin.load_checkpoint(path)
    plugin.remove_checkpoint(path)
    assert os.listdir(path.parent) == []


def test_a_damaged_checkpoint_is_not_copied(path: Path) -> None:
    copy_checkpoint(path, path.parent / "b" / "best.ckpt")
    assert value_of(path.parent / "b" / "best.ckpt") == 1.0

    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        copy_checkpoint(path, path.parent / "c" / "best.ckpt")
    assert not (path.parent / "c").exists()


def test_the_newest_whole_checkpoint_is_found_and_damaged_ones_are_told(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = path.parent
    for name in ("best.ckpt", "interrupted.ckpt"):
        write_checkpoint(held(2.0), folder / name)
    assert first_whole(folder) == folder / "interrupted.ckpt"
    assert caplog.messages == []

    for name in ("interrupted.ckpt", "last.ckpt"):
        (folder / name).write_bytes((folder / name).read_bytes()[:300])
    with caplog.at_level(logging.WARNING, logger="moeapps"):
        assert first_whole(folder) == folder / "best.ckpt"
    assert caplog.messages == [f"interrupted.ckpt and last.ckpt in {folder} are damaged; going on from best.ckpt"]
