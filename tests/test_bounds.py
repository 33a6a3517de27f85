# SPDX-License-Identifier: Apache-2.0
"""Files made to fill memory, to end the process or to keep it busy: each is told in one sentence, within bounds.

Every attack runs in a process of its own, see tests/guarded.py.
"""

from __future__ import annotations

import csv
import io
import json
import os
import struct
import wave
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import soundfile
import torch
import yaml
from PIL import Image

from moeapps import bounds
from moeapps.data.images.arrays import check_labels, read_array, read_arrays
from moeapps.data.images.pictures import open_picture, read_image
from moeapps.evaluation.results import read_results
from moeapps.training.precedence import checkpoint_hparams
from moeapps.training.stages import read_source
from tasks.adaptation.data.readers.table import read_csv as read_image_table
from tasks.audio.data.readers.audio_files import read_audio
from tasks.audio.data.readers.clip_table import read_clip_table
from tasks.audio.data.store import load_arrays
from tasks.dynamics.data.readers.arff_format import read_arff
from tasks.dynamics.data.readers.csv_format import read_csv
from tasks.dynamics.data.readers.npz_format import read_npz as read_trajectories
from tasks.dynamics.data.readers.ts_format import read_ts
from tasks.image_diffusion.data.readers.latent_files import read_latent
from tasks.point_cloud.data.readers.arrays import read_bytes, read_npy, read_npz
from tasks.point_cloud.data.readers.las import read_las, write_las
from tasks.point_cloud.data.readers.nuscenes import _index_rows as read_sweeps
from tasks.point_cloud.data.readers.own import read_own_labels
from tasks.point_cloud.data.readers.ply import read_ply
from tasks.point_cloud.data.scans import load_scans
from tasks.recommendation.data.readers.blocks import open_blocks
from tasks.recommendation.data.readers.ratings import read_ratings
from tasks.recommendation.data.readers.text import ends_in_quotes
from tests.guarded import guarded

Read = Callable[[Path], object]
HUGE = 2**40


def told(read: Read, path: Path, *words: str) -> str:
    """Read a file in a guarded process, which must refuse it in one sentence within the bounds."""
    found = guarded(partial(read, path))
    assert found.kind.endswith("Error"), found
    assert found.kind not in ("MemoryError", "RecursionError", "KeyError", "TypeError"), found
    assert found.within(path.stat().st_size if path.is_file() else 0), found
    assert all(word in found.text for word in words), found
    assert len(found.text) < 1500, found
    return found.text


# LAS and LAZ ---------------------------------------------------------------------------------------------------------


def laz(path: Path, point_format: int, changes: dict[int, bytes], *, in_table: bool = False) -> Path:
    """Write a LAZ file of five points with bytes changed: at places from where points begin, or from the table."""
    write_las(path, np.random.default_rng(0).uniform(0, 10, (5, 3)), point_format=point_format)
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", data, 96)
    (table,) = struct.unpack_from("<q", data, start)
    for place, new in changes.items():
        at = place + (table if in_table else start)
        data[at : at + len(new)] = new
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("point_format", [1, 3, 6, 7])
def test_a_laz_table_of_four_thousand_million_chunks_is_told(tmp_path: Path, point_format: int) -> None:
    path = laz(tmp_path / "a.laz", point_format, {4: b"\xff" * 4}, in_table=True)
    told(read_las, path, "4294967295 chunks, 1 at most hold 5 points")


@pytest.mark.parametrize("point_format", [1, 3, 6, 7])
def test_a_laz_table_of_fewer_points_than_the_header_is_told(tmp_path: Path, point_format: int) -> None:
    """The decompressor went on where no chunk had been looked at, and took gigabytes; the fuzzer found it."""
    path = laz(tmp_path / "a.laz", point_format, {4: bytes(4)}, in_table=True)
    told(read_las, path, "its table of chunks tells of 0 points, its header of 5")


@pytest.mark.parametrize("size", [100, 150, 200])
def test_a_las_header_that_ends_before_its_numbers_is_told(tmp_path: Path, size: int) -> None:
    """laspy answers it with struct.error; the fuzzer found it."""
    write_las(tmp_path / "a.las", np.zeros((5, 3)), point_format=7)
    data = bytearray((tmp_path / "a.las").read_bytes())
    struct.pack_into("<H", data, 94, size)
    (tmp_path / "a.las").write_bytes(data)
    told(read_las, tmp_path / "a.las", "a.las ")


@pytest.mark.parametrize("point_format", [6, 7])
def test_laz_layers_of_gigabytes_are_told(tmp_path: Path, point_format: int) -> None:
    for layer in range(9):
        length = {6: 30, 7: 36}[point_format]
        path = laz(tmp_path / "a.laz", point_format, {8 + length + 4 + 4 * layer: b"\xff\xff\xff\x7f"})
        told(read_las, path, "the layers of the chunk at byte ")


def test_laz_tables_outside_of_the_file_and_strange_compressors_are_told(tmp_path: Path) -> None:
    for place in (-2, 2**62, 5):
        told(read_las, laz(tmp_path / "a.laz", 6, {0: struct.pack("<q", place)}), "table of chunks should begin at")
    path = laz(tmp_path / "b.laz", 6, {})
    data = bytearray(path.read_bytes())
    record = data.index(b"laszip encoded") - 2 + 54
    for place, new, word in (
        (0, b"\x09", "compressor 9"),
        (12, b"\0\0\0\0", "chunks of 0"),
        (32, b"\xff\xff", "items"),
    ):
        path.write_bytes(data[: record + place] + new + data[record + place + len(new) :])
        told(read_las, path, word)


def test_las_headers_that_promise_points_and_records_are_told(tmp_path: Path) -> None:
    for name in ("a.las", "a.laz"):
        whole = bytearray(laz(tmp_path / name, 6, {}).read_bytes()) if name.endswith("z") else None
        if whole is None:
            write_las(tmp_path / name, np.zeros((5, 3)))
            whole = bytearray((tmp_path / name).read_bytes())
        for place, new in ((247, struct.pack("<Q", HUGE)), (100, struct.pack("<I", 2**32 - 1)), (105, b"\xff\xff")):
            changed = bytearray(whole)
            changed[place : place + len(new)] = new
            (tmp_path / name).write_bytes(changed)
            told(read_las, tmp_path / name, name)


# Arrays --------------------------------------------------------------------------------------------------------------


def promise(shape: tuple[int, ...], kind: str = "<f4", body: bytes = bytes(64)) -> bytes:
    """Bytes of an npy file whose header tells of more numbers than there are."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
    return stream.getvalue() + body


NPZ_READERS: dict[str, tuple[Read, tuple[str, ...]]] = {
    "images": (lambda path: read_arrays(path), ("x", "y")),
    "latents": (read_latent, ("latent",)),
    "clips": (lambda path: load_arrays(path, "x"), ("x",)),
    "trajectories": (read_trajectories, ("X", "t")),
    "scans": (load_scans, ("pos", "light", "up", "label", "size", "name", "words")),
    "points": (lambda path: read_npz(path, ("xyz",)), ("xyz",)),
}


@pytest.fixture(scope="module")
def zeros() -> bytes:
    """300 MB of zeros as a deflated npy: 300 kB."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open("a", "w") as part:
        part.write(promise((300_000_000,), "|u1", b""))
        for _ in range(300):
            part.write(bytes(1_000_000))
    return stream.getvalue()


@pytest.mark.parametrize("name", NPZ_READERS)
def test_an_npz_file_that_promises_terabytes_is_told(tmp_path: Path, name: str) -> None:
    read, keys = NPZ_READERS[name]
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for key in keys:
            archive.writestr(f"{key}.npy", promise((HUGE,)))
    told(read, tmp_path / "a.npz")


@pytest.mark.parametrize("name", NPZ_READERS)
def test_an_npz_file_that_unpacks_to_a_thousandfold_is_told(tmp_path: Path, name: str, zeros: bytes) -> None:
    read, keys = NPZ_READERS[name]
    renamed = zeros
    path = tmp_path / "a.npz"
    path.write_bytes(renamed)
    with zipfile.ZipFile(path, "a") as archive:
        for key in keys:
            archive.writestr(f"{key}.npy", promise((16,)))
    told(read, path)


@pytest.mark.parametrize("read", [read_array, read_npy], ids=["images", "points"])
def test_an_npy_file_that_promises_terabytes_is_told(tmp_path: Path, read: Read) -> None:
    (tmp_path / "a.npy").write_bytes(promise((HUGE, 3)))
    told(read, tmp_path / "a.npy", "a.npy")


def test_pickled_objects_are_told_before_numpy_reads_them(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(bounds.BoundError, match="pickled objects, which are never loaded"):
        bounds.check_npz(tmp_path / "a.npy")


def test_arrays_that_are_what_they_say_pass(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((0, 3)), y=np.array("text"), z=np.arange(5))
    np.savez_compressed(tmp_path / "b.npz", x=np.zeros((1000, 1000)))
    np.save(tmp_path / "c.npy", np.zeros((2, 3), [("a", "<f4"), ("b", "<i8")]))
    for path in sorted(tmp_path.iterdir()):
        bounds.check_npz(path)


def test_labels_are_never_taken_for_sizes() -> None:
    with pytest.raises(ValueError, match=f"label {HUGE}; number the classes from 0"):
        check_labels(np.array([0, HUGE]), 2, Path("a.npz"))


def test_label_ids_of_points_are_looked_up_and_not_counted_up_to(tmp_path: Path) -> None:
    (tmp_path / "labels.yaml").write_text(f"names: {{0: a, {HUGE}: b}}\n")
    found = guarded(lambda: read_own_labels(tmp_path / "labels.yaml"))
    assert found.kind == "value"
    assert found.within(0)


# Tables --------------------------------------------------------------------------------------------------------------


def test_a_row_group_of_millions_of_equal_rows_is_told(tmp_path: Path) -> None:
    rows = np.zeros(1 << 23, np.int8)
    parquet.write_table(pa.table({"a": rows}), tmp_path / "a.parquet", row_group_size=len(rows))
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    told(open_blocks, tmp_path / "a.parquet", "a row group of 8,388,608 rows, which would fill memory")


TABLES: dict[str, tuple[Read, str]] = {
    "image table": (lambda path: read_image_table(path, {"file", "domain"}), "file,domain\n"),
    "clip table": (read_clip_table, "file,domain,kind,text\n"),
    "series": (read_csv, "time,a\n"),
    "log": (lambda path: open_blocks(path, cache=path.parent), "user,item\n"),
}


@pytest.mark.parametrize("name", TABLES)
def test_one_open_quote_is_told(tmp_path: Path, name: str) -> None:
    read, head = TABLES[name]
    (tmp_path / "a.csv").write_text(head + '1,"2\n' + "3,4\n" * 50_000)
    told(read, tmp_path / "a.csv", "a.csv")
    (tmp_path / "a.csv").write_text('"' + head + "3,4\n" * 50_000)
    told(read, tmp_path / "a.csv", "a.csv")


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (b'a,b\n1,"2\n3,4\n', True),
        (b'"a,b\n1,2\n', True),
        (b'a,b\n1,"x""\n', True),
        (b'a,b\n1,"x""y"\n', False),
        (b'a,b\n5" pipe,1\n', False),
        (b'a,b\n"1\n2",""\n', False),
        (b'a,b\r\n"1","2\r\n"\r\n', False),
        (b"", False),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 1 << 20])
def test_an_open_quote_is_told_from_a_letter(
    monkeypatch: pytest.MonkeyPatch, text: bytes, inside: bool, chunk: int
) -> None:
    monkeypatch.setattr("tasks.recommendation.data.readers.text.CHUNK_BYTES", chunk)
    assert ends_in_quotes(io.BytesIO(text), b",") is inside


@pytest.mark.parametrize("name", TABLES)
def test_a_cell_of_megabytes_is_told_or_read(tmp_path: Path, name: str) -> None:
    read, head = TABLES[name]
    path = tmp_path / "a.csv"
    path.write_text(head + "x" * 2_000_000 + ",1\n")
    found = guarded(partial(read, path))
    assert found.kind == "value" or (found.kind.endswith("Error") and found.text.count("x") < 5000), found
    assert found.within(path.stat().st_size)


def test_a_compressed_header_without_an_end_is_told(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"a" * 10_000_000, 1) * 50)
    told(lambda path: open_blocks(path, cache=path.parent), path, "a.csv.gz")


def test_numbers_of_users_are_no_sizes(tmp_path: Path) -> None:
    (tmp_path / "ml-100k.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t1\t3\t5\n")
    (tmp_path / "ml-100k.item").write_text("item_id:token\trelease_year:token\tclass:token_seq\n1\t1995\tComedy\n")
    (tmp_path / "ml-100k.user").write_text(
        f"user_id:token\tage:token\tgender:token\toccupation:token\n{HUGE}\t5\tM\tnone\n"
    )
    told(read_ratings, tmp_path, "user_id goes from")
    (tmp_path / "ml-100k.item").write_text("item_id:token\trelease_year:token\tclass:token_seq\n1\t" + "9" * 200_000)
    told(read_ratings, tmp_path, "is not a readable table")


def test_a_late_mistake_in_a_long_arff_file_is_found_quickly(tmp_path: Path) -> None:
    path = tmp_path / "a.arff"
    path.write_text("@relation x\n@attribute a numeric\n@attribute c {p,q}\n@data\n" + "1.5,p\n" * 40_000 + "x,p\n")
    told(read_arff, path, "a.arff, line 40005 cannot be read")


def test_reading_arff_leaves_the_bound_on_cells_of_tables_as_it_is(tmp_path: Path) -> None:
    path, before = tmp_path / "a.arff", csv.field_size_limit(131_072)
    try:
        path.write_text("@relation x\n@attribute a numeric\n@attribute c {p,q}\n@data\n1.5,p\n2.5,q\n")
        read_arff(path)
        assert csv.field_size_limit() == 131_072
    finally:
        csv.field_size_limit(before)


# Pictures and sounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "words"), [((9000, 9000), "fill memory"), ((60_000, 1), "strip"), ((1, 9000), "strip")]
)
def test_pictures_of_extreme_shape_are_told(tmp_path: Path, size: tuple[int, int], words: str) -> None:
    path = tmp_path / "a.png"
    Image.new("1", size).save(path)
    told(lambda path: read_image(path, 8, 3), path, "a.png", words)


def test_a_photograph_is_read(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2500, 3000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    assert open_picture(tmp_path / "a.jpg", 3).size == (3000, 2500)


def a_wave(path: Path, rate: int = 16_000, frames: int = 1000) -> bytearray:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(2 * frames))
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("rate", [1, 999, 400_001, 2**31 - 1])
def test_rates_of_sound_that_nobody_records_are_told(tmp_path: Path, rate: int) -> None:
    a_wave(tmp_path / "a.wav")
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[24:28] = struct.pack("<I", rate)
    (tmp_path / "a.wav").write_bytes(data)
    told(lambda path: read_audio(path, 16_000), tmp_path / "a.wav", "a.wav has ", "samples per second")


def test_headers_that_promise_gigabytes_of_sound_are_told_or_cut_to_what_is_there(tmp_path: Path) -> None:
    data = a_wave(tmp_path / "a.wav")
    for place, new in ((40, b"\xf0\xff\xff\x7f"), (4, b"\xff" * 4), (22, b"\x00\x04"), (32, b"\x00\x08")):
        changed = bytearray(data)
        changed[place : place + len(new)] = new
        (tmp_path / "a.wav").write_bytes(changed)
        found = guarded(lambda: read_audio(tmp_path / "a.wav", 16_000))
        assert found.kind in ("value", "AudioFileError"), found
        assert found.within(len(data)), found
    soundfile.write(tmp_path / "a.flac", np.zeros(1000, np.float32), 16_000)
    flac = bytearray((tmp_path / "a.flac").read_bytes())
    flac[21:26] = bytes([flac[21] | 0x0F, 255, 255, 255, 255])  # STREAMINFO: 2^36 - 1 samples in all
    (tmp_path / "a.flac").write_bytes(flac)
    told(lambda path: read_audio(path, 16_000), tmp_path / "a.flac", "a.flac")


def test_hours_of_silence_in_a_few_bytes_are_told(tmp_path: Path) -> None:
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 16_000, 1) as file:
        for _ in range(40):
            file.write(np.zeros(1_000_000, np.float32))
    told(lambda path: read_audio(path, 16_000), tmp_path / "a.flac", "2,500 seconds")


# Configs, results and checkpoints ------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
BAD_YAML = {
    "aliases": (LAUGHS, "more than 200,000 values, aliases counted"),
    "a circle": ("a: &a [*a]\n", "an alias stands for itself"),
    "merged": ("a: &a {x: 1, y: 2}\n" + "".join(
        f"{n}: &{n} {{<<: [{', '.join(['*' + b] * 9)}]}}\n" for b, n in zip("abcdefghi", "bcdefghij", strict=True)
    ), "more than 200,000 values"),
    "deep": ("[" * 5000 + "]" * 5000, "too deep inside one another"),
    "deep by indent": ("".join("  " * k + "a:\n" for k in range(300)), "more than 200 levels"),
    "large": ("a: " + "x" * 4_000_001, "at most 4,000,000 are read"),
    "a day that is none": ("a: 2024-13-45\n", "a value that cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_YAML)
def test_yaml_that_grows_is_told(tmp_path: Path, name: str) -> None:
    text, words = BAD_YAML[name]
    (tmp_path / "a.yaml").write_text(text)
    told(bounds.read_yaml, tmp_path / "a.yaml", "a.yaml", words)
    told(read_own_labels, tmp_path / "a.yaml", "a.yaml")


def test_configs_of_ours_are_far_from_the_bounds() -> None:
    for path in Path("configs").rglob("*.yaml"):
        assert bounds.read_yaml(path) == yaml.safe_load(path.read_text(encoding="utf-8"))
        assert path.stat().st_size < bounds.YAML_BYTES / 100


def test_results_that_are_none_are_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "test.json"
    path.parent.mkdir()
    row = {"domain": "a", "role": "seen", "metric": "m", "value": 1, "n": 1, "direction": "max"}
    rows = [{**row, key: value} for key, value in (("n", 1e400), ("value", [1]), ("domain", [1]), ("role", "king"))]
    wrong = [[], {}, None, {"header": 1, "rows": []}, {"header": {}, "rows": 3}]
    wrong += [{"header": {}, "rows": [row], "units": []}, {"header": {"seeds": 3}, "rows": [row]}]
    wrong += [{"header": {}, "rows": [row]} for row in rows]
    for text in ("[" * 100_000, "9" * 100_000, *map(json.dumps, wrong)):
        path.write_text(text)
        told(read_results, path, "test.json")


def test_checkpoints_that_are_made_to_fill_memory_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {}}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
        archive.writestr("archive/data/0", bytes(100_000_000))
    for read in (checkpoint_hparams, read_source):
        told(read, path, "a.ckpt is compressed, which torch does not do")
    path.write_bytes(b"\x80\x02}q\x00.")
    told(checkpoint_hparams, path, "a.ckpt is no readable checkpoint")


# What is no file -----------------------------------------------------------------------------------------------------

ANY_READER: dict[str, Read] = {
    "a.ply": read_ply,
    "a.las": read_las,
    "a.npy": read_npy,
    "b.npy": read_array,
    "a.npz": lambda path: read_npz(path, ("xyz",)),
    "b.npz": lambda path: read_arrays(path),
    "c.npz": read_trajectories,
    "d.npz": load_scans,
    "a.csv": read_csv,
    "b.csv": lambda path: read_image_table(path, {"a"}),
    "c.csv": read_clip_table,
    "d.csv": open_blocks,
    "a.parquet": open_blocks,
    "a.ts": read_ts,
    "a.arff": read_arff,
    "a.png": lambda path: read_image(path, 8, 3),
    "a.wav": lambda path: read_audio(path, 16_000),
    "a.yaml": bounds.read_yaml,
    "b.yaml": read_own_labels,
    "a.json": bounds.read_json,
    "a.ckpt": read_source,
}


@pytest.mark.parametrize("name", ANY_READER)
def test_pipes_and_devices_are_no_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    told(ANY_READER[name], path)
    path.unlink()
    path.symlink_to("/dev/zero")
    told(ANY_READER[name], path)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_names_that_no_file_can_have_are_told(tmp_path: Path, name: str) -> None:
    """Tables name files; the fuzzer put a zero byte into such a name (an index of nuScenes)."""
    for read in (bounds.require_file, read_bytes):
        found = guarded(partial(read, tmp_path / name))
        assert found.kind in ("BoundError", "PointCloudFileError")
        assert "no name of a file" in found.text
        assert found.text.isprintable()


# Tables of very short lines: what Python keeps of a line of two bytes is fifty times as much --------------------------

TS_HEAD, ARFF_HEAD = "@classLabel true a b\n@data\n", "@relation x\n@attribute a numeric\n@attribute c {p,q}\n@data\n"
CLIPS_HEAD = "file,domain,kind\n"
WIDE_HEAD = ",".join(f"c{place}" for place in range(1000)) + "\n"
SHORT_LINES: dict[str, tuple[Read, Callable[[int], str]]] = {
    "a.csv": (read_csv, lambda rows: "x\n" + "1\n" * rows),
    "cells.csv": (read_csv, lambda cells: WIDE_HEAD + (",".join(["1"] * 1000) + "\n") * (cells // 1000)),
    "pairs.csv": (read_csv, lambda rows: "trajectory,x\n" + "".join(f"{row // 2},1\n" for row in range(rows))),
    "clips.csv": (
        read_clip_table,
        lambda rows: "file,domain,kind\n" + "".join(f"{k:x},x,speech\n" for k in range(rows)),
    ),
    "images.csv": (partial(read_image_table, columns={"a", "b"}), lambda rows: "a,b\n" + "1,2\n" * rows),
    "sweeps.csv": (read_sweeps, lambda rows: "points,labels,split\n" + "a,,val\n" * rows),
    "a.ts": (read_ts, lambda rows: TS_HEAD + "1:a\n" * rows),
    "one.ts": (read_ts, lambda rows: TS_HEAD + "1," * rows + "1:a\n"),
    "a.arff": (read_arff, lambda rows: ARFF_HEAD + "1,p\n" * rows),
}


@pytest.mark.parametrize("name", [name for name in SHORT_LINES if name != "cells.csv"])  # read: 34 bytes a cell
def test_millions_of_short_lines_are_told_before_memory_is_taken(tmp_path: Path, name: str) -> None:
    read, text = SHORT_LINES[name]
    (tmp_path / name).write_text(text(6_000_000))
    told(read, tmp_path / name, "would fill memory")


@pytest.mark.parametrize("name", SHORT_LINES)
def test_short_lines_are_read_within_bounds(tmp_path: Path, name: str) -> None:
    read, text = SHORT_LINES[name]
    path = tmp_path / name
    path.write_text(text(200_000))
    found = guarded(partial(read, path))
    assert found.kind == "value", found
    assert found.within(path.stat().st_size), found
