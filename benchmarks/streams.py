# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.streams``: the share of a training step that reading its batch from a stream takes.

Latents, scans and two kinds of logs are written by ``moeapps data optimize`` into a temporary folder and read from
there, each by the network of its base config, without workers: a batch and a step in turn, in one process (3 minutes).
``read`` is what the stream takes of both (files, checksums, tensors), ``made`` all of making a batch, crops and
augmentation too, which data in memory costs as well and workers take over. Times are of the processor; files have been
written just before, so that the disk itself is as fast as its cache. Fails where ``read`` is 5 per cent or more.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml

from benchmarks.readme import ROOT
from moeapps.bounds import read_json
from moeapps.commands.data import main as data_command
from moeapps.commands.trained import build
from moeapps.data.domain import DomainDataModule
from moeapps.data.streaming import StreamedRows
from moeapps.files import write_arrays, write_json
from moeapps.training.task import BaseTask

READ = StreamedRows._read
RESULTS = ROOT / "benchmarks" / "results" / "streams.json"
GATE = 0.05
STEPS, SKIPPED = 12, 2
"""Steps of each at least, of which the first make tables and open files."""
BLOCKS, MOST_STEPS = 8, 600
"""Blocks that are read in the others: a block of a log is many batches, and twelve may be of those read first."""


def latents(root: Path) -> dict[str, Any]:
    """Three domains of 1,500 latents of 4 x 32 x 32, as moments."""
    rng = np.random.default_rng(0)
    for domain in ("near", "far", "other"):
        x = rng.normal(size=(1500, 8, 32, 32)).astype(np.float32)
        write_arrays(root / f"{domain}.npz", x=x, y=np.arange(1500) % 10)
    source = {"class_path": "tasks.image_diffusion.data.latents.LatentImages", "init_args": {"root": str(root)}}
    roles = {"seen": ["near"], "validation": ["far"], "unseen": ["other"]}
    return {"class_path": "tasks.image_diffusion.datamodule.ImageData", "init_args": {"source": source, **roles}}


def scans(root: Path) -> dict[str, Any]:
    """Three domains of files with 20,000 points each."""
    from tasks.point_cloud.data.readers import OwnLabels, RawScan, write_own_labels, write_own_scan

    rng, own = np.random.default_rng(1), {}
    for domain in ("yard", "hall", "road"):
        write_own_labels(root / domain / "labels.yaml", OwnLabels(names=("ground", "wall")))
        for split, count in (("train", 30), ("val", 1), ("test", 1)):
            (root / domain / split).mkdir(parents=True)
            for number in range(count):
                xyz = rng.uniform(0, (30, 30, 3), (20_000, 3)).astype(np.float32)
                light = rng.uniform(size=20_000).astype(np.float32)
                raw = RawScan(xyz, rng.integers(0, 2, 20_000), ("ground", "wall"), intensity=light)
                write_own_scan(root / domain / split / f"{number}.npz", raw)
        reader = {"class_path": "tasks.point_cloud.data.readers.OwnScans"}
        reader |= {"init_args": {"root": str(root), "domain": domain}}  # type: ignore[dict-item]
        path = "tasks.point_cloud.data.public.PublicScans"
        own[domain] = {"class_path": path, "init_args": {"reader": reader, "voxel": 0.25}}
    roles = {"seen": ["yard"], "validation": ["hall"], "unseen": ["road"]}
    return {"class_path": "tasks.point_cloud.datamodule.PointCloudData", "init_args": {"own": own, **roles}}


def generated(root: Path) -> dict[str, Any]:
    """The generated log of the base config."""
    return {}


CASES = {
    "promoe": ("configs/promoe.yaml", latents),
    "point_moe": ("configs/point_moe.yaml", scans),
    "home": ("configs/home.yaml", generated),
    "aw_moe": ("configs/aw_moe.yaml", generated),
}


def share_of(base: str, files: Path, folder: Path) -> dict[str, Any]:
    """Write a stream, train some steps on it, and return what fetching took beside them."""
    stream = folder / "stream"
    if data_command(["optimize", base, str(files), str(stream), "--chunk_mb", "16"]):
        raise RuntimeError(f"{base}: no stream was written")
    built = build(None, [Path(base), files, stream / "data.yaml"])
    task, data = cast(BaseTask, built.model), cast(DomainDataModule, built.datamodule)
    if hasattr(data, "source"):
        cast(Any, data).source.window = 1  # these streams are small: more would be read once and then held
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-4)
    batches = _repeated(data)
    read: list[float] = []
    fetch: list[float] = []
    step: list[float] = []
    spent, blocks = _timed_reading(), 0
    while len(step) < STEPS + SKIPPED or (blocks < BLOCKS and len(step) < MOST_STEPS):
        start = time.process_time()
        batch = next(batches)
        middle = time.process_time()
        read.append(sum(spent))
        blocks += len(spent) * (len(step) >= SKIPPED)
        spent.clear()
        optimizer.zero_grad()
        task.recorded_step(batch, "train").loss.backward()
        optimizer.step()
        fetch.append(middle - start)
        step.append(time.process_time() - middle)
    # Blocks are read in some steps and held in the others: the mean is what a training waits.
    times = [statistics.mean(islice(values, SKIPPED, None)) for values in (read, fetch, step)]
    share = times[0] / (times[1] + times[2])
    size = sum(file.stat().st_size for file in stream.rglob("*") if file.is_file())
    return {
        "read": round(share, 5),
        "made": round(times[1] / (times[1] + times[2]), 4),
        "read_ms": round(1000 * times[0], 2),
        "made_ms": round(1000 * times[1], 2),
        "step_ms": round(1000 * times[2], 1),
        "steps": len(step) - SKIPPED,
        "blocks": blocks,
        "batch_size": data.batch_size,
        "stream_mb": round(size / 1e6, 1),
        "gate": GATE,
        "ok": share < GATE,
    }


def _timed_reading() -> list[float]:
    """Let streams add the seconds of each block that they read to the list that is returned."""
    spent: list[float] = []

    def timed(self: StreamedRows, number: int) -> Any:
        start = time.process_time()
        try:
            return READ(self, number)
        finally:
            spent.append(time.process_time() - start)

    StreamedRows._read = timed  # type: ignore[method-assign]
    return spent


def _repeated(data: DomainDataModule) -> Any:
    while True:
        yield from data.train_dataloader()


KINDS = {"promoe": "latents", "point_moe": "scans", "home": "impressions", "aw_moe": "lists"}


def sentence(report: dict[str, dict[str, Any]]) -> str:
    """What docs/data.md says of the results."""
    shares = [f"{100 * row['read']:.1f} per cent for {KINDS[name]}" for name, row in report.items()]
    return f"Reading takes {', '.join(shares)}."


def main(words: list[str]) -> int:
    """Measure the named systems, or all."""
    if not set(words) <= set(CASES):
        print(f"usage: python -m benchmarks.streams [{' '.join(CASES)}]", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    found = read_json(RESULTS) if RESULTS.exists() else {}
    for name, (base, write) in CASES.items():
        if words and name not in words:
            continue
        with tempfile.TemporaryDirectory() as folder:
            overlay = Path(folder) / "files.yaml"
            data = write(Path(folder) / "files")
            overlay.write_text(yaml.safe_dump({"data": data} if data else {"name": "streamed"}))
            found[name] = share_of(base, overlay, Path(folder))
        print(f"{name}: {found[name]}", flush=True)
        write_json(RESULTS, found)
    print(sentence(found), "(docs/data.md says so)")
    return 0 if all(row["ok"] for row in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
