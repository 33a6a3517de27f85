# SPDX-License-Identifier: Apache-2.0
"""Grids while training, judgement and few-shot tuning at the end of a test: run by a trainer with a stand-in model."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from image_common import ToyDiffusion, ToyNet, small_data, stand_in
from PIL import Image
from torch import Tensor

from moeapps.training.tuning import restored, tuned_parameters
from tasks.image_diffusion.datamodule import ImageData
from tasks.image_diffusion.report import generation
from tasks.image_diffusion.report.few_shot import FewShot, paired, tune
from tasks.image_diffusion.report.generation import GenerationQuality, SampleGrid
from tasks.image_diffusion.report.judge import Judging
from tasks.image_diffusion.report.pictures import class_figure, grid, spread, visible, write_png
from tests.pictured import check_readable

QUICK = Judging(epochs=1, batch_size=64, width=4)
SHOTS: dict[str, Any] = {"images": [4, 12], "steps": 30, "lr": 0.02, "batch_size": 8, "test_images": 20}


@pytest.fixture
def data(tmp_path: Path) -> ImageData:
    return small_data(tmp_path / "cache")


def toy(data: ImageData) -> ToyDiffusion:
    return ToyDiffusion(net=ToyNet(), facts=data.facts)


def trainer(folder: Path, *given: L.Callback, epochs: int = 2) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
        callbacks=list(given),
    )


def test_a_test_ends_with_judgement_files_and_groups_in_the_summary(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def draw(task: Any, labels: Tensor, **options: Any) -> Tensor:
        asked.update(options, labels=labels)
        return stand_in(task, labels, **options)

    monkeypatch.setattr(generation, "sample", draw)
    quality = GenerationQuality(num_images=60, cfg=2.5, steps=3, solver="euler", seed=7, judging=QUICK)
    run = trainer(tmp_path / "run", quality, FewShot(**SHOTS))
    task = toy(data)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    run.test(task, datamodule=data, verbose=False)

    found = json.loads((tmp_path / "run" / "metrics" / "test.json").read_text())["summary"]
    assert {"generation", "generation.glyphs", "generation.clothes", "generation.animals"} <= set(found)
    assert {"few_shot_4.stripes", "few_shot_12.stripes"} <= set(found)
    assert found["generation"]["images"] == 60
    assert (asked["cfg"], asked["steps"], asked["solver"], asked["seed"]) == (2.5, 3, "euler", 7)
    assert asked["labels"].bincount().tolist() == [2] * 30
    told = json.loads((tmp_path / "run" / "metrics" / "generation.json").read_text())
    assert len(told["judge"]) == 12
    assert list(told["classes"]) == data.facts["class_names"]
    assert (tmp_path / "run" / "figures" / "samples.png").is_file()
    for name, value in task.state_dict().items():
        assert torch.equal(value, before[name])


def test_grids_are_drawn_every_few_epochs_and_at_the_last(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "sample", stand_in)
    trainer(tmp_path / "run", SampleGrid(every_n_epochs=2, per_class=2), epochs=3).fit(toy(data), datamodule=data)

    names = sorted(path.name for path in (tmp_path / "run" / "figures").iterdir())
    assert names == ["samples-epoch_1.png", "samples-epoch_2.png"]


def test_nothing_is_drawn_under_fast_dev_run(data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> Tensor:
        raise AssertionError("drew")

    monkeypatch.setattr(generation, "sample", never)
    run = L.Trainer(
        accelerator="cpu",
        fast_dev_run=True,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
        callbacks=[SampleGrid(every_n_epochs=1), GenerationQuality(), FewShot()],
    )
    run.fit(toy(data), datamodule=data)
    run.test(toy(data), datamodule=data, verbose=False)


# --- few-shot tuning --------------------------------------------------------------------------------------------------


def test_tuning_moves_what_is_named_and_nothing_else_and_is_forgotten(data: ImageData) -> None:
    task = toy(data)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    chosen = tuned_parameters(task, ["*experts*"])
    few, test = data.images("stripes", "train"), data.images("stripes", "test")
    loss = paired(task, test, null=True)
    with restored(task):
        tune(task, few, chosen, steps=40, batch_size=8, lr=0.05, seed=0)
        assert not torch.equal(task.net.experts.weight, before["net.experts.weight"])
        assert torch.equal(task.net.shared, before["net.shared"])
        assert paired(task, test, null=True).mean() < loss.mean()

    for name, value in task.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.requires_grad and p.grad is None for p in task.parameters())
    assert torch.equal(paired(task, test, null=True), loss)


def test_weights_come_back_after_a_failure_too(data: ImageData) -> None:
    task = toy(data)
    before = task.net.shared.detach().clone()

    def breaks() -> None:
        with restored(task), torch.no_grad():
            task.net.shared += 1
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        breaks()
    assert torch.equal(task.net.shared, before)


def test_tuning_is_deterministic_and_leaves_random_numbers_alone(data: ImageData) -> None:
    task, few, found = toy(data), data.images("stripes", "train"), []
    for _ in range(2):
        state = torch.get_rng_state()
        with restored(task):
            tune(task, few, list(task.parameters()), steps=5, batch_size=4, lr=0.01, seed=3)
            found.append(task.net.experts.weight.detach().clone())
        assert torch.equal(torch.get_rng_state(), state)

    assert torch.equal(*found)


def test_unlabelled_and_labelled_images_are_both_tuned_on(data: ImageData) -> None:
    task = toy(data)
    before = task.net.experts.weight.detach().clone()
    few = data.images("glyphs", "train")
    with restored(task):
        tune(task, few, tuned_parameters(task, ["*experts*"]), steps=20, batch_size=16, lr=0.01, seed=0)
        moved = (task.net.experts.weight.detach() != before).any(1)

    assert moved[:10].all()
    assert not moved[10:30].any()  # classes that are not among the images
    assert moved[30]


def test_a_model_without_experts_is_left_out(data: ImageData, tmp_path: Path) -> None:
    few_shot = FewShot(**SHOTS, tuned=["*nothing*"])
    trainer(tmp_path / "run", few_shot).test(toy(data), datamodule=data, verbose=False)

    assert few_shot.describe_results() == {}


def test_gain_is_the_mean_of_paired_differences(data: ImageData, tmp_path: Path) -> None:
    few_shot = FewShot(**SHOTS)
    trainer(tmp_path / "run", few_shot).test(toy(data), datamodule=data, verbose=False)

    for group in few_shot.result.values():
        assert group["null_gain"] == pytest.approx(group["null_before"] - group["null_after"], abs=1e-6)
        assert group["null_gain"] > 3 * group["null_gain_se"] > 0
        assert 0 < group["tuned"] < 1
    assert few_shot.result["few_shot_12.stripes"]["images"] == 12


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FewShot, {"images": []}, "images"),
        (FewShot, {"steps": 0}, "steps=0"),
        (FewShot, {"tuned": []}, "pattern"),
        (SampleGrid, {"every_n_epochs": 0}, "every_n_epochs=0"),
        (GenerationQuality, {"num_images": 1}, "num_images=1"),
        (GenerationQuality, {"inception": Path("missing.pth")}, "inception weights: no file missing.pth"),
    ],
)
def test_wrong_options_are_told_at_construction(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


# --- pictures ---------------------------------------------------------------------------------------------------------


NAMES = ["a", "circle", "a_very_long_name_of_a_class_that_does_not_fit_above_its_images", "d", "e"]


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("size", [8, 28, 64])
def test_images_of_a_class_stand_together_under_its_name(classes: int, size: int) -> None:
    image = torch.linspace(-0.9, 0.9, 4 * classes).reshape(-1, 1, 1, 1).expand(-1, 1, size, size)
    names = NAMES[:classes]
    figure = class_figure(image, [name for name in names for _ in range(4)])

    check_readable(figure)
    said = [text.get_text() for text in figure.texts]
    assert [word[:1] for word in said] == [name[:1] for name in names]
    (drawn,) = figure.images
    pixels = np.asarray(drawn.get_array())[..., 0]
    high = pixels.shape[0]
    tones = visible(image)[:, 0, 0, 0].tolist()
    places = [np.argwhere(pixels == tone) for tone in tones]
    for name, text in enumerate(figure.texts):
        own = places[4 * name : 4 * name + 4]
        assert all(len(place) for place in own)
        assert len({place[0, 0] for place in own}) == 1  # in one row,
        lefts = [place[0, 1] for place in own]
        assert lefts == sorted(lefts)
        x, y = text.get_position()
        assert x * pixels.shape[1] == pytest.approx(lefts[0], abs=1)
        assert 0 < own[0][0, 0] - (1 - y) * high < 10  # right below the name,


def test_classes_side_by_side_are_farther_apart_than_images_of_one() -> None:
    figure = class_figure(torch.zeros(30, 1, 28, 28), [f"class {k // 2}" for k in range(30)])
    (drawn,) = figure.images
    row = (np.asarray(drawn.get_array())[..., 0] < 200).any(axis=0)  # columns of dots with a pixel of an image
    gaps = [len(list(run)) for dark, run in groupby(row.tolist()) if not dark][1:-1]

    assert len(gaps) > 2
    assert min(gaps[1::2]) > 4 * max(gaps[::2])  # between images and between classes, in turn


def test_grid_holds_every_image_in_its_place(tmp_path: Path) -> None:
    image = torch.rand(5, 3, 4, 6) * 2 - 1
    pixels = grid(image, columns=3, gap=1, enlarge=2)

    assert pixels.shape == (2 * (8 + 1) + 1, 3 * (12 + 1) + 1, 3)
    for i in range(5):
        top, left = 1 + i // 3 * 9, 1 + i % 3 * 13
        assert torch.equal(pixels[top : top + 8 : 2, left : left + 12 : 2].permute(2, 0, 1), visible(image)[i])
    read = np.asarray(Image.open(write_png(tmp_path / "a" / "g.png", pixels)))
    assert np.array_equal(read, pixels.numpy())
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["g.png"]


def test_latents_are_shown_over_their_own_range() -> None:
    shown = visible(5 + 3 * torch.randn(4, 4, 3, 3))

    assert shown.shape == (4, 3, 3, 3)
    assert shown.amin((0, 2, 3)).tolist() == [0] * 3
    assert shown.amax((0, 2, 3)).tolist() == [255] * 3


def test_places_are_spread_over_all() -> None:
    assert spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(100, 3) == [0, 50, 99] or spread(100, 3) == [0, 49, 99]
