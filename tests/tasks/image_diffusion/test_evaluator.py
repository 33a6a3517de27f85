# SPDX-License-Identifier: Apache-2.0
"""The judge: it learns, it is kept, it is another for other images; perfect, copied and random samples are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tasks.image_diffusion.data.glyph_shapes import GlyphShapes
from tasks.image_diffusion.datamodule import ImageData
from tasks.image_diffusion.report.inception import InceptionFeatures
from tasks.image_diffusion.report.judge import NUM_FEATURES, Judge, Judging, get_judge, shifted, training_images
from tasks.image_diffusion.report.judgement import RealImages, class_table, judge_images
from tasks.image_diffusion.report.quality import Gaussian, frechet_distance

QUICK = Judging(epochs=10, batch_size=32, width=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    source = GlyphShapes(train_per_class=30, val_per_class=1, test_per_class=10, image_size=14)
    return ImageData(source=source, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def real(data: ImageData) -> RealImages:
    return RealImages(training_images(data), training_images(data, "test"), data.domain_names)


@pytest.fixture(scope="module")
def judge(data: ImageData) -> Judge:
    torch.set_num_threads(1)
    return get_judge(data, QUICK)


def test_judge_learns_the_classes(judge: Judge, real: RealImages) -> None:
    features = judge.features(real.test.image)

    assert features.shape == (300, NUM_FEATURES)
    assert (judge.classes(features) == real.test.label).float().mean() > 0.7


def test_judge_is_trained_once_and_anew_for_other_images_or_settings(
    judge: Judge, data: ImageData, real: RealImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []

    def count(given: Judge, *args: object) -> Judge:
        trained.append(1)
        return given

    monkeypatch.setattr("tasks.image_diffusion.report.judge.train_judge", count)
    again = get_judge(data, QUICK)
    assert not trained
    assert again.key == judge.key
    for name, value in judge.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    changed = replace(real.train, image=real.train.image.clone())
    changed.image[0, 0, 0, 0] += 0.1
    keys = {judge.key, get_judge(data, QUICK, images=changed).key, get_judge(data, replace(QUICK, seed=1)).key}
    assert len(keys) == 3
    assert len(trained) == 2


def test_judge_leaves_random_numbers_alone_and_does_not_depend_on_them(data: ImageData, tmp_path: Path) -> None:
    short = Judging(epochs=1, batch_size=256, width=4)
    found = []
    for seed in (0, 1):
        fresh = ImageData(source=data.source, cache_dir=tmp_path / str(seed))
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        with torch.inference_mode():  # as at the end of a test
            found.append(get_judge(fresh, short, images=training_images(data)))
        assert torch.equal(torch.get_rng_state(), state)

    for name, value in found[0].state_dict().items():
        torch.testing.assert_close(found[1].state_dict()[name], value)


def test_moving_an_image_keeps_its_size_and_repeats_its_edges() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)

    assert torch.equal(shifted(x, 0), x)
    for _ in range(10):
        moved = shifted(x, 1)
        assert moved.shape == x.shape
        assert set(moved.flatten().tolist()) <= set(x.flatten().tolist())
    assert (shifted(torch.ones(2, 1, 4, 4), 2) == 1).all()


def test_real_images_as_samples_are_at_the_floor(judge: Judge, real: RealImages) -> None:
    found = judge_images(real.test.image, real.test.label, real, judge)

    assert set(found) == {"generation", "generation.glyphs", "generation.clothes", "generation.animals"}
    for group in found.values():
        assert group["class_accuracy"] == group["real_class_accuracy"]
        assert group["frechet"] == pytest.approx(group["frechet_floor"])
        assert group["nearest_ratio"] == pytest.approx(1)
        assert group["precision"] == group["recall"] == 1
    assert found["generation"]["images"] == 300
    assert found["generation.animals"]["images"] == found["generation.animals"]["floor_images"] == 100


def test_copies_noise_and_wrong_classes_are_found_out(judge: Judge, real: RealImages) -> None:
    every_third = torch.arange(0, len(real.train), 3)
    label, image = real.train.label[every_third], real.train.image[every_third]
    copied = judge_images(image, label, real, judge)["generation"]
    noise = judge_images(torch.rand(300, 1, 14, 14) * 2 - 1, real.labels(300), real, judge)["generation"]
    wrong_class = judge_images(image, label // 10 * 10 + (label + 1) % 10, real, judge)["generation"]
    wrong_domain = judge_images(image, (label + 10) % 30, real, judge)["generation"]

    assert copied["nearest_ratio"] == 0
    assert copied["class_accuracy"] > 0.7
    assert noise["frechet"] > 10 * noise["frechet_floor"]
    assert noise["class_accuracy"] < 0.2
    assert noise["precision"] < 0.2
    assert wrong_class["class_accuracy"] < 0.2
    assert wrong_class["domain_accuracy"] == pytest.approx(copied["domain_accuracy"], abs=0.02)
    assert copied["domain_accuracy"] > 0.9
    assert wrong_domain["domain_accuracy"] < 0.1


def test_accuracy_of_each_class_averages_to_that_of_all(judge: Judge, real: RealImages, data: ImageData) -> None:
    table = class_table(real.test.image, real.test.label, judge, data.facts["class_names"])

    assert list(table) == data.facts["class_names"]
    whole = judge_images(real.test.image, real.test.label, real, judge)["generation"]["class_accuracy"]
    assert sum(table.values()) / 30 == pytest.approx(whole)


def test_labels_go_round_the_trained_classes_of_which_each_has_one_domain(real: RealImages) -> None:
    assert real.labels(65).bincount().tolist() == [3] * 5 + [2] * 25
    assert [real.domain_of()[label] for label in range(30)] == [label // 10 for label in range(30)]
    few = RealImages(real.train.take(real.train.label >= 20), real.test, real.domains)
    assert few.labels(4).tolist() == [20, 21, 22, 23]


def test_distance_grows_with_noise(judge: Judge, real: RealImages) -> None:
    reference = Gaussian.of(judge.features(real.train.image))
    spoiled = [real.test.image + s * torch.randn_like(real.test.image) for s in (0.0, 0.2, 0.5)]
    distances = [frechet_distance(reference, Gaussian.of(judge.features(image))) for image in spoiled]

    assert distances == sorted(distances)
    assert distances[2] > 3 * distances[0]


def test_missing_inception_weights_are_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inception weights: no file"):
        InceptionFeatures(tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pip install 'moeapps\[fid\]'"):
        InceptionFeatures(tmp_path / "weights.pth")


def test_no_accuracy_is_given_where_any_judge_would_be_right(
    judge: Judge, real: RealImages, caplog: pytest.LogCaptureFixture
) -> None:
    ones = torch.nonzero(real.test.label == 3).flatten()
    one_class = replace(real, test=real.test.take(ones))
    found = judge_images(one_class.test.image, one_class.test.label, one_class, judge)

    assert all("class_accuracy" not in group and "real_class_accuracy" not in group for group in found.values())
    assert "domain_accuracy" in found["generation"]  # three domains are trained on
    assert "of one class" in caplog.text
    glyphs = [torch.nonzero(part.domain == 0).flatten() for part in (real.train, real.test)]
    one_domain = replace(real, train=real.train.take(glyphs[0]), test=real.test.take(glyphs[1]))
    found = judge_images(one_domain.test.image, one_domain.test.label, one_domain, judge)
    assert "domain_accuracy" not in found["generation"]
    assert "class_accuracy" in found["generation"]
