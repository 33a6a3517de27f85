# SPDX-License-Identifier: Apache-2.0
"""``make demo``: three systems and a dense twin, two at a time, and one page of what their experts did.

Each training is a process with one thread: ``moeapps fit`` with the words of `PARTS`. One that is finished is not run
again, one that was interrupted goes on, and one that fails costs neither the others nor the page. What is said at the
end does not hang on the one seed of the demo: a difference stands beside what the committed runs of the same training
with other seeds differ by.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.readme import ROOT, claim_of
from moeapps.bounds import read_json
from moeapps.evidence.cells import read_cells
from moeapps.reporting.findings import describe_run
from moeapps.training.folders import holds_checkpoint, newest_version, runs_root

SYSTEMS = {"point_moe": "Point-MoE", "mixer": "MixER", "promoe": "ProMoE"}
COMMAND = (sys.executable, "-m", "moeapps")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Part:
    """One training of the demo.

    Args:
        label: what it is called on the screen.
        system: of the run.
        name: of the variant, runs/<system>/<name>.
        configs: the files after ``--config``.
    """

    label: str
    system: str
    name: str
    configs: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """runs/<system>/<name>."""
        return runs_root() / self.system / self.name

    @property
    def results(self) -> Path:
        """The scores of its test, there when it is finished."""
        return newest_version(self.folder) / "metrics" / "test.json"

    def words(self) -> list[str]:
        """The words of the training, or of going on with one that was interrupted."""
        run = newest_version(self.folder, trained=True)
        if (run / "config.yaml").is_file() and holds_checkpoint(run):
            return ["fit", "--run", str(run)]
        named = [word for config in self.configs for word in ("--config", config)]
        return ["fit", *named, "--name", self.name]


_POINTS = ("configs/point_moe.yaml", "configs/demo/point_moe.yaml", "configs/data/real_als.yaml")
MOE = Part("Point-MoE", "point_moe", "demo", _POINTS)
DENSE = Part("its dense twin", "point_moe", "demo_dense", (*_POINTS, "configs/baselines/point_moe_dense.yaml"))
# The longest first: with two at a time, the two short ones fill up what is left.
PARTS = (
    MOE,
    DENSE,
    Part("ProMoE", "promoe", "demo", ("configs/promoe.yaml", "configs/demo/promoe.yaml")),
    Part("MixER", "mixer", "demo", ("configs/mixer.yaml",)),
)


def train(part: Part, logs: Path, started: float, running: list[subprocess.Popen[str]]) -> bool:
    """Run one part unless it is finished; show a line per epoch, keep all it says in a log.

    Args:
        part: what to run.
        logs: folder of the log.
        started: when the demo began.
        running: what has to be stopped with it; the process stands there while it runs.

    Returns:
        Whether it is finished.
    """
    if part.results.is_file():
        tell(started, part, f"is there already ({part.results.parents[1]})")
        return True
    log = logs / f"{part.system}-{part.name}.log"
    tell(started, part, f"trains; all it says goes to {log}")
    with (
        log.open("w", encoding="utf-8") as kept,
        subprocess.Popen(
            [*COMMAND, *part.words()],
            env={**os.environ, **_ONE_THREAD},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C reaches this process alone, which hands it on once
        ) as process,
    ):
        running.append(process)
        assert process.stdout is not None
        _follow(process.stdout, kept, part, started)
        process.wait()
        running.remove(process)
    done = process.returncode == 0 and part.results.is_file()
    tell(started, part, "is done" if done else f"FAILED; the others go on, the reason is in {log}")
    return done


def _follow(output: IO[str], kept: IO[str], part: Part, started: float) -> None:
    for line in output:
        kept.write(line)
        kept.flush()
        if line.startswith("epoch "):
            tell(started, part, line.split("train/", 1)[0].strip())


def tell(started: float, part: Part, text: str) -> None:
    """Print one line with the time since the start."""
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    print(f"{minutes:2d}:{seconds:02d}  {part.label:<15}{text}", flush=True)


# --- what is said at the end ------------------------------------------------------------------------------------------


def sentence(part: Part) -> str:
    """Say what the experts of a finished part did."""
    return f"{SYSTEMS[part.system]}. {describe_run(newest_version(part.folder)).sentence}"


def beside_the_twin(moe: dict[str, Any], dense: dict[str, Any], claim: dict[str, Any]) -> str:
    """Say how the mixture differs from its twin, and whether one run can tell.

    Args:
        moe: metrics/test.json of the mixture.
        dense: that of its twin.
        claim: of the committed results: the same training with other seeds.
    """
    role, metric = claim["metric"].split("/")
    here = float(moe["summary"][role][metric]) - float(dense["summary"][role][metric])
    pairs = [a - b for a, b in zip(claim["system"], claim["baseline"], strict=True)]
    low, high = claim["ci95"]
    told = (
        f"On {role} domains: {moe['summary'][role][metric]:.3f} against {dense['summary'][role][metric]:.3f} of its "
        f"dense twin. The same training with {len(pairs)} other seeds (committed) differs by {min(pairs):+.3f} to "
        f"{max(pairs):+.3f}, {claim['diff_mean']:+.3f} [{low:+.3f}, {high:+.3f}] on average: "
    )
    if low <= 0 <= high:
        beyond = "" if min(pairs) <= here <= max(pairs) else ", beyond those of the other seeds,"
        return told + f"the {here:+.3f} of this run{beyond} says neither that experts pay here nor that they do not."
    word = "experts pay" if (low > 0) == (claim["direction"] == "higher") else "experts lose"
    return told + f"{word} here, whatever this one run says ({here:+.3f})."


def families_of_all_seeds(system: str = "mixer", variant: str = "robust", metric: str = "partition/ari") -> str:
    """Say how well the committed runs of MixER with other seeds found the families."""
    folder = ROOT / "benchmarks" / "results" / system / "cells"
    cells = read_cells(folder, system).values()
    found = sorted(cell.metrics[metric] for cell in cells if cell.variant == variant)
    whole = sum(math.isclose(value, 1.0) for value in found)
    return (
        f"With {len(found)} other seeds (committed) it found all families {whole} times; the adjusted Rand index was "
        f"{found[0]:.2f} at worst."
    )


def told_of_the_system(part: Part) -> str:
    """Say what one seed of a part says, and what the committed seeds say."""
    if part is MOE:
        if not DENSE.results.is_file():
            return "Its dense twin has no results: nothing is compared."
        runs = [read_json(one.results) for one in (MOE, DENSE)]
        return beside_the_twin(runs[0], runs[1], claim_of("point_moe", "C1d"))
    if part.system == "mixer":
        return families_of_all_seeds()
    claim = claim_of("promoe", "C1a")
    low, high = claim["ci95"]
    return (
        f"Its twin is not trained here. With {len(claim['seeds'])} seeds on other images (committed) its loss differs "
        f"from that of the dense twin by {claim['diff_mean']:+.4f} [{low:+.4f}, {high:+.4f}], lower is better: "
        f"{'experts do not pay' if low > 0 else 'experts pay' if high < 0 else 'nothing is decided'} there."
    )


def main(parts: Sequence[Part] = PARTS) -> int:
    """Train what is missing, write the page, and say what happened."""
    started = time.monotonic()
    place = runs_root() / "demo"
    place.mkdir(parents=True, exist_ok=True)
    print("Three systems and a dense twin on two cores: about ten minutes. Ctrl-C stops; the same command goes on.\n")
    running: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(train, part, place, started, running) for part in parts]
        try:
            done = [job.result() for job in jobs]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(running):
                process.send_signal(signal.SIGINT)  # each keeps where it was
            raise
    finished = [part for part, well in zip(parts, done, strict=True) if well]
    failed = [part for part in parts if part not in finished]
    if not finished:
        print("nothing was trained; the logs are in", place, file=sys.stderr)
        return 1
    print("\nWhat the experts did\n")
    for part in finished:
        if part is not DENSE:
            print(f"  {sentence(part)}\n    {told_of_the_system(part)}\n")
    page = place / "report.html"
    runs = [str(newest_version(part.folder)) for part in finished]
    title = "make demo: what the experts learned"
    command = [*COMMAND, "report", *runs, "-o", str(page), "--title", title]
    wrote = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    for part in failed:
        print(f"{part.label} failed, see {place}/{part.system}-{part.name}.log; `make demo` tries it again")
    print(f"Open this page in a browser:\n{page.resolve()}" if wrote else "the page could not be written, see above")
    return 0 if wrote and not failed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; `make demo` goes on from here", file=sys.stderr)
        sys.exit(130)
