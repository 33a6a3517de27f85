# SPDX-License-Identifier: Apache-2.0
"""Sounds, pictures, clouds, tables, caches, results, configs and checkpoints with damage of any kind (``make fuzz``).

Each is read, or told in one sentence. A case is made from its format and a number alone.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import wave
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moeapps.bounds import read_json, read_yaml
from moeapps.evaluation.results import read_results
from moeapps.training.precedence import checkpoint_hparams
from moeapps.training.stages import read_source
from tasks.adaptation.data.readers.files import ImageForm
from tasks.adaptation.data.readers.table import read_csv as read_image_table
from tasks.audio.data.prompt import Prompt
from tasks.audio.data.readers.audio_files import read_audio
from tasks.audio.data.readers.clip_table import read_clip_table
from tasks.audio.data.source import Clip
from tasks.audio.data.store import load_clips, save_clips
from tasks.point_cloud.data.readers.las import read_las, write_las
from tasks.point_cloud.data.scans import load_scans
from tasks.recommendation.data.readers.blocks import open_blocks
from tests.fuzzing import refused, watched
from tests.guarded import attempted, guarded


@dataclass(frozen=True)
class Form:
    """A format: a whole file of it, what reads it, and which errors tell that it cannot be read."""

    name: str
    whole: Callable[[Path], object]
    read: Callable[[Path], object]
    errors: tuple[str, ...]


def a_sound(path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (800, 2)).astype(np.float32)
    if path.suffix == ".wav":
        with wave.open(str(path), "wb") as file:
            file.setnchannels(2)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes((samples * 32767).astype("<i2").tobytes())
    else:
        soundfile.write(path, samples, 16_000)


def a_picture(path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9, 3)).astype(np.uint8))
    image.save(path)


def a_cloud(point_format: int) -> Callable[[Path], object]:
    pos = np.random.default_rng(0).uniform(0, 10, (5, 3))
    return lambda path: write_las(path, pos, point_format=point_format)


def results(path: Path) -> None:
    rows = [
        {"domain": d, "role": r, "metric": m, "value": 0.5, "n": 3, "direction": "max"}
        for d, r in (("a", "seen"), ("b", "unseen"))
        for m in ("acc", "loss")
    ]
    units = {"a": {"acc": [0.5, None, 1.0]}, "b": {"acc": [0.1, 0.2]}}
    header = {"system": "toy", "name": "n", "seed": 0, "seeds": {"seed_everything": 0}, "sources": {"a": "x"}}
    path.write_text(json.dumps({"header": {**header, "main_metric": "acc"}, "rows": rows, "units": units}, indent=1))


def a_log(path: Path) -> None:
    table = pa.table(
        {"user": [1, 2, 3, 4] * 50, "word": ["a", "b", None, "c"] * 50, "bag": [[1, 2], [], [3], None] * 50}
    )
    parquet.write_table(table, path, row_group_size=100)


def read_log(path: Path) -> None:
    file = open_blocks(path, cache=path.parent)
    for block in range(len(file.sizes)):
        file.read(block, file.columns[:3])


def clips(path: Path) -> None:
    kept = [Clip(torch.rand(50), Prompt("speech", {"speaker": "x"}, "words"), f"c{k}", False) for k in range(2)]
    save_clips(path, {"train": kept, "val": kept, "test": kept})


def scans(path: Path) -> None:
    from tasks.point_cloud.data.scans import ScanArrays, save_scans

    rng = np.random.default_rng(0)
    save_scans(
        path,
        [
            ScanArrays(
                name=f"s{k}",
                pos=rng.random((6, 3)).astype(np.float32),
                light=rng.random(6).astype(np.float32),
                up=rng.random(6).astype(np.float32),
                label=np.zeros(6, np.uint8),
                words=("a", "b"),
            )
            for k in range(2)
        ],
    )


def checkpoint(path: Path) -> None:
    hparams = {"_class_path": "tests.toy.ToyTask", "net": {"class_path": "tests.toy.ToyNet", "init_args": {"width": 8}}}
    state = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2)}
    torch.save({"state_dict": state, "hyper_parameters": hparams, "callbacks": {}, "global_step": 3}, path)


def config(path: Path) -> None:
    path.write_bytes(Path("tests/toy.yaml").read_bytes())


TABLE = "file,domain,kind,text,mood\na.wav,x,speech,some words,glad\nb.wav,y,music,,sad\n"
YAML_ERRORS = ("ScannerError", "ParserError", "ComposerError", "ConstructorError", "ReaderError")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".au")
PICTURES = (".png", ".jpg", ".gif", ".webp", ".tif", ".bmp")
FORMS = [
    *(Form(f"a{end}", a_sound, lambda p: read_audio(p, 8000), ("AudioFileError",)) for end in SOUNDS),
    *(Form(f"a{end}", a_picture, ImageForm(size=8).read, ("ImageFileError",)) for end in PICTURES),
    Form("clips.csv", lambda p: p.write_text(TABLE), read_clip_table, ("AudioFileError",)),
    Form("metadata.csv", lambda p: p.write_text(TABLE), lambda p: read_image_table(p, {"file"}), ("ImageFileError",)),
    *(Form(f"{k}.las", a_cloud(k), read_las, ("LasError",)) for k in (1, 7)),
    *(Form(f"{k}.laz", a_cloud(k), read_las, ("LasError",)) for k in (1, 3, 6, 7)),
    Form("a.parquet", a_log, read_log, ("TableError",)),
    Form("a.csv", lambda p: p.write_text(TABLE), read_log, ("TableError",)),
    Form("test.json", results, read_results, ("ValueError", "BoundError")),
    Form("run.json", results, read_json, ("BoundError",)),
    Form("config.yaml", config, read_yaml, ("BoundError", *YAML_ERRORS)),
    Form("a.ckpt", checkpoint, read_source, ("StageError",)),
    Form("b.ckpt", checkpoint, checkpoint_hparams, ("CheckpointError",)),
    Form("clips.npz", clips, lambda p: load_clips(p, "val"), ("ValueError", "BoundError")),
    Form("scans.npz", scans, load_scans, ("ValueError", "BoundError")),
]


@cache
def original(name: str) -> bytes:
    form = next(form for form in FORMS if form.name == name)
    with tempfile.TemporaryDirectory() as folder:
        form.whole(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


CASES = st.binary(min_size=8, max_size=8).map(lambda drawn: int.from_bytes(drawn))
"""Numbers of cases, all equally likely: of whole numbers hypothesis draws the small ones again and again."""

SPECIAL = [
    b"\xff" * 4,
    b"\xff" * 8,
    b"\xff\xff\xff\x7f",
    b"\0" * 4,
    b"\0\0\0\x10",
    b"\xff" * 7 + b"\x7f",
    b"\x80",
    b"\x01",
]
SIGNS = [
    b'"',
    b"'",
    b"[",
    b"{",
    b"&a ",
    b"*a ",
    b"\n",
    b"\\",
    b",",
    b":",
    b"9" * 400,
    b"e999",
    b"null",
    b"<<: *a",
    b"\x1b",
    b"\xc3",
]


def damaged(name: str, case: int) -> bytes:
    """The bytes of a case: bits flipped, numbers made extreme, signs put in, parts cut out, doubled or cut off."""
    rng = random.Random(zlib.crc32(f"{name} {case}".encode()))
    data = bytearray(original(name))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(8)
        if kind <= 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 3:
            new = rng.choice(SPECIAL)
            data[at : at + len(new)] = new
        elif kind == 4:
            data[at:at] = rng.choice(SIGNS)
        elif kind == 5:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 6:
            data[at:at] = data[at : at + rng.randrange(1, 400)]
        else:
            del data[at:]
        if not data:
            data = bytearray(b"\0")
    return bytes(data)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@settings(max_examples=int(os.environ.get("MOEAPPS_FUZZ", "20")), deadline=None)
@given(case=CASES)
def test_a_damaged_file_is_read_or_told(form: Form, case: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / form.name
        path.write_bytes(damaged(form.name, case))
        work = partial(form.read, path)
        found = attempted(work) if watched() else guarded(work)
        assert found.within(path.stat().st_size), found
    assert found.kind == "value" or found.kind in form.errors, found
    if found.kind != "value":
        refused()
    assert found.kind == "value" or form.name == "config.yaml" or form.name in found.text, found


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_whole_files_are_read(form: Form, tmp_path: Path) -> None:
    (tmp_path / form.name).write_bytes(original(form.name))
    form.read(tmp_path / form.name)


def test_a_case_is_its_format_and_number() -> None:
    assert damaged("a.wav", 7) == damaged("a.wav", 7) != damaged("a.wav", 8)
