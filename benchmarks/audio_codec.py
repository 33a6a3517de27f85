# SPDX-License-Identifier: Apache-2.0
"""How much of recorded clips their tokens keep: ``python -m benchmarks.audio_codec [--json FILE]``.

MelRVQ with 8 books of 256 codes is fitted to the training clips of the recordings' seen domains, at hop 256 (31.25
frames per second) and at hop 160 (50). Every test clip of the seen domains, and of the unseen language and artist, is
encoded and decoded from 2, 4 and 8 books; the vocoder of the same tokens is trained and heard at hop 256. Reported are
STOI, narrow-band PESQ and the mel distance per kind of domain (STOI and PESQ for speech alone), the CPU seconds of the
fit, the size of its file, and the seconds of sound decoded per CPU second.

Fails (exit status 1) where speech of the seen domains, at 8 books of MelRVQ, has a mean STOI below `LEAST_STOI`, or
fewer than `LEAST_CLIPS` clips. The recordings are fetched first (0.1 GB); then about five minutes on an idle core.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.core import machine
from moeapps.data.domain import Role, Split
from moeapps.files import write_json
from tasks.audio.data.recordings import Recordings
from tasks.audio.data.source import AudioSource
from tasks.audio.nets.tokenizers import MelRVQ, Tokenizer
from tasks.audio.nets.tokenizers.vocoder import VocodedRVQ
from tasks.audio.report.codec_quality import codec_quality

BOOKS = (2, 4, 8)
LEAST_STOI = {256: 0.78, 160: 0.84}  # by hop, at 8 books
LEAST_CLIPS = 100
ROLES: tuple[Role, ...] = ("seen", "unseen")


def waves(source: AudioSource, role: Role, kind: str, split: Split) -> list[Tensor]:
    """The clips of all domains of a role and kind."""
    names = [name for name in source.default_roles[role] if source.kind(name) == kind]
    return [clip.wave for name in names for clip in source.clips(name, split, None)]


def rows_of(tokenizer: Tokenizer, source: AudioSource, books: Sequence[int], most: int | None) -> list[dict[str, Any]]:
    """Judge a fitted tokenizer on the test clips of seen and of unseen domains, speech and music apart."""
    rows = []
    for role in ROLES:
        for kind, measures in (("speech", ["stoi", "pesq", "mel"]), ("music", ["mel"])):
            held = waves(source, role, kind, "test")[:most]
            for number in books:
                found = codec_quality(tokenizer, held, num_codebooks=number, measures=measures)
                rows.append({"domains": role, "kind": kind, "books": number, **_rounded(found)})
    return rows


def judge(tokenizer: Tokenizer, source: AudioSource, books: Sequence[int], most: int | None) -> dict[str, Any]:
    """Fit a tokenizer, measure what the fit costs, and judge it."""
    train = [wave for kind in ("speech", "music") for wave in waves(source, "seen", kind, "train")]
    start = time.process_time()
    tokenizer.fit(train)
    fit_s = time.process_time() - start
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(Path(scratch) / "tokenizer")
        size = (Path(scratch) / "tokenizer").stat().st_size
    codes = tokenizer.encode(torch.cat(train)[None, : 60 * tokenizer.sample_rate])
    start = time.process_time()
    heard = tokenizer.decode(codes)
    speed = heard.shape[1] / tokenizer.sample_rate / (time.process_time() - start)
    return {
        "tokenizer": type(tokenizer).__name__,
        "hop": tokenizer.hop,
        "bits_per_second": round(tokenizer.frame_rate * tokenizer.num_codebooks * 8),
        "fit_cpu_s": round(fit_s, 1),
        "file_kb": round(size / 1000),
        "decoded_s_per_cpu_s": round(speed),
        "train_minutes": round(sum(map(len, train)) / tokenizer.sample_rate / 60, 1),
        "rows": rows_of(tokenizer, source, books, most),
    }


def measure(source: AudioSource, tokenizers: Sequence[Tokenizer], most: int | None = None) -> dict[str, Any]:
    """Judge tokenizers in turn and return the report; ``most`` bounds the clips of each kind."""
    source.bind(source.default_roles)
    source.prepare(None)
    found = [judge(tokenizer, source, BOOKS, most) for tokenizer in track(tokenizers, "tokenizers", transient=True)]
    for report in found:
        if report["tokenizer"] == "MelRVQ":
            report["ok"] = meets(report)
    return {
        "command": "python -m benchmarks.audio_codec --json benchmarks/results/audio_codec.json",
        "machine": machine(),
        "load": round(os.getloadavg()[1], 1),  # processes that wanted a core in the last five minutes
        "gate": {"stoi": {str(hop): least for hop, least in LEAST_STOI.items()}, "clips": LEAST_CLIPS},
        "source": type(source).__name__,
        "tokenizers": found,
    }


def meets(report: dict[str, Any]) -> bool:
    """Whether a MelRVQ's report holds the bounds on speech of the seen domains."""
    (row,) = (
        row for row in report["rows"] if (row["domains"], row["kind"], row["books"]) == ("seen", "speech", max(BOOKS))
    )
    clips: int = row.get("stoi_clips", row["clips"])
    return clips >= LEAST_CLIPS and bool(row["stoi"] >= LEAST_STOI[report["hop"]])


def show(report: dict[str, Any]) -> None:
    """Print the report as a table."""
    table = Table("tokenizer", "hop", "domains", "books", "clips", "STOI", "PESQ", "mel", title="what tokens keep")
    for found in report["tokenizers"]:
        for row in found["rows"]:
            scores = [f"{row[name]:.3f}" if name in row else "" for name in ("stoi", "pesq", "mel")]
            which = f"{row['domains']} {row['kind']}"
            table.add_row(found["tokenizer"], str(found["hop"]), which, str(row["books"]), str(row["clips"]), *scores)
    Console(highlight=False).print(table)


def _rounded(found: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


def main(args: list[str] | None = None) -> int:
    """Measure, print, write; 1 when a bound is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audio_codec", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, help="where to write the report")
    parser.add_argument("--vocoder-steps", type=int, default=1000, help="training steps of the vocoder (default 1000)")
    options = parser.parse_args(args)
    fine, coarse = MelRVQ(hop=160, num_codebooks=max(BOOKS)), MelRVQ(hop=256, num_codebooks=max(BOOKS))
    vocoder = VocodedRVQ(MelRVQ(hop=256, num_codebooks=max(BOOKS)), steps=options.vocoder_steps)
    report = measure(Recordings(), [coarse, fine, vocoder])
    show(report)
    if options.json:
        write_json(options.json, report)
    return 0 if all(found.get("ok", True) for found in report["tokenizers"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
