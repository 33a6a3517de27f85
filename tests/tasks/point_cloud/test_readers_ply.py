# SPDX-License-Identifier: Apache-2.0
"""PLY: three encodings of one cloud are one cloud; meshes are measured, not guessed; predictions open elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from tasks.point_cloud.data.readers import PointCloudFileError, read_ply, write_ply
from tasks.point_cloud.data.readers.las import read_las
from tasks.point_cloud.data.readers.ply import PlyCloud, PlyFormat
from tasks.point_cloud.report.predictions import PointPrediction, class_colors, write_prediction, write_prediction_ply

FORMATS = pytest.mark.parametrize("layout", get_args(PlyFormat))
ORDER = {"binary_little_endian": "<", "binary_big_endian": ">"}


def parse_ply(data: bytes, path: Path) -> PlyCloud:
    path.write_bytes(data)
    return read_ply(path)


def _vertex(rows: int = 11) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[Any]]]:
    rng = np.random.default_rng(0)
    return {
        **{axis: rng.standard_normal(rows).astype(np.float32) for axis in "xyz"},
        "red": rng.integers(0, 256, rows).astype(np.uint8),
        "green": rng.integers(0, 256, rows).astype(np.uint8),
        "blue": rng.integers(0, 256, rows).astype(np.uint8),
        "time": rng.standard_normal(rows) * 1e9,
        "return": rng.integers(-128, 128, rows).astype(np.int8),
        "segment": rng.integers(-(2**31), 2**31, rows).astype(np.int32),
        "height": rng.integers(-(2**15), 2**15, rows).astype(np.int16),
        "label": rng.integers(0, 2**16, rows).astype(np.uint16),
        "flags": rng.integers(0, 2**32, rows).astype(np.uint32),
    }


@FORMATS
@pytest.mark.parametrize("rows", [0, 1, 11])
def test_any_scalar_property_survives_every_encoding_exactly(layout: PlyFormat, rows: int, tmp_path: Path) -> None:
    vertex = _vertex(rows)
    write_ply(tmp_path / "a.ply", vertex, layout=layout, comments=("made up", "twice"))

    back = read_ply(tmp_path / "a.ply")

    assert back.comments == ("made up", "twice")
    assert list(back.vertex) == list(vertex)
    for name, column in vertex.items():
        assert back.vertex[name].dtype == column.dtype
        np.testing.assert_array_equal(back.vertex[name], column)


def _mesh(layout: str, *, before: bool = False, quads: bool = False) -> bytes:
    """Four vertices and two faces in ``layout``; faces before the vertices or of unequal length if asked for."""
    vertices = "element vertex 4\nproperty float x\nproperty double y\nproperty float z\nproperty ushort label\n"
    faces = "element face 2\nproperty list uchar int vertex_indices\n"
    rows = [(float(i), i / 8, -float(i), 7 * i) for i in range(4)]
    lists = [[0, 1, 2], [0, 1, 2, 3] if quads else [1, 2, 3]]
    header = f"ply\nformat {layout} 1.0\n{faces + vertices if before else vertices + faces}end_header\n".encode()
    if layout == "ascii":
        points = "".join(f"{' '.join(map(str, row))}\n" for row in rows)
        triangles = "".join(f"{len(face)} {' '.join(map(str, face))}\n" for face in lists)
        return header + (triangles + points if before else points + triangles).encode()
    order = ORDER[layout]
    dtype = np.dtype([("x", f"{order}f4"), ("y", f"{order}f8"), ("z", f"{order}f4"), ("l", f"{order}u2")])
    bodies = [np.array(rows, dtype).tobytes()]
    bodies.append(b"".join(bytes([len(f)]) + np.array(f, f"{order}i4").tobytes() for f in lists))
    return header + b"".join(bodies[::-1] if before else bodies)


@FORMATS
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("quads", [False, True])
def test_vertices_of_a_mesh_do_not_depend_on_its_faces(
    layout: PlyFormat, before: bool, quads: bool, tmp_path: Path
) -> None:
    data = _mesh(layout, before=before, quads=quads)

    vertex = parse_ply(data, tmp_path / "m.ply").vertex

    np.testing.assert_array_equal(vertex["x"], [0, 1, 2, 3])
    np.testing.assert_array_equal(vertex["y"], [0, 0.125, 0.25, 0.375])
    np.testing.assert_array_equal(vertex["label"], [0, 7, 14, 21])


@FORMATS
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("quads", [False, True])
def test_a_mesh_cut_anywhere_is_refused(layout: PlyFormat, before: bool, quads: bool, tmp_path: Path) -> None:
    data = _mesh(layout, before=before, quads=quads)
    ends = len(data.rstrip()) if layout == "ascii" else len(data)
    start = 0 if layout != "ascii" else data.find(b"end_header")
    for size in range(start, ends - 2):
        if layout == "ascii" and data[:size].count(b"\n") == data.count(b"\n") - (data[size - 1 : size] != b"\n"):
            continue  # inside the last number of the last line: still a number
        with pytest.raises(PointCloudFileError):
            parse_ply(data[:size], tmp_path / "m.ply")


def test_windows_line_ends_are_read(tmp_path: Path) -> None:
    data = _mesh("ascii").replace(b"\n", b"\r\n")

    np.testing.assert_array_equal(parse_ply(data, tmp_path / "w.ply").vertex["label"], [0, 7, 14, 21])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"ply\n", b"pcd\n"),
        (b"ascii 1.0", b"ascii 2.0"),
        (b"format ascii 1.0\n", b""),
        (b"float x", b"float y"),
        (b"float x", b"float u"),
        (b"float x", b"real x"),
        (b"float x", b"list uchar float x"),
        (b"element vertex 4", b"element vertex 5"),
        (b"element vertex 4", b"element vertex -4"),
        (b"element vertex 4\n", b""),
        (b"list uchar int", b"list float int"),
        (b"ushort label", b"uchar red"),
        (b"0.125", b"0,125"),
        (b" 21\n", b" 70000\n"),
        (b" 21\n", b" 2.5\n"),
        (b"end_header", b"ende"),
        (b"vertex_indices", b"\xff\xfe"),
    ],
)
def test_a_wrong_header_or_number_is_refused(old: bytes, new: bytes, tmp_path: Path) -> None:
    data = _mesh("ascii")
    assert old in data

    with pytest.raises(PointCloudFileError, match="expected"):
        parse_ply(data.replace(old, new), tmp_path / "m.ply")


def test_columns_that_ply_cannot_hold_are_refused_by_the_writer(tmp_path: Path) -> None:
    good = np.zeros(2, np.float32)
    for wrong in (np.array([2**40, 0]), np.zeros((2, 2), np.float32), np.array(["a", "b"]), np.zeros(3, np.float32)):
        with pytest.raises(ValueError, match=r"column"):
            write_ply(tmp_path / "a.ply", {"x": good, "w": wrong})
    with pytest.raises(ValueError, match="single lines"):
        write_ply(tmp_path / "a.ply", {"x": good}, comments=("a\nelement vertex 9",))


@FORMATS
def test_predictions_carry_class_expert_and_a_colour_per_class(layout: PlyFormat, tmp_path: Path) -> None:
    names = ("wall", "floor", "chair")
    label, expert = np.array([0, 1, 2, -1, 0]), np.array([3, 0, -1, 1, 2])
    xyz = np.arange(15, dtype=np.float32).reshape(5, 3)
    write_prediction_ply(tmp_path / "p.ply", PointPrediction(xyz, label, names, expert), layout=layout)

    back = read_ply(tmp_path / "p.ply")

    np.testing.assert_array_equal(back.vertex["class"], [0, 1, 2, 255, 0])
    np.testing.assert_array_equal(back.vertex["expert"], [3, 0, 255, 1, 2])
    np.testing.assert_array_equal(back.stack("x", "y", "z"), xyz)
    np.testing.assert_array_equal(back.stack("red", "green", "blue"), class_colors(names)[label])
    assert back.comments == ("class 0 wall", "class 1 floor", "class 2 chair")


def test_a_name_has_one_colour_in_every_domain_and_names_differ() -> None:
    names = ("wall", "floor", "chair", "table", "door", "window", "car", "road", "building", "vegetation")

    colors = class_colors(names)

    assert len(np.unique(colors, axis=0)) == len(names) + 1
    np.testing.assert_array_equal(class_colors(names[::-1])[:-1], colors[:-1][::-1])


def test_predictions_far_from_zero_keep_their_millimetres(tmp_path: Path) -> None:
    xyz = np.array([[691_000.001, 5_336_000.002, 500.003]])
    write_prediction_ply(tmp_path / "p.ply", PointPrediction(xyz, np.array([0]), ("ground",)))

    back = read_ply(tmp_path / "p.ply")

    np.testing.assert_array_equal(back.stack("x", "y", "z"), xyz)
    np.testing.assert_array_equal(back.vertex["expert"], [255])


@pytest.mark.parametrize(
    ("label", "expert"), [([0, 3], None), ([0], None), ([-2, 0], None), ([0, 1], [0, 255]), ([0, 1], [0])]
)
def test_predictions_that_do_not_fit_are_refused(label: list[int], expert: list[int] | None) -> None:
    with pytest.raises(ValueError, match=r"label|expert"):
        PointPrediction(
            np.zeros((2, 3)), np.array(label), ("a", "b", "c"), None if expert is None else np.array(expert)
        )


def test_las_predictions_carry_class_and_expert_as_extra_dimensions(tmp_path: Path) -> None:
    names = ("ground", "building")
    xyz = np.array(
        [[691_000.001, 5_336_000.002, 500.003], [691_009.0, 5_336_001.0, 501.0], [691_000.5, 5_336_000.5, 500.0]]
    )
    prediction = PointPrediction(xyz, np.array([1, -1, 0]), names, np.array([3, 0, -1]))

    write_prediction(tmp_path / "out" / "p.las", prediction)
    cloud = read_las(tmp_path / "out" / "p.las")

    np.testing.assert_allclose(cloud.pos, xyz, atol=5.1e-4)
    np.testing.assert_array_equal(cloud.column("class"), [1, 255, 0])
    np.testing.assert_array_equal(cloud.column("expert"), [3, 0, 255])
    np.testing.assert_array_equal(cloud.classification, [1, 255, 0])
    assert cloud.rgb is not None
    np.testing.assert_array_equal(cloud.rgb // 257, class_colors(names)[prediction.label])
    assert (tmp_path / "out" / "p.classes.txt").read_text() == "0 ground\n1 building\n255 none\n"


def test_a_prediction_format_is_chosen_by_the_ending(tmp_path: Path) -> None:
    prediction = PointPrediction(np.eye(3), np.array([0, 1, -1]), ("a", "b"))

    write_prediction(tmp_path / "p.ply", prediction)

    np.testing.assert_array_equal(read_ply(tmp_path / "p.ply").vertex["class"], [0, 1, 255])
    with pytest.raises(ValueError, match=r"\.ply or \.las"):
        write_prediction(tmp_path / "p.obj", prediction)
