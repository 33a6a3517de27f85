# SPDX-License-Identifier: Apache-2.0
"""Folders of classes: every file is counted, is a note, or is an error that names its class; the table says so."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_common import bound, write_latent, write_shard
from PIL import Image
from torchvision.datasets import ImageFolder

from moeapps.data.images.arrays import ImageFileError
from moeapps.data.images.folders import class_files, found_table
from moeapps.data.images.pictures import ENDINGS
from moeapps.files import write_arrays
from tasks.image_diffusion.data.latents import LatentImages
from tasks.image_diffusion.data.own_images import OwnImages
from tasks.image_diffusion.datamodule import ImageData

WORDS = st.text("abcxyz", min_size=1, max_size=3)
PLACES = st.lists(WORDS, max_size=2).map("/".join)
FILES = st.lists(st.tuples(PLACES, WORDS, st.sampled_from([*ENDINGS, ".PNG", ".Jpg"])), min_size=1, max_size=6)
TREES = st.dictionaries(WORDS.map("c".__add__), FILES, min_size=1, max_size=4)
CLUTTER = st.lists(st.sampled_from([".DS_Store", "Thumbs.db", ".hidden.png", "notes.txt", "a.json", ".old/a.png"]))


def picture(path: Path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), level).save(path)


def touched(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


@settings(max_examples=80, deadline=None)
@given(TREES, CLUTTER)
def test_the_files_are_those_that_torchvision_finds(tree: dict[str, Any], clutter: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for word, files in tree.items():
            for place, stem, ending in files:
                touched(root / word / place / f"f{stem}{ending}")
        theirs = ImageFolder(name, is_valid_file=lambda path: Path(path).suffix.lower() in ENDINGS)
        for k, path in enumerate(clutter):
            touched(root / list(tree)[k % len(tree)] / path)
        (root / ".ipynb_checkpoints").mkdir()
        ours = class_files(root, ENDINGS)

        assert list(ours) == theirs.classes
        assert {word: len(files) for word, files in ours.items()} == {
            theirs.classes[number]: count for number, count in Counter(theirs.targets).items()
        }
        assert {str(path) for files in ours.values() for path in files} == {path for path, _ in theirs.samples}


def test_one_name_in_two_spellings_of_unicode_is_one_class(tmp_path: Path) -> None:
    picture(tmp_path / "caf\u00e9" / "0.png")
    picture(tmp_path / "cafe\u0301" / "1.png")

    found = class_files(tmp_path, ENDINGS)
    assert {name: len(files) for name, files in found.items()} == {"caf\u00e9": 2}


def test_a_linked_class_is_followed_and_a_circle_ends(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere", target_is_directory=True)

    assert [path.name for path in class_files(tmp_path / "a", ENDINGS)["cat"]] == ["0.png"]


def empty_class(root: Path) -> None:
    (root / "a" / "dog" / "session").mkdir(parents=True)


def only_hidden(root: Path) -> None:
    picture(root / "a" / "dog" / ".0.png")


def another_ending(root: Path) -> None:
    picture(root / "a" / "dog" / "0.png")
    touched(root / "a" / "dog" / "1.heic")


def archive(root: Path) -> None:
    picture(root / "a" / "dog" / "0.png")
    touched(root / "a" / "dog" / "more.zip")


def beside(root: Path) -> None:
    picture(root / "a" / "0.png")


def archive_beside(root: Path) -> None:
    touched(root / "a" / "birds.zip")


def link_to_nothing(root: Path) -> None:
    picture(root / "a" / "dog" / "0.png")
    (root / "a" / "dog" / "1.png").symlink_to(root / "gone.png")


def class_of_nothing(root: Path) -> None:
    (root / "a" / "dog").symlink_to(root / "gone", target_is_directory=True)


def twice(root: Path) -> None:
    write_arrays(root / "a.npz", x=np.zeros((2, 4, 4), np.uint8), y=np.arange(2))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty_class, "class 'dog' in .*a holds no picture"),
        (only_hidden, "class 'dog' in .*a holds no picture"),
        (another_ending, r"class 'dog': .*1.heic is not read; allowed endings: .png, .*Convert, move or remove"),
        (archive, "class 'dog': .*more.zip is not read"),
        (beside, "0.png lies beside the class folders"),
        (archive_beside, "birds.zip lies beside the class folders and is not read"),
        (link_to_nothing, "class 'dog': .*1.png is a link to nothing"),
        (class_of_nothing, "dog lies beside the class folders"),
        (twice, "holds a folder a and a.npz; keep one"),
    ],
)
def test_a_class_that_would_be_short_is_named_before_training(damage: Any, message: str, tmp_path: Path) -> None:
    picture(tmp_path / "a" / "cat" / "0.png")
    damage(tmp_path)

    with pytest.raises(ImageFileError, match=message):
        bound(OwnImages(root=tmp_path, image_size=4), "a")


def test_latent_folders_are_held_to_the_same(tmp_path: Path) -> None:
    write_latent(tmp_path / "a" / "cat" / "session" / "0.npz", torch.zeros(4, 4, 4))
    source = bound(LatentImages(root=tmp_path, image_size=4), "a")
    assert source.counts == {"a": {"cat": 1}}
    assert len(source.dataset("a", "train", None)) == 1

    (tmp_path / "a" / "dog").mkdir()
    with pytest.raises(ImageFileError, match=r"class 'dog' in .*a holds no latent"):
        bound(LatentImages(root=tmp_path, image_size=4), "a")


@pytest.mark.parametrize("kind", ["pixels", "latents"])
@pytest.mark.parametrize("names", [["caf\u00e9", "b"], ["cafe\u0301", "b"], ["caf\u00e9".encode(), b"b"]])
def test_names_in_arrays_meet_those_of_folders_however_they_are_kept(
    kind: str, names: list[str | bytes], tmp_path: Path
) -> None:
    x = np.zeros((2, 4, 4), np.uint8) if kind == "pixels" else np.zeros((2, 4, 4, 4))
    write_arrays(tmp_path / "a.npz", x=x, y=np.arange(2), names=np.array(names))
    if kind == "pixels":
        picture(tmp_path / "b" / "caf\u00e9" / "0.png")
    else:
        write_latent(tmp_path / "b" / "caf\u00e9" / "0.npz", torch.zeros(4, 4, 4))
    maker = OwnImages if kind == "pixels" else LatentImages

    assert bound(maker(root=tmp_path, image_size=4), "a", "b").class_names == ["caf\u00e9", "b"]
    for wrong in (np.array("cat"), np.array([["cat", "dog"]]), np.zeros(2)):
        write_arrays(tmp_path / "a.npz", x=x, y=np.arange(2), names=wrong)
        with pytest.raises(ImageFileError, match=r"a.npz: names are .*give one word for each label"):
            bound(maker(root=tmp_path, image_size=4), "a", "b")


LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(LABELS, LABELS, st.booleans(), st.sampled_from(["pixels", "latents", "shards"]))
def test_labels_without_names_meet_those_of_others_only_where_that_is_said(
    one: list[int], other: list[int], shared: bool, kind: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for domain, labels in (("a", one), ("b", other)):
            if kind == "pixels":
                write_arrays(root / f"{domain}.npz", x=np.zeros((len(labels), 4, 4), np.uint8), y=np.array(labels))
            elif kind == "latents":
                write_arrays(root / f"{domain}.npz", x=np.zeros((len(labels), 4, 4, 4)), y=np.array(labels))
            else:
                write_shard(root / domain / "0.safetensors", torch.zeros(len(labels), 4, 4, 4), torch.tensor(labels))
        options: dict[str, Any] = {"root": root, "image_size": 4, "val_share": 0, "test_share": 0}
        maker = OwnImages if kind == "pixels" else LatentImages
        options |= {"channels": 1} if kind == "pixels" else {"statistics": False}
        source = bound(maker(shared_labels=shared, **options), "a", "b")
        found = [source.dataset(domain, "train", None).label.tolist() for domain in "ab"]

    meeting = set(found[0]) & set(found[1])
    assert len(meeting) == (len(set(one) & set(other)) if shared else 0)
    for labels, numbers in zip((one, other), found, strict=True):  # equal labels get equal numbers, others others
        assert len(set(zip(labels, numbers, strict=True))) == len(set(labels)) == len(set(numbers))
    assert sorted({*found[0], *found[1]}) == list(range(len(source.class_names)))  # no class without an image


def test_a_name_without_an_image_is_no_class_and_a_name_given_twice_is_told(tmp_path: Path) -> None:
    names = np.array(["p", "q", "r"])
    write_arrays(tmp_path / "a.npz", x=np.zeros((2, 4, 4), np.uint8), y=np.array([2, 0]), names=names)
    write_arrays(tmp_path / "b.npz", x=np.zeros((1, 4, 4), np.uint8), y=np.array([0]), names=np.array(["p", "p"]))
    options: dict[str, Any] = {"root": tmp_path, "image_size": 4, "channels": 1, "val_share": 0, "test_share": 0}
    source = bound(OwnImages(**options), "a")

    assert source.class_names == ["p", "r"]
    assert source.dataset("a", "train", None).label.tolist() == [1, 0]
    with pytest.raises(ImageFileError, match=r"domain 'b' .* gives the name 'p' to two labels"):
        bound(OwnImages(**options), "b")


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        WORDS,
        st.dictionaries(WORDS.map("k".__add__), st.integers(1, 10**6), min_size=1, max_size=9),
        min_size=1,
        max_size=4,
    )
)
def test_the_table_holds_every_count(counts: dict[str, dict[str, int]]) -> None:
    head, totals, *rows = [line.split() for line in found_table(counts).splitlines()]

    assert head == ["class", *counts]
    assert totals == ["all", "classes", *(str(sum(classes.values())) for classes in counts.values())]
    read = {domain: {row[0]: int(row[1 + k]) for row in rows} for k, domain in enumerate(counts)}
    assert {d: {c: n for c, n in classes.items() if n} for d, classes in read.items()} == counts


def test_the_table_of_a_thousand_classes_stays_short() -> None:
    table = found_table({"a": {f"n{k:04}": 5 + k for k in range(1000)}, "b": {"n0999": 7}})

    assert len(table.splitlines()) == 43
    assert table.splitlines()[-1].split() == ["960", "more,", "each", "45", "to", "1004", "0", "to", "7"]


def test_what_was_found_is_shown_before_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for k in range(3):
        picture(tmp_path / "photo" / "cat" / f"{k}.png", k)
    picture(tmp_path / "sketch" / "emu" / "0.tif")
    data = ImageData(source=OwnImages(root=tmp_path, image_size=4), seen=["photo"], validation=[], unseen=["sketch"])
    with caplog.at_level(logging.INFO, logger="moeapps"):
        data.prepare_data()

    lines = [line.split() for line in caplog.text.splitlines()]
    assert ["class", "photo", "sketch"] in lines
    assert ["cat", "3", "0"] in lines
    assert ["emu", "0", "1"] in lines
