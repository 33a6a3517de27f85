# SPDX-License-Identifier: Apache-2.0
"""Speed of UniMoE-Audio: ``python -m benchmarks.unimoe_audio_speed [--json FILE] [--pairs 9]``.

Two questions, each answered by CPU time on one thread:

* What does a training step cost beside the dense twin of equal active FLOPs? How many experts a row takes falls as a
  router grows sure: from 4.4 in a fresh network to about 2.4. It is measured at both, the second with that ``budget``
  (whose own sorting counts); the twin is as wide as what the mixture takes in the very batch.
* How many seconds of sound are drawn per second, with guidance (which doubles the work) and the key-value cache?

Writes benchmarks/results/unimoe_audio_speed.json, and the sentence in tasks/audio/README.md; fails when a step costs
more than `GATE` times the twin's, or clips are drawn more slowly than they play. About two minutes on one idle core.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.core import machine
from benchmarks.core_cases import median_ms, paired_ratios
from benchmarks.markdown import wrapped
from benchmarks.system_share import build, train_step
from moeapps.files import write_json, write_text
from moeapps.moe.routing import Routing
from tasks.audio.data.batch import AudioBatch
from tasks.audio.module import AudioTask
from tasks.audio.report.drawing import Drawing, draw_codes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "unimoe_audio_speed.json"
README = ROOT / "tasks" / "audio" / "README.md"
BLOCK = re.compile(r"(<!-- speed:begin -->\n).*?(<!-- speed:end -->)", re.DOTALL)
GATE = 1.3
"""A step over a step of the dense twin; agreed beforehand."""
BUDGET = 2.4
"""Experts of a step that the base config ends with."""
SETTLING = 100
"""Passes in which the probability that a row's experts reach comes to rest where the budget is met."""
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


def step_over_twin(pairs: int, flags: list[str], budget: float | None = None) -> dict[str, Any]:
    """A step of the mixture over one of its twin, where a row takes what it takes, or ``budget`` experts."""
    torch.manual_seed(0)
    moe = "--model.init_args.net.init_args.moe.init_args"
    task, batch = build("unimoe_audio", flags if budget is None else [*flags, f"{moe}.budget={budget}"])
    assert isinstance(task, AudioTask)
    with torch.no_grad():
        for _ in range(0 if budget is None else SETTLING):
            task.recorded_step(batch, "train")
    taken = experts_per_row(task, batch)
    dense = ["--config", "configs/baselines/unimoe_audio_dense.yaml", *flags, f"{moe}.moe.init_args.budget={taken}"]
    twin, _ = build("unimoe_audio", dense)
    mixed, plain = train_step(task, batch), train_step(twin, batch)
    values = paired_ratios(mixed, plain, pairs=pairs)
    ratio = round(statistics.median(values), 3)
    return {
        "budget": budget,
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


def sentence(report: Mapping[str, Any]) -> str:
    """What the README says."""
    step, sound = report["step_over_dense"], report["drawing"]["sound_per_second"]
    settled = report.get("step_over_dense_at_budget")
    at = f" ({step['experts_per_row']:.1f} experts a row)"
    also = (
        "" if settled is None else f"{at}, and {settled['ratio']:.2f} times at {settled['experts_per_row']:.1f} experts"
    )
    one, many = sound.values()
    return wrapped(
        f"On one thread a step of a fresh network costs {step['ratio']:.2f} times the dense twin's of equal active "
        f"FLOPs{also}, and the network draws {one:.1f} seconds of sound per second, {many:.0f} with 16 clips at once, "
        f"guidance included: `{report['command']}`, [results](../../benchmarks/results/unimoe_audio_speed.json).\n"
    )


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
    step, settled = (step_over_twin(options.pairs, flags, budget) for budget in (None, BUDGET))
    drawing = drawing_speed(flags, options.seconds)
    about = {"command": "python -m benchmarks.unimoe_audio_speed", "machine": machine()}
    report = {**about, "step_over_dense": step, "step_over_dense_at_budget": settled, "drawing": drawing}
    write_json(options.json, report)
    if options.json == RESULTS:
        text = README.read_text(encoding="utf-8")
        write_text(README, BLOCK.sub(lambda block: block[1] + sentence(report) + block[2], text))
    console = Console(highlight=False)
    for row in (step, settled):
        taken = f"a step at {row['experts_per_row']} experts"
        console.print(f"{taken}: {row['step_ms']} ms, {row['ratio']} times the dense twin's (at most {GATE})")
    for clips, speed in drawing["sound_per_second"].items():
        console.print(f"{clips} clips at once: {speed} seconds of sound per second")
    return 0 if step["ok"] and settled["ok"] and drawing["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
