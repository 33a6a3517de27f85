# SPDX-License-Identifier: Apache-2.0
"""Clouds, arrays, pictures and sounds made to fill memory: each is told in one sentence, within bounds."""

from __future__ import annotations

import io
import struct
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from moeapps import bounds
from moeapps.data.images.arrays import check_labels, read_array, read_arrays
from moeapps.data.images.pictures import open_picture, read_image
from tasks.audio.data.readers.audio_files import read_audio
from tasks.audio.data.store import load_arrays
from tasks.dynamics.data.readers.npz_format import read_npz as read_trajectories
from tasks.image_diffusion.data.readers.latent_files import read_latent
from tasks.point_cloud.data.readers.arrays import read_npy, read_npz
from tasks.point_cloud.data.readers.las import read_las, write_las
from tasks.point_cloud.data.readers.own import read_own_labels
from tasks.point_cloud.data.scans import load_scans
from tests.bounds_common import HUGE, Read, told
from tests.guarded import guarded

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
