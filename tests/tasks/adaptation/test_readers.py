# SPDX-License-Identifier: Apache-2.0
"""Folders and tables of images, written here in the form their owners keep them, are read picture by picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeapps.data.domain import Split
from moeapps.data.images.arrays import ImageFileError
from moeapps.data.images.batch import to_uint8
from tasks.adaptation.data.readers.files import ImageForm, domain_name, filled
from tasks.adaptation.data.readers.folders import DomainFolders
from tasks.adaptation.data.readers.table import Derived, Rule, TableDomains
from tasks.adaptation.datamodule import AdaptationData
from tests.tasks.adaptation.adaptation_common import write_folders, write_picture, write_table

COUNTS = {
    "Real World": {"cat": 10, "dog": 10},
    "clip-art": {"cat": 6, "dog": 4},
    "photo": {"cat": 5, "dog": 7},
}
ROLES = {"seen": ["Real_World"], "validation": ["clip-art"], "unseen": ["photo"]}


def folders(root: Path, **options: Any) -> AdaptationData:
    source = DomainFolders(root=root, form=ImageForm(size=4, **options.pop("form", {})), **options)
    return AdaptationData(source=source, cache_dir=root.parent / "cache", **ROLES, support=2, query=2)


def levels(data: AdaptationData, domain: str, split: Split) -> list[tuple[int, str]]:
    """Return the grey level and the class of every image of a domain and split."""
    batch = data.images(domain, split)
    assert (batch.image == batch.image[:, :1, :1, :1]).all()  # one level each
    values = to_uint8(batch.image[:, 0, 0, 0]).tolist()
    return [(value, data.source.class_names[k]) for value, k in zip(values, batch.label.tolist(), strict=True)]


@pytest.mark.parametrize("packed", [True, False])
def test_folders_of_domains_and_classes_are_read_picture_by_picture(packed: bool, tmp_path: Path) -> None:
    written = write_folders(tmp_path / "data", COUNTS)
    data = folders(tmp_path / "data", form={"packed": packed}, same_classes=True)
    data.prepare_data()

    splits: dict[str, tuple[Split, ...]] = {
        "Real_World": ("train", "val", "test"),
        "clip-art": ("val", "test"),
        "photo": ("test",),
    }
    for (folder, classes), (domain, own) in zip(written.items(), splits.items(), strict=True):
        assert domain_name(folder) == domain
        found = [item for split in own for item in levels(data, domain, split)]
        assert sorted(found) == sorted((level, name) for name, several in classes.items() for level in several)
    # A tenth of ten pictures of each class for either split; halves of each class of the validation domain.
    assert [len(data.images("Real_World", split)) for split in splits["Real_World"]] == [16, 2, 2]
    assert [name for _, name in levels(data, "clip-art", "val")].count("cat") == 3
    assert data.facts["num_classes"] == 2
    assert "photo" in data.sources["photo"]


def test_a_pack_is_made_anew_when_a_picture_changes(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", COUNTS)
    assert 255 not in [level for level, _ in levels(folders(tmp_path / "data"), "photo", "test")]
    write_picture(tmp_path / "data" / "photo" / "cat" / "000.png", 255, size=11)

    assert (255, "cat") in levels(folders(tmp_path / "data"), "photo", "test")


def test_classes_that_a_domain_lacks_are_told_where_all_must_have_them(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", {**COUNTS, "photo": {"cat": 5}})

    with pytest.raises(ImageFileError, match=r"domain 'photo' lacks the classes dog that others have; .* same_classes"):
        folders(tmp_path / "data", same_classes=True)
    data = folders(tmp_path / "data")
    assert {name for _, name in levels(data, "photo", "test")} == {"cat"}  # a domain of one class is a domain
    (episode,) = data.episodes("photo", "test")[0].episodes
    assert (len(episode.support), len(episode.query)) == (2, 3)


def test_two_folders_of_one_name_an_unknown_domain_and_no_folder_are_told(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", {"a b": {"x": 1}, "a_b": {"x": 1}})
    with pytest.raises(ImageFileError, match="both give the domain 'a_b'; rename one"):
        DomainFolders(root=tmp_path / "data")
    write_folders(tmp_path / "more", COUNTS)
    source = DomainFolders(root=tmp_path / "more", form=ImageForm(size=4))
    with pytest.raises(ValueError, match=r"more has no domain 'moon'; allowed: Real_World, clip-art, photo"):
        AdaptationData(source=source, seen=["photo"], validation=["clip-art"], unseen=["moon"])
    with pytest.raises(ImageFileError, match=r"no folder .*; set root to the folder that holds the data"):
        DomainFolders(root=tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"seen=\[\] leaves nothing to train on"):
        AdaptationData(source=source)


def test_too_few_pictures_are_told_or_give_small_episodes(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", {**COUNTS, "photo": {"cat": 1}, "clip-art": {"cat": 2, "dog": 1}})
    data = folders(tmp_path / "data")

    assert len(data.episodes("photo", "test")) == 1
    assert [len(data.images("clip-art", split)) for split in ("val", "test")] == [2, 1]  # type: ignore[arg-type]
    (episode,) = data.episodes("clip-art", "val")[0].episodes
    assert (len(episode.support), len(episode.query)) == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"channels": 2}, "pictures have 1 or 3 channels"),
        ({"mirror": 1.5}, "a probability lies in"),
        ({"background": "pink"}, "background='pink' is not allowed"),
    ],
)
def test_wrong_forms_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageForm(**options)


def test_mirrors_are_for_training_and_forbid_keeping_features(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", COUNTS)
    path = tmp_path / "data" / "Real World" / "cat" / "000.png"
    from PIL import Image

    Image.fromarray(np.tile(np.array([0, 0, 255, 255], np.uint8), (4, 1))).save(path)
    data = folders(tmp_path / "data", form={"mirror": 1.0}, val_share=0.0, test_share=0.0)

    assert data.facts["augmented"]
    batch = data.images("Real_World", "train")
    (mirrored,) = [image for image in batch.image if image.std() > 0.1]
    assert to_uint8(mirrored[0, 0]).tolist() == [255, 255, 0, 0]


def test_standardised_images_have_mean_zero_and_deviation_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    from PIL import Image

    for domain, classes in COUNTS.items():
        for name in classes:
            for number in range(3):
                path = tmp_path / "data" / domain / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)).save(path)
    image = folders(tmp_path / "data", form={"standardise": True}).images("photo", "test").image

    assert torch.allclose(image.mean((2, 3)), torch.zeros(6, 3), atol=1e-5)
    assert torch.allclose(image.std((2, 3)), torch.ones(6, 3), atol=1e-5)


def test_an_empty_split_takes_one_row_of_the_largest() -> None:
    rows = {"train": torch.arange(5), "val": torch.tensor([7]), "test": torch.tensor([], dtype=torch.int64)}

    found = filled(rows, ["val", "test"])  # type: ignore[arg-type]

    assert {split: own.tolist() for split, own in found.items()} == {"train": [0, 1, 2, 3], "val": [7], "test": [4]}
    alone = filled({"train": torch.tensor([3])}, ["val"])
    assert {split: own.tolist() for split, own in alone.items()} == {"train": [3]}


# Tables ---------------------------------------------------------------------------------------------------------------


def table(root: Path, count: int = 24, **changes: Any) -> Path:
    """Write a table of places A to D with the columns name, kind, place, part and date, and a picture for each row."""
    rows = []
    for number in range(count):
        row: dict[str, object] = {
            "name": f"p{number}",
            "kind": ("fox", "owl", "hare")[number % 3],
            "place": "ABCD"[number // 6 % 4],
            "part": ("train", "id_val", "id_test")[min(number % 6 // 2, 2)],
            "date": f"20{10 + number // 6}-05-01T12:00:00Z",
        }
        rows.append({**row, **{key: value(number) for key, value in changes.items()}})
        write_picture(root / "images" / f"p{number}.png", number)
    return write_table(root / "metadata.csv", rows, index=True)


RULES = [
    Rule("unseen", {"place": "D"}),
    Rule("validation", {"place": ["C", "X"]}),
    Rule("seen", {"part": "train"}, "train"),
    Rule("seen", {"part": "id_val"}, "val"),
    Rule("seen", {"part": "id_test"}, "test"),
]


def listed(root: Path, **options: Any) -> AdaptationData:
    given = {"image": "images/{name}.png", "label": "kind", "domain": "place {place}", "rules": RULES, **options}
    source = TableDomains(root=root, form=ImageForm(size=4), **given)
    return AdaptationData(source=source, cache_dir=root / "cache", support=2, query=2)


def test_rows_of_a_table_give_pictures_labels_domains_roles_and_splits(tmp_path: Path) -> None:
    table(tmp_path)
    data = listed(tmp_path)

    assert data.roles == {"seen": ["place_A", "place_B"], "validation": ["place_C"], "unseen": ["place_D"]}
    assert data.source.class_names == ["fox", "hare", "owl"]

    def kind(number: int) -> tuple[int, str]:
        return number, ("fox", "owl", "hare")[number % 3]

    for first, domain in ((0, "place_A"), (6, "place_B")):
        for start, split in ((0, "train"), (2, "val"), (4, "test")):
            assert levels(data, domain, split) == [kind(first + start), kind(first + start + 1)]  # type: ignore[arg-type]
    held = [levels(data, "place_C", "val"), levels(data, "place_C", "test")]
    assert sorted(held[0] + held[1]) == [kind(number) for number in range(12, 18)]
    assert len(held[0]) == len(held[1]) == 3
    assert levels(data, "place_D", "test") == [kind(number) for number in range(18, 24)]


def test_a_run_may_give_a_domain_another_role_than_the_table(tmp_path: Path) -> None:
    table(tmp_path, 120, place=lambda number: "ABCD"[number // 30])
    source = listed(tmp_path).source
    data = AdaptationData(
        source=source, seen=["place_D"], validation=["place_A"], unseen=["place_B"], cache_dir=tmp_path / "cache"
    )

    assert [len(data.images("place_D", split)) for split in ("train", "val", "test")] == [24, 3, 3]  # type: ignore[arg-type]
    assert [len(data.images("place_A", split)) for split in ("val", "test")] == [15, 15]  # type: ignore[arg-type]
    assert len(data.images("place_B", "test")) == 30


def test_without_rules_the_run_names_the_roles(tmp_path: Path) -> None:
    table(tmp_path)
    with pytest.raises(ValueError, match=r"seen=\[\] leaves nothing to train on"):
        listed(tmp_path, rules=None)
    source = TableDomains(
        root=tmp_path, image="images/{name}.png", label="kind", domain="{place}", form=ImageForm(size=4)
    )
    data = AdaptationData(source=source, seen=["A", "B"], validation=["C"], unseen=["D"], cache_dir=tmp_path / "cache")
    assert sum(len(data.images("A", split)) for split in ("train", "val", "test")) == 6  # type: ignore[arg-type]


def test_columns_are_derived_and_dates_compared(tmp_path: Path) -> None:
    table(tmp_path)
    write_table(tmp_path / "names.csv", [{"code": "A", "long": "alder"}, {"code": "B", "long": "birch"}])
    rules = [
        Rule("unseen", {"date": {"from": "2013-01-01"}}),
        Rule("validation", {"date": {"from": "2012-01-01", "below": "2013-01-01"}}),
        Rule("seen", {"date": {"below": "2012-01-01"}}),
    ]
    derived = {"year": Derived("date", first=4), "tree": Derived("place", table="names.csv", key="code", value="long")}
    data = listed(tmp_path, rules=rules, derived=derived, domain="{year}_{tree}")

    assert data.roles == {"seen": ["2010_alder", "2011_birch"], "validation": ["2012_other"], "unseen": ["2013_other"]}
    assert len(data.images("2013_other", "test")) == 6


def test_labels_that_are_numbers_are_sorted_by_value_or_measured(tmp_path: Path) -> None:
    table(tmp_path, kind=lambda number: number % 12)
    data = listed(tmp_path)
    assert data.source.class_names == [str(number) for number in range(12)]
    assert data.images("place_D", "test").label.tolist() == [number % 12 for number in range(18, 24)]

    measured = listed(tmp_path, target="regression")
    assert (measured.facts["target"], measured.facts["num_classes"]) == ("regression", 1)
    batch = measured.images("place_D", "test")
    assert batch.label.dtype == torch.float32
    assert batch.label.tolist() == [float(number % 12) for number in range(18, 24)]
    (episode,) = AdaptationData(source=measured.source, support=2, query=2).episodes("place_D", "test")[0].episodes
    assert episode.support.label.isnan().all()


def test_small_domains_are_left_out_and_empty_splits_filled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table(tmp_path, place=lambda number: "A" if number < 3 else "B" if number < 12 else "C" if number < 18 else "D")
    with caplog.at_level("INFO", logger="moeapps"):
        data = listed(tmp_path, least=4)
    assert data.roles["seen"] == ["place_B"]
    assert "metadata.csv: 1 domains of fewer than 4 images are left out" in caplog.text
    table(tmp_path, part=lambda number: "train")
    data = listed(tmp_path)
    assert [len(data.images("place_A", split)) for split in ("train", "val", "test")] == [4, 1, 1]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "species"}, r"metadata.csv has no column 'species'; it has name, kind, place, part, date"),
        ({"image": "images/{file}.png"}, "has no column 'file'"),
        ({"table": "rows.csv"}, "no file .*rows.csv; set root"),
        ({"rules": [Rule("seen", {"place": "Z"})]}, "no row of .* fits a rule"),
        ({"domain": "{kind}"}, r"rows of the domain 'fox' are seen and unseen and validation; a domain has one role"),
        ({"target": "regression"}, "kind holds 'fox'; regression needs a number"),
        ({"target": "ranking"}, "target='ranking' is not allowed; use one of classification, regression"),
    ],
)
def test_tables_that_do_not_fit_are_told(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    table(tmp_path)
    with pytest.raises(ValueError, match=message):
        listed(tmp_path, **options)


@pytest.mark.parametrize("packed", [True, False])
def test_a_missing_picture_is_told_before_training(packed: bool, tmp_path: Path) -> None:
    table(tmp_path)
    (tmp_path / "images" / "p23.png").unlink()
    source = listed(tmp_path).source
    source.form = ImageForm(size=4, packed=packed)  # type: ignore[attr-defined]

    with pytest.raises(ImageFileError, match=r"no file .*p23.png; check the root"):
        AdaptationData(source=source, cache_dir=tmp_path / "cache").prepare_data()


def test_damaged_tables_and_pictures_are_told(tmp_path: Path) -> None:
    path = table(tmp_path)
    (tmp_path / "images" / "p0.png").write_bytes(b"no picture")
    with pytest.raises(ImageFileError, match=r"p0.png is not a readable image"):
        listed(tmp_path).prepare_data()
    path.write_bytes(b"name,kind,place,part,date\n")
    with pytest.raises(ImageFileError, match="has no row below its header"):
        listed(tmp_path)
    path.write_bytes(b"name,kind,place,part,date\n\xff\xfe,a,b,c,d\n")
    with pytest.raises(ImageFileError, match="is not a readable CSV file"):
        listed(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule("hidden"), "role='hidden' is not allowed"),  # type: ignore[arg-type]
        (lambda: Rule("unseen", split="train"), "split='train' is not allowed for unseen rows"),
        (lambda: Rule("seen", {"year": {"after": 3}}), "give a value, a list, or from and below"),
        (lambda: Derived("date"), "give either first, or all of table, key and value"),
        (lambda: Derived("date", first=4, table="a.csv", key="b", value="c"), "give either first"),
    ],
)
def test_wrong_rules_are_told(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
