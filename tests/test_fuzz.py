# SPDX-License-Identifier: Apache-2.0
"""Files of every reader of bytes, damaged at random: read, or told in one sentence, within bounds (``make fuzz``).

Cases run in copies of this process, a batch in each: one that crashes, hangs over 5 seconds of processor or takes more
than ten times the file's size and 256 MB of memory fails by its number. ``make fuzz`` keeps in .pytest_cache how far
each format has come, and goes on there; a case is made again from its format and number alone.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import tempfile
import warnings
import wave
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import soundfile
import torch
from PIL import Image

from moeapps.bounds import BoundError, read_json, read_yaml
from moeapps.data.images.arrays import ImageFileError
from moeapps.evaluation.results import read_results
from moeapps.evaluation.xeval import build_matrix
from moeapps.reporting.matrix import markdown, rich_tables
from moeapps.training.precedence import checkpoint_hparams
from moeapps.training.stages import StageError, read_source
from tasks.adaptation.data.readers.files import ImageForm
from tasks.adaptation.data.readers.table import read_csv as read_image_table
from tasks.audio.data.prompt import Prompt
from tasks.audio.data.readers.audio_files import AudioFileError, read_audio
from tasks.audio.data.readers.clip_table import read_clip_table
from tasks.audio.data.source import Clip
from tasks.audio.data.store import load_clips, save_clips
from tasks.point_cloud.data.readers.las import LasError, read_las, write_las
from tasks.point_cloud.data.scans import load_scans
from tasks.recommendation.data.readers.blocks import open_blocks
from tasks.recommendation.data.readers.values import TableError
from tests.guarded import FREE_BYTES, PER_BYTE, SECONDS

CASES = int(os.environ.get("MOEAPPS_FUZZ", "40"))
BATCH = 250
PROGRESS = Path(".pytest_cache") / "moeapps_fuzz"


@dataclass(frozen=True)
class Form:
    """A format: a whole file of it, what reads it, and which errors tell that it cannot be read."""

    name: str
    whole: Callable[[Path], object]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...]


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


def compare(path: Path) -> None:
    matrix = build_matrix([read_results(path)], [], None)
    markdown(matrix)
    rich_tables(matrix)


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
                light=rng.random((6, 3)).astype(np.float32),
                up=rng.random((6, 3)).astype(np.float32),
                label=np.zeros(6, np.int64),
                words=("a", "b"),
            )
            for k in range(2)
        ],
    )


def checkpoint(path: Path) -> None:
    hparams = {"_class_path": "tests.toy.ToyTask", "net": {"class_path": "tests.toy.ToyNet", "init_args": {"width": 8}}}
    state = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2)}
    torch.save({"state_dict": state, "hyper_parameters": hparams, "callbacks": {}, "global_step": 3}, path)


TABLE = "file,domain,kind,text,mood\na.wav,x,speech,some words,glad\nb.wav,y,music,,sad\n"
FORMS = [
    *(Form(f"a{end}", a_sound, lambda p: read_audio(p, 8000), (AudioFileError,)) for end in (".wav", ".flac", ".ogg")),
    *(Form(f"a{end}", a_sound, lambda p: read_audio(p, 8000), (AudioFileError,)) for end in (".mp3", ".aiff", ".au")),
    Form("clips.csv", lambda p: p.write_text(TABLE), read_clip_table, (AudioFileError,)),
    Form("metadata.csv", lambda p: p.write_text(TABLE), lambda p: read_image_table(p, {"file"}), (ImageFileError,)),
    *(Form(f"a{end}", a_picture, ImageForm(size=8).read, (ImageFileError,)) for end in (".png", ".jpg", ".gif")),
    *(Form(f"a{end}", a_picture, ImageForm(size=8).read, (ImageFileError,)) for end in (".webp", ".tif", ".bmp")),
    *(Form(f"{k}.las", a_cloud(k), read_las, (LasError,)) for k in (1, 7)),
    *(Form(f"{k}.laz", a_cloud(k), read_las, (LasError,)) for k in (1, 3, 6, 7)),
    Form("a.parquet", a_log, read_log, (TableError,)),
    Form("a.csv", lambda p: p.write_text(TABLE), read_log, (TableError,)),
    Form("test.json", results, compare, (ValueError,)),
    Form("run.json", results, read_json, (BoundError,)),
    Form("config.yaml", lambda p: p.write_bytes(Path("tests/toy.yaml").read_bytes()), read_yaml, (BoundError,)),
    Form("a.ckpt", checkpoint, read_source, (StageError,)),
    Form("clips.npz", clips, lambda p: load_clips(p, "val"), (ValueError,)),
    Form("scans.npz", scans, load_scans, (ValueError,)),
]


@cache
def original(name: str) -> bytes:
    form = next(form for form in FORMS if form.name == name)
    with tempfile.TemporaryDirectory() as folder:
        form.whole(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


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


def one_case(form: Form, case: int, folder: Path) -> str:
    """Read one damaged file; "" if it was read or told, else what went wrong."""
    path = folder / form.name
    for old in folder.iterdir():
        old.unlink()
    path.write_bytes(damaged(form.name, case))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            form.read(path)
    except form.errors as error:
        text = str(error)
        if not text or ("\n" in text.strip() and form.name not in ("config.yaml", "test.json")):
            return f"told in {len(text.splitlines())} lines: {text[:200]!r}"
    except BaseException as error:  # whatever else it is, that is what is looked for
        if form.name == "config.yaml" and type(error).__module__.startswith("yaml"):
            return ""
        return f"{type(error).__name__}: {str(error)[:300]}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    return f"{grown:,} bytes of memory" if grown > FREE_BYTES + PER_BYTE * path.stat().st_size else ""


def batch(form: Form, first: int, last: int) -> tuple[int, list[str]]:
    """Run cases in a copy of this process; how far it came, and what went wrong."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(read)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        with tempfile.TemporaryDirectory() as folder:
            for case in range(first, last):
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                signal.setitimer(signal.ITIMER_REAL, 60 * SECONDS)
                told = one_case(form, case, Path(folder))
                os.write(write, f"{case}\t{told}\n".replace("\r", " ").encode(errors="replace"))
            signal.setitimer(signal.ITIMER_REAL, 0)
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8", errors="replace") as pipe:
        lines = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    reports = dict(line.split("\t", 1) for line in lines if "\t" in line)
    wrong = [f"{form.name} case {case}: {told}" for case, told in reports.items() if told]
    done = first + len(reports)
    if done < last:
        how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status}"
        wrong.append(f"{form.name} case {done}: ended by {how}")
        done += 1
    return done, wrong


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_damaged_file_of_a_format_is_read_or_told(form: Form) -> None:
    kept = PROGRESS / form.name if "MOEAPPS_FUZZ" in os.environ else None
    done = int(kept.read_text()) if kept is not None and kept.is_file() else 0
    done = 0 if done >= CASES else done
    wrong: list[str] = []
    while done < CASES:
        done, found = batch(form, done, min(done + BATCH, CASES))
        wrong += found
        if kept is not None and not wrong:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(str(done))
        if len(wrong) > 20:
            break
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_whole_files_are_read(form: Form, tmp_path: Path) -> None:
    (tmp_path / form.name).write_bytes(original(form.name))
    form.read(tmp_path / form.name)


def test_a_case_is_its_format_and_number() -> None:
    assert damaged("a.wav", 7) == damaged("a.wav", 7) != damaged("a.wav", 8)


def test_hparams_of_damaged_checkpoints_are_plain_or_told(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    read = 0
    for case in range(60):
        path.write_bytes(damaged("a.ckpt", case))
        try:
            found = checkpoint_hparams(path)
        except (BoundError, ValueError, RuntimeError):
            continue
        read += 1
        assert isinstance(found, dict)
    assert read < 60
