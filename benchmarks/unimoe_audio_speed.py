# SPDX-License-Identifier: Apache-2.0
"""Speed of UniMoE-Audio: ``python -m benchmarks.unimoe_audio_speed [--json FILE] [--pairs 9]``.

Two questions, each answered by CPU time on one thread:

* What does a training step cost beside the dense twin of equal active FLOPs? How many experts a row takes falls as a
  router grows sure; both steps are of fresh networks, and the twin is as wide as what the mixture takes then.
* How many seconds of sound are drawn per second, with guidance (which doubles the work) and the key-value cache?

Writes benchmarks/results/unimoe_audio_speed.json; fails when a step costs more than `GATE` times the twin's, or clips
are drawn more slowly than they play. About a minute on one idle core.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.core import machine
from benchmarks.core_cases import median_ms, paired_ratios
from benchmarks.system_share import build, train_step
from moeapps.files import write_json
from moeapps.moe.routing import Routing
from tasks.audio.data.batch import AudioBatch
from tasks.audio.module import AudioTask
from tasks.audio.report.drawing import Drawing, draw_codes

RESULTS = Path(__file__).resolve().parent / "results" / "unimoe_audio_speed.json"
GATE = 1.3
"""A step over a step of the dense twin; agreed beforehand."""
CLIPS = (1, 16)
"""Clips that are drawn at once."""


def experts_per_row(task: AudioTask, batch: AudioBatch) -> float:
    """Mean number of routed experts that work on a row which counts, over the layers."""
    task.recorded_step(batch, "train")
    found: list[Tensor] = []
    for record in task.last_records:
        assert isinstance(record.routing, Routing)
        rows = record.routing.num_rows if record.token_mask is None else int(record.token_mask.sum())
        found.append(record.routing.counts().sum() / rows)
    return float(torch.stack(found).mean())


def step_over_twin(pairs: int, flags: list[str]) -> dict[str, Any]:
    """A step of the mixture over one of its twin."""
    torch.manual_seed(0)
    task, batch = build("unimoe_audio", flags)
    assert isinstance(task, AudioTask)
    taken = experts_per_row(task, batch)
    option = "--model.init_args.net.init_args.moe.init_args.moe.init_args.budget"
    dense = ["--config", "configs/baselines/unimoe_audio_dense.yaml", *flags, option, str(taken)]
    twin, _ = build("unimoe_audio", dense)
    mixed, plain = train_step(task, batch), train_step(twin, batch)
    values = paired_ratios(mixed, plain, pairs=pairs)
    ratio = round(statistics.median(values), 3)
    return {
        "experts_per_row": round(taken, 2),
        "step_ms": round(median_ms(mixed, samples=3), 1),
        "twin_ms": round(median_ms(plain, samples=3), 1),
        "ratio": ratio,
        "pairs": [round(value, 3) for value in values],
        "gate": GATE,
        "ok": ratio <= GATE,
    }


def drawing_speed(flags: list[str], seconds: float) -> dict[str, Any]:
    """Seconds of sound per CPU second, for several numbers of clips at once."""
    torch.manual_seed(0)
    task, batch = build("unimoe_audio", flags)
    assert isinstance(task, AudioTask)
    rate = float(task.facts["frame_rate"])
    how = Drawing(cfg=1.0, min_seconds=seconds, max_seconds=seconds)
    found: dict[str, float] = {}
    for clips in CLIPS:
        prompt = batch.prompt[torch.arange(clips) % len(batch)]
        before = time.process_time()
        drawn = draw_codes(task.net, prompt, rate, how)
        spent = time.process_time() - before
        found[str(clips)] = round(sum(codes.shape[1] for codes in drawn) / rate / spent, 1)
    return {"seconds": seconds, "sound_per_second": found, "ok": min(found.values()) > 1}


def main(args: list[str] | None = None) -> int:
    """Measure, print, write; 1 where a gate does not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.unimoe_audio_speed", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="where to write the report")
    parser.add_argument("--pairs", type=int, default=9, help="alternated pairs (default 9)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of the drawn clips (default 3)")
    parser.add_argument("--config", action="append", default=[], help="overlays")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    flags = [word for file in options.config for word in ("--config", file)]
    step, drawing = step_over_twin(options.pairs, flags), drawing_speed(flags, options.seconds)
    about = {"command": "python -m benchmarks.unimoe_audio_speed", "machine": machine()}
    write_json(options.json, {**about, "step_over_dense": step, "drawing": drawing})
    console = Console(highlight=False)
    console.print(f"a step: {step['step_ms']} ms, {step['ratio']} times the dense twin's (at most {GATE})")
    for clips, speed in drawing["sound_per_second"].items():
        console.print(f"{clips} clips at once: {speed} seconds of sound per second")
    return 0 if step["ok"] and drawing["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
