# SPDX-License-Identifier: Apache-2.0
"""Published packages that hold labelled point clouds."""

from __future__ import annotations

from moeapps.data.archives import Package

PACKAGES: tuple[Package, ...] = (
    Package(
        name="laspy",
        version="2.7.0",
        kind="sdist",
        sha256="f56feb5445e75d6ff12ee814aab6a35339290e75264ff277c6bf553f3025a3f5",
        size=1_929_624,
        licence="BSD-2-Clause",
        members=("laspy-2.7.0/tests/data/file_with_both_wkt_and_geotiff_vlrs.las", "laspy-2.7.0/LICENSE*"),
        description="one classified aerial tile: 25,408 points, 18 x 12 m, ground, building, vegetation",
        used_by=("configs/data/real_als.yaml",),
        source="PyPI, laspy 2.7.0 source archive, tests/data",
    ),
)
