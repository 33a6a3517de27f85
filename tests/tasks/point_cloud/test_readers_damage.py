# SPDX-License-Identifier: Apache-2.0
"""Truncated, empty, bit-flipped and hostile files end in one sentence or in a scan that keeps its promises."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layout_writers import write_pointcept_scan
from readers_common import LAYOUTS, OWN_NAMES, Layout, assert_valid, files_of, random_scan

from tasks.point_cloud.data import readers
from tasks.point_cloud.data.readers import (
    OwnLabels,
    OwnScans,
    PointceptFolders,
    PointCloudFileError,
    RawScan,
    ScanReader,
    read_own_scan,
    write_own_labels,
    write_own_scan,
)
from tasks.point_cloud.data.readers.arrays import parse_npy
from tasks.point_cloud.data.readers.own import FORMATS
from tasks.point_cloud.data.readers.ply import read_ply

EACH = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def _read(layout: Layout, root: Path) -> RawScan:
    reader = layout.reader(root)
    (ref,) = reader.scans("train")
    return reader.read(ref)


def _outcome(layout: Layout, root: Path) -> RawScan | None:
    """Read; anything but a scan or the one error type propagates and fails the test."""
    try:
        return _read(layout, root)
    except PointCloudFileError as refusal:
        message = str(refusal)
    assert "expected" in message
    assert str(root) in message
    return None


def test_every_reader_and_every_own_format_is_among_the_layouts(tmp_path: Path) -> None:
    public = {kind for kind in vars(readers).values() if isinstance(kind, type) and issubclass(kind, ScanReader)}

    assert {type(layout.reader(tmp_path)) for layout in LAYOUTS.values()} == public - {ScanReader}
    assert {f"own_{suffix[1:]}" for suffix in FORMATS} <= LAYOUTS.keys()


@EACH
def test_any_truncation_of_any_file_is_refused(layout: Layout, tmp_path: Path) -> None:
    layout.make(tmp_path)
    assert _outcome(layout, tmp_path) is not None
    for path in files_of(tmp_path):
        whole = path.read_bytes()
        if path.suffix in (".txt", ".yaml"):
            continue  # a shorter text can be a valid one; see the tests of the texts below
        for size in sorted({0, 1, len(whole) // 2, *range(0, len(whole), 7), len(whole) - 1}):
            if whole[:size].strip() == whole.strip():
                continue  # only the last line break is gone
            path.write_bytes(whole[:size])
            assert _outcome(layout, tmp_path) is None, f"{path.name} cut to {size} of {len(whole)} bytes was read"
        path.write_bytes(whole)


@EACH
def test_appended_bytes_are_refused(layout: Layout, tmp_path: Path) -> None:
    layout.make(tmp_path)
    for path in files_of(tmp_path):
        # Zip archives are found from their end; a LAZ file says where its table of chunks lies, and may hold more.
        if path.suffix in (".txt", ".yaml", ".npz", ".laz"):
            continue
        whole = path.read_bytes()
        path.write_bytes(whole + b"7")
        assert _outcome(layout, tmp_path) is None, f"{path.name} with a byte too much was read"
        path.write_bytes(whole)


@EACH
def test_a_flipped_bit_is_refused_or_changes_values_only(layout: Layout, tmp_path: Path) -> None:
    _, scan = layout.make(tmp_path, random_scan(layout.names, rows=3, indoor=layout.indoor))
    for path in files_of(tmp_path):
        whole = path.read_bytes()
        step = max(1, len(whole) // 60)
        for place in range(0, len(whole), step):
            bit = place % 7 if step > 1 else place % 8
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            back = _outcome(layout, tmp_path)
            if back is not None:
                assert_valid(back)
                assert len(back) == len(scan), f"bit {bit} of byte {place} of {path.name} changed the number of points"
        path.write_bytes(whole)


def _flips(whole: bytes, stop: int) -> Iterator[bytes]:
    for place in range(stop):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            yield bytes(damaged)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(21, dtype=np.float32).reshape(7, 3),
        np.arange(7, dtype=np.int16),
        np.arange(8, dtype=np.uint8).reshape(4, 2),
        np.ones(3, [("x", "<f8"), ("label", "<i4")]),
    ],
    ids=lambda array: str(array.dtype),
)
def test_a_flipped_bit_in_an_npy_header_is_refused_or_harmless(array: Any) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    whole = buffer.getvalue()
    read = 0
    for damaged in _flips(whole, len(whole) - array.nbytes):
        try:
            back = parse_npy(damaged, "a.npy")
        except PointCloudFileError:
            continue
        read += 1
        if array.dtype.names is None and back.dtype == array.dtype:
            np.testing.assert_array_equal(back, array)
        else:  # a flip in a field's name or between signed and unsigned: the shape stands, the caller checks the rest
            assert back.shape == array.shape
    assert read < 8 * 128


def test_a_flipped_bit_in_a_ply_header_never_changes_a_column(tmp_path: Path) -> None:
    path = tmp_path / "a.ply"
    write_own_scan(path, random_scan(OWN_NAMES, 3))
    whole = path.read_bytes()
    vertex = read_ply(path).vertex
    for damaged in _flips(whole, whole.find(b"end_header") + 11):
        path.write_bytes(damaged)
        try:
            back = read_ply(path).vertex
        except PointCloudFileError:
            continue
        for name in set(back) & set(vertex):  # a renamed optional column is missing, not wrong
            np.testing.assert_array_equal(back[name], vertex[name])


@EACH
def test_a_missing_points_file_is_refused(layout: Layout, tmp_path: Path) -> None:
    layout.make(tmp_path)
    reader = layout.reader(tmp_path)
    (ref,) = reader.scans("train")
    points = ref.points / "coord.npy" if ref.points.is_dir() else ref.points

    points.unlink()

    with pytest.raises(PointCloudFileError, match="no such file"):
        reader.read(ref)


def test_a_label_file_that_an_index_names_must_be_there(tmp_path: Path) -> None:
    for name in ("nuscenes", "nuscenes_csv"):
        layout = LAYOUTS[name]
        reader, _ = layout.make(tmp_path / name)
        (ref,) = reader.scans("train")
        assert ref.labels is not None

        ref.labels.unlink()

        with pytest.raises(PointCloudFileError, match="no such file"):
            reader.read(ref)


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("exploded"),))  # type: ignore[return-value]


def _pickled_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([_Bomb()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def test_pickles_are_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"object.npy": _pickled_array(), "bare.npy": pickle.dumps(_Bomb()), "inside.npz": b""}
    with zipfile.ZipFile(tmp_path / "inside.npz", "w") as archive:
        archive.writestr("xyz.npy", _pickled_array())
    for name, content in files.items():
        if content:
            (tmp_path / name).write_bytes(content)

        with pytest.raises(PointCloudFileError):
            read_own_scan(tmp_path / name, OwnLabels(OWN_NAMES))

    assert not (tmp_path / "exploded").exists()


def test_a_header_that_promises_terabytes_allocates_nothing(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 3)})
    (tmp_path / "huge.npy").write_bytes(buffer.getvalue())
    (tmp_path / "huge.ply").write_bytes(
        b"ply\nformat binary_little_endian 1.0\nelement vertex 999999999999\n"
        b"property float x\nproperty float y\nproperty float z\nend_header\n"
    )

    for name in ("huge.npy", "huge.ply"):
        with pytest.raises(PointCloudFileError, match="bytes"):
            read_own_scan(tmp_path / name, OwnLabels(OWN_NAMES))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_coordinates_that_no_scanner_gives_are_refused(value: float, tmp_path: Path) -> None:
    scan = random_scan(("a", "b"), 4)
    scan.xyz[2, 1] = value
    write_pointcept_scan(tmp_path / "train" / "one", scan)
    reader = PointceptFolders(tmp_path, ["a", "b"], {"train": ["train"]})

    with pytest.raises(PointCloudFileError, match=r"row 2|span"):
        reader.read(reader.scans("train")[0])


@pytest.mark.parametrize(
    ("name", "array", "match"),
    [
        ("coord", np.zeros((4, 2), np.float32), r"\(R, 3\)"),
        ("coord", np.zeros((4, 3), ">f4"), "little-endian"),
        ("color", np.zeros((3, 3), np.uint8), "beside 4 points"),
        ("color", np.full((4, 3), 300.0, np.float32), "rescale"),
        ("normal", np.ones((4, 2), np.float32), "beside 4 points"),
        ("strength", np.full((4, 1), 40.0, np.float32), "set `strength_max` of this reader"),
        ("segment", np.zeros(3, np.int16), "beside 4 points"),
        ("segment", np.zeros((4, 2), np.int16), "one label per point"),
        ("segment", np.full(4, 0.5, np.float32), "whole numbers"),
        ("segment", np.full(4, 2, np.int16), "label set"),
    ],
)
def test_arrays_that_contradict_the_layout_are_refused(name: str, array: Any, match: str, tmp_path: Path) -> None:
    write_pointcept_scan(tmp_path / "train" / "one", random_scan(("a", "b"), 4))
    np.save(tmp_path / "train" / "one" / f"{name}.npy", array)
    reader = PointceptFolders(tmp_path, ["a", "b"], {"train": ["train"]})

    with pytest.raises(PointCloudFileError, match=match):
        reader.read(reader.scans("train")[0])


@pytest.mark.parametrize(
    "text",
    [
        *("", "names", "names: 3", "names: []", "names: [a, a]", "names: [a, no]", "names: {a: b}", "[a, b]"),
        *("names: [a]\ncolour: red", "names: [a]\nunit: -1", "names: [a]\nunit: .inf", "names: [a]\nignore: a"),
        *("names: [a]\ncolumns: [x, y]", "names: [a]\ncolumns: [x, y, z, x]", "names: [a]\ncolumns: [x, y, z, w]"),
        *("names: [a]\nlabel: 3", "names: [a\n", "names: !!python/object:os.system {}", "\x00", "{" * 500),
    ],
)
def test_a_wrong_labels_yaml_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "yard").mkdir()
    (tmp_path / "yard" / "labels.yaml").write_text(text)

    with pytest.raises(PointCloudFileError, match=r"labels\.yaml"):
        OwnScans(tmp_path, "yard").names  # noqa: B018


def test_strange_files_in_a_split_are_named(tmp_path: Path) -> None:
    write_own_labels(tmp_path / "yard" / "labels.yaml", OwnLabels(OWN_NAMES))
    (tmp_path / "yard" / "train").mkdir()
    (tmp_path / "yard" / "train" / "scan.e57").write_bytes(b"")

    with pytest.raises(PointCloudFileError, match=r"scan\.e57"):
        OwnScans(tmp_path, "yard").scans("train")
    with pytest.raises(PointCloudFileError, match="no such folder"):
        OwnScans(tmp_path, "yard").scans("test")
