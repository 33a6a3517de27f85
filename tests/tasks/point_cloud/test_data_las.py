# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct
from pathlib import Path

import laspy
import numpy as np
import pytest

from tasks.point_cloud.data.readers.las import LasError, read_las, write_las

FORMATS = [0, 1, 2, 3, 6, 7, 8]


def _points(count: int = 50) -> np.ndarray:
    return np.random.default_rng(0).uniform(-500, 800_000, (count, 3)).round(3)


@pytest.mark.parametrize("point_format", FORMATS)
def test_what_is_written_is_read(tmp_path: Path, point_format: int) -> None:
    rng, count = np.random.default_rng(1), 50
    fields = {
        "classification": rng.integers(0, 31, count),
        "intensity": rng.integers(0, 65535, count),
        "return_number": rng.integers(1, 4, count),
        "number_of_returns": rng.integers(4, 6, count),
        "rgb": rng.integers(0, 65535, (count, 3)) if point_format in (2, 3, 7, 8) else None,
    }
    extra = {"expert": rng.integers(0, 8, count).astype(np.uint8), "gate": rng.random(count).astype(np.float32)}
    write_las(tmp_path / "a.las", _points(), point_format=point_format, extra=extra, **fields)
    cloud = read_las(tmp_path / "a.las")

    np.testing.assert_allclose(cloud.pos, _points(), atol=5.1e-4)
    np.testing.assert_array_equal(cloud.classification, fields["classification"])
    np.testing.assert_array_equal(cloud.intensity, fields["intensity"])
    for name in ("return_number", "number_of_returns"):
        np.testing.assert_array_equal(cloud.column(name), fields[name])
    assert (cloud.rgb is None) == (fields["rgb"] is None)
    if cloud.rgb is not None:
        np.testing.assert_array_equal(cloud.rgb, fields["rgb"])
    for name, values in extra.items():
        np.testing.assert_array_equal(cloud.column(name), values)


def test_empty_cloud_round_trips(tmp_path: Path) -> None:
    write_las(tmp_path / "a.las", np.zeros((0, 3)))
    assert len(read_las(tmp_path / "a.las")) == 0


@pytest.mark.parametrize("point_format", range(11))
def test_fields_are_read_from_the_bytes_the_specification_names(tmp_path: Path, point_format: int) -> None:
    length = (20, 28, 26, 34, 57, 63, 30, 36, 38, 59, 67)[point_format]
    header = bytearray(375)
    header[:4], header[24], header[25] = b"LASF", 1, 4
    struct.pack_into("<HII", header, 94, 375, 375, 0)
    # Two bytes of a vendor's own per record; the 32-bit count is for formats before 6 only.
    struct.pack_into("<BHI", header, 104, point_format, length + 2, 1 if point_format < 6 else 0)
    struct.pack_into("<6d", header, 131, 0.5, 0.25, 1.0, 10.0, 20.0, -30.0)
    struct.pack_into("<Q", header, 247, 1)
    record = bytearray(length + 2)
    struct.pack_into("<iiiH", record, 0, 4, -8, 7, 321)
    if point_format < 6:
        record[14], record[15] = 0b00_101_010, 0b101_00110
    else:
        record[14], record[16] = 0b0101_0010, 6
    place = {2: 20, 3: 28, 5: 28, 7: 30, 8: 30, 10: 30}.get(point_format)
    if place is not None:
        struct.pack_into("<HHH", record, place, 1, 2, 3)
    (tmp_path / "a.las").write_bytes(bytes(header) + bytes(record))
    cloud = read_las(tmp_path / "a.las")

    np.testing.assert_array_equal(cloud.pos, [[12.0, 18.0, -23.0]])
    assert (cloud.intensity[0], cloud.classification[0]) == (321, 6)
    assert (cloud.column("return_number")[0], cloud.column("number_of_returns")[0]) == (2, 5)
    assert (cloud.rgb is None) == (place is None)
    if cloud.rgb is not None:
        np.testing.assert_array_equal(cloud.rgb, [[1, 2, 3]])


@pytest.mark.parametrize("keep", [0, 3, 100, 226, 240, 376, -1])
def test_truncated_file_is_one_clear_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.las"
    write_las(path, _points())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LasError, match=r"cut short|not a LAS|damaged"):
        read_las(path)


def test_flipped_bits_give_points_or_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "a.las"
    write_las(path, _points(5), extra={"expert": np.zeros(5, np.uint8)})
    whole, errors = path.read_bytes(), 0
    for bit in np.random.default_rng(0).permutation(8 * 640)[:700]:
        data = bytearray(whole)
        data[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
        try:
            assert np.isfinite(read_las(path).pos).all()
        except LasError:
            errors += 1
    assert errors > 20


def test_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(LasError, match=r"cannot read .*give the path"):
        read_las(tmp_path / "none.las")


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    """A LAZ file of 120 points, made by laspy from a LAS file of ours."""
    rng = np.random.default_rng(0)
    write_las(
        tmp_path / "a.las",
        rng.uniform(-50, 50, (120, 3)),
        intensity=rng.integers(0, 65536, 120).astype(np.uint16),
        classification=rng.integers(0, 20, 120).astype(np.uint8),
    )
    laspy.read(tmp_path / "a.las").write(tmp_path / "a.laz")
    return tmp_path / "a.laz"


def test_compressed_file_holds_what_the_plain_one_holds(compressed: Path) -> None:
    plain, packed = read_las(compressed.with_suffix(".las")), read_las(compressed)

    np.testing.assert_allclose(packed.pos, plain.pos, atol=1e-9)
    np.testing.assert_array_equal(packed.intensity, plain.intensity)
    np.testing.assert_array_equal(packed.classification, plain.classification)


def test_damaged_compressed_files_end_in_one_clear_error_or_in_all_points(compressed: Path) -> None:
    whole, errors = compressed.read_bytes(), 0
    cut = [whole[:size] for size in (0, 1, 100, 227, *range(300, len(whole), 97))]
    flipped = []
    for bit in range(0, 8 * len(whole), 61):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << (bit % 8)
        flipped.append(bytes(data))
    count = bytearray(whole)
    at, size = (247, 8) if whole[25] >= 4 else (107, 4)
    count[at + size - 1] ^= 0x40  # the highest byte of the number of points
    for number, data in enumerate((*cut, *flipped, bytes(count))):
        compressed.write_bytes(data)
        try:
            cloud = read_las(compressed)
        except LasError:
            errors += 1
        else:
            assert np.isfinite(cloud.pos).all()
            assert len(cloud.pos) == 120, number
    assert errors > len(cut)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"point_format": 4}, "cannot be written"),
        ({"rgb": np.zeros((3, 3)), "point_format": 6}, "has no colour"),
        ({"extra": {"expert": np.zeros(2, np.uint8)}}, "use \\[3\\] numbers"),
        ({"extra": {"expert": np.zeros(3, complex)}}, "complex"),
        ({"extra": {"classification": np.zeros(3, np.uint8)}}, "is taken"),
        ({"pos": np.array([[np.nan, 0, 0]])}, "NaN"),
        ({"pos": np.array([[0, 0, 0], [0, 0, 1e9]])}, "larger scale"),
    ],
)
def test_writer_refuses_what_the_format_cannot_hold(tmp_path: Path, options: dict, text: str) -> None:
    pos = options.pop("pos", np.zeros((3, 3)))
    with pytest.raises(ValueError, match=text):
        write_las(tmp_path / "a.las", pos, **options)
    assert not (tmp_path / "a.las").exists()
