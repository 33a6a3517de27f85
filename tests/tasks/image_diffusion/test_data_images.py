# SPDX-License-Identifier: Apache-2.0
"""Generated images: what is drawn, what the splits share (nothing), how batches mix domains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from image_common import SMALL, small_data

from moeapps.data.images.batch import ImageBatch, PixelImages, from_uint8, to_uint8
from moeapps.data.images.drawing import Hand, Sketch, arc, draw
from moeapps.data.images.splits import split_rows
from tasks.image_diffusion.data.glyph_shapes import SPLITS, GlyphShapes
from tasks.image_diffusion.data.styles import STYLES, negative, outline, stripes
from tasks.image_diffusion.datamodule import ImageData

STILL = Hand(jitter=0, rotation=0, shear=0, scale=0, shift=0, thickness=0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images are drawn once for most tests."""
    return tmp_path_factory.mktemp("cache")


def pixels_of(batch: ImageBatch) -> set[bytes]:
    return {image.numpy().tobytes() for image in to_uint8(batch.image)}


def test_every_byte_survives_scaling_to_floats_and_back() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8)

    assert torch.equal(to_uint8(from_uint8(bytes_)), bytes_)
    assert from_uint8(bytes_).min() == -1
    assert from_uint8(bytes_).max() == 1
    assert torch.equal(to_uint8(torch.tensor([-3.0, 3.0])), torch.tensor([0, 255], dtype=torch.uint8))


def test_area_of_a_drawn_disc_and_of_a_rectangle_is_that_of_geometry() -> None:
    disc = draw(Sketch().stroke([(0, 0), (0, 0)], 0.5), STILL, 1, 64, torch.Generator())
    box = draw(Sketch().quad((-0.5, -0.4), (0.5, -0.4), (0.5, 0.4), (-0.5, 0.4)), STILL, 1, 64, torch.Generator())

    cell = (2 / 64) ** 2
    assert float(disc.sum()) / 255 * cell == pytest.approx(math.pi * (0.9 * 0.5) ** 2, rel=0.01)  # drawn at 0.9
    assert float(box.sum()) / 255 * cell == pytest.approx(0.81 * 0.8, rel=0.01)


def test_quadrilateral_may_run_either_way_round_and_a_stroke_either_way_along() -> None:
    points = [(-0.5, -0.4), (0.6, -0.3), (0.4, 0.5), (-0.3, 0.4)]
    one, other = (draw(Sketch().quad(*p), STILL, 1, 28, torch.Generator()) for p in (points, points[::-1]))
    line, back = (draw(Sketch().stroke(p, 0.1), STILL, 1, 28, torch.Generator()) for p in (points, points[::-1]))

    assert torch.equal(one, other)
    assert torch.equal(line, back)
    assert one.float().mean() > 0.05


def test_arc_lies_on_its_ellipse() -> None:
    for x, y in arc(0.1, -0.2, 0.5, 0.3, 0, 270):
        assert ((x - 0.1) / 0.5) ** 2 + ((y + 0.2) / 0.3) ** 2 == pytest.approx(1)


def test_images_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    one, again, other = (GlyphShapes(**SMALL, seed=s).render("glyphs", "train") for s in (0, 0, 1))

    assert torch.equal(one[0], again[0])
    assert not torch.equal(one[0], other[0])


def test_no_image_is_in_two_splits_or_domains(cache: Path) -> None:
    data = small_data(cache)
    sets = [pixels_of(data.images(name, split)) for name in data.domain_names for split in SPLITS]

    assert sum(map(len, sets)) == len(set().union(*sets))
    assert sum(map(len, sets)) == 3 * 10 * (6 + 2 + 3) + 2 * 30 * (2 + 1 + 1)


def test_facts_are_those_of_the_images_and_known_before_any_is_drawn(tmp_path: Path, cache: Path) -> None:
    facts = small_data(tmp_path).facts
    assert not list(tmp_path.rglob("*.npz"))

    data = small_data(cache)
    assert data.facts == facts
    batch = ImageBatch.cat([data.images(name, "train") for name in data.domain_names])
    assert batch.image.shape[1:] == (facts["channels"], facts["image_size"], facts["image_size"])
    assert batch.label.unique().tolist() == list(range(facts["num_classes"]))
    assert len(facts["class_names"]) == len(set(facts["class_names"])) == facts["num_classes"]
    assert not facts["latent"]
    for position, family in enumerate(data.roles["seen"]):
        labels = data.images(family, "train").label.unique().tolist()
        assert [facts["superclass"][label] for label in labels] == [position] * 10
    for style in ("outline", "stripes"):
        assert data.images(style, "test").label.unique().tolist() == list(range(30))


def test_images_are_drawn_once(cache: Path) -> None:
    small_data(cache).prepare_data()
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npz")}
    again = small_data(cache)
    again.prepare_data()

    assert len(files) == 5
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.npz")} == files
    assert torch.equal(again.images("glyphs", "val").label, GlyphShapes(**SMALL).render("glyphs", "val")[1])


def test_classes_can_be_told_apart_by_their_mean_images() -> None:
    source = GlyphShapes(train_per_class=25, test_per_class=8, image_size=14)
    hits = []
    for family in ("glyphs", "clothes", "animals"):
        (x, y), (test, truth) = source.render(family, "train"), source.render(family, "test")
        means = torch.stack([x[y == c].float().mean(0).flatten() for c in y.unique()])
        hits.append((y.unique()[torch.cdist(test.float().flatten(1), means).argmin(1)] == truth).float().mean())

    assert min(hits) > 0.5  # chance is 0.1


def test_outline_of_a_square_is_its_border() -> None:
    square = torch.zeros(1, 1, 10, 10, dtype=torch.uint8)
    square[..., 2:8, 2:8] = 200
    edge = outline(square, 0)

    assert edge[0, 0, 4, 4] == 0
    assert edge[0, 0, 2, 4] == edge[0, 0, 1, 4] == 200
    assert edge[0, 0, 0, 0] == 0
    assert (outline(torch.full_like(square, 77), 0) == 0).all()


def test_stripes_darken_some_places_and_brighten_none() -> None:
    image = torch.full((20, 1, 28, 28), 240, dtype=torch.uint8)
    drawn = stripes(image, 3)

    assert (drawn <= image).all()
    assert (drawn < 60).float().mean() > 0.15
    assert (drawn == 240).float().mean() > 0.15
    assert torch.equal(drawn, stripes(image, 3))
    assert not torch.equal(drawn[0], drawn[1])


def test_negative_of_a_negative_is_the_image() -> None:
    image = torch.randint(0, 256, (2, 1, 5, 5)).to(torch.uint8)

    assert torch.equal(negative(negative(image, 0), 0), image)
    assert set(STYLES) == {"outline", "stripes", "negative"}


def test_balanced_batches_hold_every_domain_equally_often(cache: Path) -> None:
    data = small_data(cache)
    batches = list(data.train_dataloader())

    assert len(batches) == 180 // 9
    for batch in batches:
        assert batch.domain.bincount(minlength=3).tolist() == [3, 3, 3]
        assert torch.equal(batch.label // 10, batch.domain)
        for k in range(len(batch)):
            own = data.images(data.domain_names[int(batch.domain[k])], "train", batch.index[k : k + 1])
            assert torch.equal(own.image[0], batch.image[k])
            assert own.label == batch.label[k]


def test_batch_moves_takes_and_joins() -> None:
    batch = ImageBatch(torch.randn(4, 1, 2, 2), torch.arange(4), torch.zeros(4).long(), torch.arange(4) + 7)

    assert torch.equal(ImageBatch.cat([batch.take(torch.tensor([3])), batch]).index, torch.tensor([10, 7, 8, 9, 10]))
    assert batch.to("meta").image.device.type == "meta"


def test_training_images_are_mirrored_and_others_never_are() -> None:
    pixels = torch.arange(8, dtype=torch.uint8).view(2, 1, 1, 4)
    rows, label = torch.arange(2), torch.zeros(2).long()

    assert torch.equal(PixelImages(pixels, label, train=True, mirror=1.0).fetch(rows), from_uint8(pixels).flip(-1))
    assert torch.equal(PixelImages(pixels, label, train=False, mirror=1.0).fetch(rows), from_uint8(pixels))
    half = PixelImages(pixels[:1].expand(400, -1, -1, -1), torch.zeros(400).long(), train=True, mirror=0.5)
    flipped = (half.fetch(torch.arange(400))[:, 0, 0, 0] > half.fetch(torch.tensor([0]))[0].min()).float().mean()
    assert 0.4 < flipped < 0.6


def test_split_of_rows_is_a_partition_class_by_class() -> None:
    label = torch.tensor([0] * 40 + [1] * 20 + [2])
    rows = split_rows(label, {"test": 0.1, "val": 0.05}, seed=1)

    assert torch.cat(list(rows.values())).sort().values.tolist() == list(range(61))
    assert label[rows["test"]].bincount(minlength=3).tolist() == [4, 2, 0]
    assert label[rows["val"]].bincount(minlength=3).tolist() == [2, 1, 0]
    assert 60 in rows["train"].tolist()  # the only image of a class is trained on
    assert torch.equal(split_rows(label, {"test": 0.1, "val": 0.05}, seed=1)["test"], rows["test"])
    assert not torch.equal(split_rows(label, {"test": 0.1, "val": 0.05}, seed=2)["test"], rows["test"])


def test_one_domain_is_enough(cache: Path) -> None:
    data = small_data(cache, seen=["animals"], validation=[], unseen=[])

    assert data.facts["num_classes"] == 30  # labels, and with them the null label, do not depend on the roles
    batch = next(iter(data.train_dataloader()))
    assert batch.label.min() >= 20
    assert batch.domain.unique().tolist() == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seen": ["glyph"]}, "has no domain 'glyph'; allowed: glyphs, clothes"),
        ({"seen": ["glyphs"], "unseen": ["glyphs"]}, "exactly one role"),
        ({"seen": []}, "nothing to train on"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"mixing": "even"}, "mixing"),
    ],
)
def test_wrong_settings_are_told(options: dict[str, Any], message: str, cache: Path) -> None:
    with pytest.raises(ValueError, match=message):
        small_data(cache, **options).train_dataloader()


def test_counts_below_one_are_told() -> None:
    with pytest.raises(ValueError, match="test: 0"):
        GlyphShapes(test_per_class=0)
    with pytest.raises(ValueError, match="uint8"):
        PixelImages(torch.zeros(2, 1, 4, 4), torch.zeros(2).long())
    assert ImageData().facts["image_size"] == 28
