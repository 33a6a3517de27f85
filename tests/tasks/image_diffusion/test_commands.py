# SPDX-License-Identifier: Apache-2.0
"""``moeapps sample`` and ``moeapps fid-stats``: files, numbers, and what is said of wrong words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from image_common import SMALL, ToyDiffusion, ToyNet, small_data, stand_in
from PIL import Image

from moeapps.cli import main
from moeapps.data.images.batch import to_uint8
from tasks.image_diffusion.datamodule import ImageData
from tasks.image_diffusion.report import fid_stats, sample
from tasks.image_diffusion.report.adm import read_adm, write_adm
from tasks.image_diffusion.report.judge import Judging, get_judge
from tasks.image_diffusion.report.quality import Gaussian
from tasks.image_diffusion.report.sample import class_numbers


def small_judge(data: ImageData) -> Any:
    return get_judge(data, Judging(epochs=1, batch_size=64, width=4))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageData:
    monkeypatch.setattr(fid_stats, "get_judge", small_judge)
    monkeypatch.setattr(sample, "sample", stand_in)
    return small_data(tmp_path / "cache")


def test_classes_are_given_by_name_or_number() -> None:
    names = ["cat", "dog", "7"]

    assert class_numbers(["dog", "0", "7"], names) == [1, 0, 2]
    for word, message in (("3", "allowed: 0 to 2"), ("-1", "allowed: 0 to 2"), ("cut", "did you mean 'cat'")):
        with pytest.raises(ValueError, match=message):
            class_numbers([word], names)


def test_samples_are_written_as_grid_and_npz(data: ImageData, tmp_path: Path) -> None:
    task = ToyDiffusion(net=ToyNet(), facts=data.facts)
    words = ["--classes", "fish", "3", "--count", "4", "--seed", "5", "--out", str(tmp_path / "out")]

    assert sample.main(words, task, data) == 0
    found = read_adm(tmp_path / "out" / "samples.npz")
    fish = data.facts["class_names"].index("fish")
    assert found.label is not None
    assert found.label.tolist() == [fish] * 4 + [3] * 4
    assert found.image is not None
    expected = to_uint8(stand_in(task, found.label, seed=5)).expand(-1, 3, -1, -1)
    assert torch.equal(to_uint8(found.image), expected)
    with Image.open(tmp_path / "out" / "grid.png") as picture:
        assert picture.size[0] >= 4 * 14


def test_models_of_latents_say_that_they_write_latents(
    data: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(data.source), "latent", True)
    task = ToyDiffusion(net=ToyNet(channels=4), facts=data.facts)

    assert sample.main(["--classes", "1", "--count", "2", "--out", str(tmp_path)], task, data) == 0
    assert "latents" in capsys.readouterr().out
    with np.load(tmp_path / "samples.npz") as file:
        assert file["x"].shape == (2, 4, 14, 14)
        assert file["x"].dtype == np.float32
    with pytest.raises(ValueError, match=r"config\.json"):
        sample.main(["--vae", str(tmp_path), "--out", str(tmp_path)], task, data)


def test_statistics_of_a_data_set_are_those_of_its_features(
    data: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stats.npz"

    assert (
        fid_stats.main(["--domain", "glyphs", "--split", "test", "--out", str(out), "--keep-images"], None, data) == 0
    )
    found = read_adm(out)
    judge = small_judge(data)
    expected = Gaussian.of(judge.features(data.images("glyphs", "test").image))
    assert found.statistics is not None
    torch.testing.assert_close(found.statistics.mean, expected.mean)
    torch.testing.assert_close(found.statistics.cov, expected.cov)
    assert (found.statistics.num, found.extractor) == (30, judge.key)
    capsys.readouterr()
    again = ["--images", str(out), "--out", str(tmp_path / "b.npz"), "--against", str(out)]
    assert fid_stats.main(again, None, data) == 0
    assert "Fréchet distance" in (text := capsys.readouterr().out)
    assert float(text.rsplit(":", 1)[1]) == pytest.approx(0, abs=1e-3)


def test_statistics_of_a_folder_of_pictures(data: ImageData, tmp_path: Path) -> None:
    image = data.images("animals", "test").image
    (tmp_path / "mine" / "deeper").mkdir(parents=True)
    for k, pixels in enumerate(to_uint8(image)[:, 0]):
        Image.fromarray(pixels.numpy()).save(tmp_path / "mine" / ("deeper" if k % 2 else ".") / f"{k:03}.png")

    assert fid_stats.main(["--images", str(tmp_path / "mine"), "--out", str(tmp_path / "a.npz")], None, data) == 0
    found = read_adm(tmp_path / "a.npz").statistics
    assert found is not None
    expected = Gaussian.of(small_judge(data).features(image))
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.cov, expected.cov)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--domain", "nobody"], "unknown domain 'nobody'"),
        (["--images", "EMPTY"], "holds no image"),
        (["--images", "no_such_file"], "no file no_such_file"),
        (["--inception", "no_such_file"], "inception weights: no file"),
        (["--against", "OTHER"], "make both with one extractor"),
    ],
)
def test_wrong_words_of_fid_stats_are_told(words: list[str], message: str, data: ImageData, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_adm(tmp_path / "other.npz", statistics=Gaussian.of(torch.randn(5, 64)), extractor="another")
    places = {"EMPTY": str(tmp_path / "empty"), "OTHER": str(tmp_path / "other.npz")}

    with pytest.raises(ValueError, match=message):
        fid_stats.main([*(places.get(word, word) for word in words), "--out", str(tmp_path / "a.npz")], None, data)


# --- from the command line --------------------------------------------------------------------------------------------


def config(tmp_path: Path) -> Path:
    content: dict[str, Any] = {
        "seed_everything": 0,
        "system": "toy_images",
        "model": {
            "class_path": "image_common.ToyDiffusion",
            "init_args": {"net": {"class_path": "image_common.ToyNet"}},
        },
        "data": {
            "class_path": "tasks.image_diffusion.datamodule.ImageData",
            "init_args": {
                "source": {"class_path": "tasks.image_diffusion.data.glyph_shapes.GlyphShapes", "init_args": SMALL},
                "cache_dir": str(tmp_path / "cache"),
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "limit_train_batches": 2,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
        },
        "test_after_fit": False,
    }
    path = tmp_path / "toy_images.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_run_draws_what_it_has_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "sample", stand_in)
    assert main(["fit", "--config", str(config(tmp_path)), "--trainer.log_every_n_steps", "1"]) == 0
    run = tmp_path / "runs" / "toy_images" / "base"
    before = sorted(path.name for path in (run / "version_0").iterdir())
    capsys.readouterr()

    assert main(["sample", "--run", str(run), "--classes", "bird", "--count", "2"]) == 0
    written = run / "version_0" / "sample"
    assert sorted(path.name for path in written.iterdir()) == ["grid.png", "samples.npz"]
    weights = torch.load(run / "version_0" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    task = ToyDiffusion(net=ToyNet(), facts=small_data(tmp_path / "cache").facts)
    task.load_state_dict(weights)
    found = read_adm(written / "samples.npz")
    assert found.image is not None
    assert found.label is not None
    assert torch.equal(to_uint8(found.image)[:, :1], to_uint8(stand_in(task, found.label)))
    assert sorted(path.name for path in (run / "version_0").iterdir()) == sorted([*before, "sample"])
    assert [path.name for path in run.iterdir()] == ["version_0"]  # drawing is no run of its own

    assert main(["sample", "--run", str(run), "--classes", "brid"]) == 2
    assert "did you mean 'bird'" in capsys.readouterr().err
    assert main(["sample", "--run", str(run), "--cout", "2"]) == 2
    assert main(["sample", "--run", str(run), "--help"]) == 0
    assert "--classes" in capsys.readouterr().out


def test_wrong_runs_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample"]) == 2
    assert "needs --run DIR" in capsys.readouterr().err
    assert main(["sample", "--run", str(tmp_path)]) == 2
    assert "it holds no config.yaml" in capsys.readouterr().err
    assert main(["fid-stats", "--config", "tests/toy.yaml", "--out", "a.npz"]) == 2
    assert "ToyData has no command `fid-stats`" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(config(tmp_path).read_text())
    assert main(["sample", "--run", str(tmp_path)]) == 2
    assert "name a file with --ckpt_path" in capsys.readouterr().err
