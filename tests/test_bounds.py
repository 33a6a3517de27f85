# SPDX-License-Identifier: Apache-2.0
"""Configs, results, checkpoints and what is no file: each is told in one sentence, within bounds."""

from __future__ import annotations

import json
import os
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from moeapps import bounds
from moeapps.data.images.arrays import read_array, read_arrays
from moeapps.data.images.pictures import read_image
from moeapps.evaluation.results import read_results
from moeapps.training.precedence import checkpoint_hparams
from moeapps.training.stages import read_source
from tasks.adaptation.data.readers.table import read_csv as read_image_table
from tasks.audio.data.readers.audio_files import read_audio
from tasks.audio.data.readers.clip_table import read_clip_table
from tasks.dynamics.data.readers.arff_format import read_arff
from tasks.dynamics.data.readers.csv_format import read_csv
from tasks.dynamics.data.readers.npz_format import read_npz as read_trajectories
from tasks.dynamics.data.readers.ts_format import read_ts
from tasks.point_cloud.data.readers.arrays import read_bytes, read_npy, read_npz
from tasks.point_cloud.data.readers.las import read_las
from tasks.point_cloud.data.readers.own import read_own_labels
from tasks.point_cloud.data.readers.ply import read_ply
from tasks.point_cloud.data.scans import load_scans
from tasks.recommendation.data.readers.blocks import open_blocks
from tests.bounds_common import Read, told
from tests.guarded import guarded

# Configs, results and checkpoints ------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
BAD_YAML = {
    "aliases": (LAUGHS, "more than 200,000 values, aliases counted"),
    "a circle": ("a: &a [*a]\n", "an alias stands for itself"),
    "merged": ("a: &a {x: 1, y: 2}\n" + "".join(
        f"{n}: &{n} {{<<: [{', '.join(['*' + b] * 9)}]}}\n" for b, n in zip("abcdefghi", "bcdefghij", strict=True)
    ), "more than 200,000 values"),
    "deep": ("[" * 5000 + "]" * 5000, "too deep inside one another"),
    "deep by indent": ("".join("  " * k + "a:\n" for k in range(300)), "more than 200 levels"),
    "large": ("a: " + "x" * 4_000_001, "at most 4,000,000 are read"),
    "a day that is none": ("a: 2024-13-45\n", "a value that cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_YAML)
def test_yaml_that_grows_is_told(tmp_path: Path, name: str) -> None:
    text, words = BAD_YAML[name]
    (tmp_path / "a.yaml").write_text(text)
    told(bounds.read_yaml, tmp_path / "a.yaml", "a.yaml", words)
    told(read_own_labels, tmp_path / "a.yaml", "a.yaml")


SAID_TWICE = {
    "a: 1\nb: 2\na: 3": ("line 3", "'a' stands in line 1 already"),
    "names:\n  0: floor\n  0: wall": ("line 3", "'0' stands in line 2 already"),
    "- {b: 1, c: {d: 1, d: 1}}": ("line 1", "'d'"),
}
OTHER_NUMBERS = {"a: 010": "as 8", "a: [1:30]": "as 90", "a: -2:30.5": "as -150.5", "012: x": "as 10"}
PLAIN = {
    "a: '010'": "010",
    "a: 07": 7,
    "a: 00": 0,
    "a: 1_000": 1000,
    "a: 0x10": 16,
    "a: '1:30'": "1:30",
    "a: 0.50": 0.5,
}


@pytest.mark.parametrize("text", SAID_TWICE)
def test_yaml_that_says_a_thing_twice_is_told(tmp_path: Path, text: str) -> None:
    """The last of two equal keys wins in silence, so half of what a user wrote would not count."""
    (tmp_path / "a.yaml").write_text(text)
    told(bounds.read_yaml, tmp_path / "a.yaml", "a.yaml", *SAID_TWICE[text])
    told(read_own_labels, tmp_path / "a.yaml", "a.yaml")


def test_what_merges_is_not_said_twice(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &x {b: 1, c: 1}\nd: {<<: *x, b: 2}\ne: *x")
    assert bounds.read_yaml(tmp_path / "a.yaml")["d"] == {"b": 2, "c": 1}


def test_numbers_that_yaml_reads_as_others_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for text, words in OTHER_NUMBERS.items():
        path.write_text(text)
        told(bounds.read_yaml, path, "a.yaml", words)
    for text, value in PLAIN.items():
        path.write_text(text)
        assert bounds.read_yaml(path) == {"a": value}


def test_configs_of_ours_are_far_from_the_bounds() -> None:
    for path in Path("configs").rglob("*.yaml"):
        assert bounds.read_yaml(path) == yaml.safe_load(path.read_text(encoding="utf-8"))
        assert path.stat().st_size < bounds.YAML_BYTES / 100


def test_results_that_are_none_are_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "test.json"
    path.parent.mkdir()
    row = {"domain": "a", "role": "seen", "metric": "m", "value": 1, "n": 1, "direction": "max"}
    rows = [{**row, key: value} for key, value in (("n", 1e400), ("value", [1]), ("domain", [1]), ("role", "king"))]
    wrong = [[], {}, None, {"header": 1, "rows": []}, {"header": {}, "rows": 3}]
    wrong += [{"header": {}, "rows": [row], "units": []}, {"header": {"seeds": 3}, "rows": [row]}]
    wrong += [{"header": {}, "rows": [row]} for row in rows]
    for text in ("[" * 100_000, "9" * 100_000, *map(json.dumps, wrong)):
        path.write_text(text)
        told(read_results, path, "test.json")


def test_checkpoints_that_are_made_to_fill_memory_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {}}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
        archive.writestr("archive/data/0", bytes(100_000_000))
    for read in (checkpoint_hparams, read_source):
        told(read, path, "a.ckpt is compressed, which torch does not do")
    path.write_bytes(b"\x80\x02}q\x00.")
    told(checkpoint_hparams, path, "a.ckpt is no readable checkpoint")


# What is no file -----------------------------------------------------------------------------------------------------

ANY_READER: dict[str, Read] = {
    "a.ply": read_ply,
    "a.las": read_las,
    "a.npy": read_npy,
    "b.npy": read_array,
    "a.npz": lambda path: read_npz(path, ("xyz",)),
    "b.npz": lambda path: read_arrays(path),
    "c.npz": read_trajectories,
    "d.npz": load_scans,
    "a.csv": read_csv,
    "b.csv": lambda path: read_image_table(path, {"a"}),
    "c.csv": read_clip_table,
    "d.csv": open_blocks,
    "a.parquet": open_blocks,
    "a.ts": read_ts,
    "a.arff": read_arff,
    "a.png": lambda path: read_image(path, 8, 3),
    "a.wav": lambda path: read_audio(path, 16_000),
    "a.yaml": bounds.read_yaml,
    "b.yaml": read_own_labels,
    "a.json": bounds.read_json,
    "a.ckpt": read_source,
}


@pytest.mark.parametrize("name", ANY_READER)
def test_pipes_and_devices_are_no_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    told(ANY_READER[name], path)
    path.unlink()
    path.symlink_to("/dev/zero")
    told(ANY_READER[name], path)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_names_that_no_file_can_have_are_told(tmp_path: Path, name: str) -> None:
    """Tables name files; the fuzzer put a zero byte into such a name (an index of nuScenes)."""
    for read in (bounds.require_file, read_bytes):
        found = guarded(partial(read, tmp_path / name))
        assert found.kind in ("BoundError", "PointCloudFileError")
        assert "no name of a file" in found.text
        assert found.text.isprintable()
