# SPDX-License-Identifier: Apache-2.0
"""Damage of any kind to any file of any layout: one sentence, or a scan that keeps its promises (``make fuzz``)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readers_common import LAYOUTS, Layout, assert_valid, files_of, random_scan

from tasks.point_cloud.data.readers import PointCloudFileError, write_ply
from tests.fuzzing import refused

EXAMPLES = int(os.environ.get("MOEAPPS_FUZZ", "25"))  # make fuzz
EACH = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@st.composite
def damages(draw: st.DrawFn) -> tuple[float, int, bytes]:
    """Where (a share of the file), how many bytes go, and which come."""
    return draw(st.floats(0, 1)), draw(st.integers(0, 40)), draw(st.binary(max_size=40))


def damaged(whole: bytes, places: list[tuple[float, int, bytes]]) -> bytes:
    for share, gone, come in places:
        at = int(share * len(whole))
        whole = whole[:at] + come + whole[at + gone :]
    return whole


def read_or_refuse(layout: Layout, root: Path) -> None:
    """Read all training scans; anything but valid scans or the one error type propagates."""
    try:
        reader = layout.reader(root)
        for ref in reader.scans("train"):
            assert_valid(reader.read(ref))
    except PointCloudFileError as refusal:
        message = str(refusal)
    else:
        return
    refused()
    assert "expected" in message
    assert "\n" not in message


@EACH
@settings(max_examples=EXAMPLES, deadline=None)
@given(which=st.integers(0, 99), places=st.lists(damages(), min_size=1, max_size=3))
def test_a_damaged_file_of_a_layout_is_read_or_told(
    layout: Layout, which: int, places: list[tuple[float, int, bytes]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        layout.make(root, random_scan(layout.names, 5, indoor=layout.indoor))
        files = files_of(root)
        path = files[which % len(files)]
        path.write_bytes(damaged(path.read_bytes(), places))
        read_or_refuse(layout, root)


@settings(max_examples=4 * EXAMPLES, deadline=None)
@given(layout=st.sampled_from(["ascii", "binary_little_endian"]), places=st.lists(damages(), min_size=1, max_size=3))
def test_a_mesh_with_a_damaged_header_is_read_or_told(layout: str, places: list[tuple[float, int, bytes]]) -> None:
    own = LAYOUTS["own_ply"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _, scan = own.make(root, random_scan(own.names, 3))
        path = root / "yard" / "train" / "first.ply"
        write_ply(path, dict(zip("xyz", scan.xyz.T, strict=True)), layout=layout)  # type: ignore[arg-type]
        whole = path.read_bytes()
        body = whole.find(b"end_header") + 11
        faces = b"element face 2\nproperty list uchar int vertex_indices\nend_header\n"
        lists = b"3 0 1 2\n2 0 1\n" if layout == "ascii" else b"\x03" + bytes(12) + b"\x02" + bytes(8)
        head = damaged(whole[: body - 11] + faces, places)
        path.write_bytes(head + whole[body:] + lists)
        read_or_refuse(own, root)
