# SPDX-License-Identifier: Apache-2.0
"""Streams: what was written is read, in blocks; what is damaged or no plain bytes is told; a run resumes to the bit."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moeapps.commands.run import run
from moeapps.data.stream_writing import write_stream
from moeapps.data.streaming import COUNT, StreamedRows, StreamError, pack, read_about, split_folder, unpack
from tests.fuzzing import refused, watched
from tests.guarded import attempted, guarded
from tests.streams import PER_BLOCK, ToyStream, points, toy_plan, write_toys
from tests.toy import ToyData


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toys(tmp_path_factory.mktemp("streams") / "toys")


def read_all(root: Path) -> list[Any]:
    return [StreamedRows(root / "a" / "train", points).batch(torch.arange(24))]


# --- reading and writing ----------------------------------------------------------------------------------------------


def test_every_row_is_read_as_it_was_written_in_any_order(stream: Path) -> None:
    assert len(list((stream / "a" / "train").glob("chunk-*.bin"))) > 2
    for domain, split in (("a", "train"), ("c", "val"), ("u", "test")):
        rows = StreamedRows(stream / domain / split, points, window=2)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
        x, y, index = ToyData().get_dataset(domain, split)[order]  # type: ignore[arg-type]
        found = rows.batch(order)
        assert torch.equal(found.x, x)
        assert torch.equal(found.y, y)
        assert torch.equal(found.domain, index)
        assert torch.equal(rows.kept["label"][order], y)
    about = read_about(stream, "toys")
    assert about["facts"] == {"num_classes": 2}
    assert about["roles"] == {"seen": ["a", "b", "c"], "validation": ["v"], "unseen": ["u"]}
    assert about["splits"]["v/val"] == {"says": "v"}


def test_no_more_blocks_are_held_than_the_window_and_each_is_read_once_in_order(stream: Path) -> None:
    rows, reads = StreamedRows(stream / "b" / "train", points, window=2), []
    read = rows._read
    rows._read = lambda number: reads.append(number) or read(number)  # type: ignore[func-returns-value, method-assign]
    for row in range(24):
        rows.batch(torch.tensor([row]))
        assert len(rows._held) <= 2

    assert reads == list(range(-(-24 // PER_BLOCK)))


def test_a_stream_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    plan = toy_plan(ToyData())
    told: list[tuple[str, int]] = []

    def fail(name: str, rows: int) -> None:
        told.append((name, rows))
        if name == "b/train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_stream(plan, tmp_path / "s", advance=fail)
    assert list(tmp_path.iterdir()) == []
    assert [rows for name, rows in told if name == "a/train"] == [5, 5, 5, 5, 4]
    write_stream(plan, tmp_path / "s")
    assert [file.name for file in tmp_path.iterdir()] == ["s"]
    with pytest.raises(StreamError, match="is there already; give a folder that is new or empty"):
        write_stream(plan, tmp_path / "s")


def test_what_is_not_there_is_told(stream: Path, tmp_path: Path) -> None:
    about = read_about(stream, "toys")
    with pytest.raises(StreamError, match=r"no train split of domain 'u' but a/train.*change the role"):
        split_folder(stream, about, "u", "train")
    with pytest.raises(StreamError, match="has toys in format 1, needed are latents in format 1"):
        read_about(stream, "latents")
    with pytest.raises(StreamError, match=r"is no stream.*No such file.*moeapps data optimize"):
        read_about(tmp_path, "toys")


# --- damage -----------------------------------------------------------------------------------------------------------


def test_items_that_litdata_would_unpickle_or_import_for_are_refused(stream: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stream / "a" / "train", tmp_path / "train")
    index = json.loads((folder / "index.json").read_text())
    spec = '[1, {"type": "collections.defaultdict", "context": "{\\"default_factory_module\\": \\"this\\"}"}]'
    for change in (
        {"data_format": ["pickle"]},
        {"data_format": ["bytes", "pickle"]},
        {"data_spec": spec},
        {"compression": "zstd"},
        {"encryption": {"algorithm": "fernet"}},
        {"item_loader": "ParquetLoader"},
    ):
        (folder / "index.json").write_text(json.dumps({**index, "config": {**index["config"], **change}}))
        with pytest.raises(StreamError, match="only plain bytes are read, never pickles"):
            StreamedRows(folder, points)
    (folder / "index.json").write_text(json.dumps({"shards": [], **index}))
    with pytest.raises(StreamError, match="no list of chunks"):
        StreamedRows(folder, points)


def test_a_pickle_in_a_block_is_not_loaded() -> None:
    payload = pickle.dumps({"x": torch.zeros(2)})
    told = zlib.crc32(payload).to_bytes(4, "little")
    with pytest.raises(StreamError, match="tensors cannot be read"):
        unpack(told + payload)
    with pytest.raises(StreamError, match="checksum"):
        unpack(pack({"x": torch.zeros(2)})[:-1])


def cut(folder: Path) -> None:
    file = folder / "chunk-0-1.bin"
    file.write_bytes(file.read_bytes()[:-3])


def missing(folder: Path) -> None:
    (folder / "chunk-0-0.bin").unlink()


def one_bit(folder: Path) -> None:
    data = bytearray((folder / "chunk-0-0.bin").read_bytes())
    data[-9] ^= 4
    (folder / "chunk-0-0.bin").write_bytes(data)


def far_place(folder: Path) -> None:
    data = bytearray((folder / "chunk-0-0.bin").read_bytes())
    data[8:12] = b"\xff\xff\xff\x7f"  # the second block would begin behind two gigabytes
    (folder / "chunk-0-0.bin").write_bytes(data)


def other_rows(folder: Path) -> None:
    save_file({COUNT: torch.tensor([5, 5, 5, 4, 5]), "label": torch.zeros(24)}, folder / "rows.safetensors")


def away(folder: Path) -> None:
    path = folder / "index.json"
    path.write_text(path.read_text().replace("chunk-0-0.bin", "../../../etc/passwd"))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (cut, r"chunk-0-1.bin has .* bytes, index.json says .*cut off"),
        (missing, r"chunk-0-0.bin cannot be read \(No such file"),
        (one_bit, r"chunk-0-0.bin: block \d is damaged, its checksum is another one"),
        (far_place, r"chunk-0-0.bin is damaged: its blocks do not lie one after another"),
        (other_rows, r"block 3 has 5 rows, rows.safetensors says 4"),
        (away, r"index.json is damaged: it has no list of chunks"),
    ],
)
def test_damage_is_told_in_one_sentence(
    damage: Callable[[Path], None], text: str, stream: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(stream, tmp_path / "toys")
    damage(root / "a" / "train")

    with pytest.raises(StreamError, match=text) as told:
        read_all(root)
    assert str(told.value).endswith("write the stream again")


@cache
def _whole() -> Path:
    return write_toys(Path(tempfile.mkdtemp()) / "toys", num_items=12, seen=["a"], validation=[], unseen=[])


FILES = ("index.json", "rows.safetensors", "chunk-0-0.bin", "../../stream.json")
SIGNS = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"-1", b'"', b"9" * 20, b"pickle", b"{", b"]", b"\x7f\xff\xff\xff", b"null")


def _read(root: Path) -> None:
    data = ToyStream(root=root, seen=["a"], validation=[], unseen=[])
    data.get_dataset("a", "train").batch(torch.arange(12))  # type: ignore[attr-defined]


def test_the_fuzzed_stream_is_read_where_it_is_whole() -> None:
    _read(_whole())


@pytest.mark.parametrize("file", FILES)
@settings(max_examples=20, deadline=None)
@given(case=st.integers(0, 2**31))
def test_a_damaged_stream_is_read_or_told(file: str, case: int) -> None:
    rng = random.Random(zlib.crc32(f"{file} {case}".encode()))
    with tempfile.TemporaryDirectory() as folder:
        root = shutil.copytree(_whole(), Path(folder) / "toys")
        path = root / "a" / "train" / file
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 1, 2, 5))):
            at, sign = rng.randrange(len(data) + 1), rng.choice(SIGNS)
            kind = rng.randrange(4)
            if kind == 0 and at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[at : at + len(sign)] = sign
            elif kind == 2:
                data[at:at] = sign
            else:
                del data[at : at + rng.randrange(1, 60)]
        path.write_bytes(data)
        work = partial(_read, root)
        found = attempted(work) if watched() else guarded(work)
    assert found.kind in ("value", "StreamError"), found
    assert found.within(path_size := len(data)), (found, path_size)
    if found.kind != "value":
        refused()


# --- training ---------------------------------------------------------------------------------------------------------

FIT = ["fit", "--config", "tests/toy.yaml", "--test_after_fit", "false", "--trainer.enable_model_summary", "false"]
KEEP = ["--trainer.callbacks", "lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.every_n_train_steps"]


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # a resumed run has a folder of its own
@pytest.mark.parametrize(
    "flags",
    [["--data.mixing", "concat"], ["--data.mixing", "balanced"], ["--data.num_workers", "2"]],
    ids=["concat", "balanced", "two workers"],
)
def test_a_run_resumed_inside_an_epoch_is_bit_equal(stream: Path, tmp_path: Path, flags: list[str]) -> None:
    keep = [*KEEP, "4", "--trainer.callbacks.save_top_k", "-1", "--trainer.callbacks.filename", "{step}"]
    words = [*FIT, "--data", "tests.streams.ToyStream", "--data.root", str(stream), "--data.batch_size", "8", *flags]
    words += ["--trainer.max_epochs", "2", *keep, "--trainer.callbacks+=tests.toy_callbacks.RowTape"]
    whole = run(words)
    checkpoint = next(tmp_path.glob("runs/toy/base/version_0/checkpoints/*step=4.ckpt"))  # of 9 steps in an epoch
    resumed = run([*words, "--ckpt_path", str(checkpoint)])

    assert resumed.trainer.global_step == whole.trainer.global_step == 18
    tapes = [next(c.rows for c in done.trainer.callbacks if hasattr(c, "rows")) for done in (whole, resumed)]
    assert tapes[1] == tapes[0][4:]
    for (key, a), (_, b) in zip(resumed.model.state_dict().items(), whole.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
