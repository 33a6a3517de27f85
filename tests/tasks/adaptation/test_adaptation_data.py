# SPDX-License-Identifier: Apache-2.0
"""The data module: rows or episodes, roles, experts of domains; and the generated digits behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from moeapps.data.domain import SPLITS_OF
from moeapps.data.images.batch import ImageBatch, to_uint8
from tasks.adaptation.data.batch import EpisodeBatch
from tasks.adaptation.data.digits import ROLES, DigitDomains, recipes
from tasks.adaptation.datamodule import AdaptationData, expert_groups
from tests.tasks.adaptation.adaptation_common import SMALL, small_data


def test_rows_train_and_evaluate_as_plain_batches(tmp_path: Path) -> None:
    data = small_data(tmp_path)
    batches = list(data.train_dataloader())

    assert all(isinstance(batch, ImageBatch) for batch in batches)
    assert [len(batch) for batch in batches] == [6] * 15
    assert all(batch.domain.bincount(minlength=3).tolist() == [2, 2, 2] for batch in batches)  # balanced
    assert [len(loader) for loader in data.val_dataloader()] == [2, 2, 2, 3]  # 10 or 20 images by 7
    assert isinstance(next(iter(data.test_dataloader()[5])), ImageBatch)
    assert isinstance(data.example_batch(), ImageBatch)


def test_episodes_train_and_evaluate_each_domain(tmp_path: Path) -> None:
    data = small_data(tmp_path, mode="episodes", draws=2)
    batches = list(data.train_dataloader())

    assert len(batches) == 5  # 90 images, 18 for each step
    assert all(len({episode.domain for episode in batch}) == 2 for batch in batches)
    assert {episode.domain for batch in batches for episode in batch} <= {0, 1, 2}
    # 10 held-out images: 6 answered, 1 part; 20 of the validation domain: 16 answered, 3 parts; two draws.
    assert [len(loader) for loader in data.val_dataloader()] == [2, 2, 2, 6]
    for number, loader in enumerate(data.test_dataloader()):
        (episode,) = next(iter(loader)).episodes
        assert episode.domain == number
        assert len(episode.support) == 4
    example = data.example_batch(3)
    assert isinstance(example, EpisodeBatch)
    assert len(example) == 3
    assert len(example.episodes[0].support) == 4
    first = data.first_training_batch()
    assert [e.query.index.tolist() for e in first] == [e.query.index.tolist() for e in batches[0]]


def test_evaluation_may_differ_from_training_and_steps_may_be_set(tmp_path: Path) -> None:
    data = small_data(tmp_path, mode="rows", evaluation="episodes")
    assert isinstance(next(iter(data.train_dataloader())), ImageBatch)
    assert isinstance(next(iter(data.val_dataloader()[0])), EpisodeBatch)
    other = small_data(tmp_path, mode="episodes", evaluation="rows", steps_per_epoch=11)
    assert len(other.train_dataloader()) == 11
    assert isinstance(next(iter(other.val_dataloader()[0])), ImageBatch)
    assert not other.is_padding("val", 0, 0)


def test_domains_of_few_training_images_give_smaller_episodes_and_a_single_one_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = small_data(tmp_path, mode="episodes", support=20, query=40)
    few = {"inverted": 1, "pen": 6}
    for name, count in few.items():
        whole = data.get_dataset(name, "train")
        whole.label = whole.label[:count]  # type: ignore[attr-defined]
    with caplog.at_level("INFO", logger="moeapps"):
        batches = list(data.train_dataloader())

    assert {(e.domain, len(e.support), len(e.query)) for batch in batches for e in batch} == {(0, 10, 20), (2, 2, 4)}
    assert "domains of a single training image give no episode: inverted" in caplog.text
    assert "fewer than support=20 + query=40 training images, hence smaller episodes: plain, pen" in caplog.text
    for name in data.roles["seen"]:
        data.get_dataset(name, "train").label = torch.zeros(1, dtype=torch.int64)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="domain 'plain' has 1 image"):
        data.train_dataloader()


def test_facts_name_everything_a_network_needs(tmp_path: Path) -> None:
    facts = small_data(tmp_path, num_experts=2).facts

    assert (facts["num_classes"], facts["channels"], facts["image_size"]) == (10, 3, 12)
    assert (facts["target"], facts["num_experts"], facts["augmented"]) == ("classification", 2, False)
    assert facts["expert_of"][3:] == [-1, -1, -1]
    assert sorted(set(facts["expert_of"][:3])) == [0, 1]


def test_two_processes_answer_every_image_once_and_know_their_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small_data(tmp_path, mode="episodes", draws=1)
    whole = [sorted(row for item in loader for row in item.query.index.tolist()) for loader in data.test_dataloader()]
    shared: list[list[int]] = [[] for _ in whole]
    steps = []
    for rank in (0, 1):
        monkeypatch.setattr(data, "_place", lambda rank=rank: (rank, 2))
        loaders = data.test_dataloader()
        steps.append([len(loader) for loader in loaders])
        for place, loader in enumerate(loaders):
            for index, item in enumerate(loader):
                if not data.is_padding("test", place, index):
                    shared[place] += item.query.index.tolist()

    assert steps[0] == steps[1]  # both wait for each other as often
    assert [sorted(rows) for rows in shared] == whole


def test_worker_processes_give_the_same_episodes(tmp_path: Path) -> None:
    alone, helped = (list(small_data(tmp_path, mode="episodes", num_workers=n).train_dataloader()) for n in (0, 1))

    for first, second in zip(alone, helped, strict=True):
        assert torch.equal(first.query.image, second.query.image)
        assert [e.support.index.tolist() for e in first] == [e.support.index.tolist() for e in second]


@pytest.mark.parametrize("domains", [1, 2, 7, 30, 33])
def test_groups_of_experts_cover_all_domains_and_differ_by_at_most_one(domains: int) -> None:
    for experts in range(1, domains + 1):
        groups = torch.tensor(expert_groups(domains, experts, seed=5))
        sizes = groups.bincount()
        assert len(groups) == domains
        assert len(sizes) == experts
        assert int(sizes.max() - sizes.min()) <= 1
        assert expert_groups(domains, experts, seed=5) == groups.tolist()
    assert expert_groups(domains, None, seed=5) == list(range(domains))
    if domains > 7:
        assert expert_groups(domains, 4, seed=5) != expert_groups(domains, 4, seed=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "row"}, "mode='row' is not allowed; use one of rows, episodes"),
        ({"evaluation": "all"}, "evaluation='all' is not allowed"),
        ({"protocol": "own"}, "protocol='own' is not allowed; use one of disjoint, official"),
        ({"support": 0}, "support=0 is not allowed"),
        ({"draws": 0}, "draws=0 is not allowed"),
        ({"steps_per_epoch": -1}, "steps_per_epoch=-1 is not allowed"),
        ({"num_experts": 4}, "num_experts=4 is not allowed; use 1 to 3"),
        ({"num_experts": 0}, "num_experts=0 is not allowed"),
        ({"unseen": ["moon"]}, "DigitDomains has no domain 'moon'; allowed: plain, "),
        ({"unseen": ["plain"]}, "domain 'plain' is given as seen and as unseen"),
    ],
)
def test_wrong_settings_are_told(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        small_data(tmp_path, **options)


def test_a_source_of_one_class_is_told(tmp_path: Path) -> None:
    class OneClass(DigitDomains):
        def bind(self, roles: Any) -> None:
            super().bind(roles)
            self.class_names = ["digit_0"]

    with pytest.raises(ValueError, match=r"hold 1 class \['digit_0'\]; there is nothing to tell apart"):
        AdaptationData(source=OneClass(**SMALL), cache_dir=tmp_path)


class Sink(L.LightningModule):
    """Takes episodes and rows through a Trainer and writes down what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.trained: list[list[list[int]]] = []

    def training_step(self, batch: EpisodeBatch, index: int) -> Tensor:
        self.trained.append([[e.domain, *e.support.index.tolist(), *e.query.index.tolist()] for e in batch])
        return (self.weight * batch.query.image.mean()).sum()

    def on_train_batch_end(self, *args: Any) -> None:
        if len(self.trained) == 3:
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "third.ckpt")

    def validation_step(self, batch: EpisodeBatch, index: int, dataloader_idx: int = 0) -> None:
        """Nothing is validated here; Lightning wants the method."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: AdaptationData, folder: Path, *, resume: Path | None = None) -> Sink:
    module = Sink()
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        limit_val_batches=0,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module


def test_a_run_stopped_inside_an_epoch_goes_on_with_the_next_episodes(tmp_path: Path) -> None:
    whole = fit(small_data(tmp_path, mode="episodes"), tmp_path / "whole").trained
    checkpoint = tmp_path / "whole" / "third.ckpt"
    rest = fit(small_data(tmp_path, mode="episodes"), tmp_path / "rest", resume=checkpoint).trained

    assert len(whole) == 10
    assert rest == whole[3:]


# Generated digits -----------------------------------------------------------------------------------------------------


def source(**options: Any) -> DigitDomains:
    found = DigitDomains(**{**SMALL, **options})
    found.bind(found.default_roles)  # type: ignore[arg-type]
    return found


def test_every_domain_and_split_has_the_digits_it_says_equally_often(tmp_path: Path) -> None:
    digits = source()
    for role, names in ROLES.items():
        for name in names:
            for split in SPLITS_OF[role]:
                label = digits.dataset(name, split, tmp_path).label
                each = 3 if split == "train" else 1 if role == "seen" else 2
                assert label.bincount(minlength=10).tolist() == [each] * 10
                assert label.tolist() != sorted(label.tolist())  # an official support is not all of one digit


def test_no_drawing_is_in_two_domains_or_splits(tmp_path: Path) -> None:
    digits = source(image_size=20)
    seen: dict[bytes, str] = {}
    for role, names in ROLES.items():
        for name in names:
            for split in SPLITS_OF[role]:
                for drawing in digits.base(name, split, tmp_path)[0]:
                    key = drawing.numpy().tobytes()
                    assert key not in seen, (name, split, seen.get(key))
                    seen[key] = f"{name} {split}"


def test_unseen_domains_have_nothing_to_train_on_and_validation_domains_neither(tmp_path: Path) -> None:
    data = small_data(tmp_path)
    for name, split in (("colours", "train"), ("colours", "val"), ("stripes", "train")):
        with pytest.raises(ValueError, match=f"it has no {split} images, only .*; training uses seen domains alone"):
            data.images(name, split)  # type: ignore[arg-type]


def test_digits_are_the_same_for_a_seed_and_come_from_the_cache(tmp_path: Path) -> None:
    first = small_data(tmp_path / "a").images("plain", "train").image
    assert torch.equal(small_data(tmp_path / "b").images("plain", "train").image, first)
    other = AdaptationData(source=DigitDomains(**SMALL, seed=1), cache_dir=tmp_path / "b")
    assert not torch.equal(other.images("plain", "train").image, first)
    data = small_data(tmp_path / "b")
    files = sorted((tmp_path / "b" / "adaptation").glob("plain-train-*.npz"))
    assert len(files) == 2
    stamp = files[0].stat().st_mtime_ns
    data.prepare_data()
    assert files[0].stat().st_mtime_ns == stamp


@pytest.mark.parametrize("options", [{"distance": -1.0}, {"train_per_class": 0}, {"image_size": 0}])
def test_sizes_and_distances_below_their_least_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not allowed; use"):
        DigitDomains(**options)


def test_at_distance_zero_domains_of_one_hand_look_alike(tmp_path: Path) -> None:
    near, far = source(distance=0.0, image_size=28), source(image_size=28)

    def grey(digits: DigitDomains, name: str) -> float:
        return float(to_uint8(digits.dataset(name, "test", tmp_path / str(digits.distance))[0].image).float().mean())

    assert grey(far, "clouds") > 2 * grey(far, "plain")
    assert grey(near, "clouds") < 1.7 * grey(near, "plain")
    assert set(recipes(0.0)) == set(recipes(1.0)) == {name for names in ROLES.values() for name in names}
