# SPDX-License-Identifier: Apache-2.0
"""Published packages that hold recorded series."""

from __future__ import annotations

from moeapps.data.archives import Package

_DATA = "aeon/datasets/data"
TERMS = (
    "data sets of the UEA and UCR archives of time series: their files state no licence; the archives offer them for "
    "research and ask to cite them and the donors of the data (aeon's own code, which is not read, is BSD-3-Clause)"
)

AEON = Package(
    name="aeon",
    version="1.6.0",
    kind="wheel",
    sha256="d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409",
    size=6_421_000,
    licence=TERMS,
    members=tuple(
        f"{_DATA}/{name}/{name}_{part}.ts"
        for name in ("BasicMotions", "JapaneseVowels", "GunPoint", "ItalyPowerDemand", "ArrowHead", "ACSF1")
        for part in ("TRAIN", "TEST")
    ),
    description="BasicMotions (80 recordings of 4 activities, 6 channels, 10 Hz) and five more sets of labelled series",
    used_by=("configs/data/basic_motions.yaml",),
    source="PyPI, aeon 1.6.0 wheel, aeon/datasets/data",
)

PACKAGES: tuple[Package, ...] = (AEON,)
