# SPDX-License-Identifier: Apache-2.0
"""What LAS, LAZ and PLY files may say, drawn at random, against values written by other means."""

from __future__ import annotations

import inspect
import re
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import laspy
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from readers_common import LAYOUTS, OWN_NAMES, Layout, random_scan

from tasks.point_cloud.data.public import to_arrays
from tasks.point_cloud.data.readers import (
    OwnLabels,
    OwnScans,
    PointCloudFileError,
    ScanNetMeshes,
    read_own_scan,
    read_ply,
    write_own_labels,
    write_own_scan,
)
from tasks.point_cloud.data.readers.las import read_las, write_las
from tasks.point_cloud.data.sources import LasFiles

EACH = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
STANDARD = ("intensity", "return_num", "withheld", "X", "x", "classification", "raw_classification", "flag_byte")
FEW = settings(deadline=None, max_examples=max(1, settings().max_examples // 2))


def las_of(rows: int, point_format: int = 7) -> laspy.LasData:
    rng = np.random.default_rng(rows)
    header = laspy.LasHeader(point_format=point_format, version="1.4")
    header.scales = np.full(3, 0.001)
    las = laspy.LasData(header)
    las.x, las.y, las.z = rng.uniform(-50, 50, (3, rows))
    las.classification = rng.integers(2, 7, rows).astype(np.uint8)
    return las


# --- LAS and LAZ ------------------------------------------------------------------------------------------------------


@FEW
@given(
    name=st.one_of(
        st.sampled_from(STANDARD), st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1)
    ),
    kind=st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"]),
    scale=st.one_of(st.none(), st.floats(0.01, 10)),
    offset=st.floats(-100, 100),
    rows=st.integers(1, 20),
)
def test_an_extra_attribute_of_any_name_is_the_same_from_las_and_laz(
    name: str, kind: str, scale: float | None, offset: float, rows: int
) -> None:
    name = name[:31]
    assume(len(name) > 0)
    raw = np.random.default_rng(rows).integers(0, 100, rows).astype(kind)
    las = las_of(rows)
    scaled = {} if scale is None else {"scales": np.array([scale]), "offsets": np.array([offset])}
    mark = "q" * len(name)  # laspy writes no name twice, other programs do: the name is put in afterwards
    las.add_extra_dim(laspy.ExtraBytesParams(mark, np.dtype(kind), **scaled))
    las.points.array[mark][:] = raw
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".las", ".laz"):
            path = Path(folder) / f"a{suffix}"
            las.write(path)
            data = path.read_bytes()
            assert data.count(mark.encode() + b"\0") == 1 or len(mark) < 3
            at = data.index(b"LASF_Spec\0") + 52 + 4
            path.write_bytes(data[:at] + name.encode() + data[at + len(name) :])
            cloud = read_las(path)
            double = name in (*las.point_format.standard_dimension_names, *las.points.array.dtype.names)
            found.append(cloud.column(f"{name} (extra)" if double else name))
            np.testing.assert_array_equal(cloud.intensity, np.zeros(rows))
    expected = raw if scale is None else raw.astype(np.float64) * scale + offset
    for values in found:
        np.testing.assert_allclose(values, expected, rtol=1e-12)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("suffix", [".las", ".laz"])
def test_label_may_name_any_field_and_a_scaled_attribute(suffix: str, tmp_path: Path) -> None:
    path, rng = tmp_path / f"a{suffix}", np.random.default_rng(0)
    las = las_of(30)
    for name in ("return_number", "user_data", "point_source_id", "scan_angle", "gps_time", "red", "synthetic"):
        las[name] = rng.integers(0, 2, 30)
    las.add_extra_dim(laspy.ExtraBytesParams("Tree Kind", "i2", scales=np.array([0.5]), offsets=np.array([-1.0])))
    las.points.array["Tree Kind"][:] = rng.integers(1, 3, 30) * 2
    las.write(path)

    names = [name for name in las.point_format.dimension_names if name not in ("X", "Y", "Z")]
    for name in names:
        values = np.asarray(las[name]).astype(np.int64)
        table = {int(value): place for place, value in enumerate(np.unique(values))}
        labels = OwnLabels(tuple(map(str, table)), table, label=name.upper())

        back = read_own_scan(path, labels)

        assert back.labelled
        np.testing.assert_array_equal([int(back.names[index]) for index in back.label], values)
    with pytest.raises(PointCloudFileError, match=r"no field 'genus'.*return_number.*Tree Kind"):
        read_own_scan(path, OwnLabels(("oak",), label="genus"))


@FEW
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.sampled_from([0, 3, 6, 7]))
def test_withheld_points_stay_but_have_no_label(withheld: list[bool], point_format: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.las"
        rows = len(withheld)
        xyz, classes = np.random.default_rng(0).uniform(0, 9, (rows, 3)), np.arange(rows) % 3 + 2
        write_las(path, xyz, classification=classes, withheld=np.array(withheld), point_format=point_format)
        table = {2: 0, 3: 1, 4: 2}

        own = read_own_scan(path, OwnLabels(OWN_NAMES, table))
        (scan,) = LasFiles(root=Path(folder), test=["a.las"], classes=dict(zip(table, OWN_NAMES, strict=True))).scans(
            "test", None
        )

        expected = np.where(withheld, -1, classes - 2)
        np.testing.assert_array_equal(own.label, expected)
        np.testing.assert_array_equal(scan.target(OWN_NAMES), expected)
        assert len(own) == len(scan) == rows


@pytest.mark.parametrize("intensity", [0, 500])
def test_light_is_the_colour_where_every_intensity_is_zero(intensity: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rgb, xyz = rng.integers(1, 256, (40, 3)), rng.uniform(0, 9, (40, 3))
    values = rng.integers(0, intensity + 1, 40)
    write_las(tmp_path / "a.las", xyz, rgb=rgb * 257, intensity=values, point_format=7)
    luminance = rgb @ (0.299, 0.587, 0.114) / 255  # ITU-R BT.601
    expected = luminance if intensity == 0 else values / 65_535

    own = to_arrays(read_own_scan(tmp_path / "a.las", OwnLabels(OWN_NAMES)), "a", 0.25)
    (tile,) = LasFiles(root=tmp_path, test=["a.las"], classes={0: "ground"}).scans("test", None)

    np.testing.assert_allclose(own.light, expected, atol=1e-6)
    np.testing.assert_allclose(tile.light, expected if intensity == 0 else values, atol=1e-6)


# --- PLY --------------------------------------------------------------------------------------------------------------

LAYOUT_ORDER = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


@FEW
@given(
    layout=st.sampled_from(list(LAYOUT_ORDER)),
    element=st.sampled_from(["vertex", "VERTEX", "testing", "point"]),
    newline=st.sampled_from(["\n", "\r\n"]),
    capitals=st.booleans(),
    blanks=st.sampled_from(["", " ", "\t  "]),
    comment=st.binary(max_size=20),
    lists=st.lists(st.integers(0, 4), max_size=6),
    first=st.booleans(),
)
def test_a_ply_file_means_the_same_however_it_is_written(
    layout: str, element: str, newline: str, capitals: bool, blanks: str, comment: bytes, lists: list[int], first: bool
) -> None:
    """``lists``: length of a list property of each vertex; ``first``: whether it stands before the coordinates."""
    assume(not {b"\n", b"\r"} & {comment[i : i + 1] for i in range(len(comment))})
    rows, order = len(lists), LAYOUT_ORDER[layout]
    rng = np.random.default_rng(rows)
    xyz, label = rng.standard_normal((rows, 3)).astype(np.float32), rng.integers(0, 3, rows)
    names = ["property list uchar int near"] * first
    names += [*(f"property float {axis}" for axis in "xyz"), "property uchar Scalar_Label"]
    names += ["property list uchar int near"] * (not first)
    lines = ["ply", f"format {layout} 1.0", "@", f"element {element} {rows}", *names, "element face 1"]
    lines += ["property list uchar int vertex_indices", "", "end_header"]
    text = newline.join(f"{line.upper() if capitals else line}{blanks}" for line in lines) + newline
    header = text.encode().replace(b"@", b"comment " + comment)
    body = b""
    for row, length in enumerate(lists):
        near = np.arange(length)
        numbers = [*xyz[row].tolist(), int(label[row])]
        if layout == "ascii":
            listed = [length, *near.tolist()]
            words = [*listed, *numbers] if first else [*numbers, *listed]
            body += (" ".join(map(repr, words)) + blanks + newline).encode()
        else:
            listed = bytes([length]) + near.astype(f"{order}i4").tobytes()
            plain = xyz[row].astype(f"{order}f4").tobytes() + bytes([int(label[row])])
            body += listed + plain if first else plain + listed
    body += f"3 0 1 2{newline}".encode() if layout == "ascii" else b"\x03" + np.arange(3).astype(f"{order}i4").tobytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.ply"
        path.write_bytes(header + body)

        back = read_own_scan(path, OwnLabels(OWN_NAMES))

        np.testing.assert_array_equal(back.xyz, xyz)
        np.testing.assert_array_equal(back.label, label)
        assert len(read_ply(path).comments) == 1


def test_two_elements_with_coordinates_and_no_vertex_are_refused(tmp_path: Path) -> None:
    parts = "".join(
        f"element {name} 1\n" + "".join(f"property float {axis}\n" for axis in "xyz") for name in ("left", "right")
    )
    (tmp_path / "a.ply").write_text(f"ply\nformat ascii 1.0\n{parts}end_header\n0 0 0\n1 1 1\n")

    with pytest.raises(PointCloudFileError, match="left: x, y, z; right: x, y, z"):
        read_ply(tmp_path / "a.ply")


def test_class_and_reflectance_of_dales_are_read(tmp_path: Path) -> None:
    names = ("float x", "float y", "float z", "int reflectance", "int sem_class", "int ins_class")
    dtype = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("r", "<i4"), ("s", "<i4"), ("i", "<i4")]
    rows = np.array([(1, 2, 3, 10, 1, 7), (4, 5, 6, 20, 2, 8)], dtype)
    header = "".join(f"property {name}\n" for name in names)
    (tmp_path / "a.ply").write_bytes(
        f"ply\nformat binary_little_endian 1.0\nelement testing 2\n{header}end_header\n".encode() + rows.tobytes()
    )

    scan = read_own_scan(tmp_path / "a.ply", OwnLabels(("ground", "plant"), {1: 0, 2: 1}, intensity_max=40))

    np.testing.assert_array_equal(scan.label, [0, 1])
    np.testing.assert_allclose(scan.intensity, [0.25, 0.5])


# --- options of every reader ------------------------------------------------------------------------------------------


def scaled(layout: Layout, root: Path, **options: Any) -> Any:
    """The reader of a layout with other options: those of labels.yaml for own scans."""
    reader = layout.reader(root)
    if isinstance(reader, OwnScans):
        write_own_labels(root / "yard" / "labels.yaml", replace(reader.labels, **options))
        return OwnScans(root, "yard")
    kind, given_ = type(reader), {}
    for name in ("splits", "version", "segment", "names"):
        key = "label_set" if name == "names" else name
        if key in inspect.signature(kind.__init__).parameters and hasattr(reader, name):
            given_[key] = list(getattr(reader, name)) if name == "names" else getattr(reader, name)
    return kind(root, **given_, **options)


@EACH
@settings(deadline=None, max_examples=5)
@given(unit=st.floats(0.01, 5))
def test_every_reader_has_a_unit(layout: Layout, unit: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _, scan = layout.make(root)
        reader = scaled(layout, root, unit=unit)

        back = reader.read(reader.scans("train")[0])

        np.testing.assert_allclose(back.world_xyz(), scan.xyz.astype(np.float64) * unit, rtol=1e-6)


@pytest.mark.parametrize(
    "layout",  # LAS keeps integers: no coordinate of it can be missing
    [pytest.param(layout, id=name) for name, layout in LAYOUTS.items() if name not in ("own_las", "own_laz")],
)
def test_every_reader_can_leave_out_points_without_a_return(layout: Layout, tmp_path: Path) -> None:
    scan = random_scan(layout.names, 9, indoor=layout.indoor)
    scan.xyz[4, 1], scan.xyz[0] = np.nan, np.inf
    layout.make(tmp_path, scan)
    reader = layout.reader(tmp_path)
    with pytest.raises(PointCloudFileError, match=r"row 0.*`drop_invalid`") as refusal:
        reader.read(reader.scans("train")[0])
    assert ("in labels.yaml" in str(refusal.value)) == isinstance(reader, OwnScans)

    reader = scaled(layout, tmp_path, drop_invalid=True)
    back = reader.read(reader.scans("train")[0])

    kept = [1, 2, 3, 5, 6, 7, 8]
    np.testing.assert_array_equal(back.xyz, scan.xyz[kept])
    np.testing.assert_array_equal(back.label, scan.label[kept])
    for field in layout.keeps:
        np.testing.assert_allclose(getattr(back, field), getattr(scan, field)[kept], rtol=1e-6)


@EACH
def test_advice_names_options_that_the_caller_has(layout: Layout, tmp_path: Path) -> None:
    reader, _ = layout.make(tmp_path)
    in_yaml = ArgumentParser().add_class_arguments(type(reader), "reader")  # what a configuration may set
    has = {name.removeprefix("reader.") for name in in_yaml}
    if isinstance(reader, OwnScans):
        has = {field.name for field in fields(OwnLabels)}
    light = {reader.scaling.light_option} - ({"intensity_max"} if isinstance(reader, ScanNetMeshes) else set())

    for option in ("unit", "drop_invalid", *light):
        (named,) = re.findall("`(.*)`", reader.scaling.advice(option))
        assert named in has
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="unit"):
            scaled(layout, tmp_path, unit=wrong).names  # noqa: B018


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".ply"])
@pytest.mark.parametrize("value", [np.nan, 7.0])
def test_normals_of_a_file_do_not_matter(suffix: str, value: float, tmp_path: Path) -> None:
    scan = random_scan(OWN_NAMES, 50)
    odd = replace(scan, normal=np.full((50, 3), value, np.float32))
    for name, one in (("a", scan), ("b", odd)):
        write_own_scan(tmp_path / f"{name}{suffix}", one)

    first, second = (to_arrays(read_own_scan(tmp_path / f"{n}{suffix}", OwnLabels(OWN_NAMES)), n, 0.3) for n in "ab")

    np.testing.assert_array_equal(first.up, second.up)
    np.testing.assert_array_equal(first.light, second.light)


def test_files_that_other_programs_lay_beside_scans_are_skipped(tmp_path: Path) -> None:
    LAYOUTS["own_laz"].make(tmp_path)
    for folder in ("__MACOSX", ".ipynb_checkpoints"):
        (tmp_path / "yard" / "train" / folder).mkdir()
    for name in ("first.lax", "Thumbs.db", "desktop.ini", "first.prj", "first.laz.aux.xml", ".DS_Store"):
        (tmp_path / "yard" / "train" / name).write_bytes(b"\0")

    assert [ref.name for ref in OwnScans(tmp_path, "yard").scans("train")] == ["first"]
